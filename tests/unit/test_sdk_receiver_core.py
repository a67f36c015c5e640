"""The receiver core: whom it asks for how many, what it tells primaries, what it keeps."""

from __future__ import annotations

from typing import Any

from ferryline.core.asking import PAUSE_MS, SHORT_WAIT_MS, WAIT_MS
from ferryline.core.leases import LOST, WAITING, renewals
from ferryline.core.receiving import SURPLUS_MS
from ferryline.core.receiving_events import (
    Closed,
    ForgetReceive,
    GiveBack,
    KeepAnswered,
    Parting,
    RaiseError,
    Received,
    ReceiveFailed,
    RecordsLost,
    RefreshMetadata,
    RoutesChanged,
    SendKeep,
    SendReceive,
    SendSettle,
    SessionLost,
    SettleAnswered,
    Settled,
    SettleFailed,
    Stopped,
    TimePassed,
)
from ferryline.protocol.errors import (
    ClientClosed,
    ConnectionFailed,
    ConnectionLost,
    Forbidden,
    InvalidArgument,
    NotPrimary,
    OutcomeUnknown,
    PrimaryNotAvailable,
    RequestTimedOut,
    UnknownGroup,
    UnknownTopic,
)
from ferryline.protocol.queue_messages import ACK, RELEASE, Delivery, SettleResult
from unit.sdk_receiver_story import LEASE_MS, A, B, C, D, Story, story

# -- whom to ask for how many --------------------------------------------------------------------------


def test_what_is_free_is_split_over_the_brokers_that_lead_partitions() -> None:
    brokers = Story({A: (1, 1), B: (2, 1), C: (1, 1), D: (3, 1)})
    asked = {effect.broker: (effect.keys, effect.records_max, effect.wait_ms) for effect in brokers.pick(SendReceive)}
    assert asked == {1: ([A, C], 10, SHORT_WAIT_MS), 2: ([B], 10, SHORT_WAIT_MS), 3: ([D], 10, SHORT_WAIT_MS)}


def test_each_broker_is_asked_for_one_at_least() -> None:
    brokers = Story({A: (1, 1), B: (2, 1), C: (3, 1)}, prefetch=1)
    assert [effect.records_max for effect in brokers.pick(SendReceive)] == [1, 1, 1]


def test_what_is_asked_for_and_what_is_unsettled_is_prefetch_together() -> None:
    here = story(prefetch=10)
    (lease,) = here.receive(here.one(SendReceive), here.delivery(A, 1, [0, 1, 2, 3]))
    second = here.one(SendReceive)
    assert second.records_max == 6
    here.receive(second, here.delivery(A, 2, [4, 5, 6, 7, 8, 9]))
    assert here.pick(SendReceive) == [], "all of prefetch is here"
    here.hand_out(lease)
    here.settle(lease, ACK, 0, 1)
    assert here.one(SendReceive).records_max == 2, "what is being settled is not in the application's hands"


def test_a_broker_that_had_nothing_leaves_its_share_to_the_others() -> None:
    brokers = Story({A: (1, 1), B: (2, 1)})
    quiet, busy = brokers.pick(SendReceive)
    brokers.receive(quiet, after_ms=SHORT_WAIT_MS)
    again = brokers.one(SendReceive)
    assert (again.broker, again.records_max, again.wait_ms) == (1, 1, WAIT_MS)
    (lease,) = brokers.receive(busy, brokers.delivery(B, 1, list(range(15))))
    assert brokers.one(SendReceive).records_max == 30 - 15 - 1
    brokers.receive(again, brokers.delivery(A, 1, [0]))
    assert brokers.pick(SendReceive)[0].wait_ms == SHORT_WAIT_MS, "it has something again"
    assert lease.waiting == 15


def test_a_broker_that_answers_nothing_without_waiting_is_not_asked_again_at_once() -> None:
    here = story()
    here.receive(here.one(SendReceive), after_ms=1)
    assert here.pick(SendReceive) == []
    here.do(TimePassed(), (here.core.next_deadline_ms() or 0) - here.now)
    assert here.one(SendReceive).broker == 1


