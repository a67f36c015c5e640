"""Topics, metadata polls, and recovery of partitions without candidates."""

from __future__ import annotations

from typing import Any

import pytest

from ferryline.protocol.errors import (
    ClusterMismatch,
    Conflict,
    InvalidArgument,
    InvalidName,
    NotReady,
    Throttled,
    TopicExists,
    UnknownPartition,
    UnknownTopic,
)
from ferryline.protocol.metadata import ClusterMetadata, MetadataRequest, TopicConfig
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from unit.coordinator_bench import Bench

# -- topics -----------------------------------------------------------------------------------------

BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"partitions": 0}, "partitions: 0 is outside 1..10000"),
    ({"partitions": 10_001}, "partitions: 10001"),
    ({"partitions": "3"}, "partitions: expected an integer, got str"),
    ({"partitions": True}, "partitions: expected an integer, got bool"),
    ({"replication": 0}, "replication: 0"),
    ({"replication": 8}, "replication: 8 is outside 1..7"),
    ({"min_isr": 3, "replication": 2}, "min_isr: 3 is above replication 2"),
    ({"min_isr": 0}, "min_isr: 0"),
    ({"flush": "never"}, "flush: expected 'fsync' or 'replicated'"),
    ({"flush": 1}, "flush"),
    ({"retention_ms": -2}, "retention_ms: -2"),
    ({"retention_ms": 1.5}, "retention_ms: expected an integer, got float"),
    ({"retention_bytes": 1}, "retention_bytes: 1"),
    ({"segment_bytes": -1}, "segment_bytes: -1"),
    ({"segment_bytes": 2**40}, "segment_bytes"),
    ({"segment_ms": 0}, "segment_ms: 0"),
    ({"max_record_bytes": 9 * 1024 * 1024}, "max_record_bytes: 9437184 is outside 1..8388608"),
    ({"compression": "lz4"}, "compression: no such setting"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_SETTINGS, ids=[str(case[0]) for case in BAD_SETTINGS])
def test_a_wrong_setting_is_refused_by_name_and_limit(wrong: dict[str, Any], message: str) -> None:
    bench = Bench(3)
    with pytest.raises(InvalidArgument) as refused:
        bench.create("t", **wrong)
    assert message in refused.value.message
    assert refused.value.details["field"] in message
    assert not bench.state.topics
    bench.create("t")
    only = {k: v for k, v in wrong.items() if k not in ("partitions", "replication")}
    if only:
        with pytest.raises(InvalidArgument):
            bench.ask(ev.TopicAltered, "t", only)
        assert bench.state.topic("t").config == TopicConfig()


@pytest.mark.parametrize("name", ["", ".", "..", "__x", "a/b", "a b", "x" * 201, "é", "a\n", "a\0"])
def test_a_wrong_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidName):
        Bench(1).create(name, replication=1)


def test_names_are_taken_once_and_free_after_deletion_under_another_id() -> None:
    bench = Bench(3)
    bench.create("t")
    with pytest.raises(TopicExists):
        bench.ask(ev.TopicCreated, "t", "other", {})
    bench.ask(ev.TopicDeleted, "t")
    with pytest.raises(UnknownTopic):
        bench.ask(ev.TopicDeleted, "t")
    assert not bench.state.parts
    assert not any(bench.state.held.values())
    again = bench.ask(ev.TopicCreated, "t", "second", {})
    assert again.id == "second"
    bench.restart()
    assert bench.state.topic("t").id == "second"
    assert set(bench.state.gone) == {"t-id"}


def test_altered_settings_reach_the_partitions() -> None:
    bench = Bench(3)
    bench.create("t", replication=3)
    topic = bench.ask(ev.TopicAltered, "t", {"min_isr": 2, "flush": "replicated", "retention_ms": -1})
    assert (topic.config.min_isr, topic.config.flush, topic.config.retention_ms, topic.version) == (
        2,
        "replicated",
        -1,
        2,
    )
    assert all((r.meta.min_isr, r.meta.flush) == (2, "replicated") for r in bench.state.parts.values())
    for name in ("partitions", "replication"):
        with pytest.raises(InvalidArgument, match=name):
            bench.ask(ev.TopicAltered, "t", {name: 7})


