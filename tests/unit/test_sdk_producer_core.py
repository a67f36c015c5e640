"""The producer core: order is kept, every batch settles once, doubt is told as doubt."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.core.producer import (
    BatchAnswered,
    BatchClosed,
    Closed,
    CompleteBatch,
    Effect,
    FailBatch,
    ProducerCore,
    RepartitionBatch,
    RouteChanged,
    SendBatch,
    SessionLost,
    TimePassed,
)
from ferryline.core.retry import Backoff, Jitter
from ferryline.protocol.errors import (
    ClientClosed,
    CommitUnknown,
    ConnectionFailed,
    DeadlineExceeded,
    FerrylineError,
    NotEnoughReplicas,
    NotPrimary,
    OutcomeUnknown,
    OutOfOrderSequence,
    RecordTooLarge,
    ShuttingDown,
    StalePartitioning,
    UnknownProducer,
    UnknownTopic,
)
from unit.sdk_producer_driver import DELIVERY_MS, KEY, Driver, numbers


def test_at_most_five_batches_are_on_their_way_and_sequences_count_records() -> None:
    driver = Driver()
    sends = driver.close(7, records=10)
    assert numbers(sends) == [1, 2, 3, 4, 5]
    assert [send.sequence for send in sends] == [0, 10, 20, 30, 40]
    assert not driver.core.room(KEY)
    assert numbers(driver.ack(sends[0])) == [6]
    assert driver.completed == [1]


def test_a_batch_that_is_not_full_grows_while_one_is_on_its_way() -> None:
    driver = Driver()
    assert driver.core.room(KEY)
    (first,) = driver.close()
    assert not driver.core.room(KEY)
    driver.ack(first)
    assert driver.core.room(KEY)


def test_the_window_is_measured_from_the_lowest_unsettled_batch_and_not_by_their_count() -> None:
    driver = Driver()
    sends = driver.close(7)
    for send in sends[1:5]:
        assert driver.ack(send) == []  # batch 1 is unsettled: its neighbours must stay among the broker's last five
    assert numbers(driver.ack(sends[0])) == [6, 7]


def test_a_sequence_wraps_at_two_to_the_31() -> None:
    driver = Driver()
    first = driver.close(records=2**31 - 3)[0]
    second = driver.close(records=5)[0]
    third = driver.close(records=1)[0]
    assert (first.sequence, second.sequence, third.sequence) == (0, 2**31 - 3, 2)


def test_a_refused_batch_is_sent_again_before_any_later_one_and_with_the_same_identity() -> None:
    driver = Driver()
    sends = driver.close(3)
    assert driver.refuse(sends[0], NotEnoughReplicas()) == []
    assert driver.refuse(sends[1], OutOfOrderSequence()) == []
    assert driver.refuse(sends[2], OutOfOrderSequence()) == []
    again = driver.later()
    assert numbers(again) == [1, 2, 3]
    assert [(s.pid, s.pepoch, s.sequence) for s in again] == [(s.pid, s.pepoch, s.sequence) for s in sends]
    assert not driver.failed


def test_nothing_new_is_sent_while_an_earlier_batch_waits_for_its_retry() -> None:
    driver = Driver()
    driver.refuse(driver.close()[0], NotEnoughReplicas())
    assert driver.close(2) == []
    assert numbers(driver.later()) == [1, 2, 3]


def test_a_new_primary_gets_everything_unsettled_at_once_and_in_order() -> None:
    driver = Driver()
    driver.close(3)
    again = driver.do(RouteChanged(KEY, 2, 2))  # the old primary may be paused: its answers are not waited for
    assert numbers(again) == [1, 2, 3]
    assert {send.broker for send in again} == {2}


def test_an_answer_of_the_old_primary_still_settles_a_batch() -> None:
    driver = Driver()
    first = driver.close()[0]
    second = driver.do(RouteChanged(KEY, 2, 2))[0]
    driver.ack(first)
    assert driver.completed == [1]
    driver.ack(second)
    assert driver.completed == [1]


def test_an_older_route_is_ignored() -> None:
    driver = Driver(broker=2, epoch=5)
    driver.close()
    assert driver.do(RouteChanged(KEY, 1, 4)) == []


def test_a_refusal_that_names_the_new_primary_is_followed_without_waiting_for_metadata() -> None:
    driver = Driver()
    sends = driver.close(2)
    again = driver.refuse(sends[0], NotPrimary("moved", primary=3, epoch=2))
    assert numbers(again) == [1, 2]
    assert {send.broker for send in again} == {3}


def test_a_hint_of_an_older_epoch_is_not_followed() -> None:
    driver = Driver(epoch=5)
    sends = driver.close()
    assert driver.refuse(sends[0], NotPrimary("moved", primary=3, epoch=5)) == []
    assert driver.refreshes == 1


def test_a_lost_session_is_retried_within_tens_of_ms_and_refreshes_metadata() -> None:
    driver = Driver()
    sends = driver.close(2)
    assert driver.do(SessionLost(1)) == []
    assert driver.refreshes == 1
    started = driver.now
    again = driver.later()
    assert driver.now - started <= 20
    assert numbers(again) == [1, 2]
    assert [s.sequence for s in again] == [s.sequence for s in sends]


def test_several_refusals_of_one_round_count_as_one_failure() -> None:
    driver = Driver()
    for send in driver.close(5):
        driver.refuse(send, NotPrimary())
    started = driver.now
    driver.later()
    assert driver.now - started <= 10


def test_backoff_stays_bounded_when_a_partition_has_no_primary() -> None:
    driver = Driver(broker=0)
    driver.close()
    waits = []
    while driver.now < 60_000:
        before = driver.now
        driver.later()
        waits.append(driver.now - before)
    assert all(1 <= wait <= 1_000 for wait in waits)
    assert driver.refreshes >= 50
    assert numbers(driver.do(RouteChanged(KEY, 1, 9))) == [1]


def test_a_definite_refusal_fails_a_batch_that_was_never_in_doubt() -> None:
    driver = Driver()
    driver.refuse(driver.close()[0], RecordTooLarge("value: too large"))
    assert isinstance(driver.failed[1], RecordTooLarge)


def test_a_definite_refusal_leaves_an_earlier_doubtful_attempt_open_until_the_deadline() -> None:
    driver = Driver()
    driver.close()
    driver.do(SessionLost(1))
    driver.refuse(driver.later()[0], RecordTooLarge())
    assert not driver.failed  # the first attempt may have been applied
    while not driver.failed:
        driver.later()
        if driver.sent[-1].attempt and not driver.failed:
            driver.refuse(driver.sent[-1], RecordTooLarge())
    assert isinstance(driver.failed[1], OutcomeUnknown)
    assert driver.now == 1_000 + DELIVERY_MS


def test_an_indefinite_refusal_is_retried_and_may_still_be_acknowledged() -> None:
    driver = Driver()
    driver.refuse(driver.close()[0], CommitUnknown())
    driver.ack(driver.later()[0], base_offset=5)
    assert driver.completed == [1]


def test_a_batch_never_sent_fails_definitely_at_its_deadline() -> None:
    driver = Driver(broker=0)
    driver.close()
    while not driver.failed:
        driver.later()
    assert isinstance(driver.failed[1], DeadlineExceeded)
    assert driver.failed[1].definite


def test_the_deadline_error_tells_the_last_cause() -> None:
    driver = Driver()
    send = driver.close()[0]
    while not driver.failed:
        driver.refuse(send, NotEnoughReplicas("isr is {1}"))
        sends = driver.later()
        send = sends[0] if sends else send
    assert isinstance(driver.failed[1], DeadlineExceeded)
    assert "isr is {1}" in str(driver.failed[1])
    assert isinstance(driver.failed[1].__cause__, NotEnoughReplicas)


def test_a_silent_attempt_is_given_up_after_the_request_timeout_and_tried_again() -> None:
    driver = Driver()
    first = driver.close()[0]
    assert first.timeout_ms == 30_000
    driver.later()
    assert driver.now == 31_000
    again = driver.later()
    assert numbers(again) == [1]
    assert again[0].sequence == first.sequence


def test_a_gap_is_followed_by_a_new_producer_epoch_after_everything_in_doubt_is_settled() -> None:
    driver = Driver()
    sends = driver.close(4)
    assert driver.refuse(sends[0], RecordTooLarge()) == []  # 2, 3 and 4 are still on their way
    assert driver.refuse(sends[1], OutOfOrderSequence()) == []
    assert driver.refuse(sends[2], OutOfOrderSequence()) == []
    assert driver.refuse(sends[3], OutOfOrderSequence()) == []
    again = driver.later()
    assert numbers(again) == [2, 3, 4]
    assert [(send.pepoch, send.sequence) for send in again] == [(1, 0), (1, 1), (1, 2)]


def test_while_something_is_in_doubt_under_the_old_epoch_nothing_is_numbered_anew() -> None:
    driver = Driver()
    sends = driver.close(3)
    driver.refuse(sends[0], RecordTooLarge())
    driver.refuse(sends[1], OutOfOrderSequence())
    driver.do(SessionLost(1))  # 3 is in doubt now
    again = driver.later()
    assert numbers(again) == [3]
    assert again[0].pepoch == 0
    assert driver.close(1) == []


def test_after_an_unknown_outcome_what_is_left_is_numbered_from_zero() -> None:
    driver = Driver()
    driver.close()
    driver.now += 1_000
    driver.close()
    driver.do(SessionLost(1))
    while 1 not in driver.failed:
        driver.later()
        driver.do(SessionLost(1))
    assert isinstance(driver.failed[1], OutcomeUnknown)
    while 2 not in driver.failed:
        driver.later()
    assert driver.sent[-1].pepoch == 0  # its own outcome stays open under the old epoch
    after = driver.close()
    while not after:
        after = driver.later()
    assert (after[0].batch, after[0].pepoch, after[0].sequence) == (3, 1, 0)


@pytest.mark.parametrize("error", [OutOfOrderSequence(), UnknownProducer()])
def test_a_broker_that_lost_its_producer_state_gets_a_new_producer_epoch(error: FerrylineError) -> None:
    driver = Driver()
    driver.ack(driver.close()[0])
    driver.refuse(driver.close()[0], error)
    again = driver.later()
    assert [(send.batch, send.pepoch, send.sequence) for send in again] == [(2, 1, 0)]


def test_a_producer_epoch_past_its_range_takes_another_producer_id() -> None:
    driver = Driver()
    driver.core._partition(KEY).pepoch = 2**15 - 1
    driver.refuse(driver.close()[0], RecordTooLarge())
    send = driver.close()[0]
    assert send.pid != 7
    assert 0 <= send.pid < 2**63
    assert (send.pepoch, send.sequence) == (0, 0)


def test_batches_hashed_with_an_old_partition_count_are_given_back_in_order() -> None:
    driver = Driver()
    sends = driver.close(7, partitions=3)
    for send in sends:
        driver.refuse(send, StalePartitioning())
    assert not driver.returned  # our own picture may be ahead of the broker's
    driver.do(RouteChanged(KEY, 1, 1, partitions=6))
    assert driver.returned == [1, 2, 3, 4, 5, 6, 7]
    driver.close(1, partitions=6)
    assert driver.later()[0].pepoch == 1


def test_a_batch_behind_a_doubtful_one_is_not_given_back_early() -> None:
    driver = Driver()
    sends = driver.close(2, partitions=3)
    driver.refuse(sends[1], StalePartitioning())
    driver.do(RouteChanged(KEY, 1, 1, partitions=6))
    assert driver.returned == []
    driver.ack(sends[0])
    assert driver.returned == [2]


def test_a_topic_that_a_broker_does_not_know_yet_is_tried_again() -> None:
    driver = Driver()
    driver.refuse(driver.close()[0], UnknownTopic())
    assert not driver.failed
    driver.ack(driver.later()[0])
    assert driver.completed == [1]


def test_a_deleted_topic_fails_what_is_not_in_doubt() -> None:
    driver = Driver()
    driver.close(6)
    driver.do(RouteChanged(KEY, 0, 0, gone=True))
    assert isinstance(driver.failed[6], UnknownTopic)
    assert 1 not in driver.failed
    driver.close()
    assert isinstance(driver.failed[7], UnknownTopic)


def test_closing_tells_what_was_never_sent_from_what_may_have_been_applied() -> None:
    driver = Driver()
    driver.close(6)
    driver.do(Closed())
    assert isinstance(driver.failed[1], OutcomeUnknown)
    assert isinstance(driver.failed[6], ClientClosed)
    assert driver.core.unsettled() == 0
    driver.close()
    assert isinstance(driver.failed[7], ClientClosed)


def test_a_refused_connection_leaves_no_doubt() -> None:
    driver = Driver()
    driver.refuse(driver.close()[0], ConnectionFailed())
    driver.do(Closed())
    assert isinstance(driver.failed[1], ClientClosed)


def test_an_idle_core_has_no_deadline_and_a_deadline_that_fired_does_not_fire_again() -> None:
    driver = Driver()
    assert driver.core.next_deadline_ms() is None
    driver.ack(driver.close()[0])
    while driver.core.next_deadline_ms() is not None:
        before = driver.core.next_deadline_ms()
        driver.later()
        after = driver.core.next_deadline_ms()
        assert after is None or before is None or after > before


def test_backoff_doubles_up_to_its_cap_and_never_falls_below_one_ms() -> None:
    backoff = Backoff(first_ms=10, cap_ms=1_000)
    assert [backoff.delay_ms(n, 0.999999) for n in (1, 2, 3, 8, 500)] == [9, 19, 39, 999, 999]
    assert backoff.delay_ms(1, 0.0) == 5
    assert Backoff(1, 1).delay_ms(1, 0.0) == 1
    stream = Jitter(3)
    draws = [stream.next() for _ in range(1_000)]
    assert all(0 <= draw < 1 for draw in draws)
    assert 0.4 < sum(draws) / 1_000 < 0.6


# -- a small world: brokers with logs, sessions that lose, primaries that change ----------------------


class World:
    """One partition on a chain of primaries. Frames of a session arrive in order; answers in any order; sessions break.

    A broker keeps (pid, pepoch, sequence) as the replication rules say. What is not committed may vanish with its
    primary; a broker that is deposed refuses, or answers nothing.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.core = ProducerCore(pid=rng.getrandbits(63), request_timeout_ms=500)
        self.now = 0
        self.epoch = 1
        self.known_epoch = 0
        self.log: list[tuple[int, int, int, int]] = []  # (batch, pid, pepoch, sequence)
        self.committed = 0
        self.frames: list[tuple[int, SendBatch]] = []  # (broker = epoch, frame)
        self.answers: list[BatchAnswered] = []
        self.waiting: list[tuple[SendBatch, int]] = []
        self.closed: list[int] = []
        self.records: dict[int, int] = {}
        self.settled: dict[int, Effect] = {}
        self.poison: set[int] = set()
        self.step(RouteChanged(KEY, 1, 1))

    def step(self, event: object) -> None:
        for effect in self.core.handle(event, self.now):  # type: ignore[arg-type]
            if isinstance(effect, SendBatch):
                self.frames.append((effect.broker, effect))
            elif isinstance(effect, (CompleteBatch, FailBatch, RepartitionBatch)):
                assert effect.batch not in self.settled, "settled twice"
                self.settled[effect.batch] = effect

    def close(self) -> None:
        number = len(self.closed) + 1
        self.closed.append(number)
        self.records[number] = self.rng.randint(1, 3)
        if self.rng.random() < 0.05:
            self.poison.add(number)
        self.step(BatchClosed(KEY, number, self.records[number], self.now + 3_000))

    def answer(self, send: SendBatch, base_offset: int = -1, error: FerrylineError | None = None) -> None:
        self.answers.append(BatchAnswered(KEY, send.batch, send.attempt, base_offset, self.epoch, error))

    def receive(self) -> None:
        """The next frame reaches its broker."""
        broker, send = self.frames.pop(0)
        if broker != self.epoch:
            if self.rng.random() < 0.5:
                self.answer(send, error=NotPrimary())
            return
        state = [entry for entry in self.log if entry[1] == send.pid]
        if self.rng.random() < 0.08:
            error = self.rng.choice([NotEnoughReplicas, ShuttingDown, NotPrimary])()
            return self.answer(send, error=error)
        if send.batch in self.poison:
            return self.answer(send, error=RecordTooLarge())
        if state and send.pepoch < state[-1][2]:
            return self.answer(send, error=FerrylineError("fenced"))
        same = [entry for entry in state if entry[2] == send.pepoch]
        if not same:
            if send.sequence:
                return self.answer(send, error=OutOfOrderSequence() if state else UnknownProducer())
        else:
            last = same[-1]
            for entry in same[-5:]:
                if entry[3] == send.sequence:
                    assert entry[0] == send.batch, "one identity for two batches"
                    self.waiting.append((send, self.log.index(entry)))
                    return None
            if send.sequence != last[3] + self.records[last[0]]:
                return self.answer(send, error=OutOfOrderSequence())
        self.waiting.append((send, len(self.log)))
        self.log.append((send.batch, send.pid, send.pepoch, send.sequence))
        return None

    def commit(self) -> None:
        self.committed = self.rng.randint(self.committed, len(self.log))
        for send, offset in list(self.waiting):
            if offset < self.committed:
                self.waiting.remove((send, offset))
                self.answer(send, base_offset=offset)

    def fail_over(self) -> None:
        """Another broker takes over with everything committed and a part of the rest."""
        del self.log[self.rng.randint(self.committed, len(self.log)) :]
        for send, _ in self.waiting:
            if self.rng.random() < 0.5:
                self.answer(send, error=CommitUnknown())
        self.waiting.clear()
        self.epoch += 1

    def lose_session(self) -> None:
        self.frames = [f for f in self.frames if f[0] != self.core._partition(KEY).broker]
        self.answers.clear()
        self.waiting.clear()
        self.step(SessionLost(self.core._partition(KEY).broker))

    def learn(self) -> None:
        self.step(RouteChanged(KEY, self.epoch, self.epoch))

    def pass_time(self, ms: int) -> None:
        self.now += ms
        deadline = self.core.next_deadline_ms()
        if deadline is not None and deadline <= self.now:
            self.step(TimePassed())

    def act(self) -> None:
        choice = self.rng.random()
        if choice < 0.25:
            self.close()
        elif choice < 0.5:
            if self.frames:
                self.receive()
        elif choice < 0.6:
            self.commit()
        elif choice < 0.78:
            if self.answers:
                self.step(self.answers.pop(self.rng.randrange(len(self.answers))))
        elif choice < 0.81:
            self.fail_over()
        elif choice < 0.84:
            self.lose_session()
        elif choice < 0.9:
            self.learn()
        else:
            self.pass_time(self.rng.choice([1, 10, 50, 600]))

    def settle(self) -> None:
        """Everything is healthy from here on: all batches must settle."""
        self.poison.clear()
        for _ in range(2_000):
            self.learn()
            while self.frames:
                self.receive()
            self.commit()
            while self.answers:
                self.step(self.answers.pop(0))
            if not self.core.unsettled():
                return
            self.pass_time(20)
        raise AssertionError("not settled")

    def check(self) -> None:
        assert sorted(self.settled) == self.closed
        stored = [entry[0] for entry in self.log]
        assert len(stored) == len(set(stored)), f"stored twice: {stored}"
        assert stored == sorted(stored), f"order broken: {stored}"
        for batch, effect in self.settled.items():
            if isinstance(effect, CompleteBatch):
                assert self.log[effect.base_offset][0] == batch
            elif isinstance(effect, FailBatch) and effect.error.definite:
                assert batch not in stored, f"{effect} but it is stored"


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 400))
def test_order_is_never_broken_and_every_batch_settles_once_under_any_interleaving(seed: int, steps: int) -> None:
    world = World(random.Random(seed))
    for _ in range(steps):
        world.act()
    world.settle()
    world.check()
