"""Moves to the dead letters between real brokers: one copy, whatever is lost, killed, missing or large on the way.

`MoveDead` is handed to the source as its core would; what it tells is caught before it reaches the core. The last tests
let a queue itself give records up.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ferryline.protocol.dead_letters import EnsureTopic
from ferryline.protocol.errors import CoordinatorLoading
from ferryline.protocol.frames import Frame, Kind
from ferryline.protocol.limits import BATCH_BYTES_MAX
from ferryline.protocol.messages import RECORDS, ProduceEntry
from ferryline.protocol.metadata import RetryPolicy, TopicMeta
from ferryline.protocol.queue_messages import (
    REJECT,
    QueueAnswer,
    QueueAsk,
    Receive,
    ReceiveAnswer,
    Settle,
    SettleAnswer,
    SettleEntry,
)
from ferryline.protocol.records import DecodedRecord, decode_batch, encode_batch, split_batches
from ferryline_broker import node_sessions
from ferryline_broker.core.dead_copy import RETENTION_MS, Origin, copy_of, producer_of
from ferryline_broker.core.queue_events import DONE, UNKNOWN_PRODUCER, DeadMoved, MoveDead
from ferryline_broker.log.interface import LogDamaged
from ferryline_service.server_session import ServerSession
from unit.broker_world import BrokerWorld, RunningBroker, eventually

Handle = Callable[[ServerSession, Frame], None]
DIED = [(1, "nacked", "first trace"), (2, "no stock", "second trace")]


def dead(offset: int, sequence: int = 0, epoch: int = 0, **fields: Any) -> MoveDead:
    return MoveDead(
        "billing", offset, epoch, sequence, 2, fields.pop("reason", "no stock"), fields.pop("history", DIED)
    )


class Source:
    """A partition whose dead records are moved, and what its broker told of the moves."""

    def __init__(self, world: BrokerWorld, broker: RunningBroker, topic: TopicMeta, partition: int = 0) -> None:
        self.world, self.broker, self.topic, self.partition = world, broker, topic, partition
        self.told: list[DeadMoved] = []
        self.letters = broker.broker.dead_letters
        self.letters.tell = lambda _, event: self.told.append(event)

    async def send(self, value: bytes, headers: list[tuple[str, bytes | None]] | None = None, **options: Any) -> int:
        """One record; returns its offset."""
        client = await self.world.client(self.broker.url)
        data = bytes(encode_batch([(b"customer-7", value, headers or [])], timestamp_ms=1_234, **options))
        entry = ProduceEntry(self.topic.id, self.partition, self.topic.config.partitions, len(data))
        result = (await client.produce_raw([(entry, data)]))[0]
        assert result.error is None, result.error
        return result.base_offset

    def move(self, move: MoveDead) -> None:
        self.letters.move(self.broker.broker.partitions.replicas[self.topic.id, self.partition], move)

    async def moved(self, move: MoveDead, outcome: str = DONE) -> None:
        """Move, and wait for the outcome."""
        before = len(self.told)
        self.move(move)
        await eventually(lambda: len(self.told) > before, "the move ended")
        assert self.told[before:] == [DeadMoved("billing", move.offset, move.sequence, outcome)]


def copies(world: BrokerWorld, name: str = "orders.dlq") -> list[tuple[int, DecodedRecord]]:
    """(partition, record) of everything that is committed in a topic, as its primaries have it."""
    topic = next(topic for topic in world.coordinator.topics.values() if topic.name == name)
    found: list[tuple[int, DecodedRecord]] = []
    for number in range(topic.config.partitions):
        leader = world.primary(topic.id, number)
        assert leader is not None
        hosted = leader.broker.partitions.replicas[topic.id, number]
        at, below = hosted.core.log_start[RECORDS], hosted.core.high_watermark[RECORDS]
        while at < below:
            data = hosted.logs[RECORDS].read(at, 2**24, below)
            for place, header in split_batches(data):
                at = header.next_offset
                if not header.is_control:
                    found += [(number, record) for record in decode_batch(data[place : place + header.size])]
    return found


def on_produce(broker: RunningBroker, act: Callable[[Handle, ServerSession, Frame], None]) -> list[str]:
    """Let ``act`` handle the next PRODUCE that another broker brings; returns what was handled, once it was."""
    handlers = broker.broker.frames._handlers
    real, done = handlers[Kind.PRODUCE], []

    def first(session: ServerSession, frame: Frame) -> None:
        if session.identity is None or done:
            real(session, frame)
        else:
            done.append(session.identity)
            act(real, session, frame)

    handlers[Kind.PRODUCE] = first
    return done


def text(record: DecodedRecord) -> dict[str, str]:
    return {name: (value or b"").decode() for name, value in record.headers}


@pytest.mark.parametrize("target", ["here", "there"])
async def test_a_dead_record_arrives_whole_with_the_story_of_its_death(tmp_path: Path, target: str) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,), (one.id,)])
        await world.topic("orders.dlq", [(two.id,), (one.id if target == "here" else two.id,)])
        source = Source(world, one, topic, partition=1)
        mine: list[tuple[str, bytes | None]] = [("trace", b"abc"), ("empty", None), ("fl-priority", b"7")]
        offset = await source.send(b"{}", [*mine, ("fl-expires-at", b"5"), ("fl-deliver-at", b"4"), ("fl-id", b"id-1")])
        await source.moved(dead(offset))
        [(partition, copy)] = copies(world)
        assert (partition, copy.key, copy.value) == (1, b"customer-7", b"{}")
        assert copy.headers[: len(mine)] == mine
        story = {name: value for name, value in text(copy).items() if name not in ("trace", "empty", "fl-priority")}
        assert json.loads(story.pop("fl-history")) == [
            {"attempt": 1, "reason": "nacked", "detail": "first trace"},
            {"attempt": 2, "reason": "no stock", "detail": "second trace"},
        ]
        assert story == {
            "fl-origin-topic": "orders",
            "fl-origin-partition": "1",
            "fl-origin-offset": str(offset),
            "fl-origin-timestamp": "1234",
            "fl-origin-id": "id-1",
            "fl-group": "billing",
            "fl-dead-reason": "no stock",
            "fl-attempts": "2",
            "fl-exception": "second trace",
        }
        assert copy.timestamp > 1_700_000_000_000, "retention counts from the death"
        assert world.coordinator.ensured == [], "the topic was there"


async def test_a_missing_topic_is_made_once_like_its_source(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id, two.id)] * 3, min_isr=2, flush="replicated")
        source = Source(world, one, topic, partition=2)
        offset = await source.send(b"v")
        await source.moved(dead(offset))
        await source.moved(dead(offset, sequence=1))
        [asked] = world.coordinator.ensured
        config = asked.config
        assert (asked.name, config.partitions, config.replication, config.min_isr) == ("orders.dlq", 3, 2, 2)
        assert (config.flush, config.retention_ms, config.retry.on_dead) == ("replicated", RETENTION_MS, "park")
        assert [partition for partition, _ in copies(world)] == [2, 2]


async def test_the_policy_names_another_topic_and_a_narrower_one_takes_partitions_in_turn(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        retry = RetryPolicy(dead_letters="graveyard")
        topic = await world.topic("orders", [(broker.id,)] * 5, retry=retry)
        await world.topic("graveyard", [(broker.id,)] * 3)
        for partition in (1, 4, 2):
            source = Source(world, broker, topic, partition)
            await source.moved(dead(await source.send(b"v")))
        assert [partition for partition, _ in copies(world, "graveyard")] == [1, 1, 2]


async def test_an_answer_that_is_lost_is_asked_for_again_and_one_copy_stands(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,)])
        await world.topic("orders.dlq", [(two.id,)])
        source = Source(world, one, topic)
        offset = await source.send(b"v")

        def lose(real: Handle, session: ServerSession, frame: Frame) -> None:
            real(session, frame)  # appended
            session.abort("the answer is lost")

        lost = on_produce(two, lose)
        await source.moved(dead(offset))
        assert lost == [f"broker-{one.id}"]
        assert len(copies(world)) == 1


@pytest.mark.parametrize("reached", [False, True], ids=["before", "after"])
async def test_the_target_fails_over_before_or_after_it_appended_and_one_copy_stands(
    tmp_path: Path, reached: bool
) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two, three = await world.broker(), await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,)])
        target = await world.topic("orders.dlq", [(two.id, three.id)])
        source = Source(world, one, topic)
        offset = await source.send(b"v")

        def swallow(real: Handle, session: ServerSession, frame: Frame) -> None:
            if reached:
                session.answer = lambda *_, **__: None  # type: ignore[method-assign]
                real(session, frame)

        swallowed = on_produce(two, swallow)
        source.move(dead(offset))
        await eventually(lambda: swallowed, "the copy is on its way")
        if reached:
            log = three.broker.partitions.replicas[target.id, 0].core.log_end
            await eventually(lambda: log[RECORDS] == 2, "the copy is on the secondary")
        await two.crash()
        world.coordinator.fence(two.id)
        await eventually(lambda: source.told, "the move ended")
        assert source.told == [DeadMoved("billing", offset, 0, DONE)]
        assert world.primary(target.id) is three
        assert len(copies(world)) == 1


async def test_the_next_primary_of_the_source_repeats_the_move_and_one_copy_stands(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two, three = await world.broker(), await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id, two.id)])
        await world.topic("orders.dlq", [(three.id,)])
        former = Source(world, one, topic)
        offset = await former.send(b"v")
        await former.moved(dead(offset))
        await one.crash()
        world.coordinator.fence(one.id)
        await eventually(lambda: world.primary(topic.id) is two, "the secondary leads")
        later = Source(world, two, topic)
        await later.moved(dead(offset))
        await later.moved(dead(offset, sequence=1))
        assert len(copies(world)) == 2


@pytest.mark.parametrize(
    "move",
    [dead(0, sequence=5), dead(0, sequence=1, epoch=3), dead(0, sequence=3), dead(0, sequence=0, epoch=0)],
    ids=["of nobody", "of a later epoch", "with a gap", "of an earlier epoch"],
)
async def test_a_sequence_that_the_target_does_not_know_is_told_to_the_core(tmp_path: Path, move: MoveDead) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        await world.topic("orders.dlq", [(broker.id,)])
        source = Source(world, broker, topic)
        offset = await source.send(b"v")
        if move.sequence != 5:
            await source.moved(dead(offset, epoch=1 if move.sequence == 0 else 0))
        before = len(copies(world))
        await source.moved(MoveDead("billing", offset, move.producer_epoch, move.sequence, 1, "", []), UNKNOWN_PRODUCER)
        assert len(copies(world)) == before
        await source.moved(dead(offset, epoch=7))
        assert len(copies(world)) == before + 1


@pytest.mark.parametrize("target", ["here", "there"])
async def test_a_copy_that_is_taken_for_one_of_another_record_is_sent_under_the_next_epoch(
    tmp_path: Path, target: str
) -> None:
    """As a queue does that was forgotten and came back: it begins with the same epoch and sequence once more."""
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,)])
        await world.topic("orders.dlq", [(one.id if target == "here" else two.id,)])
        source = Source(world, one, topic)
        first, second = await source.send(b"same"), await source.send(b"same")
        await source.moved(dead(first))
        await source.moved(dead(second), UNKNOWN_PRODUCER)
        source.letters._placed.clear()  # as after a fail-over
        await source.moved(dead(second), UNKNOWN_PRODUCER)
        await source.moved(dead(second, epoch=1))
        assert [text(copy)["fl-origin-offset"] for _, copy in copies(world)] == [str(first), str(second)]


async def test_only_the_first_copy_of_a_primaryship_is_read_again(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,)])
        await world.topic("orders.dlq", [(two.id,)])
        source = Source(world, one, topic)
        handlers, reads = two.broker.frames._handlers, []
        real = handlers[Kind.FETCH]

        def fetch(session: ServerSession, frame: Frame) -> None:
            reads.append(session.identity)
            real(session, frame)

        handlers[Kind.FETCH] = fetch
        offset = await source.send(b"v")
        for sequence in range(4):
            await source.moved(dead(offset, sequence=sequence))
        assert reads == [f"broker-{one.id}"]
        await source.moved(dead(offset, sequence=3))  # the same once more
        assert len(reads) == 2
        assert len(copies(world)) == 4


async def test_a_target_without_primary_is_waited_for_and_found_when_it_is_back(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,)])
        target = await world.topic("orders.dlq", [(two.id,)])
        world.coordinator.change((target.id, 0), primary=0, isr=(), elr=(two.id,), epoch=2)
        source = Source(world, one, topic)
        source.move(dead(await source.send(b"v")))
        await asyncio.sleep(0)  # the move begins
        world.coordinator.change((target.id, 0), primary=two.id, isr=(two.id,), elr=(), epoch=3)
        await eventually(lambda: source.told, "the move ended")
        assert len(copies(world)) == 1


async def test_a_coordinator_that_cannot_make_the_topic_is_asked_again(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        source = Source(world, broker, topic)
        real, refused = world.coordinator._ensure, []

        def refuse(asked: EnsureTopic) -> TopicMeta:
            if len(refused) < 3:
                refused.append(asked)
                raise CoordinatorLoading("not yet")
            return real(asked)

        world.coordinator._ensure = refuse  # type: ignore[method-assign]
        await source.moved(dead(await source.send(b"v")))
        assert len(refused) == 3
        assert len(copies(world)) == 1


@pytest.mark.parametrize("codec", ["none", "zstd"])
async def test_the_largest_record_arrives_whole_although_it_is_over_the_limit_with_its_story(
    tmp_path: Path, codec: str
) -> None:
    limit = 8 * 1024 * 1024
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,)], max_record_bytes=limit)
        target = await world.topic("orders.dlq", [(two.id,)], max_record_bytes=1024)
        source = Source(world, one, topic)
        value = bytes(range(256)) * (limit // 256 - 1)
        offset = await source.send(value, codec=codec)
        history = [(attempt, "r" * 256, "d" * 4096) for attempt in range(1, 1001)]
        await source.moved(dead(offset, history=history))
        [(_, copy)] = copies(world)
        assert copy.value == value
        story = text(copy)
        assert "fl-truncated" not in story
        kept = json.loads(story["fl-history"])
        assert kept[-1] == {"attempt": 1000, "reason": "r" * 256, "detail": "d" * 4096}
        assert kept[0]["omitted"] + len(kept) - 1 == 1000
        client = await world.client(two.url)  # what is good for a broker is not for a client
        data = bytes(encode_batch([(None, value, [])]))
        result = (await client.produce_raw([(ProduceEntry(target.id, 0, 1, len(data)), data)]))[0]
        assert result.error is not None
        assert result.error.code == "RECORD_TOO_LARGE"


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
async def test_a_record_that_only_fits_when_it_is_packed_is_packed_again(tmp_path: Path, codec: str) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,)])
        await world.topic("orders.dlq", [(two.id,)])
        source = Source(world, one, topic)
        noise = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(200 if codec == "gzip" else 2_000))
        value = bytes(20 * 1024 * 1024) + noise
        offset = await source.send(value, codec=codec)
        await source.moved(dead(offset))
        [(_, copy)] = copies(world)
        assert copy.value == value
        assert "fl-truncated" not in text(copy)


def test_a_record_that_no_batch_can_carry_is_cut_and_says_so() -> None:
    size = 20 * 1024 * 1024
    row = (b"k", bytes(size), [("trace", b"abc"), ("fl-truncated", b"7")])
    [record] = decode_batch(encode_batch([row]))
    data = copy_of(Origin("t", "orders", 0), record, dead(5), 99)
    [copy] = decode_batch(data)
    cut = int(text(copy)["fl-truncated"])
    assert (copy.key, text(copy)["trace"], text(copy)["fl-origin-offset"]) == (b"k", "abc", "5")
    assert copy.value is not None
    assert len(copy.value) + cut == size
    assert BATCH_BYTES_MAX - 128 * 1024 < len(data) < BATCH_BYTES_MAX
    [odd] = decode_batch(encode_batch([(bytes(size), None, [("h", bytes(size))])]))
    [copy] = decode_batch(copy_of(Origin("t", "orders", 0), odd, dead(5), 99))
    assert copy.key is not None
    assert copy.value is None
    assert "h" not in text(copy)
    assert int(text(copy)["fl-truncated"]) > 2 * size - BATCH_BYTES_MAX


async def test_a_move_ends_with_its_primaryship_and_tells_nobody(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id, two.id)])
        target = await world.topic("orders.dlq", [(two.id,)])
        world.coordinator.change((target.id, 0), primary=0, isr=(), elr=(two.id,), epoch=2)
        source = Source(world, one, topic)
        source.move(dead(await source.send(b"v")))
        await eventually(lambda: len(source.letters._moves) == 1, "the move waits")
        world.coordinator.lead((topic.id, 0), two.id, (one.id, two.id))
        await eventually(lambda: not source.letters._moves, "the move ended")
        world.coordinator.change((target.id, 0), primary=two.id, isr=(two.id,), elr=(), epoch=3)
        await eventually(lambda: world.primary(target.id) is two, "the target leads again")
        assert source.told == []
        assert copies(world) == []


async def test_a_move_ends_when_its_topic_is_deleted(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        source = Source(world, broker, topic)

        def refuse(_: EnsureTopic) -> TopicMeta:
            raise CoordinatorLoading("not yet")

        world.coordinator._ensure = refuse  # type: ignore[method-assign]
        source.move(dead(await source.send(b"v")))
        await eventually(lambda: len(source.letters._moves) == 1, "the move waits")
        broker.broker.partitions.unhost((topic.id, 0))
        await eventually(lambda: not source.letters._moves, "the move ended")
        assert source.told == []


async def test_a_later_move_of_the_same_queue_takes_the_place_of_the_former(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        await world.topic("orders.dlq", [(broker.id,)])
        source = Source(world, broker, topic)
        offset = await source.send(b"v")
        source.move(dead(offset))
        await source.moved(dead(offset, epoch=1))
        assert len(source.told) == 1


async def test_a_record_that_is_gone_holds_nobody_up_and_damage_stops_the_partition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        await world.topic("orders.dlq", [(broker.id,)])
        source = Source(world, broker, topic)
        offset = await source.send(b"v")
        hosted = broker.broker.partitions.replicas[topic.id, 0]
        monkeypatch.setattr(hosted.core.replica, "log_start", [offset + 1, 0])
        monkeypatch.setattr(type(source.letters._records), "records", lambda *_: [])
        await source.moved(dead(offset))
        assert copies(world) == []

        def damaged(*_: object) -> list[DecodedRecord]:
            raise LogDamaged("a bit flipped", offset=offset)

        monkeypatch.setattr(hosted.core.replica, "log_start", [0, 0])
        monkeypatch.setattr(type(source.letters._records), "records", damaged)
        source.move(dead(offset, sequence=1))
        await eventually(lambda: hosted.core.role == "stopped", "the partition stopped")
        await eventually(lambda: not source.letters._moves, "the move ended")
        assert len(source.told) == 1


# -- sessions ---------------------------------------------------------------------------------------


async def test_one_session_serves_many_moves_and_a_new_one_is_opened_when_it_ends(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,)])
        await world.topic("orders.dlq", [(two.id,)])
        source = Source(world, one, topic)
        offset = await source.send(b"v")

        def sessions() -> list[ServerSession]:
            return [s for s in two.broker.endpoint.sessions if (s.identity, s.role) == (f"broker-{one.id}", "client")]

        for sequence in range(3):
            await source.moved(dead(offset, sequence=sequence))
        [first] = sessions()
        first.abort("cut")
        await source.moved(dead(offset, sequence=3))
        [second] = sessions()
        assert second is not first
        assert len(copies(world)) == 4
        source.letters.close()
        await eventually(lambda: not sessions(), "closed with the rest")
        source.move(dead(offset, sequence=4))
        assert not source.letters._moves, "nothing begins any more"


async def test_sessions_are_bounded_and_the_idle_ones_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_sessions, "SESSIONS_MAX", 1)
    async with BrokerWorld(tmp_path) as world:
        one, two, three = await world.broker(), await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id,), (one.id,)])
        await world.topic("orders.dlq", [(two.id,), (three.id,)])
        for turn in range(2):
            for partition in range(2):
                source = Source(world, one, topic, partition)
                await source.moved(dead(await source.send(b"v"), sequence=turn))
        assert len(one.broker.dead_letters._sessions._open) == 1
        assert len(copies(world)) == 4


# -- from the queue to the dead letters -------------------------------------------------------------


async def test_what_a_receiver_rejects_is_copied_once_and_leaves_the_queue(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        one, two = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(one.id, two.id)])
        client = await world.client(one.url)
        data = bytes(encode_batch([(b"k%d" % n, b"v%d" % n, []) for n in range(4)]))
        assert (await client.produce_raw([(ProduceEntry(topic.id, 0, 1, len(data)), data)]))[0].error is None
        ask = Receive("billing", "m", [(topic.id, 0)], 10, wait_ms=5_000)
        delivery = (await client.call(Kind.RECEIVE, ask, ReceiveAnswer)).deliveries[0]
        assert len(delivery.offsets) == 4
        entry = SettleEntry(
            topic.id, 0, delivery.epoch, delivery.lease, delivery.receipt, REJECT, delivery.offsets[1:3], reason="no"
        )
        answer = await client.call(Kind.SETTLE, Settle("billing", "m", [entry]), SettleAnswer)
        assert answer.results[0].error is None

        async def stats() -> dict[str, Any]:
            asked = QueueAsk("billing", "stats", [(topic.id, 0)])
            found: dict[str, Any] = (await client.call(Kind.QUEUE, asked, QueueAnswer)).results[0].details
            return found

        async def settled() -> bool:
            found = await stats()
            return (found["dying"], found["leased"], found["settled_above_start"]) == (0, 2, 2)

        await eventually(settled, "both are copied, and settled")
        found = [(record.value, text(record)["fl-dead-reason"]) for _, record in copies(world)]
        assert found == [(b"v1", "no"), (b"v2", "no")]


def test_producers_of_copies_differ_by_topic_partition_and_group_and_are_positive() -> None:
    ids = {producer_of(topic, number, group) for topic in "ab" for number in range(50) for group in ("g", "h")}
    assert len(ids) == 200
    assert all(0 <= one < 2**63 for one in ids)
    assert producer_of("a", 1, "g") == producer_of("a", 1, "g")
