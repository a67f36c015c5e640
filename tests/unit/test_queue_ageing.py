"""Priorities with ageing: what has waited for longer than the bound gets a share, and no more than that."""

from __future__ import annotations

from collections import Counter

from ferryline_broker.core.queue_events import Scanned
from ferryline_broker.core.window import Window

BOUND_MS = 1_000
BACKLOG = 10_000


def filled(*levels: int, now_ms: int = 0) -> Window:
    """A window in which one record of each of these priorities became ready, in this order."""
    window = Window(0, BOUND_MS)
    for offset, level in enumerate(levels):
        window.scan(Scanned(offset, None, level), now_ms)
    return window


def test_the_lowest_does_not_wait_for_a_backlog_that_is_older_than_the_bound() -> None:
    """Higher ones lie there since before it came, and as many come as are picked."""
    window = filled(*[9] * BACKLOG)
    window.scan(Scanned(BACKLOG, None, 0), 500)
    now_ms, added = 500, BACKLOG
    while (picked := window.pick(now_ms)) != BACKLOG:
        assert picked is not None
        now_ms += 1
        added += 1
        window.scan(Scanned(added, None, 9), now_ms)
        assert now_ms < 500 + BOUND_MS + 2, "its turn has come"
    assert now_ms >= 500 + BOUND_MS, "no sooner than the bound"


def test_what_is_overdue_gets_every_second_turn_and_the_highest_the_others() -> None:
    window = filled(*[0] * 100, *[9] * 100)
    picked = [window.pick(BOUND_MS) for _ in range(20)]
    assert [one for one in picked if one is not None and one < 100] == list(range(10))
    assert [one for one in picked if one is not None and one >= 100] == list(range(100, 110))


def test_every_priority_that_is_overdue_has_its_turn() -> None:
    levels = [9] * 100 + [7, 5, 3, 0] * 100
    window = filled(*levels)
    share = Counter(levels[window.pick(BOUND_MS) or 0] for _ in range(80))
    assert share == {9: 40, 7: 10, 5: 10, 3: 10, 0: 10}


def test_before_the_bound_priority_alone_decides() -> None:
    window = filled(0, 3, 9, 3, 9)
    assert [window.pick(BOUND_MS - 1) for _ in range(5)] == [2, 4, 1, 3, 0]


def test_what_is_picked_by_age_alone_leaves_nothing_behind() -> None:
    """A backlog of higher ones that never ends: nobody ever looks for the next low one by its priority."""
    window = filled(*[9] * 100)
    for offset in range(100, 5_000):
        window.scan(Scanned(offset, None, 9 if offset % 2 else 0), offset)
        window.pick(offset + BOUND_MS)
    assert len(window.ready) == 100
    assert sum(map(len, window._heads)) <= 300