def test_a_request_that_stands_is_not_repeated_and_counts_for_what_is_left() -> None:
    here = story(prefetch=8)
    ask = here.one(SendReceive)
    assert ask.records_max == 8
    (first,) = here.receive(ask, here.delivery(A, 1, [1]), more=True)
    assert here.pick(SendReceive) == []
    assert len(here.receive(ask, here.delivery(A, 2, [2]), more=True)) == 1
    here.hand_out(first)
    here.settle(first, ACK, 0)
    assert here.pick(SendReceive) == [], "though there is room again"
    here.receive(ask, here.delivery(A, 3, [3]))
    again = here.one(SendReceive)
    assert (again.records_max, again.ask > ask.ask) == (6, True), "two are here, one is done"
    assert here.receive(ask, here.delivery(A, 4, [4]), more=True) == [], "its last answer was given"


def test_a_request_that_ends_after_it_has_brought_something_was_not_in_vain() -> None:
    here = Story({A: (1, 1), B: (2, 1)}, prefetch=20)
    asks = {ask.broker: ask for ask in here.pick(SendReceive)}
    here.receive(asks[1], here.delivery(A, 1, [1]), more=True)
    here.receive(asks[1], after_ms=10)
    again = here.one(SendReceive)
    assert (again.broker, again.records_max > 1) == (1, True), "at once, and for its share"


def test_bytes_that_wait_here_are_bounded_too() -> None:
    here = story(prefetch_bytes=100, prefetch=100)
    (lease,) = here.receive(here.one(SendReceive), here.delivery(A, 1, list(range(10))))
    assert here.pick(SendReceive) == []
    assert here.core.full
    here.hand_out(lease)
    here.do(TimePassed())
    assert here.one(SendReceive).records_max == 90


def test_a_partition_that_is_added_is_asked_for_at_once_beside_the_others() -> None:
    here = story()
    first = here.one(SendReceive)
    here.routes[B] = (1, 1)
    here.do(RoutesChanged(dict(here.routes)))
    second = here.one(SendReceive)
    assert second.keys == [A, B]
    here.receive(first)
    assert here.pick(SendReceive) == [], "the later one stands"


def test_one_refused_partition_waits_and_the_others_are_asked_again() -> None:
    here = Story({A: (1, 1), B: (1, 1)})
    refused = Delivery(*A, error=PrimaryNotAvailable("not yet").info())
    here.receive(here.one(SendReceive), refused)
    assert here.one(SendReceive).keys == [B]
    assert here.pick(RefreshMetadata)
    assert not here.pick(RaiseError)
    here.do(TimePassed(), 20)
    assert here.one(SendReceive).keys == [A, B]


def test_a_refusal_that_stands_is_raised_and_asked_again_after_a_pause() -> None:
    here = story()
    here.receive(here.one(SendReceive), Delivery(*A, error=InvalidArgument("ordering: ...").info()))
    assert isinstance(here.one(RaiseError).error, InvalidArgument)
    assert here.pick(SendReceive) == []
    here.do(TimePassed(), PAUSE_MS - 1)
    assert here.pick(SendReceive) == []
    here.do(TimePassed(), 1)
    assert here.one(SendReceive)


def test_a_whole_request_that_is_refused_is_raised_too() -> None:
    here = story()
    here.do(ReceiveFailed(here.one(SendReceive).ask, Forbidden("no")))
    assert isinstance(here.one(RaiseError).error, Forbidden)


def test_a_broker_that_cannot_be_reached_is_tried_again_and_nothing_is_raised() -> None:
    here = story()
    for _ in range(20):
        here.do(ReceiveFailed(here.one(SendReceive).ask, ConnectionFailed("refused")))
        assert here.pick(RefreshMetadata)
        assert not here.pick(RaiseError)
        assert not here.pick(SendReceive)
        due = here.core.next_deadline_ms()
        assert due is not None
        assert 1 <= due - here.now <= 500, "within two seconds of its return"
        here.do(TimePassed(), due - here.now)
        assert not here.pick(SendKeep), "nothing was sent, so nothing was leased"


