"""How the receiver core settles: frames, repetitions, deadlines, runs."""

from __future__ import annotations

import pytest

from ferryline.core.leases import HANDED, LOST, SETTLED, SETTLING
from ferryline.core.receiving_events import (
    RefreshMetadata,
    RoutesChanged,
    SendReceive,
    SendSettle,
    Settle,
    SettleAnswered,
    SettleAsked,
    Settled,
    SettleFailed,
    TimePassed,
)
from ferryline.core.settling import HOLD_MS, HOLD_RECORDS
from ferryline.protocol.errors import (
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    FerrylineError,
    Forbidden,
    NotPrimary,
    OutcomeUnknown,
    RequestTimedOut,
    UnknownTopic,
)
from ferryline.protocol.queue_messages import ACK, EXTEND, NACK, REJECT, RELEASE, SettleResult
from unit.sdk_receiver_story import A, B, Story, story

# -- settling ------------------------------------------------------------------------------------------


def test_what_is_settled_together_travels_together_to_each_broker() -> None:
    brokers = Story({A: (1, 1), B: (2, 1)})
    first, second = brokers.pick(SendReceive)
    (one,) = brokers.receive(first, brokers.delivery(A, 1, [0, 1]))
    (two,) = brokers.receive(second, brokers.delivery(B, 1, [5]))
    brokers.hand_out(one)
    brokers.hand_out(two)
    for lease, index in ((one, 0), (one, 1), (two, 0)):
        assert brokers.core.table.begin(lease, index)
    brokers.do(
        SettleAsked(
            [
                Settle(1, one, ACK, [0], 9_000),
                Settle(2, two, ACK, [0], 9_000),
                Settle(3, one, NACK, [1], 9_000, 500, "busy", "stack"),
            ]
        )
    )
    sent = {effect.broker: effect.entries for effect in brokers.pick(SendSettle)}
    assert [(e.action, e.offsets, e.receipt, e.delay_ms, e.reason, e.detail) for e in sent[1]] == [
        (ACK, [0], b"r1", -1, "", ""),
        (NACK, [1], b"r1", 500, "busy", "stack"),
    ]
    assert [(e.action, e.offsets) for e in sent[2]] == [(ACK, [5])]


def test_an_answer_settles_all_but_the_stale() -> None:
    here = story()
    lease = here.one_lease(10, 11, 12)
    number = here.settle(lease, ACK, 0, 1, 2)
    here.do(SettleAnswered(here.one(SendSettle).frame, [SettleResult(0, stale=[11], settled=[12])]))
    done = here.one(Settled)
    assert (done.number, done.lost, done.error) == (number, [1], None)
    assert list(lease.states) == [SETTLED, LOST, SETTLED], "settled before is settled"
    assert here.core.table.held == {}
    assert (here.core.table.unsettled, here.core.table.settling) == (0, 0)


def test_a_lost_answer_is_repeated_and_settled_before_counts_as_done() -> None:
    here = story()
    lease = here.one_lease(0)
    here.settle(lease, ACK, 0)
    first = here.one(SendSettle)
    here.do(SettleFailed(first.frame, ConnectionLost("gone")))
    assert not here.pick(Settled)
    here.do(TimePassed(), 20)
    again = here.one(SendSettle)
    assert again.entries == first.entries
    here.do(SettleAnswered(again.frame, [SettleResult(0, settled=[0])]))
    assert (here.one(Settled).lost, list(lease.states)) == ([], [SETTLED])


@pytest.mark.parametrize("action", [NACK, REJECT, RELEASE])
def test_what_was_given_back_by_a_first_copy_may_be_anywhere_by_then(action: str) -> None:
    here = story()
    lease = here.one_lease(0, 1)
    here.settle(lease, action, 0)
    here.do(SettleFailed(here.one(SendSettle).frame, RequestTimedOut("late")))
    here.do(TimePassed(), 20)
    here.do(SettleAnswered(here.one(SendSettle).frame, [SettleResult(0, stale=[0])]))
    assert here.one(Settled).lost == []
    here.settle(lease, action, 1)
    here.do(SettleAnswered(here.one(SendSettle).frame, [SettleResult(0, stale=[1])]))
    assert here.one(Settled).lost == [1], "but not if it was never in doubt"


def test_a_fail_over_moves_settlements_to_the_new_primary_at_once() -> None:
    here = story()
    lease = here.one_lease(0, 1)
    here.settle(lease, ACK, 0)
    old = here.one(SendSettle)
    here.move(A, 2)
    new = here.one(SendSettle)
    assert (new.broker, new.entries) == (2, old.entries)
    here.do(SettleAnswered(old.frame, [SettleResult(0)]))
    assert not here.pick(Settled), "the later answer counts"
    here.do(SettleAnswered(new.frame, [SettleResult(0, settled=[0])]))
    assert here.one(Settled).lost == []


