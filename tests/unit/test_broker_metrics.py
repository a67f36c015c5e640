"""What a broker tells Prometheus: counts that never jump, bounded series, queues and ages as they are."""

from __future__ import annotations

import time
from pathlib import Path

from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import (
    Commit,
    CommitEntry,
    CommittedAnswer,
    Offsets,
    OffsetsAnswer,
    OffsetsEntry,
    ProduceEntry,
)
from ferryline.protocol.queue_messages import ACK, NACK, REJECT
from ferryline.protocol.records import encode_batch
from ferryline_broker.core.epochs import EpochIndex
from ferryline_broker.metrics import BrokerMetrics, PartitionGauges
from ferryline_broker.traffic import GROUPS_MAX, LIVE_MS, MEMBERS_MAX, OTHERS, GroupCounts, Topics
from unit.broker_world import BrokerWorld, RawClient, RunningBroker, eventually
from unit.test_broker_queue import Receiver, produce
from unit.test_broker_rest import Curl

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(metrics: BrokerMetrics) -> Series:
    """Every sample, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def value(metrics: BrokerMetrics, name: str, **labels: str) -> float:
    """One sample; fails if it is not there."""
    return series(metrics)[name, tuple(sorted(labels.items()))]


def group_value(broker: RunningBroker, name: str, topic: str = "jobs", group: str = "g") -> float:
    return value(broker.broker.metrics, f"ferryline_queue_{name}", topic=topic, group=group)


# -- which topics are shown -------------------------------------------------------------------------


def test_topics_beyond_the_limit_are_counted_together_and_no_counter_ever_falls() -> None:
    topics = Topics(2)
    for name in ("a", "b", "c", "d"):
        topics.of(name).records_in = 10
    assert {name: row.records_in for name, row in topics.rows().items()} == {"a": 10, "b": 10, OTHERS: 20}
    assert (topics.left_out, topics.label("a"), topics.label("c")) == (2, "a", OTHERS)
    topics.of("d").records_in += 90  # busier than those that are shown: they keep their places
    assert {name: row.records_in for name, row in topics.rows().items()} == {"a": 10, "b": 10, OTHERS: 110}
    topics.forget("c")
    assert topics.rows()[OTHERS].records_in == 110, "what a deleted topic added stays in the sum"
    topics.forget("a")
    assert {name: row.records_in for name, row in topics.rows().items()} == {"b": 10, OTHERS: 110}
    topics.of("e").records_in = 1
    assert topics.label("e") == "e", "its place is free"
    assert topics.label("d") == OTHERS, "and not for one that was counted among the others"


def test_groups_beyond_the_limit_are_counted_together() -> None:
    counts = Topics(1).of("a")
    for number in range(GROUPS_MAX + 5):
        counts.group(f"g{number}").acked += 1
    assert len(counts.groups) == GROUPS_MAX + 1
    assert counts.groups[OTHERS].acked == 5


def test_partitions_of_topics_that_are_not_shown_are_summed_with_their_groups() -> None:
    metrics = BrokerMetrics(topics_max=1)
    parts = []
    for number, name in enumerate(("a", "b", "c")):
        part = PartitionGauges()
        part.topic, part.role, part.high_watermark, part.in_sync, part.replicas = name, "primary", 10, 2, 2
        part.groups, part.lags = {"g": number}, {"g": 10 - number}
        part.summed_ages_s = {"g": float(number)}
        part.queues = {"q": {"unsettled": 4}}
        part.queue_ages_s = {"q": 7.0}
        parts.append(part)
    metrics.partitions = lambda: parts
    assert value(metrics, "ferryline_group_lag_records", group="g", topic="a", partition="primary") == 10
    others = {"topic": OTHERS, "partition": "primary"}
    assert value(metrics, "ferryline_group_lag_records", group="g", **others) == 9 + 8
    assert value(metrics, "ferryline_group_lag_seconds", group="g", **others) == 2.0
    assert value(metrics, "ferryline_queue_records", group="q", state="unsettled", **others) == 8
    assert value(metrics, "ferryline_queue_oldest_seconds", group="q", **others) == 7.0
    assert value(metrics, "ferryline_metrics_topics_left_out") == 2


def test_many_groups_in_few_partitions_are_bounded_too() -> None:
    metrics = BrokerMetrics()
    part = PartitionGauges()
    part.topic, part.role, part.high_watermark = "a", "primary", 10
    part.queues = {f"q{number:04}": {"unsettled": 1, "ready": 1} for number in range(1_500)}
    metrics.partitions = lambda: [part]
    shown = {key: one for key, one in series(metrics).items() if key[0] == "ferryline_queue_records"}
    assert len(shown) == 2 * (GROUPS_MAX + 1)
    assert sum(shown.values()) == 3_000


def test_counts_of_a_deleted_topic_go_with_its_last_partition_here() -> None:
    metrics = BrokerMetrics()
    metrics.topic("gone").records_in = 5
    part = PartitionGauges()
    part.topic = "gone"
    there = [part]
    metrics.partitions = lambda: there
    metrics.exists = lambda _: False
    assert value(metrics, "ferryline_records_in_total", topic="gone") == 5
    there.clear()
    assert ("ferryline_records_in_total", (("topic", "gone"),)) not in series(metrics)


# -- groups -----------------------------------------------------------------------------------------


def test_receivers_that_say_nothing_for_long_are_not_counted() -> None:
    counts = GroupCounts()
    counts.saw("a", 0)
    counts.saw("b", LIVE_MS)
    counts.saw("a", LIVE_MS + 1)
    assert counts.live(2 * LIVE_MS) == 2
    assert counts.live(2 * LIVE_MS + 1) == 1
    assert counts.live(2 * LIVE_MS + 1, {"a", "works for long"}) == 2, "who holds leases is there"
    for number in range(MEMBERS_MAX + 10):
        counts.saw(f"m{number}", 2 * LIVE_MS)
    assert counts.live(2 * LIVE_MS) == MEMBERS_MAX


async def test_what_a_queue_group_does_is_counted_when_it_is_committed(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, *((None, f"v{number}") for number in range(6)))
        receiver = Receiver(client, topic)
        got = await receiver.receive(records_max=6)
        assert got is not None
        delivery, values = got
        assert len(values) == 6
        assert group_value(broker, "leased_records_total") == 6
        assert group_value(broker, "receivers") == 1
        broker.broker.metrics.topic("jobs").group("g").seen.clear()
        assert group_value(broker, "receivers") == 1, "it has leases"
        first, second, third, *rest = delivery.offsets
        await receiver.settle(delivery, ACK, first, second)
        await receiver.settle(delivery, ACK, first)  # again: it is settled already
        await receiver.settle(delivery, NACK, third, delay_ms=0)
        assert group_value(broker, "acknowledged_records_total") == 2
        assert group_value(broker, "failed_records_total") == 1
        assert group_value(broker, "handling_seconds_count") == 2
        again = await receiver.receive(records_max=1)
        assert again is not None
        assert group_value(broker, "redelivered_records_total") == 1
        refused = await receiver.settle(delivery, ACK, *rest, receipt=b"x" * 32)
        assert refused.error is not None
        assert group_value(broker, "acknowledged_records_total") == 2, "a settlement that was refused counts nothing"


async def test_a_dead_letter_is_counted_and_seen_where_it_lies_with_its_origin(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        await world.topic("jobs.dlq", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, (None, "bad"))
        receiver = Receiver(client, topic)
        got = await receiver.receive()
        assert got is not None
        await receiver.settle(got[0], REJECT, reason="bad")
        assert group_value(broker, "rejected_records_total") == 1
        await eventually(lambda: group_value(broker, "dead_letters_total") == 1, "the copy is counted")
        labels = {"topic": "jobs.dlq", "partition": "0", "origin": "jobs"}
        await eventually(
            lambda: value(broker.broker.metrics, "ferryline_dead_letter_records", **labels) == 1, "it is there"
        )


def test_beginnings_of_epochs_are_not_taken_for_records() -> None:
    epochs = EpochIndex([(1, 0), (2, 10), (5, 11)])
    assert epochs.marks(0, 30) == [0, 10, 11]
    assert epochs.marks(0, 11) == [0, 10]
    assert epochs.marks(10, 11) == [10]
    assert epochs.marks(1, 10) == epochs.marks(12, 30) == EpochIndex().marks(0, 0) == []
    epochs.advance(4, 30)
    assert epochs.marks(4, 30) == [10, 11], "the first epoch goes on at 4, with a record"
    assert epochs.marks(4, 4) == []
    epochs.advance(10, 30)
    assert epochs.marks(10, 30) == [10, 11], "retention stopped exactly where an epoch begins"


# -- ages -------------------------------------------------------------------------------------------


async def test_the_age_is_that_of_the_first_record_that_is_left(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)
        now = time.time_ns() // 1_000_000
        for ago_s in (300, 60):
            data = bytes(encode_batch([(None, b"x", [])], timestamp_ms=now - 1000 * ago_s))
            await client.produce_raw([(ProduceEntry(topic.id, 0, 1, len(data)), data)])
        await produce(client, topic, (None, "its sender says no time"))
        receiver = Receiver(client, topic)
        got = await receiver.receive(records_max=3)
        assert got is not None
        labels = {"topic": "jobs", "partition": "0", "group": "g"}

        def age() -> float:
            return value(broker.broker.metrics, "ferryline_queue_oldest_seconds", **labels)

        assert age() >= 300
        await receiver.settle(got[0], ACK, got[0].offsets[0])
        assert 60 <= age() < 300
        await receiver.settle(got[0], ACK, got[0].offsets[1])
        assert age() == 0
        await receiver.settle(got[0], ACK, got[0].offsets[2])
        assert age() == 0


async def test_the_lag_of_a_log_group_is_told_in_records_and_seconds(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, *((None, f"v{number}") for number in range(5)))
        await commit(client, topic.id, 4)  # the beginning of the epoch has an offset, too
        labels = {"topic": "orders", "partition": "0", "group": "g"}
        metrics = broker.broker.metrics
        await eventually(lambda: value(metrics, "ferryline_group_lag_records", **labels) == 2, "two are left")
        assert value(metrics, "ferryline_queued_records", topic="orders", partition="0") == 5
        assert value(metrics, "ferryline_group_lag_seconds", **labels) >= 0
        assert value(metrics, "ferryline_commit_seconds_count") >= 1
        assert value(metrics, "ferryline_disk_total_bytes") > value(metrics, "ferryline_disk_free_bytes") > 0


async def test_whoever_has_read_everything_is_not_behind_after_new_epochs(tmp_path: Path) -> None:
    """Each primaryship begins with a mark in the log, which is no record: a group that sleeps has no lag by it."""
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        letters = await world.topic("jobs.dlq", [(broker.id,)])
        client = await world.client(broker.url)
        for where in (topic, letters):
            await produce(client, where, (None, "a"), (None, "b"))
        await commit(client, topic.id, 3)
        receiver = Receiver(client, letters, group="dead-letters")
        got = await receiver.receive()
        assert got is not None
        assert (await receiver.settle(got[0], ACK)).error is None
        metrics, labels = broker.broker.metrics, {"topic": "jobs", "partition": "0"}

        def shown() -> list[float]:
            return [
                value(metrics, "ferryline_group_lag_records", group="g", **labels),
                value(metrics, "ferryline_dead_letter_records", topic="jobs.dlq", partition="0", origin="jobs"),
                value(metrics, "ferryline_queued_records", **labels),
            ]

        assert shown() == [0, 0, 2]
        for epochs in (2, 3):
            for where in (topic, letters):
                core = broker.broker.partitions.replicas[where.id, 0].core
                end = core.high_watermark[0]
                world.coordinator.lead((where.id, 0), broker.id, (broker.id,))
                await eventually(lambda core=core, end=end: core.high_watermark[0] == end + 1, "a new mark")
            assert shown() == [0, 0, 2], epochs
        curl = Curl(world, broker)
        _, told = await curl.get("/v1/groups/g/offsets?topic=jobs")
        assert [(one["offset"], one["high_watermark"], one["lag"]) for one in told["offsets"]] == [(3, 5, 0)]
        ask = Offsets([OffsetsEntry(topic.id, 0, "end", counted_from=at) for at in (-1, 0, 2, 3, 5, 99)])
        answer = await client.call(Kind.OFFSETS, ask, OffsetsAnswer)
        assert [(one.offset, one.records) for one in answer.results] == [
            (5, -1), (5, 2), (5, 1), (5, 0), (5, 0), (5, 0),
        ]  # fmt: skip
        await produce(client, topic, (None, "c"))
        await produce(client, letters, (None, "c"))
        assert shown() == [1, 1, 3], "and what comes behind the marks counts"


async def commit(client: RawClient, topic_id: str, offset: int) -> None:
    """Commit an offset of group g, which nobody else is in."""
    answer = await client.call(Kind.COMMIT, Commit("g", "", [CommitEntry(topic_id, 0, 0, offset)]), CommittedAnswer)
    assert answer.results[0].error is None