def test_lowering_min_isr_ends_the_candidacy_of_those_outside() -> None:
    bench = Bench(3)
    bench.create("t", partitions=1, min_isr=2)
    part = bench.part()
    bench.alter(part, [part.primary])
    assert bench.part().elr
    bench.ask(ev.TopicAltered, "t", {"min_isr": 1})
    assert bench.part().elr == ()


def test_partitions_are_added_only_when_the_caller_knows_that_keys_move() -> None:
    bench = Bench(3)
    bench.create("t", partitions=3)
    with pytest.raises(Conflict, match="keys_move"):
        bench.ask(ev.PartitionsAdded, "t", 5)
    with pytest.raises(InvalidArgument, match="below the present 3"):
        bench.ask(ev.PartitionsAdded, "t", 2, True)
    topic = bench.ask(ev.PartitionsAdded, "t", 5, True)
    assert topic.config.partitions == 5
    assert {key[1] for key in bench.state.parts} == set(range(5))


def test_a_cluster_has_bounds_on_topics_and_partitions() -> None:
    bench = Bench(2, CoreConfig(topics_max=2, partitions_max=20))
    with pytest.raises(Throttled, match="20"):
        bench.create("wide", partitions=11)
    bench.create("a", partitions=2)
    bench.create("b", partitions=2)
    with pytest.raises(Throttled, match="2 topics"):
        bench.create("c", partitions=1)


# -- metadata ---------------------------------------------------------------------------------------


def test_a_copy_that_follows_by_deltas_equals_a_full_one_after_every_change() -> None:
    bench = Bench(3, lively=True)
    copy = ClusterMetadata()
    copy.apply(bench.metadata())

    def steps() -> Any:
        yield lambda: bench.create("t", partitions=6)
        yield lambda: bench.kill(2)
        yield lambda: bench.play(2_000)
        yield lambda: bench.start(2)
        yield lambda: bench.play(10_000)
        yield lambda: bench.ask(ev.PartitionsAdded, "t", 8, True)
        yield lambda: bench.ask(ev.DrainSet, 1, True)
        yield lambda: bench.ask(ev.TopicDeleted, "t")
        yield lambda: bench.create("t", partitions=1)
        yield lambda: bench.kill(1)
        yield lambda: bench.play(40_000)
        yield lambda: bench.ask(ev.BrokerForgotten, 1)

    for step in steps():
        step()
        delta = bench.metadata(copy)
        assert not delta.full
        copy.apply(delta)
        full = ClusterMetadata()
        full.apply(bench.metadata())
        assert (copy.brokers, copy.topics, copy.topic_ids, copy.partitions, copy.revision) == (
            full.brokers,
            full.topics,
            full.topic_ids,
            full.partitions,
            full.revision,
        )


def test_a_parked_poll_is_answered_by_the_next_change_and_by_nothing_else() -> None:
    bench = Bench(3)
    copy = ClusterMetadata()
    copy.apply(bench.metadata())
    assert bench.metadata(copy, wait_ms=30_000) is None
    reply = bench._numbers
    bench.heartbeat(1)
    assert reply not in bench.answers
    topic = bench.create("t", partitions=2)
    answer = bench.answers[reply]
    assert [t.id for t in answer.topics] == [topic.id]
    assert len(answer.partitions) == 2
    assert copy.apply(answer)
    assert copy.revision == bench.state.revision
    bench.create("u")  # the bench fails on a second answer
    assert bench.core.polls.parked == 0


def test_a_parked_poll_is_answered_with_nothing_when_its_wait_is_over() -> None:
    bench = Bench(3)
    copy = ClusterMetadata()
    copy.apply(bench.metadata())
    bench.metadata(copy, wait_ms=1_000)
    reply = bench._numbers
    bench.play(800)
    assert reply not in bench.answers
    bench.play(400)
    assert not copy.apply(bench.answers[reply])
    assert bench.core.polls.parked == 0