def test_a_topic_that_is_deleted_is_said_once_and_nothing_is_asked() -> None:
    here = story()
    ask = here.one(SendReceive)
    here.do(RoutesChanged({}))
    assert isinstance(here.one(RaiseError).error, UnknownTopic)
    assert here.one(ForgetReceive).ask == ask.ask
    here.do(RoutesChanged({}))
    assert here.effects == []


# -- what is told to a new primary ---------------------------------------------------------------------


def test_a_new_primary_is_told_what_is_held_before_it_is_asked() -> None:
    brokers = Story({A: (1, 1), B: (2, 1)})
    first, second = brokers.pick(SendReceive)
    (lease,) = brokers.receive(first, brokers.delivery(A, 7, [0, 1]))
    brokers.receive(second, brokers.delivery(B, 3, [0]))
    brokers.move(A, 2)
    keep = brokers.one(SendKeep)
    assert (keep.broker, keep.entries) == (2, [(A, [7])])
    assert all(A not in ask.keys for ask in brokers.pick(SendReceive)), "not before it knows"
    brokers.do(KeepAnswered(keep.keep))
    assert brokers.one(SendReceive).keys == [A, B]
    assert lease.open == 2


def test_a_lease_is_named_while_any_of_its_records_is_open() -> None:
    here = story()
    lease = here.one_lease(0, 1)
    number = here.settle(lease, ACK, 0, 1)
    here.move(A, 2)
    assert here.one(SendKeep).entries == [(A, [1])], "an ack on its way must not find the record given away"
    here.do(KeepAnswered(here.one(SendKeep).keep))
    frames = here.core._settling._frames
    here.do(SettleAnswered(max(frames), [SettleResult(0)]))
    assert here.one(Settled).number == number
    here.move(A, 1)
    assert here.one(SendKeep).entries == [(A, [])]


def test_a_new_session_is_told_what_is_held() -> None:
    here = story()
    here.one_lease(0, 1)
    parked = here.one(SendReceive)
    here.do(ReceiveFailed(parked.ask, ConnectionLost("gone")))
    here.do(SessionLost(1))
    due = here.core.next_deadline_ms()
    here.do(TimePassed(), (due or 0) - here.now)
    assert here.one(SendKeep).entries == [(A, [1])]
    assert not here.pick(SendReceive)


def test_a_session_that_ended_while_nothing_was_asked_is_told_too() -> None:
    here = story(prefetch=1)
    here.one_lease(0)
    assert here.pick(SendReceive) == []
    here.do(SessionLost(1))
    assert here.one(SendKeep).entries == [(A, [1])]


def test_an_answer_that_was_lost_may_have_leased_something() -> None:
    here = story()
    here.do(ReceiveFailed(here.one(SendReceive).ask, RequestTimedOut("no answer")))
    here.do(TimePassed(), 1_000)
    assert here.one(SendKeep).entries == [(A, [])]
    assert not here.pick(SendReceive)


def test_nothing_is_told_where_nothing_was_asked() -> None:
    here = story(prefetch=1)
    lease = here.one_lease(0)
    here.routes[B] = (2, 1)
    here.do(RoutesChanged(dict(here.routes)))
    here.move(B, 3)
    assert here.effects == []
    assert lease.open == 1


def test_a_keep_that_fails_is_repeated_until_it_is_answered() -> None:
    here = story()
    here.one_lease(0)
    here.move(A, 2)
    for error in (ConnectionFailed("refused"), NotPrimary("not yet"), RequestTimedOut("late")):
        keep = here.one(SendKeep)
        here.do(KeepAnswered(keep.keep, errors={A: error}))
        assert not here.pick(SendReceive)
        assert not here.pick(SendKeep)
        here.do(TimePassed(), 500)
    here.do(KeepAnswered(here.one(SendKeep).keep, UnknownGroup("nobody has received here")))
    assert here.one(SendReceive), "then nothing is leased to us, either"


