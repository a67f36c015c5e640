"""Who of a queue is ready, of one priority, in the order of offsets. Pure.

Nearly always records become ready in that order: those stand in a line, from which many are taken at once; what comes
back, or was waiting in its lane, is on a heap beside it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from itertools import repeat

exhaust = deque[object](maxlen=0).extend  # runs through an iterator, and keeps nothing of it
_SLACK = 1_024  # places at the head of the line that are kept until they are half of it


class Heads:
    """``ready``: offset -> since when; kept by the window. Who left it otherwise is forgotten when his turn comes."""

    def __init__(self, ready: dict[int, int]) -> None:
        self._ready = ready
        self._line: list[int] = []
        self._first = 0  # of the line
        self._late: list[int] = []

    def __len__(self) -> int:
        """How many stand here, also of those that are not ready any more."""
        return len(self._line) - self._first + len(self._late)

    def add(self, offset: int) -> None:
        line = self._line
        if not line or offset > line[-1]:
            line.append(offset)
        else:
            heapq.heappush(self._late, offset)

    def extend(self, offsets: range) -> None:
        """These, behind everybody who has been here."""
        assert not self._line or self._line[-1] < offsets.start
        self._line.extend(offsets)

    def pop(self) -> int | None:
        """The first one, which is not ready any more. None: there is none."""
        line, late, ready = self._line, self._late, self._ready
        while True:
            if late and (self._first == len(line) or late[0] < line[self._first]):
                offset = heapq.heappop(late)
            elif self._first < len(line):
                offset = line[self._first]
                self._left(1)
            else:
                return None
            if ready.pop(offset, None) is not None:
                return offset

    def take(self, limit: int) -> list[int]:
        """What `pop` would give, up to ``limit`` times."""
        taken: list[int] = []
        line, late = self._line, self._late
        while len(taken) < limit:
            first = self._first
            if late and (first == len(line) or late[0] <= line[first]):  # the same: it left the line, and came back
                if (offset := self.pop()) is None:
                    break
                taken.append(offset)
                continue
            end = min(first + limit - len(taken), len(line))
            part = line[first : bisect_left(line, late[0], first, end) if late else end]
            if not part:
                break
            self._left(len(part))
            since = list(map(self._ready.pop, part, repeat(None)))
            taken += part if None not in since else [o for o, at in zip(part, since, strict=True) if at is not None]
        return taken

    def forget_gone(self) -> None:
        """Whoever stands first and is not ready any more."""
        line, ready = self._line, self._ready
        while self._first < len(line) and line[self._first] not in ready:
            self._left(1)
        while self._late and self._late[0] not in ready:
            heapq.heappop(self._late)

    def _left(self, count: int) -> None:
        self._first += count
        if self._first == len(self._line):
            self._line.clear()
            self._first = 0
        elif self._first > _SLACK and self._first * 2 > len(self._line):
            del self._line[: self._first]
            self._first = 0
