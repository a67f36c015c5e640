"""Decide how many records a worker has here. Pure: times are arguments.

What waits here could run elsewhere: a worker whose handlers take an hour should hold no more than it can begin. One
whose handlers take a millisecond would mostly wait, if it fetched each when it can begin it. So a worker fetches ahead
what its handlers would do in `AHEAD_S`, going by how long they took of late; and nothing when all of them are at work
and none has ended for `STALL_S`, or before a last attempt: what waits here then goes back, to whoever has time.
"""

from __future__ import annotations

AHEAD_S = 0.2
AHEAD_TIMES_MAX = 32  # concurrency
AHEAD_RECORDS_MAX = 2_000
STALL_S = 1.0
_WEIGHT = 1 / 16  # of the last one in the mean


class Depth:
    """``records``: how many may be here, in hand included; never fewer than ``least``.

    What is fetched ahead is a power of two of ``concurrency``, so it changes seldom.
    """

    def __init__(self, concurrency: int, least: int) -> None:
        self.records = self.least = least
        self._concurrency = concurrency
        self._mean_s = 2 * AHEAD_S  # as if handlers were slow, until they are known not to be

    def took(self, seconds: float) -> None:
        """A handler has ended."""
        self._mean_s += (seconds - self._mean_s) * _WEIGHT

    def decide(self) -> int:
        """How many may be here from now on."""
        times = AHEAD_TIMES_MAX if self._mean_s * AHEAD_TIMES_MAX <= AHEAD_S else int(AHEAD_S / self._mean_s)
        ahead = self._concurrency << (times.bit_length() - 1) if times else 0
        self.records = self.least + min(ahead, AHEAD_RECORDS_MAX)
        return self.records

    def stalled(self) -> int:
        """Nothing is fetched ahead until handlers have shown that they are quick. As `decide`."""
        self._mean_s = max(self._mean_s, STALL_S)
        return self.decide()
