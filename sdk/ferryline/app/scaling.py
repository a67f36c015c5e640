"""Decide how many worker processes there should be, and when one that has ended may start again. Pure.

Rules of `Scaler`:

* A queue needs as many workers as would drain its backlog within ``target_s`` at the rate at which the present ones do;
  an app needs what the neediest of its queues does, for each of its workers takes from all of them.
* While a backlog does not shrink at all, one more is tried.
* Up at once, but at most to the double; down only to the most that was needed in the last ``hold_s``, by default twice
  the target.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import msgspec

SMOOTHING = 0.5  # weight of the newest rate


class Load(msgspec.Struct, frozen=True):
    """One queue as its group left it: ``backlog`` can be worked on now, or is; ``settled`` counts what is done."""

    backlog: int
    settled: int


class Scaler:
    """Between ``low`` and ``high`` processes."""

    def __init__(self, low: int, high: int, *, target_s: float = 30.0, hold_s: float | None = None) -> None:
        self.low = low
        self.high = high
        self._target_s = target_s
        self._hold_s = 2 * target_s if hold_s is None else hold_s
        self._rates: dict[str, float] = {}  # queue -> settled per second, smoothed
        self._before: tuple[float, Mapping[str, Load]] | None = None
        self._needed: deque[tuple[float, int]] = deque()  # (when, how many)

    def decide(self, loads: Mapping[str, Load], running: int, now_s: float) -> int:
        """How many processes there should be, given how many there are."""
        self._measure(loads, now_s)
        needed = max((self._need(name, load, running) for name, load in loads.items()), default=0)
        needed = min(max(needed, self.low), self.high)
        self._needed.append((now_s, needed))
        while self._needed[0][0] < now_s - self._hold_s:
            self._needed.popleft()
        most = max(count for _, count in self._needed)
        return needed if needed >= running else min(running, max(needed, most))

    def drain_s(self, name: str, load: Load) -> float:
        """How long the backlog lasts at the present rate; infinite while nothing is done."""
        rate = self._rates.get(name, 0.0)
        return load.backlog / rate if rate > 0 else math.inf if load.backlog else 0.0

    def _measure(self, loads: Mapping[str, Load], now_s: float) -> None:
        if self._before is not None and now_s > self._before[0]:
            passed_s = now_s - self._before[0]
            for name, load in loads.items():
                before = self._before[1].get(name)
                if before is not None:
                    rate = max(0, load.settled - before.settled) / passed_s  # less: the group was deleted and made anew
                    self._rates[name] = SMOOTHING * rate + (1 - SMOOTHING) * self._rates.get(name, rate)
        self._before = (now_s, dict(loads))

    def _need(self, name: str, load: Load, running: int) -> int:
        if not load.backlog:
            return 0
        if not running:
            return 1
        drain_s = self.drain_s(name, load)
        wanted = running + 1 if math.isinf(drain_s) else math.ceil(running * drain_s / self._target_s)
        return min(max(1, wanted), 2 * running)


class Restarts:
    """When a process that has ended may start again: at once at first, later and later while it keeps ending young."""

    def __init__(self, *, young_s: float = 10.0, first_s: float = 1.0, longest_s: float = 60.0) -> None:
        self._young_s = young_s
        self._first_s, self._longest_s = first_s, longest_s
        self._failures = 0

    def delay_s(self, lived_s: float) -> float:
        """How long to wait, after one that lived for so long has failed."""
        self._failures = 1 if lived_s >= self._young_s else self._failures + 1
        if self._failures == 1:
            return 0.0 if lived_s >= self._young_s else self._first_s
        return min(self._longest_s, self._first_s * 2.0 ** min(self._failures - 1, 30))