def test_a_settlement_waits_for_a_primary() -> None:
    here = story()
    lease = here.one_lease(0)
    here.routes[A] = (0, 2)
    here.do(RoutesChanged(dict(here.routes)))
    here.settle(lease, ACK, 0)
    assert not here.pick(SendSettle)
    assert here.pick(RefreshMetadata)
    here.move(A, 2)
    assert here.one(SendSettle).broker == 2


def test_a_settlement_ends_at_its_deadline_and_says_what_it_knows() -> None:
    here = story()
    lease = here.one_lease(0, 1, 2)
    deadline_ms = here.now + 1_000
    unsent = here.settle(lease, ACK, 0, deadline_ms=deadline_ms)
    here.do(SettleFailed(here.one(SendSettle).frame, ConnectionFailed("refused")))
    here.routes[A] = (0, 2)
    here.do(RoutesChanged(dict(here.routes)))
    here.do(TimePassed(), 1_000)
    assert [(e.number, type(e.error)) for e in here.pick(Settled)] == [(unsent, DeadlineExceeded)]
    here.move(A, 1)
    doubtful = here.settle(lease, ACK, 1, deadline_ms=here.now + 1_000)
    here.do(TimePassed(), 1_000)
    assert [(e.number, type(e.error)) for e in here.pick(Settled)] == [(doubtful, OutcomeUnknown)]
    assert list(lease.states) == [LOST, LOST, HANDED]


def test_a_settlement_may_outlast_a_short_lease() -> None:
    here = story()
    lease = here.one_lease(0)
    lease.deadline_ms = here.now + 100
    assert here.core.settle_deadline_ms(lease, here.now) == here.now + 10_000
    lease.deadline_ms = here.now + 50_000
    assert here.core.settle_deadline_ms(lease, here.now) == here.now + 50_000


@pytest.mark.parametrize(("error", "ends"), [(Forbidden("no"), True), (NotPrimary("elsewhere"), False)], ids=str)
def test_one_entry_may_be_refused_for_good_or_for_now(error: FerrylineError, ends: bool) -> None:
    here = story()
    lease = here.one_lease(0)
    here.settle(lease, ACK, 0)
    here.do(SettleAnswered(here.one(SendSettle).frame, [SettleResult(0, error=error.info())]))
    assert [type(effect.error) for effect in here.pick(Settled)] == ([type(error)] if ends else [])
    if not ends:
        here.do(TimePassed(), 20)
        assert here.one(SendSettle)


def test_an_entry_without_an_answer_is_asked_again() -> None:
    here = story()
    lease = here.one_lease(0)
    here.settle(lease, ACK, 0)
    here.do(SettleAnswered(here.one(SendSettle).frame, []))
    assert not here.pick(Settled)
    here.do(TimePassed(), 20)
    assert here.one(SendSettle)


def test_a_large_frame_is_split() -> None:
    here = story(prefetch=1_000)
    lease = here.one_lease(*range(400))
    for index in range(400):
        assert here.core.table.begin(lease, index)
    items = [Settle(index + 1, lease, NACK, [index], 9_000, -1, "r", "d" * 4096) for index in range(400)]
    here.do(SettleAsked(items))
    frames = here.pick(SendSettle)
    assert len(frames) > 1
    assert [offset for frame in frames for entry in frame.entries for offset in entry.offsets] == list(range(400))


def test_a_deleted_topic_ends_settlements() -> None:
    here = story()
    lease = here.one_lease(0)
    here.do(RoutesChanged({}))
    here.settle(lease, ACK, 0)
    assert isinstance(here.one(Settled).error, UnknownTopic)


def test_an_extension_moves_the_end_of_the_lease() -> None:
    here = story()
    lease = here.one_lease(0, 1)
    here.now += 5_000
    here.settle(lease, EXTEND, 0, delay_ms=60_000)
    sent = here.now
    here.do(SettleAnswered(here.one(SendSettle).frame, [SettleResult(0)]), 40)
    assert lease.deadline_ms == sent + 60_000
    assert here.core.table.handed == 2
    here.settle(lease, EXTEND, 1, delay_ms=90_000)
    here.do(SettleAnswered(here.one(SendSettle).frame, [SettleResult(0, stale=[1])]))
    assert here.one(Settled).lost == [1]
    assert (lease.deadline_ms, list(lease.states)) == (sent + 60_000, [HANDED, LOST])


# -- runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [NACK, REJECT, RELEASE])
def test_behind_a_record_that_failed_nothing_of_its_run_is_ours(action: str) -> None:
    here = story(ordering="partition")
    (lease,) = here.receive(here.one(SendReceive), here.delivery(A, 1, [0, 1, 2, 3]))
    table = here.core.table
    assert table.hand_out(lease, 0, here.now)
    assert table.hand_out(lease, 1, here.now)
    here.settle(lease, ACK, 0)
    here.settle(lease, action, 1)
    assert [entry.offsets for entry in here.one(SendSettle).entries] == [[1]]
    assert list(lease.states[2:]) == [LOST, LOST]
    assert not table.hand_out(lease, 2, here.now)
    assert table.unsettled == 0


