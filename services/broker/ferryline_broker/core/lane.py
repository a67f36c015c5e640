"""The line of one key. Pure. Where a record stands in it is decided by `Window`."""

from __future__ import annotations

from array import array
from bisect import bisect_left

import msgspec


class Lane(msgspec.Struct, gc=False, eq=False):  # cheaper than a class
    """Records of one key; for a single one there need not be a lane. ``out``: those that left the line;
    ``waiting[first:]``: the line, in order."""

    key: bytes
    out: set[int]
    waiting: array[int] | None = None  # made when somebody waits
    first: int = 0

    def __len__(self) -> int:
        """How many wait."""
        return 0 if self.waiting is None else len(self.waiting) - self.first

    def push(self, offset: int) -> None:
        if self.waiting is None:
            self.waiting = array("q")
        self.waiting.append(offset)

    def pop(self) -> int:
        assert self.waiting is not None
        offset = self.waiting[self.first]
        self.first += 1
        if self.first > 512 and self.first * 2 > len(self.waiting):
            del self.waiting[: self.first]
            self.first = 0
        return offset

    def put_back(self, offset: int) -> None:
        """To the head of the line: it had left it, and its turn has not come after all."""
        if self.waiting is None:
            self.waiting = array("q")
        if self.first:
            self.first -= 1
            self.waiting[self.first] = offset
        else:
            self.waiting.insert(0, offset)

    def insert(self, offset: int) -> None:
        """Into a line that is in the order of offsets."""
        at = self._place(offset)
        if at == self.first:
            self.put_back(offset)
        elif self.waiting is not None:
            self.waiting.insert(at, offset)

    def discard(self, offset: int) -> bool:
        """Out of a line that is in the order of offsets, if it is there."""
        at = self._place(offset)
        if self.waiting is None or at == len(self.waiting) or self.waiting[at] != offset:
            return False
        del self.waiting[at]
        return True

    def _place(self, offset: int) -> int:
        return self.first if self.waiting is None else bisect_left(self.waiting, offset, self.first)

    def peek(self) -> int:
        assert self.waiting is not None
        return self.waiting[self.first]
