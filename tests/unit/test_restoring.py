"""A backup comes back: what the coordinator takes, whom it lets lead, and what a replica takes in meanwhile."""

from __future__ import annotations

import msgspec
import pytest

from ferryline.protocol.errors import (
    Conflict,
    InvalidArgument,
    InvalidRequest,
    NotEnoughReplicas,
    NotReady,
    UnknownPartition,
)
from ferryline.protocol.exchanges import ExchangeMeta
from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.metadata import RESTORING, TopicConfig, TopicMeta
from ferryline.protocol.records import encode_batch, split_batches
from ferryline_broker.core import events as bev
from ferryline_broker.core.groups import ClaimEntry, CommitEntry, GroupTable, RestoredEntry, encode_entry
from ferryline_broker.core.partition import LogOpened, OpenedReplica, PartitionCore, ReplicaConfig
from ferryline_broker.core.producers import ProducerTable
from ferryline_broker.core.queue_entries import Dying, Opened
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.records import encode_record, record_key
from tests.unit.coordinator_bench import Bench
from tests.unit.core_pair import KEY, part

TOPIC = TopicMeta("e" * 32, "orders", TopicConfig(partitions=2, min_isr=2), 4)
EXCHANGE = ExchangeMeta("events", "topic")
RECORDS_OF = {record_key(record): encode_record(record) for record in (TOPIC, EXCHANGE)}
EPOCHS = {(TOPIC.id, 0): 7, (TOPIC.id, 1): 9}


def begun(bench: Bench) -> list[tuple[str, int, int]]:
    answer: list[tuple[str, int, int]] = bench.ask(ev.RestoreBegun, RECORDS_OF, EPOCHS)
    return answer


# -- the coordinator --------------------------------------------------------------------------------


def test_nobody_leads_before_the_logs_are_in_and_then_under_a_later_epoch() -> None:
    bench = Bench(3, CoreConfig(recovery="balanced"))
    takers = begun(bench)
    assert bench.state.topics[TOPIC.id] == TOPIC
    assert bench.state.exchanges["events"] == EXCHANGE
    bench.play(60_000)  # neither recovery by policy, nor replacement, nor balance touches it
    for topic_id, number, broker in takers:
        meta = bench.state.parts[(topic_id, number)].meta
        assert (meta.primary, meta.isr, meta.epoch, meta.recovery_epoch) == (
            0,
            (),
            EPOCHS[(topic_id, number)],
            RESTORING,
        )
        assert broker == meta.replicas[0]
    with pytest.raises(Conflict, match="being restored"):
        bench.ask(ev.RecoveryAsked, "orders", 0, True)
    for topic_id, number, broker in takers:
        led = bench.ask(ev.RestoreEnded, topic_id, number, broker)
        assert (led.primary, led.isr, led.epoch) == (broker, (broker,), EPOCHS[(topic_id, number)] + 1)
        assert bench.ask(ev.RestoreEnded, topic_id, number, broker) == led  # its answer was lost


def test_a_restore_goes_on_where_it_was_and_after_a_restart() -> None:
    bench = Bench(3)
    takers = begun(bench)
    bench.restart()
    for number in bench.brokers:
        bench.register(number)
    assert begun(bench) == takers
    assert len(bench.state.topics) == 1


def test_a_restore_goes_on_though_some_partitions_are_led_already() -> None:
    bench = Bench(3)
    first, second = begun(bench)
    bench.ask(ev.RestoreEnded, *first)
    assert begun(bench) == [(*first[:2], 0), second]
    bench.ask(ev.RestoreEnded, *second)
    with pytest.raises(Conflict, match="not empty"):
        begun(bench)


def test_only_an_empty_cluster_takes_a_backup() -> None:
    bench = Bench(3)
    bench.create("other", partitions=1)
    with pytest.raises(Conflict, match="not empty: it has topic other"):
        begun(bench)
    assert TOPIC.id not in bench.state.topics
    bench = Bench(3)
    for row in begun(bench):
        bench.ask(ev.RestoreEnded, *row)
    with pytest.raises(Conflict, match="not empty"):
        begun(bench)


