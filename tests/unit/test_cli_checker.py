"""The checker must see every anomaly that it claims to see: one hand-made bad history for each."""

from __future__ import annotations

import random

import pytest

from ferryline.cli.checker import Gaps, Ledger, percentile


def run(sends: int = 5, keys: int = 2) -> Ledger:
    """A run in which everything was sent and acknowledged: record n of a key at offset 10 * n + key."""
    ledger = Ledger(keys)
    for n in range(sends):
        for key in range(keys):
            assert ledger.next_n(key) == n
            ledger.acked(key, n, 10 * n + key)
    return ledger


def receive(ledger: Ledger, sends: int = 5, keys: int = 2, skip: set[tuple[int, int]] | None = None) -> None:
    for n in range(sends):
        for key in range(keys):
            if (key, n) not in (skip or set()):
                ledger.received(key, n, 10 * n + key)


def test_a_clean_run_is_good() -> None:
    ledger = run()
    receive(ledger)
    verdict = ledger.verdict()
    assert verdict.good
    assert (verdict.sent, verdict.acknowledged, verdict.received) == (10, 10, 10)
    assert (verdict.unknown, verdict.redelivered, verdict.examples) == (0, 0, {})


@pytest.mark.parametrize("n", [0, 2, 4])
def test_an_acknowledged_record_that_never_came_is_lost_wherever_it_stood(n: int) -> None:
    ledger = run()
    receive(ledger, skip={(1, n)})
    assert ledger.missing() == 1
    verdict = ledger.verdict()
    assert (verdict.lost, verdict.good) == (1, False)
    assert verdict.examples["lost"] == [f"key 1 record {n}, acknowledged at {10 * n + 1}"]


def test_a_record_first_seen_after_a_later_one_of_its_key_is_out_of_order() -> None:
    ledger = run()
    receive(ledger, skip={(0, 1)})
    ledger.received(0, 1, 10)
    verdict = ledger.verdict()
    assert (verdict.out_of_order, verdict.lost, verdict.good) == (1, 0, False)


def test_records_stored_in_the_wrong_order_are_out_of_order_even_if_they_arrive_right() -> None:
    ledger = Ledger(1)
    for n, offset in ((0, 5), (1, 3)):
        ledger.next_n(0)
        ledger.acked(0, n, offset)
        ledger.received(0, n, offset)
    assert ledger.verdict().out_of_order == 1


def test_the_same_offset_again_is_a_redelivery_and_no_error() -> None:
    ledger = run()
    receive(ledger)
    ledger.received(0, 3, 30)
    ledger.received(0, 4, 40)
    verdict = ledger.verdict()
    assert (verdict.redelivered, verdict.received, verdict.good) == (2, 10, True)


def test_the_same_record_at_another_offset_was_stored_twice() -> None:
    ledger = run()
    receive(ledger)
    ledger.received(0, 4, 50)
    verdict = ledger.verdict()
    assert (verdict.stored_twice, verdict.redelivered, verdict.good) == (1, 0, False)


def test_what_nobody_sent_is_a_phantom() -> None:
    for key, n in ((0, 5), (0, -1), (7, 0)):
        ledger = run()
        receive(ledger)
        ledger.received(key, n, 99)
        assert ledger.verdict().phantom == 1, (key, n)
    ledger = run()
    receive(ledger)
    ledger.stranger("junk")
    assert not ledger.verdict().good


def test_a_refused_record_must_not_appear_and_an_unknown_one_may() -> None:
    ledger = run()
    assert ledger.next_n(0) == 5
    assert ledger.next_n(1) == 5
    ledger.refused_for_certain(0, 5)
    receive(ledger)
    ledger.received(1, 5, 51)
    verdict = ledger.verdict()
    assert (verdict.good, verdict.unknown, verdict.refused, verdict.received) == (True, 1, 1, 11)
    ledger.received(0, 5, 60)
    verdict = ledger.verdict()
    assert (verdict.aborted_read, verdict.good) == (1, False)


def test_a_record_read_at_another_offset_than_acknowledged_has_moved() -> None:
    ledger = run(sends=1, keys=1)
    ledger.received(0, 0, 1)
    verdict = ledger.verdict()
    assert (verdict.moved, verdict.good) == (1, False)


def test_settling_a_record_twice_is_refused() -> None:
    ledger = run(sends=1, keys=1)
    with pytest.raises(AssertionError, match="settled twice"):
        ledger.acked(0, 0, 0)


def test_every_single_dropped_or_swapped_delivery_is_noticed() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        ledger = run(sends=20, keys=3)
        arrivals = [(key, n) for n in range(20) for key in range(3)]
        at = chance.randrange(len(arrivals) - 1)
        if seed % 2:
            del arrivals[at]
        else:
            other = next(i for i in range(len(arrivals)) if i != at and arrivals[i][0] == arrivals[at][0])
            arrivals[at], arrivals[other] = arrivals[other], arrivals[at]
        for key, n in arrivals:
            ledger.received(key, n, 10 * n + key)
        assert not ledger.verdict().good, seed


def test_gaps_are_per_lane_and_count_whole_when_they_end_after_the_start() -> None:
    gaps = Gaps(2)
    for now in (0.0, 0.1, 0.2):
        gaps.acknowledged(0, now)
        gaps.acknowledged(1, now)
    gaps.acknowledged(0, 5.0)
    gaps.start(5.5)
    gaps.acknowledged(0, 5.6)
    gaps.acknowledged(1, 6.2)
    assert gaps.longest == pytest.approx([0.6, 6.0])
    assert gaps.worst() == pytest.approx(6.0)


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50, 99, 100)
    assert (percentile([7.0], 0.01), percentile([], 0.5)) == (7.0, 0.0)


def test_a_second_reader_judges_the_same_sends_by_its_own_deliveries() -> None:
    ledger = Ledger(2)
    other = ledger.second_reader()
    for n in range(3):
        for key in range(2):
            ledger.next_n(key)
            ledger.acked(key, n, 10 * n + key)
    receive(ledger, sends=3)
    receive(other, sends=3, skip={(1, 2)})
    assert ledger.verdict().good
    verdict = other.verdict()
    assert (verdict.acknowledged, verdict.lost, verdict.good) == (6, 1, False)
