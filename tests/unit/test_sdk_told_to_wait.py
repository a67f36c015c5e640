"""Whoever is told when to come again comes then, and not before: producers, and everything that asks again."""

from __future__ import annotations

import pytest

from ferryline.core.producer import SessionLost
from ferryline.core.retry import TOLD_MS_MAX, Backoff, told_ms
from ferryline.protocol.errors import DeadlineExceeded, QuotaExceeded, RecordTooLarge
from unit.sdk_producer_driver import DELIVERY_MS, Driver, numbers


def quota(after_ms: int) -> QuotaExceeded:
    return QuotaExceeded("", retry_after_ms=after_ms)


def test_a_producer_that_is_told_to_wait_waits_that_long_and_keeps_its_order() -> None:
    driver = Driver()
    first, second, third = driver.close(3)
    for send in (first, second, third):
        driver.refuse(send, quota(4_000))
    told_at = driver.now
    assert driver.later(3_999) == []
    again = driver.later(500)
    assert numbers(again) == [1]
    assert told_at + 4_000 <= driver.now
    assert (again[0].sequence, again[0].pepoch) == (first.sequence, first.pepoch)
    assert driver.refreshes == 0  # nothing is wrong with the picture of the cluster


def test_what_would_be_refused_is_not_sent_over_and_over_and_the_window_grows_again() -> None:
    driver = Driver()
    sends = driver.close(9)
    for send in sends:
        driver.refuse(send, quota(1_000))
    (head,) = driver.later()
    assert numbers(driver.ack(head)) == [2, 3]
    second, third = driver.sent[-2:]
    driver.refuse(third, quota(1_000))
    assert driver.ack(second) == []  # the pause holds, although something was acknowledged meanwhile
    assert numbers(driver.later()) == [3, 4]
    for _ in range(6):
        for send in [send for send in driver.sent if send.batch not in driver.completed]:
            driver.ack(send)
    assert driver.completed == list(range(1, 10))


def test_whoever_is_told_to_wait_beyond_the_deadline_fails_with_what_was_told() -> None:
    driver = Driver()
    (send,) = driver.close()
    driver.refuse(send, quota(DELIVERY_MS * 10))
    while not driver.failed:
        assert driver.later() == []
    assert driver.now == 1_000 + DELIVERY_MS
    error = driver.failed[1]
    assert isinstance(error, DeadlineExceeded)
    assert isinstance(error.__cause__, QuotaExceeded)


def test_what_is_in_doubt_is_settled_wherever_it_stands_although_a_service_told_to_wait() -> None:
    driver = Driver()
    first, second, _ = driver.close(3)
    driver.refuse(first, RecordTooLarge(""))  # its number is a gap now
    driver.refuse(second, quota(1_000))
    driver.do(SessionLost(1))  # what became of the third one is not known
    assert numbers(driver.later()) == [3]


@pytest.mark.parametrize("told", [None, "soon", -5, 0, True])
def test_a_pause_that_makes_no_sense_is_not_heeded(told: object) -> None:
    error = QuotaExceeded("", **({} if told is None else {"retry_after_ms": told}))
    assert told_ms(error) == 0
    assert 5 <= Backoff(10, 1_000).pause_ms(1, 0.0, error) <= 10


def test_no_service_is_waited_for_for_ever() -> None:
    assert told_ms(quota(10**15)) == TOLD_MS_MAX
    assert told_ms(ValueError()) == told_ms(None) == 0
    assert 1_000 < Backoff().pause_ms(9, 0.99, quota(1_000)) <= 1_100
