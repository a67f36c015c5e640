"""The checkers are checked: for every anomaly a history that has it, made by hand, must be refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ferryline.protocol.messages import RESTART_OS_CRASH
from ferryline.protocol.metadata import BrokerMeta, PartitionMeta
from ferryline_coordinator.core.records import BrokerRecord
from tests.simulation.conduct import keeps_the_longest
from tests.simulation.ghost import Copy, Truth, Violation
from tests.simulation.history import FAIL, INFO, OK, History, Poll, Send
from tests.simulation.replicas import Replicas
from tests.simulation.settings import parse_configs
from tests.simulation.world import World

KEY = ("t", 0)
Log = list[tuple[int, bytes]]


def _send(history: History, value: bytes, order: int, outcome: str, offset: int = -1, *, at: int = 0) -> Send:
    send = Send("p", order, KEY, value, at)
    send.outcome, send.offset, send.ended_us = outcome, offset, at + 10
    history.send(send)
    return send


def _good() -> tuple[History, Log]:
    history = History()
    _send(history, b"a", 1, OK, 1, at=0)
    _send(history, b"b", 2, OK, 2, at=100)
    _send(history, b"c", 3, INFO, at=200)
    _send(history, b"d", 4, FAIL, at=300)
    return history, [(1, b"a"), (2, b"b"), (4, b"c")]


def _judge(history: History, log: Log, *others: Log, lost: list[tuple[int, int]] | None = None) -> None:
    replicas = [(f"b{number}", found) for number, found in enumerate((log, *others))]
    history.check({KEY: replicas}, {KEY: lost or []})


def test_a_good_history_passes() -> None:
    history, log = _good()
    poll = Poll("m", KEY, 0)
    poll.records, poll.next = [(1, b"a"), (2, b"b")], 3
    history.polls.append(poll)
    _judge(history, log, list(log))


def _lost(history: History, log: Log) -> Log:
    return [record for record in log if record[1] != b"b"]


def _duplicate(history: History, log: Log) -> Log:
    return [*log, (9, b"a")]


def _aborted(history: History, log: Log) -> Log:
    return [*log, (9, b"d")]


def _phantom(history: History, log: Log) -> Log:
    return [*log, (9, b"nobody")]


def _moved(history: History, log: Log) -> Log:
    return [(1, b"a"), (3, b"b"), (4, b"c")]


def _swapped(history: History, log: Log) -> Log:
    for send, offset in ((history.sends[b"a"], 2), (history.sends[b"b"], 1)):
        send.offset = offset
        send.ended_us = 10_000  # at the same time, so that only the order of the producer is broken
    return [(1, b"b"), (2, b"a"), (4, b"c")]


def _negative(history: History, log: Log) -> Log:
    history.sends[b"a"].offset = -1
    return log


def _elsewhere(history: History, log: Log) -> Log:
    history.sends[b"c"].key = ("t", 1)
    return log


def _late(history: History, log: Log) -> Log:
    other = Send("q", 1, KEY, b"e", 500)
    other.outcome, other.offset, other.ended_us = OK, 0, 510
    history.send(other)
    return [(0, b"e"), *log]


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (_lost, "D2 lost write"),
        (_duplicate, "D2 duplicate"),
        (_aborted, "D2 G1a aborted read"),
        (_phantom, "D2 phantom"),
        (_moved, "D2 inconsistent offsets"),
        (_swapped, "D2 nonmonotonic send"),
        (_negative, "D2 offset sanity"),
        (_elsewhere, "D2 phantom"),
        (_late, "D2 real time"),
    ],
)
def test_each_anomaly_is_named(spoil: object, rule: str) -> None:
    history, log = _good()
    spoilt = spoil(history, log)  # type: ignore[operator]
    with pytest.raises(Violation) as caught:
        _judge(history, spoilt)
    assert caught.value.rule == rule


def test_a_declared_loss_excuses_only_its_range() -> None:
    history, log = _good()
    _judge(history, _lost(history, log), lost=[(2, 3)])
    with pytest.raises(Violation):
        _judge(history, _lost(history, log), lost=[(3, 9)])


def test_replicas_that_differ_after_healing_are_refused() -> None:
    history, log = _good()
    with pytest.raises(Violation, match="differ after healing"):
        _judge(history, log, log[:-1])


@pytest.mark.parametrize(
    ("records", "until", "rule"),
    [
        ([(1, b"a")], 3, "D2 poll skip or inconsistent poll"),
        ([(2, b"b"), (1, b"a")], 3, "D2 nonmonotonic poll"),
        ([(1, b"a"), (2, b"c")], 3, "D2 poll skip or inconsistent poll"),
        ([(1, b"zzz")], 2, "D2 phantom"),
    ],
)
def test_bad_polls_are_named(records: Log, until: int, rule: str) -> None:
    history, log = _good()
    poll = Poll("m", KEY, 0)
    poll.records, poll.next = records, until
    history.polls.append(poll)
    with pytest.raises(Violation) as caught:
        _judge(history, log)
    assert caught.value.rule == rule


def test_a_group_that_skipped_a_record_is_refused() -> None:
    history, log = _good()
    history.processed[("g", KEY)] = {b"a": 1, b"c": 2}
    with pytest.raises(Violation, match="never processed"):
        history.check_processed(["g"], {KEY: log})


# -- the ghost --------------------------------------------------------------------------------------


def _copies() -> tuple[Truth, Copy, Copy]:
    truth = Truth(KEY, 0)
    one, other = Copy(truth, "b0"), Copy(truth, "b1")
    for copy in (one, other):
        copy.append((0, 2, 1, 11))
        copy.append((2, 3, 1, 12))
    return truth, one, other


def test_a_copy_is_complete_when_it_holds_what_was_committed_anywhere() -> None:
    truth, one, other = _copies()
    one.raise_watermark(3)
    assert truth.end == 3
    assert other.complete
    assert not other.durably_complete
    other.synced = 3
    assert other.durably_complete


def test_a_copy_that_was_cut_below_the_truth_is_incomplete() -> None:
    _truth, one, other = _copies()
    one.raise_watermark(3)
    other.truncate(2, recovered=False)
    assert not other.complete


def test_no_offset_has_two_contents() -> None:
    _truth, one, other = _copies()
    one.raise_watermark(2)
    other.truncate(0, recovered=False)
    other.append((0, 2, 2, 99))
    with pytest.raises(Violation, match="logs match below the high watermark"):
        other.raise_watermark(2)


@pytest.mark.parametrize("value", [4, 1])
def test_a_watermark_is_never_above_the_end_and_never_falls(value: int) -> None:
    _truth, one, _other = _copies()
    one.raise_watermark(2)
    with pytest.raises(Violation):
        one.raise_watermark(value)


def test_nothing_committed_is_cut_without_a_declared_loss() -> None:
    _truth, one, _other = _copies()
    one.raise_watermark(3)
    with pytest.raises(Violation, match="no truncation below the high watermark"):
        one.truncate(2, recovered=False)
    one.truncate(2, recovered=True)


def test_batches_must_follow_each_other() -> None:
    _truth, one, _other = _copies()
    with pytest.raises(Violation, match="contiguity"):
        one.append((4, 5, 1, 1))


def test_what_retention_took_is_excused_and_nothing_else() -> None:
    history, log = _good()
    for start, excused in ((2, True), (1, False)):
        rest = [record for record in log if record[1] != b"a"]
        if excused:
            history.check({KEY: [("b0", rest)]}, {KEY: []}, {KEY: start})
            continue
        with pytest.raises(Violation, match="lost write"):
            history.check({KEY: [("b0", rest)]}, {KEY: []}, {KEY: start})


def test_one_batch_of_a_producer_is_committed_once() -> None:
    truth = Truth(KEY, 0)
    truth.named = {(0, 11): (7, 0, 0), (1, 11): (7, 0, 0)}
    truth.extend((0, 1, 1, 11))
    with pytest.raises(Violation, match="committed again"):
        truth.extend((1, 2, 1, 11))


def test_a_batch_that_retention_took_may_come_again() -> None:
    truth = Truth(KEY, 0)
    truth.named = {(0, 11): (7, 0, 0), (1, 11): (7, 0, 0)}
    truth.extend((0, 1, 1, 11))
    truth.extend((1, 2, 1, 11), log_start=1)


# -- recoveries -------------------------------------------------------------------------------------


def _log(truth: Truth, name: str, epoch: int, *, start: int = 0, end: int) -> Copy:
    """A log of one-record batches of one epoch; logs of one epoch are the same as far as they go."""
    copy = Copy(truth, name)
    copy.load(start, [(at, at + 1, epoch, 100 * epoch + at) for at in range(start, end)], synced=True)
    return copy


def test_a_recovery_gives_up_what_the_chosen_log_does_not_hold() -> None:
    truth = Truth(KEY, 0)
    _log(truth, "b0", 1, end=6).raise_watermark(6)
    short = _log(truth, "b1", 1, end=2)
    assert truth.recovered_from(short, 3)
    assert (truth.end, truth.lost) == (2, [(2, 6)])
    assert not truth.recovered_from(short, 3)


def test_a_log_that_is_found_again_is_committed_as_far_as_its_replica_knew() -> None:
    truth = Truth(KEY, 0)
    long, short = _log(truth, "b0", 1, end=6), _log(truth, "b1", 1, end=2)
    long.raise_watermark(5)
    truth.recovered_from(short, 3)
    assert not truth.recovered_from(long, 3)
    assert truth.end == 5
    other = _log(truth, "b2", 1, end=4)
    assert not other.complete
    with pytest.raises(Violation, match="high watermark <= log end"):
        other.raise_watermark(5)


def test_a_log_that_is_found_again_may_begin_above_what_was_committed_since() -> None:
    truth = Truth(KEY, 0)
    long, short = _log(truth, "b0", 1, start=4, end=9), _log(truth, "b1", 2, end=3)
    truth.lost.append((0, 9))
    short.raise_watermark(3)
    assert not long.complete  # it begins above what it would have to hold
    with pytest.raises(Violation, match="watermark inside a batch"):
        _log(truth, "b2", 1, start=4, end=9).raise_watermark(9)
    truth.recovered_from(long, 3)
    long.raise_watermark(9)
    assert truth.end == 9
    assert not short.complete


def test_nothing_comes_back_without_a_declared_loss() -> None:
    truth = Truth(KEY, 0)
    long = _log(truth, "b0", 1, end=6)
    long.watermark = 6  # it says so, and nobody has committed it
    truth.recovered_from(long, 3)
    assert truth.end == 0


@pytest.mark.parametrize(
    ("chosen", "other", "good"),
    [((1, 6), (1, 5), True), ((2, 5), (1, 6), True), ((1, 5), (1, 6), False), ((1, 6), (2, 5), False)],
)
def test_recovery_without_force_must_keep_the_longest_log(
    chosen: tuple[int, int], other: tuple[int, int], good: bool
) -> None:
    truth = Truth(KEY, 0)
    copies = [_log(truth, f"b{number}", epoch, end=end) for number, (epoch, end) in enumerate((chosen, other))]
    if good:
        keeps_the_longest(copies[0], copies[1:])
        return
    with pytest.raises(Violation, match="C7"):
        keeps_the_longest(copies[0], copies[1:])
    with pytest.raises(Violation, match="C7"):
        keeps_the_longest(Copy(truth, "b2"), copies[1:])


def test_only_what_a_recovery_brought_need_not_be_processed() -> None:
    """Log b1 parts from the truth at 2 with records of epoch 1; what is written after its recovery is due."""
    truth = Truth(KEY, 0)
    _log(truth, "b0", 2, end=6).raise_watermark(6)
    stale = Copy(truth, "b1")
    stale.load(0, [*((at, at + 1, 2, 200 + at) for at in (0, 1)), (2, 4, 1, 99)], synced=True)
    assert truth.recovered_from(stale, 3)
    stale.append((4, 5, 3, 98))
    stale.raise_watermark(5)
    assert [truth.was_brought(offset) for offset in range(5)] == [False, False, True, True, False]
    assert truth.recovered_from(_log(truth, "b2", 2, end=2), 4)
    later = _log(truth, "b3", 2, end=2)
    later.append((2, 3, 4, 97))
    later.raise_watermark(3)
    assert not truth.was_brought(2), "something else stands there now"


def test_a_log_that_loses_only_its_end_brings_nothing() -> None:
    truth = Truth(KEY, 0)
    _log(truth, "b0", 1, end=6).raise_watermark(6)
    assert truth.recovered_from(_log(truth, "b1", 1, end=2), 3)
    assert truth.brought == []


# -- around the cores -------------------------------------------------------------------------------


@pytest.mark.parametrize(("lossy", "known", "excused"), [((2, 3), 2, True), ((2, 3), 3, True), ((3,), 2, False)])
def test_only_a_life_that_began_with_a_loss_may_stop_being_a_candidate(
    lossy: tuple[int, ...], known: int, excused: bool
) -> None:
    """It may have died again before the coordinator heard of the first."""
    world = World(parse_configs("2/1/replicated")[0], 1)
    broker = world.add_broker()
    broker.disk.join(1, "c")
    world.joined(broker)
    for incarnation in lossy:
        broker.disk.incarnation = incarnation
        world.checks.broker_started(broker, RESTART_OS_CRASH)
    meta = BrokerMeta(1, "", "", storage_id=broker.disk.storage_id, incarnation=known)
    world.checks.brokers[1] = BrokerRecord(meta)
    old = PartitionMeta("t", 0, (1, 2), 1, 1, 1, (1,))
    new = PartitionMeta("t", 0, (1, 2), 0, 2, 2, ())
    if excused:
        world.checks._check_somebody_left(old, new)
        return
    with pytest.raises(Violation, match="C8 the last whole replica stays a candidate"):
        world.checks._check_somebody_left(old, new)


@pytest.mark.parametrize(("role", "written"), [("primary", [[7, 0]]), ("stopped", [])])
def test_nothing_of_a_stopped_replica_is_checkpointed(role: str, written: list[list[int]]) -> None:
    """Its core may know a high watermark that nobody was told of, as in the product's upkeep."""
    found: list[list[int]] = []
    world = World(parse_configs("2/1/fsync")[0], 1)
    replicas = Replicas(world.add_broker())
    world.engine.now_us = 5_000_000
    hosted = SimpleNamespace(
        core=SimpleNamespace(role=role, high_watermark=[7, 0]),
        files=SimpleNamespace(checkpoint=found.append),
        marked_ms=0,
    )
    replicas._checkpoint(hosted)  # type: ignore[arg-type]
    assert found == written