def test_an_answer_to_an_overtaken_keep_changes_nothing() -> None:
    here = story()
    here.one_lease(0)
    here.move(A, 2)
    old = here.one(SendKeep)
    here.move(A, 3)
    new = here.one(SendKeep)
    here.do(KeepAnswered(old.keep))
    assert here.effects == []
    here.do(KeepAnswered(new.keep))
    assert here.one(SendReceive).broker == 3


def test_a_delivery_that_the_new_primary_was_not_told_of_is_given_back_unseen() -> None:
    here = Story({A: (1, 1), B: (1, 1)})
    parked = here.one(SendReceive)
    here.move(A, 2)
    here.do(KeepAnswered(here.one(SendKeep).keep))
    (lease,) = here.receive(parked, here.delivery(A, 5, [3, 4]), here.delivery(B, 6, [0]))
    assert lease.key == B
    entry = here.one(SendSettle).entries[0]
    assert (entry.partition, entry.lease, entry.action, entry.offsets) == (0, 5, RELEASE, [3, 4])


def test_a_request_at_a_broker_that_leads_nothing_any_more_is_forgotten() -> None:
    here = story(prefetch=4)
    parked = here.one(SendReceive)
    here.move(A, 2)
    assert here.one(ForgetReceive).ask == parked.ask
    here.do(KeepAnswered(here.one(SendKeep).keep))
    assert here.one(SendReceive).records_max == 4, "what was asked for there is free"
    here.do(Received(parked.ask, [here.delivery(A, 1, [0])]))
    assert here.effects == []


# -- leases --------------------------------------------------------------------------------------------


def test_a_lease_that_has_ended_by_our_clock_is_not_handed_out() -> None:
    here = story()
    (lease,) = here.receive(here.one(SendReceive), here.delivery(A, 1, [0, 1]))
    table = here.core.table
    assert table.hand_out(lease, 0, lease.deadline_ms - 1)
    assert not table.hand_out(lease, 1, lease.deadline_ms)
    assert lease.deadline_ms <= here.now + LEASE_MS, "never after the broker's"


def test_records_that_a_renewal_found_lost_are_not_handed_out() -> None:
    here = story()
    (lease,) = here.receive(here.one(SendReceive), here.delivery(A, 1, [5, 6, 7]))
    here.core.table.hand_out(lease, 0, here.now)
    here.do(RecordsLost(lease, [5, 6, 99]))
    assert list(lease.states) == [LOST, LOST, WAITING]
    assert here.core.table.unsettled == 1


def test_leases_are_renewed_after_a_third_of_their_time() -> None:
    here = story()
    lease = here.one_lease(0, 1)
    table = here.core.table

    def due(now_ms: int, max_ms: int = 3_600_000) -> Any:
        return renewals(table.held.values(), table.progress_ms, now_ms, max_ms)

    assert due(lease.renew_at_ms - 1) == []
    (found,) = due(lease.renew_at_ms)
    assert (found.open, found.overdue, found.stuck) == ([0, 1], [], [])
    assert here.now < lease.renew_at_ms <= here.now + LEASE_MS // 3
    lease.prolong(lease.renew_at_ms, LEASE_MS)
    assert due(lease.renew_at_ms - 1) == []
    lease.prolong(here.now, 600_000)
    assert due(here.now + 600_000 - LEASE_MS) == [], "a long extension is not cut short by a renewal"


def test_what_takes_longer_than_max_processing_is_given_up() -> None:
    here = story()
    (lease,) = here.receive(here.one(SendReceive), here.delivery(A, 1, [0, 1, 2]))
    table = here.core.table
    table.hand_out(lease, 0, here.now)
    later = here.now + 100_000
    (found,) = renewals(table.held.values(), table.progress_ms, later, 99_000)
    assert (found.open, found.overdue, found.stuck) == ([], [0], [1, 2]), "the application has taken nothing since"
    lease.deadline_ms = later + 1_000
    table.hand_out(lease, 1, later)
    (found,) = renewals(table.held.values(), table.progress_ms, later, 99_000)
    assert (found.open, found.overdue, found.stuck) == ([1, 2], [0], []), "it goes on, but for the first"