def test_what_does_not_belong_into_a_backup_is_refused() -> None:
    bench = Bench(3)
    foreign = {key: value for key, value in bench.rows.items() if key.startswith(("broker/", "cluster"))}
    for key, value in [*foreign.items(), ("topic/x", RECORDS_OF[record_key(TOPIC)]), ("topic/y", b"\xc1")]:
        with pytest.raises(InvalidArgument, match="records"):
            bench.ask(ev.RestoreBegun, {key: value}, EPOCHS)
    for wrong in (
        TopicMeta("../up", "orders", TopicConfig()),
        TopicMeta("e" * 32, "a/b", TopicConfig()),
        TopicMeta("e" * 32, "orders", TopicConfig(partitions=10**9)),
    ):
        with pytest.raises(InvalidRequest, match=r"records|topic id|partitions"):
            bench.ask(ev.RestoreBegun, {record_key(wrong): encode_record(wrong)}, EPOCHS)
    with pytest.raises(InvalidArgument, match="orders/1 is missing"):
        bench.ask(ev.RestoreBegun, RECORDS_OF, {(TOPIC.id, 0): 7})
    with pytest.raises(NotEnoughReplicas):
        Bench(1).ask(ev.RestoreBegun, RECORDS_OF, EPOCHS)


def test_only_a_broker_that_serves_and_holds_a_copy_may_lead() -> None:
    bench = Bench(3)
    topic_id, number, broker = begun(bench)[0]
    stranger = next(b for b in bench.brokers if b not in bench.state.parts[(topic_id, number)].meta.replicas)
    with pytest.raises(InvalidArgument, match="holds no copy"):
        bench.ask(ev.RestoreEnded, topic_id, number, stranger)
    bench.kill(broker)
    with pytest.raises(NotReady):
        bench.ask(ev.RestoreEnded, topic_id, number, broker)
    with pytest.raises(UnknownPartition):
        bench.ask(ev.RestoreEnded, topic_id, 9, broker)


# -- a replica --------------------------------------------------------------------------------------


def replica(epoch: int = 7) -> PartitionCore:
    opened = OpenedReplica(0, (LogOpened(), LogOpened()), ProducerTable())
    core = PartitionCore(KEY, 1, ReplicaConfig(), opened)
    meta = part(0, epoch, 1, (), recovery_epoch=RESTORING)
    core.handle(bev.MetaReceived(meta, 11, 1, {1: 11, 2: 12}), 1_000)
    return core


def imported(log: int, start: int, *, epoch: int = 3, before: int = -1, count: int = 2) -> bev.Imported:
    data = encode_batch([(b"k", b"v", [])] * count, base_offset=start, epoch=epoch)
    return bev.Imported(log, start, before, data, split_batches(data))


def test_bytes_of_a_backup_keep_their_offsets_and_epochs_and_the_next_epoch_begins_behind_them() -> None:
    core = replica()
    effects = core.handle(imported(RECORDS, 40, before=2), 1_000)
    assert [type(effect) for effect in effects] == [bev.ResetLog, bev.Append, bev.Flush]
    core.handle(imported(RECORDS, 42, epoch=7), 1_000)
    assert (core.log_start[RECORDS], core.log_end[RECORDS]) == (40, 44)
    assert core.high_watermark[RECORDS] == 40  # nothing is claimed to be committed
    core.handle(bev.MetaReceived(part(1, 8, 2, (1,)), 11, 1, {1: 11, 2: 12}), 1_000)
    assert core.role == "primary"
    assert core.log_end[RECORDS] == 45  # the control record of epoch 8
    assert core.replica.epochs[RECORDS].items()[-1] == (8, 44)


def test_a_hole_and_a_partition_that_is_led_take_nothing_in() -> None:
    core = replica()
    core.handle(imported(STATE, 0), 1_000)
    with pytest.raises(AssertionError, match="ends at 2"):
        core.handle(imported(STATE, 5), 1_000)
    core = replica()
    core.handle(bev.MetaReceived(part(1, 8, 2, (1,)), 11, 1, {1: 11, 2: 12}), 1_000)
    with pytest.raises(AssertionError):
        core.handle(imported(STATE, 0), 1_000)


def test_members_generations_and_producer_epochs_of_the_old_cluster_end_with_it() -> None:
    table = GroupTable()
    for entry in (
        ClaimEntry("g", "m", 5),
        CommitEntry("g", 12, 1, ""),
        Opened("q", "key", 0, -1),
        Dying("q", 3, 1, 0, 4),
        RestoredEntry(),
    ):
        table.apply(entry)
    assert table.offset("g") == msgspec.structs.replace(table.offset("g"), offset=12, generation=0)
    assert isinstance(table.decide_claim("g", "other", 1), ClaimEntry)
    queue = table.queues["q"]
    assert (queue.producer_epoch, queue.next_sequence) == (1, 0)
    assert queue.stories[3].dying == (0, 4)  # begun in the old one: repeated as it was, so that a copy is known again
    assert encode_entry(RestoredEntry())
