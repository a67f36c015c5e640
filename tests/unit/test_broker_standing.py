"""A RECEIVE that stands is answered as often as something comes, until much of it was given or its time is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ferryline.protocol.frames import FLAG_MORE, Frame, Kind, decode_header
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import ACK, Delivery, QueueAnswer, QueueAsk, Receive, ReceiveAnswer
from ferryline_broker.core.queue_events import LeaseAsked
from unit.broker_world import BrokerWorld, RawClient, RunningBroker, eventually
from unit.test_broker_queue import Receiver, produce


class Standing:
    """One request that stands, and its answers."""

    def __init__(self, client: RawClient, *partitions: tuple[str, int], member: str = "m", **fields: Any) -> None:
        self.client = client
        ask = Receive("g", member, list(partitions), **{"records_max": 100, "wait_ms": 20_000, **fields})
        self.correlation = client.send(Kind.RECEIVE, ask)

    async def next(self, within_s: float = 10.0) -> tuple[list[Delivery], bool]:
        """The deliveries of the next answer, and whether more follow."""
        frame: Frame = await self.client.answer(self.correlation, within_s=within_s)
        deliveries = decode_header(frame.header, ReceiveAnswer).deliveries
        assert all(one.error is None for one in deliveries)
        return deliveries, frame.flags & FLAG_MORE != 0

    async def offsets(self) -> tuple[list[int], bool]:
        deliveries, more = await self.next()
        return [offset for one in deliveries for offset in one.offsets], more


class Alone(NamedTuple):
    """One broker, one partition of topic ``t`` on it, and a client."""

    broker: RunningBroker
    topic: TopicMeta
    client: RawClient


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Alone]:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        yield Alone(broker, await world.topic("t", [(broker.id,)]), await world.client(broker.url))


def standing(client: RawClient, *partitions: tuple[str, int], **fields: Any) -> Standing:
    return Standing(client, *partitions, standing=True, batches=True, **fields)


async def test_it_is_answered_for_each_record_until_a_quarter_was_given(alone: Alone) -> None:
    topic, client = alone.topic, alone.client
    ask = standing(client, (topic.id, 0), records_max=8)
    for number, more in ((1, True), (2, True), (3, False)):
        await produce(client, topic, (f"k{number}", "v"))
        assert await ask.offsets() == ([number], more)
    await produce(client, topic, ("k4", "v"))
    again = standing(client, (topic.id, 0), records_max=8)
    assert await again.offsets() == ([4], True)
    assert not client.arrived(ask.correlation)


async def test_one_that_does_not_ask_for_it_is_answered_once(alone: Alone) -> None:
    topic, client = alone.topic, alone.client
    asks = [
        Standing(client, (topic.id, 0), member="plain"),
        standing(client, (topic.id, 0), member="strict", strict=True, ordering="key"),
    ]
    for ask in asks:
        await produce(client, topic, ("a", "v"), ("b", "v"))
        assert (await ask.offsets())[1] is False


async def test_its_time_ends_it_with_an_empty_answer(alone: Alone) -> None:
    topic, client = alone.topic, alone.client
    ask = standing(client, (topic.id, 0), wait_ms=300)
    await produce(client, topic, ("a", "v"))
    assert await ask.offsets() == ([1], True)
    assert await ask.offsets() == ([], False)
    await produce(client, topic, ("b", "v"))
    assert await Receiver(client, topic).receive() is not None, "nobody else has it"


async def test_a_later_one_of_the_member_takes_its_place(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,), (broker.id,)])
        client = await world.client(broker.url)
        first = standing(client, (topic.id, 0))
        await produce(client, topic, ("a", "v"))
        assert await first.offsets() == ([1], True)
        second = standing(client, (topic.id, 0), (topic.id, 1))
        assert await first.offsets() == ([], False)
        await produce(client, topic, ("b", "v"))
        assert await second.offsets() == ([2], True)


async def test_records_of_two_partitions_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """What is leased while another lease is committed is leased at once, and answered when it is committed."""
    async with BrokerWorld(tmp_path) as world:
        one, other = await world.broker(), await world.broker()
        topic = await world.topic("t", [(one.id, other.id), (one.id,)])
        client = await world.client(one.url)
        ask = standing(client, (topic.id, 0), (topic.id, 1))
        hosted = [one.broker.partitions.replicas[topic.id, number] for number in range(2)]
        await eventually(lambda: len(hosted[0].core.isr) == 2, "both are in sync")
        await produce(client, topic, ("first", "v"))
        deliveries, more = await ask.next()
        assert (deliveries[0].partition, more) == (0, True)
        parked = next(iter(one.broker.frames.queues._parked[hosted[1].key, "g"]))
        parked._leasing += 1  # as if a lease of partition 0 were being committed
        try:
            result = await client.produce(topic, 1, [b"v"])
            assert result.error is None
            deliveries, more = await ask.next()
            assert (deliveries[0].partition, deliveries[0].offsets, more) == (1, [result.base_offset], True)
        finally:
            parked._leasing -= 1


async def test_whoever_was_given_something_stands_behind_those_who_wait(alone: Alone) -> None:
    topic, client = alone.topic, alone.client
    asks = {name: standing(client, (topic.id, 0), member=name) for name in "abc"}
    got: list[str] = []
    for number in range(9):
        await produce(client, topic, (f"k{number}", "v"))
        waiting = {asyncio.ensure_future(ask.next()): name for name, ask in asks.items()}
        done, pending = await asyncio.wait(waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        got.append(waiting[done.pop()])
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    assert sorted(got[:3]) == sorted(got[3:6]) == sorted(got[6:]) == ["a", "b", "c"]


async def test_what_was_leased_for_one_whose_session_ended_goes_back(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,)])
        gone, client = await world.client(broker.url), await world.client(broker.url)
        ask = standing(gone, (topic.id, 0), member="gone")
        await produce(client, topic, ("a", "v"))
        assert await ask.offsets() == ([1], True)
        await gone.ws.close()
        await eventually(lambda: not broker.broker.frames.queues._parked, "nobody waits")
        await produce(client, topic, ("b", "v"))
        found = await Receiver(client, topic).receive()
        assert found is not None
        assert found[0].offsets == [2]
        await Receiver(client, topic).settle(found[0], ACK)
        stats = (await client.call(Kind.QUEUE, QueueAsk("g", "stats", [(topic.id, 0)]), QueueAnswer)).results[0]
        assert stats.details["members"] == {"gone": 1}


async def test_one_that_is_answered_once_waits_for_what_is_on_its_way(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,), (broker.id,)])
        client = await world.client(broker.url)
        ask = Standing(client, (topic.id, 0), (topic.id, 1))
        queues = broker.broker.frames.queues
        await eventually(lambda: (topic.id, 1) in {key for key, _ in queues._parked}, "it waits")
        parked = next(iter(queues._parked[(topic.id, 0), "g"]))
        parked._leasing += 1  # as if a lease of partition 1 were being committed
        await produce(client, topic, ("a", "v"))
        parked.lease(0, 1)
        await eventually(lambda: bool(parked._deliveries), "one has come")
        assert not client.arrived(ask.correlation)
        parked._leasing -= 1
        parked.emit()
        assert await ask.offsets() == ([1], False)


async def test_a_record_costs_one_question_however_many_receivers_wait(alone: Alone) -> None:
    broker, topic, client = alone.broker, alone.topic, alone.client
    asks = [standing(client, (topic.id, 0), member=f"m{number}", ordering="key") for number in range(3)]
    hosted = broker.broker.partitions.replicas[topic.id, 0]
    parked = broker.broker.frames.queues._parked
    await eventually(lambda: len(parked.get((hosted.key, "g"), ())) == 3, "all wait")
    asked: list[LeaseAsked] = []
    handle = hosted.core.handle

    def watched(event: Any, now_ms: int) -> Any:
        if isinstance(event, LeaseAsked):
            asked.append(event)
        return handle(event, now_ms)

    hosted.core.handle = watched  # type: ignore[method-assign]
    for number in range(1, 10):
        await produce(client, topic, (f"k{number}", "v"))
        assert (await asks[(number - 1) % 3].offsets())[0] == [number], "whoever has waited longest"
    assert len(asked) <= 10
