"""A broker with many partitions: work in slices, news as deltas, descriptors for those that move."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import pytest

from ferryline.protocol.metadata import (
    BrokerMeta,
    ClusterMetadata,
    MetadataAnswer,
    PartitionMeta,
    TopicConfig,
    TopicMeta,
)
from ferryline_broker.core import events as ev
from ferryline_broker.log.files import FileStorage
from ferryline_broker.log.node_store import NodeStore
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.storage import Faults, MemoryStorage
from ferryline_broker.log.together import GROUP_MIN, Together
from ferryline_broker.metrics import SERIES_MAX, BrokerMetrics, PartitionGauges
from ferryline_broker.view import ClusterView
from unit.broker_world import BrokerWorld, eventually
from unit.log_builders import append, contents

CLUSTER = "c" * 32


class Teller:
    """A coordinator's side of metadata: changes things, and answers whoever knows an older revision."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.revision = 1
        self.brokers = {n: BrokerMeta(n, "https://i", "https://e", n) for n in (1, 2, 3)}
        self.topics: dict[str, TopicMeta] = {}
        self.parts: dict[tuple[str, int], PartitionMeta] = {}
        self.made = 0

    def step(self) -> MetadataAnswer:
        """One change, told as a delta."""
        self.revision += 1
        answer = MetadataAnswer(CLUSTER, 1, self.revision, False)
        kind = self.rng.choice(["topic", "part", "part", "part", "delete", "broker", "forget"])
        if kind == "topic" or not self.topics:
            self.made += 1
            topic = TopicMeta(f"{self.made:032x}", f"t{self.made % 3}", TopicConfig(partitions=3), 1)
            if any(known.name == topic.name for known in self.topics.values()):
                return answer
            self.topics[topic.id] = topic
            fresh = [PartitionMeta(topic.id, n, (1, 2), 1, 1, 1, (1, 2)) for n in range(3)]
            self.parts.update({part.key: part for part in fresh})
            answer = msgspec.structs.replace(answer, topics=[topic], partitions=fresh)
        elif kind == "part":
            part = self.rng.choice([self.parts[key] for key in sorted(self.parts)])
            part = self.parts[part.key] = msgspec.structs.replace(part, epoch=part.epoch + 1, version=part.version + 1)
            answer = msgspec.structs.replace(answer, partitions=[part])
        elif kind == "delete":
            topic = self.topics.pop(self.rng.choice(sorted(self.topics)))
            for number in range(3):
                del self.parts[topic.id, number]
            answer = msgspec.structs.replace(answer, deleted_topics=[topic.id])
        elif kind == "broker":
            broker = self.brokers.get(4) or BrokerMeta(4, "https://i", "https://e", 4)
            broker = self.brokers[4] = msgspec.structs.replace(broker, fenced=not broker.fenced)
            answer = msgspec.structs.replace(answer, brokers=[broker])
        elif self.brokers.pop(4, None) is not None:
            answer = msgspec.structs.replace(answer, deleted_brokers=[4])
        return answer

    def whole(self) -> MetadataAnswer:
        everything = [*self.brokers.values()], [*self.topics.values()], [*self.parts.values()]
        return MetadataAnswer(CLUSTER, 1, self.revision, True, *everything)


def picture(metadata: ClusterMetadata) -> tuple[object, ...]:
    return metadata.revision, metadata.brokers, metadata.topics, metadata.topic_ids, metadata.partitions


@pytest.mark.parametrize("seed", range(20))
def test_whoever_knows_an_older_picture_gets_the_present_one_from_what_changed(seed: int) -> None:
    teller, broker = Teller(seed), ClusterMetadata()
    view = ClusterView(broker)
    whole = teller.whole()
    assert broker.apply(whole)
    view.took(whole)
    askers: list[ClusterMetadata] = []
    for _ in range(60):
        asker = ClusterMetadata()
        asker.apply(msgspec.msgpack.decode(view.encoded(), type=MetadataAnswer))
        askers.append(asker)
        told = teller.step()
        assert broker.apply(told)
        view.took(told)
        for other in random.Random(teller.revision).sample(askers, min(3, len(askers))):
            answer = msgspec.msgpack.decode(view.news(1, other.revision), type=MetadataAnswer)
            assert not answer.full
            assert other.apply(answer) or other.revision == broker.revision
            assert picture(other) == picture(broker)


