"""Acknowledgements that nobody waits for linger for others; those that somebody may wait for do not."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from ferryline.core.leases import SETTLED
from ferryline.core.receiving import BLOCKED_MS, CONTENDED_MS, LATE_MS, LINGER_LEASE_MS
from ferryline.core.receiving_events import SendReceive, SendSettle, SettleAnswered, SettleAsked, Settled, TimePassed
from ferryline.core.settling import HOLD_MS, HOLD_RECORDS, LINGER_MS
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.queue_messages import ACK, EXTEND, NACK, REJECT, RELEASE, SettleResult
from ferryline.queues.buffer import Buffer
from unit.sdk_receiver_story import A, story


def test_what_nobody_waits_for_leaves_together_after_a_moment() -> None:
    here = story()
    lease = here.one_lease(10, 11, 12)
    here.settle(lease, ACK, 0, idle=True)
    assert not here.pick(SendSettle)
    assert here.core.next_deadline_ms() == here.now + LINGER_MS
    here.now += LINGER_MS - 1
    here.settle(lease, ACK, 1, idle=True)
    assert not here.pick(SendSettle)
    here.do(TimePassed(), 1)
    sent = here.one(SendSettle)
    assert sorted(entry.offsets for entry in sent.entries) == [[10], [11]], "the second leaves with the first"
    assert sent.patient
    here.do(SettleAnswered(sent.frame, [SettleResult(0), SettleResult(1)]))
    assert lease.indexes(SETTLED) == [0, 1]


def test_who_does_something_else_meanwhile_may_wait_for_it() -> None:
    here = story()
    lease = here.one_lease(10)
    here.settle(lease, ACK, 0)
    assert not here.one(SendSettle).patient


def test_one_that_somebody_waits_for_takes_along_what_lingers_and_is_not_patient() -> None:
    here = story()
    lease = here.one_lease(10, 11)
    here.settle(lease, ACK, 0, idle=True)
    here.settle(lease, ACK, 1)
    sent = here.one(SendSettle)
    assert [entry.offsets for entry in sent.entries] == [[10], [11]]
    assert not sent.patient


@pytest.mark.parametrize("action", [NACK, REJECT, RELEASE, EXTEND])
def test_only_acknowledgements_linger(action: str) -> None:
    here = story()
    lease = here.one_lease(10, 11)
    here.settle(lease, ACK, 0, idle=True)
    here.settle(lease, action, 1, idle=True)
    sent = here.one(SendSettle)
    assert [entry.action for entry in sent.entries] == [ACK, action]
    assert not sent.patient


def test_many_do_not_linger() -> None:
    here = story(prefetch=2 * HOLD_RECORDS)
    lease = here.one_lease(*range(HOLD_RECORDS))
    here.settle(lease, ACK, *range(HOLD_RECORDS), idle=True)
    assert here.one(SendSettle)


def test_what_lingers_waits_for_the_answer_to_those_before_it_too_and_no_longer_than_that() -> None:
    here = story()
    lease = here.one_lease(10, 11, 12)
    here.settle(lease, ACK, 0)
    first = here.one(SendSettle).frame
    here.settle(lease, ACK, 1, idle=True)
    here.do(SettleAnswered(first, [SettleResult(0)]), 1)
    assert not here.pick(SendSettle), "it lingers on"
    here.do(TimePassed(), LINGER_MS - 1)
    second = here.one(SendSettle).frame
    here.settle(lease, ACK, 2, idle=True)
    here.do(TimePassed(), max(LINGER_MS, HOLD_MS) - 1)
    assert not here.pick(SendSettle)
    here.do(SettleAnswered(second, [SettleResult(0)]), 1)
    assert here.one(SendSettle)


@pytest.mark.parametrize("ordering", ["key", "partition"])
def test_where_records_wait_behind_others_every_acknowledgement_may_be_waited_for(ordering: str) -> None:
    here = story(ordering=ordering)
    asks = [ask for ask in here.pick(SendReceive) if A in ask.keys]
    delivery = msgspec.structs.replace(here.delivery(A, 1, [10, 11]), contended=ordering == "key")
    lease, later = here.receive(asks[0], delivery, here.delivery(A, 2, [20]))
    here.hand_out(lease)
    here.hand_out(later)
    here.settle(lease, ACK, 0, idle=True)
    sent = here.one(SendSettle)
    assert not sent.patient
    here.do(SettleAnswered(sent.frame, [SettleResult(0)]), CONTENDED_MS)
    here.settle(later, ACK, 0, idle=True)
    assert len(here.pick(SendSettle)) == (ordering == "partition"), "of keys that do not come again it is forgotten"
    for sent in here.pick(SendSettle):
        here.do(SettleAnswered(sent.frame, [SettleResult(0)]))
    here.settle(lease, ACK, 1, idle=True)
    assert here.one(SendSettle), "of its own lane somebody may wait, however long that took"


def test_what_lingers_follows_its_partition_to_another_broker() -> None:
    here = story()
    lease = here.one_lease(10)
    here.settle(lease, ACK, 0, idle=True)
    here.move(A, 2)
    here.do(TimePassed(), LINGER_MS)
    assert here.one(SendSettle).broker == 2


async def test_records_are_wanted_while_somebody_waits_and_none_are_here() -> None:
    buffer = Buffer(story().core.table, lambda lease: None)
    assert not buffer.wanted
    waiting = asyncio.create_task(buffer.news(None))
    await asyncio.sleep(0)
    assert buffer.wanted
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not buffer.wanted


def test_one_whose_time_passed_while_the_application_blocked_the_loop_is_sent_and_not_given_up() -> None:
    here = story()
    lease = here.one_lease(10)
    here.settle(lease, ACK, 0, idle=True)
    here.do(TimePassed(), 3 * lease.lease_ms)
    sent = here.one(SendSettle)
    assert not here.pick(Settled)
    here.do(SettleAnswered(sent.frame, [SettleResult(0)]))
    assert [effect.error for effect in here.pick(Settled)] == [None]


def test_nothing_lingers_where_the_application_blocks_the_loop() -> None:
    here = story()
    lease = here.one_lease(10, 11, 12)
    here.settle(lease, ACK, 0, idle=True)
    here.do(TimePassed(), LINGER_MS + LATE_MS + 1)
    here.do(SettleAnswered(here.one(SendSettle).frame, [SettleResult(0)]))
    here.settle(lease, ACK, 1, idle=True)
    here.do(SettleAnswered(here.one(SendSettle).frame, [SettleResult(0)]), BLOCKED_MS)
    here.settle(lease, ACK, 2, idle=True)
    assert not here.pick(SendSettle)


def test_nothing_lingers_when_its_lease_ends_soon() -> None:
    here = story()
    lease = here.one_lease(10)
    lease.deadline_ms = here.now + LINGER_LEASE_MS
    here.settle(lease, ACK, 0, idle=True)
    assert here.one(SendSettle)


def test_whoever_waits_for_all_hurries_what_lingers() -> None:
    here = story()
    lease = here.one_lease(10)
    here.settle(lease, ACK, 0, idle=True)
    here.do(SettleAsked([], idle=False))
    assert here.one(SendSettle)


def test_a_patient_frame_holds_nothing_up() -> None:
    here = story()
    lease = here.one_lease(10, 11)
    here.settle(lease, ACK, 0, idle=True)
    here.do(TimePassed(), LINGER_MS)
    assert here.one(SendSettle).patient
    here.settle(lease, ACK, 1)
    assert here.one(SendSettle), "the broker may sit on the one before for a while"


def test_what_lost_its_primary_while_it_lingered_goes_to_the_next_one_alone() -> None:
    here = story()
    lease = here.one_lease(10, 11)
    here.settle(lease, ACK, 0, idle=True)
    here.move(A, NO_BROKER)
    here.do(TimePassed(), LINGER_MS)
    assert not here.pick(SendSettle)
    here.move(A, 2)
    assert [(sent.broker, [entry.offsets for entry in sent.entries]) for sent in here.pick(SendSettle)] == [(2, [[10]])]
