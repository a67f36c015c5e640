"""RECEIVE, SETTLE, KEEP and QUEUE at real brokers on sockets: what is leased to whom, before and after a fail-over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ferryline.protocol.errors import InvalidArgument, InvalidName
from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.messages import ProduceEntry, ProduceResult
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import (
    ACK,
    EXTEND,
    NACK,
    Delivery,
    Keep,
    KeepEntry,
    QueueAnswer,
    QueueAsk,
    QueueResult,
    Receive,
    ReceiveAnswer,
    Settle,
    SettleAnswer,
    SettleEntry,
    SettleResult,
)
from ferryline.protocol.records import _seal, decode_batch, encode_batch
from ferryline_service.node import raise_error
from unit.broker_world import BrokerWorld, RawClient, eventually


async def produce(client: RawClient, topic: TopicMeta, *records: tuple[str | None, str]) -> ProduceResult:
    rows = [(key.encode() if key else None, value.encode(), []) for key, value in records]
    data = bytes(encode_batch(rows))
    entry = ProduceEntry(topic.id, 0, topic.config.partitions, len(data))
    result: ProduceResult = (await client.produce_raw([(entry, data)]))[0]
    assert result.error is None, result.error
    return result


class Receiver:
    """One member that asks for records of one partition."""

    def __init__(self, client: RawClient, topic: TopicMeta, member: str = "m", group: str = "g") -> None:
        self.client, self.topic, self.member, self.group = client, topic, member, group

    def ask(self, **fields: Any) -> Receive:
        return Receive(self.group, self.member, [(self.topic.id, 0)], **{"records_max": 10, "wait_ms": 0, **fields})

    async def receive(self, **fields: Any) -> tuple[Delivery, list[str]] | None:
        return self.read(await self.client.ask(Kind.RECEIVE, self.ask(**{"wait_ms": 5_000, **fields})))

    def read(self, frame: Any) -> tuple[Delivery, list[str]] | None:
        raise_error(frame)
        deliveries = decode_header(frame.header, ReceiveAnswer).deliveries
        if not deliveries:
            return None
        assert len(deliveries) == 1
        delivery = deliveries[0]
        if delivery.error is not None:
            return delivery, []
        assert delivery.size == len(frame.payload)
        return delivery, [(record.value or b"").decode() for record in decode_batch(frame.payload)]

    async def settle(self, delivery: Delivery, action: str, *offsets: int, **fields: Any) -> SettleResult:
        entry = SettleEntry(
            delivery.topic_id, delivery.partition, delivery.epoch, delivery.lease,
            fields.pop("receipt", delivery.receipt), action, list(offsets or delivery.offsets), **fields,
        )  # fmt: skip
        ask = Settle(self.group, fields.pop("member", self.member), [entry])
        return (await self.client.call(Kind.SETTLE, ask, SettleAnswer)).results[0]  # type: ignore[no-any-return]

    async def keep(self, *leases: int) -> SettleResult:
        ask = Keep(self.group, self.member, [KeepEntry(self.topic.id, 0, list(leases))])
        return (await self.client.call(Kind.KEEP, ask, SettleAnswer)).results[0]  # type: ignore[no-any-return]

    async def look(self, op: str, **fields: Any) -> QueueResult:
        ask = QueueAsk(self.group, op, [(self.topic.id, 0)], **fields)
        return (await self.client.call(Kind.QUEUE, ask, QueueAnswer)).results[0]  # type: ignore[no-any-return]


async def test_receivers_share_a_partition_and_lanes_wait_for_their_records(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, ("a", "a1"), ("b", "b1"), ("a", "a2"), (None, "free"))
        one, two = Receiver(client, topic, "one"), Receiver(client, topic, "two")
        first = await one.receive(records_max=2)
        second = await two.receive()
        assert first is not None
        assert second is not None
        assert first[1] == ["a1", "b1"]
        assert second[1] == ["free"]
        parked = client.send(Kind.RECEIVE, two.ask(wait_ms=5_000))
        result = await one.settle(first[0], ACK)
        assert (result.stale, result.settled, result.error) == ([], [], None)
        woken = two.read(await client.answer(parked))
        assert woken is not None
        assert woken[1] == ["a2"]
        assert woken[0].attempts == [1]
        again = await one.settle(first[0], ACK)
        assert again.settled == first[0].offsets, "a repeated ack is told so"


async def test_a_parked_receiver_wakes_for_new_records_and_is_answered_when_its_time_is_over(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        receiver = Receiver(client, topic)
        assert await receiver.receive(wait_ms=100) is None
        parked = client.send(Kind.RECEIVE, receiver.ask(wait_ms=10_000))
        await produce(client, topic, ("a", "late"))
        found = receiver.read(await client.answer(parked))
        assert found is not None
        assert found[1] == ["late"]


async def test_after_a_fail_over_acks_hold_and_leases_stay_with_their_receivers(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("jobs", [(first.id, second.id)])
        client = await world.client(first.url)
        await produce(client, topic, ("a", "a1"), ("a", "a2"), ("b", "b1"), ("c", "c1"))
        receiver = Receiver(client, topic)
        held = await receiver.receive()
        assert held is not None
        assert held[1] == ["a1", "b1", "c1"]
        a1, b1, c1 = held[0].offsets
        assert (await receiver.settle(held[0], ACK, a1)).error is None
        await first.crash()
        world.coordinator.fence(first.id)
        await eventually(lambda: world.primary(topic.id) is second, "the secondary leads")
        client = await world.client(second.url)
        other, receiver = Receiver(client, topic, "other"), Receiver(client, topic)
        free = await other.receive()
        assert free is not None
        assert free[1] == ["a2"], "a1 is settled, b1 and c1 are leased"
        assert (await receiver.settle(held[0], ACK, b1)).stale == []
        assert (await receiver.settle(held[0], ACK, a1)).settled == [a1]
        assert (await receiver.keep()).error is None  # it closes: c1 is free
        last = await other.receive()
        assert last is not None
        assert last[1] == ["c1"]
        assert (await receiver.settle(held[0], ACK, c1)).stale == [c1]


async def test_what_was_leased_for_a_session_that_ended_goes_back_at_once(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client, leaving = await world.client(broker.url), await world.client(broker.url)
        leaving.send(Kind.RECEIVE, Receiver(leaving, topic, "gone").ask(wait_ms=60_000))
        await eventually(lambda: broker.broker.frames.queues._parked, "it is parked")
        await leaving.close()
        await eventually(lambda: not broker.broker.frames.queues._parked, "it is forgotten")
        await produce(client, topic, ("a", "a1"))
        found = await Receiver(client, topic).receive()
        assert found is not None
        assert found[1] == ["a1"]


async def test_a_later_request_of_a_member_takes_the_place_of_the_one_that_waits(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        one, two = Receiver(client, topic, "one"), Receiver(client, topic, "two")
        first = client.send(Kind.RECEIVE, one.ask(wait_ms=60_000))
        other = client.send(Kind.RECEIVE, two.ask(wait_ms=60_000))
        second = client.send(Kind.RECEIVE, one.ask(wait_ms=60_000))
        assert one.read(await client.answer(first)) is None
        await produce(client, topic, ("a", "a1"), ("b", "b1"))
        found = [one.read(await client.answer(second)), two.read(await client.answer(other))]
        assert sorted(value for told in found if told is not None for value in told[1]) == ["a1", "b1"]


async def test_who_says_what_it_holds_waits_for_nothing_any_more(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client, second = await world.client(broker.url), await world.client(broker.url)
        leaving, other = Receiver(client, topic, "leaving"), Receiver(second, topic, "other")
        waiting = client.send(Kind.RECEIVE, leaving.ask(wait_ms=60_000))
        await eventually(lambda: broker.broker.frames.queues._parked, "it is parked")
        assert (await Receiver(second, topic, "leaving").keep()).error is None
        assert leaving.read(await client.answer(waiting)) is None
        await produce(client, topic, ("a", "a1"))
        found = await other.receive()
        assert found is not None
        assert found[1] == ["a1"]


async def test_a_queue_can_be_looked_at_paused_and_purged(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        receiver = Receiver(client, topic)
        unknown = await receiver.look("stats")
        assert unknown.error is not None
        assert unknown.error.code == "UNKNOWN_GROUP"
        await produce(client, topic, ("a", "a1"), ("a", "a2"), ("b", "b1"))
        held = await receiver.receive(records_max=1)
        assert held is not None
        stats = (await receiver.look("stats")).details
        assert (stats["leased"], stats["ready"], stats["waiting"], stats["members"]) == (1, 1, 1, {"m": 1})
        a1 = held[0].offsets[0]
        explained = (await receiver.look("explain", offset=a1)).details
        assert (explained["state"], explained["member"]) == ("leased", "m")
        assert (await receiver.look("explain", offset=a1 + 1)).details["behind"] == a1
        frame = await client.ask(Kind.QUEUE, QueueAsk("g", "peek", [(topic.id, 0)]))
        peeked = decode_header(frame.header, QueueAnswer).results[0]
        assert [record.value for record in decode_batch(frame.payload)] == [b"a1", b"a2", b"b1"]
        assert peeked.details["offsets"] == [a1, a1 + 1, a1 + 2]
        await receiver.look("pause")
        assert await receiver.receive(wait_ms=100) is None
        await receiver.look("resume")
        assert (await receiver.look("purge", dry_run=True)).details["purged"] == 3
        await receiver.look("purge")
        assert await receiver.receive(wait_ms=100) is None
        assert (await receiver.settle(held[0], ACK)).settled == held[0].offsets
        await produce(client, topic, ("a", "a3"))
        found = await receiver.receive()
        assert found is not None
        assert found[1] == ["a3"]


async def test_a_receipt_is_good_for_its_group_member_lease_and_nothing_else(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, ("a", "a1"), ("b", "b1"))
        receiver = Receiver(client, topic)
        held = await receiver.receive()
        assert held is not None
        forged = await receiver.settle(held[0], ACK, receipt=b"x" * 16)
        assert forged.error is not None
        assert forged.error.code == "FORBIDDEN"
        thief = Receiver(client, topic, "thief")
        stolen = await thief.settle(held[0], ACK)
        assert stolen.error is not None
        assert stolen.error.code == "FORBIDDEN"
        assert (await receiver.look("stats")).details["leased"] == 2


async def test_an_extension_and_a_nack_with_delay(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, ("a", "a1"))
        receiver = Receiver(client, topic)
        held = await receiver.receive(lease_ms=1_000)
        assert held is not None
        assert (await receiver.settle(held[0], EXTEND, delay_ms=60_000)).error is None
        left = (await receiver.look("explain", offset=held[0].offsets[0])).details["lease_ends_in_ms"]
        assert 50_000 < left <= 60_000
        assert (await receiver.settle(held[0], NACK, delay_ms=50, reason="busy")).stale == []
        again = await receiver.receive()
        assert again is not None
        assert again[0].attempts == [2]
        history = (await receiver.look("explain", offset=held[0].offsets[0])).details["history"]
        assert history == [{"attempt": 1, "reason": "busy", "detail": ""}]


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"records_max": 0}, InvalidArgument, "records_max"),
        ({"records_max": 10_001}, InvalidArgument, "records_max"),
        ({"bytes_max": 0}, InvalidArgument, "bytes_max"),
        ({"lease_ms": 999}, InvalidArgument, "lease_ms"),
        ({"wait_ms": 60_001}, InvalidArgument, "wait_ms"),
        ({"ordering": "chaos"}, InvalidArgument, "ordering"),
        ({"start": "middle"}, InvalidArgument, "start"),
        ({"group": "a/b"}, InvalidName, "group"),
        ({"member": "m" * 257}, InvalidArgument, "member"),
    ],
)
async def test_a_receive_that_makes_no_sense_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], named: str
) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        ask = Receive(**{"group": "g", "member": "m", "entries": [(topic.id, 0)], **fields})
        with pytest.raises(error, match=named):
            await client.call(Kind.RECEIVE, ask, ReceiveAnswer)


async def test_another_ordering_and_another_broker_are_refused_with_the_reason(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("jobs", [(first.id, second.id)])
        client = await world.client(first.url)
        await Receiver(client, topic).receive(wait_ms=0)
        found = await Receiver(client, topic).receive(wait_ms=0, ordering="none")
        assert found is not None
        assert found[0].error is not None
        assert found[0].error.code == "INVALID_ARGUMENT"
        assert "'key', not 'none'" in found[0].error.message
        elsewhere = await Receiver(await world.client(second.url), topic).receive()
        assert elsewhere is not None
        assert elsewhere[0].error is not None
        assert elsewhere[0].error.code == "NOT_PRIMARY"


async def test_a_batch_that_does_not_decode_stops_no_queue(tmp_path: Path) -> None:
    """Its CRC holds, so the log has taken it; brokers decode nothing before a queue looks at it."""
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        rotten = encode_batch([(b"a", b"x" * 40, []), (b"b", b"y", [])])
        rotten[61:90] = b"\xff" * 29
        _seal(rotten)
        entry = ProduceEntry(topic.id, 0, topic.config.partitions, len(rotten))
        assert (await client.produce_raw([(entry, bytes(rotten))]))[0].error is None
        await produce(client, topic, ("a", "a1"))
        found = await Receiver(client, topic).receive()
        assert found is not None
        assert found[1] == ["a1"]
        assert not broker.broker.partitions.replicas[topic.id, 0].broken
        assert broker.broker.partitions.replicas[topic.id, 0].core.role == "primary"


async def test_a_partition_in_order_is_handed_out_in_runs(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, *[(f"k{number}", str(number)) for number in range(8)])
        found = await Receiver(client, topic).receive(ordering="partition", records_max=5)
        assert found is not None
        again = await Receiver(client, topic).receive(ordering="partition", records_max=5, wait_ms=0)
        assert again is None, "somebody has a run"
        assert found[1] == ["0", "1", "2", "3", "4"]