def test_an_abandoned_poll_is_not_answered_and_a_stop_answers_all() -> None:
    bench = Bench(1)
    copy = ClusterMetadata()
    copy.apply(bench.metadata())
    bench.metadata(copy, wait_ms=60_000)
    gone = bench._numbers
    bench.send(ev.Abandoned(gone))
    bench.metadata(copy, wait_ms=60_000)
    stays = bench._numbers
    effects = bench.core.close().effects
    assert [e.reply for e in effects if isinstance(e, ev.Reply)] == [stays]


def test_who_is_too_old_or_comes_from_another_coordinator_gets_everything() -> None:
    bench = Bench(3, CoreConfig(changes_max=8))
    copy = ClusterMetadata()
    copy.apply(bench.metadata())
    bench.create("t", partitions=9)
    assert bench.metadata(copy).full
    copy.apply(bench.metadata())
    bench.restart()
    answer = bench.metadata(copy)
    assert answer.full
    assert copy.apply(answer)
    assert copy.coord_epoch == bench.coord_epoch


def test_a_broker_that_was_away_still_learns_that_a_topic_was_deleted() -> None:
    bench = Bench(3)
    bench.create("t")
    bench.ask(ev.TopicDeleted, "t")
    bench.restart()
    assert bench.metadata(broker_id=2).deleted_topics == ["t-id"]
    assert bench.metadata().deleted_topics == []


def test_another_cluster_gets_a_clear_refusal() -> None:
    bench = Bench(1)
    with pytest.raises(ClusterMismatch):
        bench.ask(ev.MetadataAsked, MetadataRequest(cluster_id="d" * 32))


def test_parked_polls_are_bounded() -> None:
    bench = Bench(1, CoreConfig(parked_max=2))
    copy = ClusterMetadata()
    copy.apply(bench.metadata())
    for _ in range(2):
        bench.metadata(copy, wait_ms=1_000)
    with pytest.raises(Throttled):
        bench.metadata(copy, wait_ms=1_000)


# -- recovery ---------------------------------------------------------------------------------------


def stranded(config: CoreConfig | None = None) -> tuple[Bench, int, int]:
    """The secondary fell out, the primary lost its disk, both are back: nobody is known to be complete."""
    bench = Bench(3, config)
    bench.create("t", partitions=1)
    part = bench.part()
    primary, secondary = part.replicas
    bench.kill(secondary)
    bench.kill(primary)
    return bench, primary, secondary


def test_balanced_recovery_waits_for_every_replica_and_chooses_the_longest() -> None:
    bench, primary, secondary = stranded()
    bench.start(secondary, replicas=[bench.report(bench.part(), 50)])
    assert bench.part().primary == 0
    with pytest.raises(NotReady, match=rf"\[{primary}\]"):
        bench.ask(ev.RecoveryAsked, "t", 0)
    bench.brokers[primary].storage = "s-new"
    bench.start(primary, restart="foreign")
    assert bench.part().primary == 0
    part = bench.ask(ev.RecoveryAsked, "t", 0)
    assert (part.primary, part.isr, part.recovery_epoch) == (secondary, (secondary,), part.epoch)
    assert bench.noted("unclean_recovery")[0]["kept_to"] == [50, 0]


@pytest.mark.parametrize(
    ("reports", "chosen"),
    [
        (((50, 1, "ok"), (40, 1, "ok")), 0),
        (((50, 1, "ok"), (40, 2, "ok")), 1),  # a later epoch outlived the earlier one
        (((50, 1, "damaged"), (40, 1, "ok")), 1),
    ],
)
def test_recovery_compares_epoch_then_length_among_undamaged(
    reports: tuple[tuple[int, int, str], tuple[int, int, str]], chosen: int
) -> None:
    bench, primary, secondary = stranded()
    for broker_id, (end, tail, log_state) in zip((primary, secondary), reports, strict=True):
        bench.brokers[broker_id].storage = f"new-{broker_id}"  # so that nobody is a candidate on its own
        bench.start(
            broker_id, restart="foreign", replicas=[bench.report(bench.part(), end, tail=tail, state=log_state)]
        )
    part = bench.ask(ev.RecoveryAsked, "t", 0)
    assert part.primary == (primary, secondary)[chosen]