def test_a_change_costs_what_changed_however_large_the_cluster_is() -> None:
    teller, broker = Teller(0), ClusterMetadata()
    view = ClusterView(broker)
    topic = TopicMeta("a" * 32, "large", TopicConfig(partitions=5_000), 1)
    teller.topics[topic.id] = topic
    teller.parts = {(topic.id, n): PartitionMeta(topic.id, n, (1, 2), 1, 1, 1, (1, 2)) for n in range(5_000)}
    whole = teller.whole()
    broker.apply(whole)
    view.took(whole)
    known = teller.revision
    part = msgspec.structs.replace(teller.parts[topic.id, 7], epoch=2, version=2)
    told = MetadataAnswer(CLUSTER, 1, known + 1, False, partitions=[part])
    broker.apply(told)
    view.took(told)
    assert len(view.news(1, known)) < 300
    assert len(view.encoded()) > 250_000


def test_another_coordinator_and_the_far_past_are_answered_with_everything() -> None:
    teller, broker = Teller(1), ClusterMetadata()
    view = ClusterView(broker)
    whole = teller.whole()
    broker.apply(whole)
    view.took(whole)
    start = teller.revision
    for _ in range(3):
        told = teller.step()
        broker.apply(told)
        view.took(told)

    def answer(coord_epoch: int, revision: int) -> MetadataAnswer:
        return msgspec.msgpack.decode(view.news(coord_epoch, revision), type=MetadataAnswer)

    assert not answer(1, start).full
    assert answer(1, start - 1).full
    assert answer(0, start + 1).full
    assert answer(-1, -1).full
    later = msgspec.structs.replace(teller.whole(), coord_epoch=2, revision=teller.revision + 1)
    broker.apply(later)
    view.took(later)
    assert answer(1, start + 2).full, "an earlier coordinator may have told another history"


def test_a_scrape_of_many_partitions_shows_topics_and_every_series_once() -> None:
    metrics = BrokerMetrics()
    many: list[PartitionGauges] = []
    for number in range(SERIES_MAX + 1):
        part = PartitionGauges()
        part.topic, part.partition = f"t{number % 2}", number
        part.role = "primary" if number % 3 else "secondary"
        part.high_watermark, part.log_bytes, part.in_sync, part.replicas = 10, 100, 2 - (number == 4), 2
        part.groups, part.lags = ({"g": 4}, {"g": 6}) if number == 1 else ({}, {})
        part.secondary_lags = {2: number}
        many.append(part)
    for count in (SERIES_MAX, SERIES_MAX + 1):
        metrics.partitions = lambda count=count: many[:count]  # type: ignore[misc]
        samples = [s for metric in metrics.registry.collect() for s in metric.samples]
        series = [(s.name, tuple(sorted(s.labels.items()))) for s in samples]
        assert len(series) == len(set(series))
        shown = {(s.labels["topic"], s.labels["partition"]) for s in samples if s.name == "ferryline_log_bytes"}
        assert len(shown) == (SERIES_MAX if count == SERIES_MAX else 4)
        assert sum(s.value for s in samples if s.name == "ferryline_log_bytes") == 100 * count
        assert [s.value for s in samples if s.name == "ferryline_group_lag_records"] == [6]
        assert [s.value for s in samples if s.name == "ferryline_under_replicated_partitions"] == [1]
        assert min(s.value for s in samples if s.name == "ferryline_in_sync_replicas") == 1


# -- descriptors ----------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_logs_that_nobody_appends_to_hold_no_descriptors_and_go_on_when_somebody_does(tmp_path: Path) -> None:
    storage = FileStorage(str(tmp_path), idle_files_max=4)
    before = descriptors()
    logs = [PartitionLog.open(storage, f"log-{number}") for number in range(20)]
    for log in logs:
        append(log)
        log.flush()
    assert descriptors() - before >= 20
    for log in logs:
        log.rest()
    assert descriptors() - before <= 4
    for log in logs:
        append(log)
        assert log.dirty, "what was appended is not flushed by going to rest"
        log.rest()
    assert descriptors() - before >= 20, "a log with unflushed records keeps its file open: errors are told there"
    for log in logs:
        log.flush()
        assert len(contents(log)) == 2
        log.truncate(3)
        log.rest()
        append(log)
        log.close()
    storage.close()


