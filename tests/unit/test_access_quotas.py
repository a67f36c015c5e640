"""Quotas of principals: buckets that are paid afterwards, who is let in, who waits and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.protocol.access import AccessPolicy, Quota
from ferryline.protocol.errors import BY_CODE, QuotaExceeded, Throttled
from ferryline_service.access import quotas as quotas_module
from ferryline_service.access.caller import UNCHECKED, Caller
from ferryline_service.access.gcra import BURST_MS, Bucket
from ferryline_service.access.quotas import Quotas
from ferryline_service.errors import problem

STEPS = st.lists(st.tuples(st.floats(0, 5_000), st.integers(1, 5_000)), min_size=1, max_size=60)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.ms = 1_000_000.0

    def __call__(self) -> float:
        return self.ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(clock)


def limited(name: str = "billing", **limits: int) -> Caller:
    return Caller(name, (), Quota(**limits))


# -- buckets ----------------------------------------------------------------------------------------


@given(st.floats(0.5, 1e8), STEPS)
@settings(max_examples=300, deadline=None)
def test_over_any_window_no_more_is_let_in_than_the_rate_a_burst_and_one_request(
    rate: float, steps: list[tuple[float, int]]
) -> None:
    bucket, now_ms = Bucket(rate), 1_000.0
    let_in: list[tuple[float, int]] = []
    for pause_ms, amount in steps:
        now_ms += pause_ms
        if not bucket.wait_ms(now_ms):
            bucket.pay(amount, now_ms)
            let_in.append((now_ms, amount))
    for first in range(len(let_in)):
        for last in range(first, len(let_in)):
            window_ms = let_in[last][0] - let_in[first][0]
            amounts = [amount for _, amount in let_in[first : last + 1]]
            bound = rate * (window_ms + BURST_MS) / 1_000 + amounts[-1]
            assert sum(amounts) <= bound * (1 + 1e-6) + 1e-6


@given(st.floats(0.5, 1e8), STEPS)
@settings(max_examples=300, deadline=None)
def test_whoever_waits_as_long_as_told_is_let_in_and_the_rate_is_used_up(
    rate: float, steps: list[tuple[float, int]]
) -> None:
    bucket, started_ms = Bucket(rate), 1_000.0
    now_ms, total = started_ms, 0
    for _, amount in steps:
        now_ms += bucket.wait_ms(now_ms)
        assert bucket.wait_ms(now_ms) <= 1e-6 * now_ms
        bucket.pay(amount, now_ms)
        total += amount
    # Nobody waited longer than what was let in before costs at the rate.
    assert now_ms - started_ms <= total * 1_000 / rate * (1 + 1e-6) + 1e-3


def test_a_request_larger_than_the_bucket_gets_in_and_the_next_one_waits_for_it() -> None:
    bucket = Bucket(100)
    assert bucket.wait_ms(0.0) == 0
    bucket.pay(1_000, 0.0)  # ten seconds of the rate
    assert bucket.wait_ms(0.0) == 9_000
    assert bucket.wait_ms(9_000.0) == 0
    assert bucket.behind_ms(9_500.0) == 500


def test_a_bucket_that_nobody_used_for_long_holds_one_second_not_more() -> None:
    bucket = Bucket(10)
    bucket.pay(1, 0.0)
    let_in = 0
    while not bucket.wait_ms(1e9):
        bucket.pay(1, 1e9)
        let_in += 1
    assert let_in == 11  # a second, and the one that finds it just empty


def test_those_who_are_refused_together_are_told_to_come_one_after_the_other() -> None:
    bucket = Bucket(100)
    bucket.pay(200, 0.0)  # a second beyond the burst
    assert [bucket.turn_ms(20, 0.0) for _ in range(3)] == [1_000, 1_200, 1_400]
    assert bucket.wait_ms(1_000.0) == 0
    bucket.pay(20, 1_000.0)
    assert bucket.wait_ms(1_000.0) == 200  # the second one comes just in time
    assert bucket.wait_ms(1_200.0) == 0


def test_who_was_refused_and_does_not_come_keeps_nobody_out_for_more_than_a_second() -> None:
    bucket = Bucket(100)
    bucket.pay(200, 0.0)
    told = [bucket.turn_ms(1_000, 0.0) for _ in range(50)]
    assert max(told) == 2_000
    assert bucket.turn_ms(1, 5_000.0) <= BURST_MS


# -- who is let in ----------------------------------------------------------------------------------


def test_records_beyond_the_rate_are_refused_with_the_time_after_which_they_are_not(
    quotas: Quotas, clock: Clock
) -> None:
    caller = limited(records=1_000)
    quotas.spend(caller, records=1_500, bytes=9)
    with pytest.raises(QuotaExceeded) as refused:
        quotas.spend(caller, records=1)
    error = refused.value
    assert error.details == {"retry_after_ms": 500, "quota": "records", "limit": 1_000, "principal": "billing"}
    clock.ms += 499
    with pytest.raises(QuotaExceeded):
        quotas.spend(caller, records=1)
    clock.ms += 1
    quotas.spend(caller, records=1)


def test_what_was_refused_costs_nothing(quotas: Quotas, clock: Clock) -> None:
    caller = limited(records=100, bytes=1_000)
    quotas.spend(caller, bytes=3_000)
    for _ in range(50):
        with pytest.raises(QuotaExceeded, match="bytes"):
            quotas.spend(caller, records=100, bytes=1)
    clock.ms += 2_000
    quotas.spend(caller, records=100)
    assert quotas.refused == {"bytes": 50}


def test_what_was_not_done_after_all_is_given_back_and_leaves_no_more_than_there_was(
    quotas: Quotas, clock: Clock
) -> None:
    caller = limited(records=100)
    quotas.spend(caller, records=500)
    quotas.give_back(caller, records=500, bytes=1)
    assert quotas.wait_ms(caller) == 0
    quotas.give_back(caller, records=10**6)
    clock.ms += 1
    quotas.charge(caller, records=300)
    assert quotas.wait_ms(caller) == 2_000


@pytest.mark.parametrize("name", ["requests", "records", "bytes"])
def test_each_rate_is_a_bucket_of_its_own(quotas: Quotas, name: str) -> None:
    caller = limited(**{name: 10})

    def use_one() -> None:
        quotas.request(caller)
        quotas.spend(caller, records=1, bytes=1)

    for _ in range(11):
        use_one()
    with pytest.raises(QuotaExceeded) as refused:
        use_one()
    assert refused.value.details["quota"] == name


def test_a_reader_pays_afterwards_and_then_waits(quotas: Quotas, clock: Clock) -> None:
    caller = limited(records=10)
    assert quotas.wait_ms(caller) == 0
    quotas.charge(caller, records=40, bytes=1_000_000)
    assert quotas.wait_ms(caller) == 3_000
    with pytest.raises(QuotaExceeded):
        quotas.check(caller)
    clock.ms += 3_000
    assert quotas.wait_ms(caller) == 0
    quotas.check(caller)


def test_two_callers_of_one_name_share_their_quota_and_others_do_not(quotas: Quotas) -> None:
    quotas.spend(limited(records=10), records=100)
    with pytest.raises(QuotaExceeded):
        quotas.spend(limited(records=10), records=1)
    quotas.spend(limited("somebody", records=10), records=1)


def test_sessions_are_counted_and_one_that_ended_makes_room(quotas: Quotas) -> None:
    caller = limited(connections=2)
    quotas.opened(caller)
    quotas.opened(caller)
    with pytest.raises(QuotaExceeded) as refused:
        quotas.opened(caller)
    assert refused.value.details["quota"] == "connections"
    assert refused.value.details["retry_after_ms"] >= 1
    quotas.closed(caller)
    quotas.opened(caller)


def test_nodes_and_whoever_has_no_quota_are_never_counted(quotas: Quotas) -> None:
    for caller in (UNCHECKED, Caller("broker-3", service=True), Caller("free")):
        for _ in range(100):
            quotas.request(caller)
            quotas.spend(caller, records=10**9, bytes=10**9)
            quotas.charge(caller, records=10**9, bytes=10**9)
            quotas.opened(caller)
        assert quotas.wait_ms(caller) == 0
        quotas.check(caller)
        quotas.closed(caller)
    assert quotas.touched == []


def test_whoever_holds_too_much_may_read_but_not_write_until_the_next_policy_says_so(quotas: Quotas) -> None:
    caller = limited(stored_bytes=1_000)
    quotas.take(AccessPolicy(enabled=True, over=(("billing", 1_000),)))
    with pytest.raises(QuotaExceeded) as refused:
        quotas.spend(caller, records=1)
    assert refused.value.details["quota"] == "stored_bytes"
    assert refused.value.details["retry_after_ms"] == 5_000
    quotas.check(caller)
    quotas.spend(limited("somebody", stored_bytes=1_000), records=1)
    quotas.spend(limited(stored_bytes=1_001), records=1)  # the same name, with a token that allows more
    quotas.spend(limited(records=10_000), records=1)
    quotas.take(AccessPolicy(enabled=True))
    quotas.spend(caller, records=1)


# -- several services -------------------------------------------------------------------------------


def test_without_a_shared_bucket_each_service_has_its_share(quotas: Quotas, clock: Clock) -> None:
    caller = limited(records=1_000)
    quotas.take(AccessPolicy(enabled=True), services=4)
    quotas.spend(caller, records=1_000)  # four seconds of a share
    assert quotas.wait_ms(caller) == 3_000
    clock.ms += 3_000
    quotas.live(1)  # what was booked stays booked
    quotas.spend(caller, records=1_000)
    assert quotas.wait_ms(caller) == 1_000


def test_a_shared_bucket_gives_each_service_the_whole_rate_and_losing_it_takes_that_back(
    quotas: Quotas, clock: Clock
) -> None:
    caller = limited(records=1_000)
    quotas.take(AccessPolicy(enabled=True), services=4)
    quotas.share(True)
    quotas.spend(caller, records=2_000)
    assert quotas.wait_ms(caller) == 1_000
    clock.ms += 2_000
    quotas.share(False)
    quotas.spend(caller, records=2_000)
    assert quotas.wait_ms(caller) == 7_000


def test_other_limits_hold_from_the_next_request_on(quotas: Quotas, clock: Clock) -> None:
    quotas.spend(limited(records=10), records=50)
    with pytest.raises(QuotaExceeded):
        quotas.spend(limited(records=1_000), records=1)  # what was spent under the old limit is paid for
    clock.ms += 5_000
    for _ in range(5):
        quotas.spend(limited(records=1_000), records=100)
    quotas.spend(limited(bytes=10), records=10**9)  # no limit on records any more


def test_meters_have_a_bound_and_only_idle_ones_are_forgotten(
    quotas: Quotas, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas_module, "METERS_MAX", 10)
    quotas.opened(limited("held", connections=1))
    quotas.spend(limited("busy", records=1), records=100)
    for number in range(50):
        clock.ms += 2_000
        quotas.request(limited(f"p{number}", requests=1))
    assert len(quotas._meters) <= 12
    with pytest.raises(QuotaExceeded):
        quotas.opened(limited("held", connections=1))


# -- the answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("after_ms", "seconds"), [(1, "1"), (1_000, "1"), (1_001, "2"), (9_500, "10")])
def test_retry_after_is_in_whole_seconds_and_never_too_early(after_ms: int, seconds: str) -> None:
    response = problem(QuotaExceeded("", retry_after_ms=after_ms), "r")
    assert response.status == 429
    assert response.headers["Retry-After"] == seconds


def test_a_quota_is_a_kind_of_throttling_that_may_be_tried_again() -> None:
    assert BY_CODE["QUOTA_EXCEEDED"] is QuotaExceeded
    assert issubclass(QuotaExceeded, Throttled)
    info = QuotaExceeded("").info()
    assert info.retriable
    assert info.definite
    assert problem(Throttled("no time is told"), "r").headers["Retry-After"] == "1"