def test_more_than_prefetch_goes_back_to_where_others_get_it() -> None:
    brokers = Story({A: (1, 1), B: (2, 1), C: (3, 1)}, prefetch=1)
    asks = brokers.pick(SendReceive)
    for ask, key in zip(asks, (A, B, C), strict=True):
        brokers.receive(ask, brokers.delivery(key, 1, [0]))
    assert not brokers.pick(GiveBack)
    brokers.do(TimePassed(), SURPLUS_MS + 2)
    assert brokers.one(GiveBack).count == 2


def test_a_surplus_that_was_worked_off_in_time_stays() -> None:
    brokers = Story({A: (1, 1), B: (2, 1)}, prefetch=1)
    first, second = brokers.pick(SendReceive)
    (one,) = brokers.receive(first, brokers.delivery(A, 1, [0]))
    brokers.receive(second, brokers.delivery(B, 1, [0]))
    brokers.hand_out(one)
    brokers.settle(one, ACK, 0)
    brokers.do(TimePassed(), SURPLUS_MS + 2)
    assert not brokers.pick(GiveBack)


# -- the end -------------------------------------------------------------------------------------------


def test_after_a_stop_nothing_is_asked_and_what_still_comes_goes_back() -> None:
    here = story()
    ask = here.one(SendReceive)
    here.do(Stopped())
    here.receive(ask, here.delivery(A, 1, [0, 1]))
    assert not here.pick(SendReceive)
    assert [(entry.action, entry.offsets) for entry in here.one(SendSettle).entries] == [(RELEASE, [0, 1])]


def test_a_stop_ends_what_stands_at_brokers_by_saying_what_is_held() -> None:
    brokers = Story({A: (1, 1), B: (2, 1)})
    asks = {ask.broker: ask for ask in brokers.pick(SendReceive)}
    (lease,) = brokers.receive(asks[1], brokers.delivery(A, 1, [0]), more=True)
    brokers.receive(asks[2], brokers.delivery(B, 1, [0]))
    brokers.do(Stopped())
    keeps = {keep.broker: keep for keep in brokers.pick(SendKeep)}
    assert keeps[1].entries == [(A, [lease.number])]
    brokers.receive(asks[1], brokers.delivery(A, 2, [1]), more=True)
    assert [(entry.action, entry.offsets) for entry in brokers.one(SendSettle).entries] == [(RELEASE, [1])]
    assert not brokers.pick(SendReceive)


def test_parting_tells_every_primary_that_was_asked_that_nothing_is_held() -> None:
    brokers = Story({A: (1, 1), B: (2, 1)})
    brokers.one_lease(0, 1)
    brokers.do(Stopped())
    brokers.do(Parting())
    keeps = {keep.broker: keep for keep in brokers.pick(SendKeep)}
    assert {broker: keep.entries for broker, keep in keeps.items()} == {1: [(A, [])], 2: [(B, [])]}
    brokers.do(KeepAnswered(keeps[1].keep))
    assert not brokers.core.parted
    brokers.do(KeepAnswered(keeps[2].keep, ConnectionLost("gone")))
    assert not brokers.core.parted
    brokers.do(TimePassed(), 20)
    brokers.do(KeepAnswered(brokers.one(SendKeep).keep))
    assert brokers.core.parted


def test_a_close_has_a_last_word_for_everything() -> None:
    here = story()
    lease = here.one_lease(0, 1)
    sent = here.settle(lease, ACK, 0)
    here.do(SettleFailed(here.one(SendSettle).frame, ConnectionFailed("refused")))
    doubtful = here.settle(lease, ACK, 1)
    here.do(Closed())
    assert {effect.number: type(effect.error) for effect in here.pick(Settled)} == {
        sent: ClientClosed,
        doubtful: OutcomeUnknown,
    }
    assert here.core.next_deadline_ms() is None
    here.do(TimePassed(), 10_000)
    assert here.effects == []
