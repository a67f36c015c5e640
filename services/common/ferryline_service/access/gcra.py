"""How much of a rate is used up: GCRA, paid afterwards. Pure: the time is an argument.

A bucket is one number, the *theoretical arrival time*: when everything that was let in would have come, had it come at
the rate. Something is let in while that lies at most BURST_MS ahead, and pays what it costs afterwards, so that a
request larger than the bucket waits instead of never getting in.

Over any window W of time, what is let in is at most ``rate * W + rate * BURST_MS + one request``; and whoever waits as
long as he is told is let in, unless somebody else was faster.
"""

from __future__ import annotations

BURST_MS = 1_000.0  # a bucket that nobody used holds a second of its rate


class Bucket:
    """One rate, per second, and how far ahead of it whoever draws on it is.

    Times in ms of any clock that does not go back; they are fractions, because a byte takes microseconds.
    """

    __slots__ = ("_turn_ms", "arrival_ms", "rate")

    def __init__(self, rate: float) -> None:
        assert rate > 0, rate
        self.rate = rate
        self.arrival_ms = 0.0  # when it would be even; at or before now: it is
        self._turn_ms = 0.0  # when whoever is refused next should come again

    def behind_ms(self, now_ms: float) -> float:
        """How long it takes until everything is paid for."""
        return max(0.0, self.arrival_ms - now_ms)

    def wait_ms(self, now_ms: float) -> float:
        """How long until something is let in; 0: now."""
        return max(0.0, self.arrival_ms - now_ms - BURST_MS)

    def turn_ms(self, amount: float, now_ms: float) -> float:
        """What to tell somebody who is refused: come again after this. Those refused together are told one after
        the other, as if each came and were let in, or all of them would come at once and all but one in vain.

        At least `wait_ms`, at most BURST_MS more: whoever does not come leaves nothing unused.
        """
        first_ms = now_ms + self.wait_ms(now_ms)
        turn_ms = min(max(first_ms, self._turn_ms), first_ms + BURST_MS)
        self._turn_ms = turn_ms + amount * 1_000 / self.rate
        return turn_ms - now_ms

    def pay(self, amount: float, now_ms: float) -> None:
        """Book what was let in, or what had to be: then whoever comes next waits."""
        self.arrival_ms = max(self.arrival_ms, now_ms) + amount * 1_000 / self.rate

    def give_back(self, amount: float) -> None:
        """What was paid for was not done after all."""
        self.arrival_ms -= amount * 1_000 / self.rate

    def owe(self, behind_ms: float, now_ms: float) -> None:
        """Somebody who knows more says how far behind it is."""
        self.arrival_ms = now_ms + behind_ms