def test_a_start_opens_replicas_without_holding_a_descriptor_for_each(tmp_path: Path) -> None:
    storage = FileStorage(str(tmp_path), idle_files_max=8)
    store = NodeStore.open(storage)
    for number in range(30):
        replica = store.open_replica("a" * 32, number)
        append(replica.records)
        replica.flush()
        replica.write_checkpoint(3, 0)
    store.close()
    before = descriptors()
    again = NodeStore.open(storage)
    together = again.together(starting=True)
    replicas = [again.open_replica(*key, together=together) for key in again.replicas_on_disk()]
    together.settle()
    assert len(replicas) == 30
    assert descriptors() - before < 20
    for replica in replicas:
        assert replica.records.log_end == 3
        append(replica.records)
        replica.flush()
    again.mark_clean_stop()
    again.close()
    storage.close()


# -- syncing together -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, GROUP_MIN + 1])
@pytest.mark.parametrize("whole", [True, False])
def test_what_was_put_off_is_durable_after_settle_and_not_before(count: int, whole: bool) -> None:
    for settle in (False, True):
        disk = MemoryStorage()
        together = Together(disk)
        for number in range(count):
            together.make(f"a/{number}")
            together.write_small(f"a/{number}/small", b"kept")
        if not whole:
            disk.faults = Faults(sync_error=True, match="nothing is called so")  # no syncfs here: file by file
        if settle:
            together.settle()
        disk.faults = Faults()
        disk.lose_unsynced()
        found = [disk.read_small(f"a/{number}/small") for number in range(count)]
        assert found == [b"kept" if settle else None] * count


# -- slices ---------------------------------------------------------------------------------------


async def test_thousands_of_heartbeats_do_not_wait_while_many_replicas_open(tmp_path: Path) -> None:
    """A topic of many partitions arrives; before its replicas are open the broker has answered others."""
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        work = broker.broker.node_driver.work
        turns: list[int] = []
        world.coordinator.create_topic("many", [(broker.id,)] * 400)
        world.coordinator.publish()

        def open_now() -> int:
            turns.append(len(broker.broker.partitions.replicas))
            return len(broker.broker.partitions.replicas)

        await eventually(lambda: open_now() == 400 and not work.pending, "all are open", within_s=60)
        partly = [count for count in turns if 0 < count < 400]
        assert partly, "the loop had turns while replicas were being opened"
        await eventually(
            lambda: all(hosted.core.ready for hosted in broker.broker.partitions.replicas.values()), "all lead"
        )


async def test_a_broker_that_is_not_done_names_no_revision_and_then_one_that_its_replicas_know(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        driver, sent = broker.broker.node_driver, []
        link = broker.broker.link
        send = link.send_heartbeat

        def noted(heartbeat: object) -> None:
            sent.append((driver.work.pending, heartbeat.revision))  # type: ignore[attr-defined]
            send(heartbeat)  # type: ignore[arg-type]

        link.send_heartbeat = noted  # type: ignore[method-assign]
        world.coordinator.create_topic("many", [(broker.id,)] * 300)
        world.coordinator.publish()
        await eventually(lambda: driver.work.pending, "work is on its way")
        driver.node_event(ev.Tick())
        for effect in driver._node.handle(ev.Tick(), 2**40):  # a heartbeat is due by then
            if isinstance(effect, ev.SendHeartbeat):
                driver._send_heartbeat(effect)
        assert sent, "a heartbeat went out"
        assert all(revision == -1 for pending, revision in sent if pending)
        await eventually(lambda: not driver.work.pending, "all is done", within_s=60)
        pending, revision = sent[-1]
        assert not pending
        assert 0 <= revision <= driver._node.metadata.revision


async def test_a_copy_that_came_back_is_not_removed_by_the_word_of_the_one_before(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        key = (topic.id, 0)
        partitions, work = second.broker.partitions, second.broker.node_driver.work
        assert key in partitions.replicas
        work.delete_replica(key)
        assert key in partitions.replicas, "the record names this broker: nothing is removed"
        world.coordinator.change(key, replicas=(first.id,), isr=(first.id,))
        world.coordinator.publish()
        await eventually(lambda: key not in partitions.replicas, "the copy goes when the record says so")


async def test_a_secondary_that_just_left_does_not_stop_the_partition(tmp_path: Path) -> None:
    """Its transport is closed before the session knows: whatever is due to it then must find that harmless."""
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        peers = first.broker.peers
        await eventually(lambda: peers._current.get(second.id), "the secondary fetches here")
        session = peers._current[second.id]
        session._transport.close()
        assert peers.room(session.state.number) >= 0
        assert session.unsent_bytes == 0
        assert not first.broker.partitions.replicas[topic.id, 0].broken
