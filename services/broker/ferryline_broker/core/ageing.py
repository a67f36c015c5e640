"""Who of a queue has been ready for how long, while priorities differ. Pure.

Priority alone would let the lowest starve; age alone would make a backlog hold up high ones, and the lowest, until it
is gone. So while somebody has waited for too long behind higher ones, every second record is one of those, the oldest
of each priority in turn: the highest keep half of the turns, and no priority is without.
"""

from __future__ import annotations

from collections import deque

from ferryline.protocol.queue_messages import PRIORITIES

_SLACK = 1_024  # lines are gone through only when they are longer than who is ready by so many


class Ageing:
    """``ready``: offset -> since when; kept by the window, which takes away what is picked here."""

    def __init__(self, ready: dict[int, int], overdue_ms: int) -> None:
        self._ready = ready
        self._overdue_ms = overdue_ms
        self._lines: list[deque[tuple[int, int]]] = [deque() for _ in range(PRIORITIES)]  # of (since, offset)
        self._turn = False  # the last record was picked by its age
        self._level = PRIORITIES  # the last such record was of this priority

    def add(self, level: int, offset: int, since_ms: int) -> None:
        self._lines[level].append((since_ms, offset))

    def pick(self, now_ms: int) -> int | None:
        """Whose turn it is by age; None: it is the highest's."""
        levels = self._overdue(now_ms)
        self._turn = bool(levels) and not self._turn
        if not self._turn:
            return None
        self._level = next((level for level in levels if level < self._level), levels[0])
        return self._lines[self._level].popleft()[1]

    def _overdue(self, now_ms: int) -> list[int]:
        """Priorities, highest first, whose oldest record is overdue; but for the highest there is, which is next."""
        found: list[int] = []
        highest, ready = True, self._ready
        for level in reversed(range(PRIORITIES)):
            line = self._lines[level]
            while line and ready.get(line[0][1]) != line[0][0]:
                line.popleft()
            if line and not highest and now_ms - line[0][0] >= self._overdue_ms:
                found.append(level)
            highest = highest and not line
        return found

    def shorten(self) -> None:
        """Who picks by priority alone never reaches the end of a line: forget those that have left it."""
        if len(self) > 2 * len(self._ready) + _SLACK:
            for level, line in enumerate(self._lines):
                self._lines[level] = deque((since, one) for since, one in line if self._ready.get(one) == since)

    def __len__(self) -> int:
        return sum(map(len, self._lines))
