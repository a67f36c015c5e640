"""What a log remembers of its newest batches, so that live readers and writers never touch an index."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

TAIL_BATCHES_MAX = 1024  # kept after a trim; twice as many before it


class Tail:
    """Base offset and position of each of the newest batches of the active segment, ascending, without gaps.

    The bytes themselves are left to the page cache: a pread of 256 KiB costs about what a copy out of our own memory
    would, and that memory would be one more megabyte for every active log.
    """

    __slots__ = ("offsets", "positions")

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.positions: list[int] = []

    def add(self, offset: int, position: int) -> None:
        self.offsets.append(offset)
        self.positions.append(position)
        if len(self.offsets) > 2 * TAIL_BATCHES_MAX:
            del self.offsets[:-TAIL_BATCHES_MAX]
            del self.positions[:-TAIL_BATCHES_MAX]

    def cut(self, log_end: int) -> None:
        """Forget batches at or above ``log_end``."""
        keep = bisect_left(self.offsets, log_end)
        del self.offsets[keep:]
        del self.positions[keep:]

    def covers(self, offset: int) -> bool:
        return bool(self.offsets) and offset >= self.offsets[0]

    def span(self, offset: int, bytes_max: int, below: int, log_end: int, size: int) -> tuple[int, int]:
        """Positions (from, to) of the batches to read, from the one that holds ``offset``; equal if none ends <= below.

        ``log_end`` and ``size`` are where the last batch ends; ``offset < below``. The first batch may be larger than
        ``bytes_max``.
        """
        offsets, positions = self.offsets, self.positions
        first = bisect_right(offsets, offset) - 1
        start = positions[first]
        last = len(offsets) if below >= log_end else bisect_right(offsets, below) - 1  # first batch not to be read
        stop = positions[last] if last < len(positions) else size
        if stop - start > bytes_max:
            last = max(first + 1, bisect_right(positions, start + bytes_max) - 1)
            stop = positions[last] if last < len(positions) else size
        return start, stop