def test_without_a_run_the_others_stay() -> None:
    here = story()
    lease = here.one_lease(0, 1, 2)
    here.settle(lease, NACK, 0)
    assert list(lease.states[1:]) == [HANDED, HANDED]


def test_handlers_that_end_in_any_order_settle_their_own_records_only() -> None:
    """Found by `ferryline chaos`: [1, 0, 3] was taken for records 1 to 3. The answer ended record 2, which another
    frame was settling, and the receiver stopped when that one was answered."""
    here = story()
    lease = here.one_lease(10, 11, 12, 13)
    here.settle(lease, ACK, 1, 0, 3)
    first = here.one(SendSettle).frame
    here.now += HOLD_MS  # the second shall not wait for the first
    here.settle(lease, ACK, 2)
    second = here.one(SendSettle).frame
    here.do(SettleAnswered(first, [SettleResult(0)]))
    assert lease.indexes(SETTLED) == [0, 1, 3]
    here.do(SettleAnswered(second, [SettleResult(0)]))
    assert lease.indexes(SETTLED) == [0, 1, 2, 3]
    assert (here.core.table.held, here.core.table.settling) == ({}, 0)


def test_an_acknowledgement_waits_for_the_answer_to_those_before_it_and_leaves_with_others() -> None:
    here = story()
    lease = here.one_lease(10, 11, 12, 13)
    here.settle(lease, ACK, 0)
    first = here.one(SendSettle).frame
    here.settle(lease, ACK, 1)
    here.settle(lease, ACK, 2)
    assert not here.pick(SendSettle)
    here.do(SettleAnswered(first, [SettleResult(0)]))
    assert [entry.offsets for entry in here.one(SendSettle).entries] == [[11], [12]]
    assert lease.indexes(SETTLED) == [0]


def test_acknowledgements_that_wait_leave_when_the_request_before_them_fails() -> None:
    here = story()
    lease = here.one_lease(10, 11)
    here.settle(lease, ACK, 0)
    first = here.one(SendSettle).frame
    here.settle(lease, ACK, 1)
    here.do(SettleFailed(first, RequestTimedOut("lost")))
    assert [entry.offsets for entry in here.one(SendSettle).entries] == [[11]], "the failed one backs off"


def test_an_acknowledgement_does_not_wait_for_ever() -> None:
    here = story()
    lease = here.one_lease(10, 11)
    here.settle(lease, ACK, 0)
    here.settle(lease, ACK, 1)
    assert here.core.next_deadline_ms() == here.now + HOLD_MS
    here.do(TimePassed(), HOLD_MS - 1)
    assert not here.pick(SendSettle)
    here.do(TimePassed(), 1)
    assert [entry.offsets for entry in here.one(SendSettle).entries] == [[11]]


@pytest.mark.parametrize("action", [NACK, REJECT, RELEASE, EXTEND])
def test_anything_but_an_acknowledgement_leaves_at_once_and_takes_along_what_waits(action: str) -> None:
    here = story()
    lease = here.one_lease(10, 11, 12)
    here.settle(lease, ACK, 0)
    here.settle(lease, ACK, 1)
    here.settle(lease, action, 2)
    entries = here.one(SendSettle).entries
    assert [(entry.action, entry.offsets) for entry in entries] == [(ACK, [11]), (action, [12])]


def test_many_acknowledgements_wait_for_nothing() -> None:
    here = story(prefetch=2 * HOLD_RECORDS)
    lease = here.one_lease(*range(2 * HOLD_RECORDS))
    here.settle(lease, ACK, 0)
    here.settle(lease, ACK, *range(1, HOLD_RECORDS))
    assert not here.pick(SendSettle)
    here.settle(lease, ACK, HOLD_RECORDS)
    assert sum(len(entry.offsets) for entry in here.one(SendSettle).entries) == HOLD_RECORDS


def test_what_waits_follows_its_partition_to_another_broker() -> None:
    here = story()
    lease = here.one_lease(10, 11)
    here.settle(lease, ACK, 0)
    here.settle(lease, ACK, 1)
    here.move(A, 2)
    (sent,) = here.pick(SendSettle)
    assert sent.broker == 2
    assert sorted(entry.offsets for entry in sent.entries) == [[10], [11]]


@pytest.mark.parametrize("indexes", [[1, 0, 3], [3, 1], [0, 2, 3], [0, 1, 2, 3], [2]])
def test_records_that_are_begun_together_are_those_that_were_named(indexes: list[int]) -> None:
    here = story()
    lease, table = here.one_lease(10, 11, 12, 13), here.core.table
    assert table.begin_all(lease, indexes) == []
    assert lease.indexes(SETTLING) == sorted(indexes)
    assert table.begin_all(lease, indexes) == indexes, "they are being settled already"
    table.end_all(lease, indexes, SETTLED)
    assert lease.indexes(SETTLED) == sorted(indexes)
    assert lease.indexes(HANDED) == sorted(set(range(4)) - set(indexes))
