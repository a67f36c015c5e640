"""Who is ready, in the order of offsets, against a sorted list; and runs of settled offsets against a set."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline_broker.core.heads import Heads
from ferryline_broker.core.intervals import Runs

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("batch"), st.integers(1, 9)),
        st.tuples(st.just("back"), st.integers(0, 12)),
        st.tuples(st.just("leave"), st.integers(0, 12)),
        st.tuples(st.just("take"), st.integers(0, 12)),
        st.tuples(st.just("pop"), st.just(0)),
        st.tuples(st.just("forget"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=500)
@given(STEPS)
def test_heads_come_in_the_order_of_offsets_and_each_once(steps: list[tuple[str, int]]) -> None:
    ready: dict[int, int] = {}
    heads, end = Heads(ready), 0
    for step, number in steps:
        first = sorted(ready)
        if step == "batch":
            ready |= dict.fromkeys(range(end, end + number), 0)
            heads.extend(range(end, end + number))
            end += number
        elif step == "back" and number < end and number not in ready:
            ready[number] = 0
            heads.add(number)
        elif step == "leave":
            ready.pop(number, None)
        elif step == "take":
            assert heads.take(number) == first[:number]
        elif step == "pop":
            assert heads.pop() == (first[0] if first else None)
        elif step == "forget":
            heads.forget_gone()
        assert len(heads) >= len(ready)
    left = sorted(ready)
    assert heads.take(end + 1) == left


def test_who_left_the_line_and_came_back_to_its_place_is_there() -> None:
    """Found by the simulation (seed 20719): it stood in the line, as one that had left, and on the heap."""
    ready = dict.fromkeys(range(3), 0)
    heads = Heads(ready)
    heads.extend(range(3))
    del ready[0]
    ready[0] = 1
    heads.add(0)
    assert heads.take(3) == [0, 1, 2]


def test_a_long_line_does_not_keep_who_has_left_it() -> None:
    ready: dict[int, int] = {}
    heads = Heads(ready)
    for base in range(0, 100_000, 1_000):
        ready |= dict.fromkeys(range(base, base + 1_000), 0)
        heads.extend(range(base, base + 1_000))
        if base:
            assert len(heads.take(1_000)) == 1_000
    assert len(heads) == 1_000
    assert len(heads._line) < 5_000


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6))), st.integers(0, 45), st.integers(1, 8))
def test_runs_know_whether_they_meet_others(added: list[tuple[int, int]], first: int, length: int) -> None:
    runs, there = Runs(), set[int]()
    for start, count in added:
        runs.add(start, start + count)
        there |= set(range(start, start + count))
    assert runs.meets(first, first + length) == any(one in there for one in range(first, first + length))
