"""A set of integers kept as runs: what a queue has settled above its start. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Runs:
    """Disjoint half-open runs in ascending order. Adding in order, or nearly, keeps it to a handful of runs."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, runs: list[tuple[int, int]] | None = None) -> None:
        self._starts = [first for first, _ in runs or ()]
        self._ends = [end for _, end in runs or ()]

    def __contains__(self, value: int) -> bool:
        at = bisect_right(self._starts, value) - 1
        return at >= 0 and value < self._ends[at]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._ends, strict=True))

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self._starts)

    @property
    def total(self) -> int:
        """How many integers are in the set."""
        return sum(self._ends) - sum(self._starts)

    def add(self, first: int, end: int) -> None:
        """Add [first, end); what is there already stays."""
        if first >= end:
            return
        starts, ends = self._starts, self._ends
        at = bisect_right(starts, first)
        if at and ends[at - 1] >= first:  # continues, or lies in, the run before
            at -= 1
            first = starts[at]
        last = at
        while last < len(starts) and starts[last] <= end:
            end = max(end, ends[last])
            last += 1
        starts[at:last] = [first]
        ends[at:last] = [end]

    def meets(self, first: int, end: int) -> bool:
        """Whether any of [first, end) is in the set."""
        at = bisect_left(self._ends, first + 1)  # the first run that ends behind ``first``
        return at < len(self._starts) and self._starts[at] < end

    def next_outside(self, value: int) -> int:
        """The lowest integer from ``value`` on that is not in the set."""
        at = bisect_right(self._starts, value) - 1
        return self._ends[at] if at >= 0 and value < self._ends[at] else value

    def cut_below(self, value: int) -> None:
        """Forget everything below ``value``."""
        starts, ends = self._starts, self._ends
        at = bisect_right(ends, value)
        del starts[:at], ends[:at]
        if starts and starts[0] < value:
            starts[0] = value