def test_recovery_without_force_waits_for_the_longest_log_to_serve() -> None:
    bench, primary, secondary = stranded()
    for broker_id in (primary, secondary):
        bench.brokers[broker_id].storage = f"new-{broker_id}"
    bench.start(secondary, restart="foreign", replicas=[bench.report(bench.part(), 10)])
    broker = bench.brokers[primary]
    broker.up, broker.incarnation = True, broker.incarnation + 1
    bench.register(primary, restart="foreign", replicas=[bench.report(bench.part(), 256)])  # it has not served yet
    with pytest.raises(NotReady, match=rf"broker {primary} has the longest log"):
        bench.ask(ev.RecoveryAsked, "t", 0)
    assert bench.part().primary == 0
    bench.heartbeat(primary)
    assert bench.ask(ev.RecoveryAsked, "t", 0).primary == primary


def test_forced_recovery_does_not_wait_for_the_longest_log() -> None:
    bench, primary, secondary = stranded()
    for broker_id, end in ((primary, 256), (secondary, 10)):
        bench.brokers[broker_id].storage = f"new-{broker_id}"
        bench.start(broker_id, restart="foreign", replicas=[bench.report(bench.part(), end)])
    bench.kill(primary)  # after its report
    with pytest.raises(NotReady):
        bench.ask(ev.RecoveryAsked, "t", 0)
    assert bench.ask(ev.RecoveryAsked, "t", 0, True).primary == secondary


def test_forced_recovery_needs_the_word_and_goes_on_with_what_is_there() -> None:
    bench, _, secondary = stranded()
    bench.start(secondary, replicas=[bench.report(bench.part(), 50)])
    part = bench.ask(ev.RecoveryAsked, "t", 0, True)
    assert part.primary == secondary
    assert bench.noted("unclean_recovery")[0]["forced"]


def test_a_broker_whose_report_is_too_old_is_asked_again() -> None:
    bench = Bench(3)
    bench.create("t", partitions=1)
    primary, secondary = bench.part().replicas
    bench.alter(bench.part(), [primary])  # the secondary stays up, but behind
    bench.kill(primary)
    with pytest.raises(NotReady, match="ask again"):
        bench.ask(ev.RecoveryAsked, "t", 0, True)
    bench.play(600)  # its heartbeat is told to register again, which it does
    bench.register(secondary, replicas=[bench.report(bench.part(), 30)])
    assert bench.ask(ev.RecoveryAsked, "t", 0, True).primary == secondary
    assert not bench.heartbeat(secondary).fenced


def test_there_is_nothing_to_recover_where_a_primary_serves() -> None:
    bench = Bench(3)
    bench.create("t", partitions=1)
    with pytest.raises(Conflict, match="has a primary"):
        bench.ask(ev.RecoveryAsked, "t", 0)
    with pytest.raises(UnknownPartition):
        bench.ask(ev.RecoveryAsked, "t", 1)
    with pytest.raises(UnknownTopic):
        bench.ask(ev.RecoveryAsked, "u", 0)


def test_the_balanced_policy_recovers_on_its_own_once_everybody_has_reported() -> None:
    bench, primary, secondary = stranded(CoreConfig(recovery="balanced"))
    bench.start(secondary, replicas=[bench.report(bench.part(), 50)])
    bench.play(2_000)
    assert bench.part().primary == 0
    bench.brokers[primary].storage = "s-new"
    bench.start(primary, restart="foreign")
    bench.play(2_000)
    assert bench.part().primary == secondary
