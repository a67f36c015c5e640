"""Virtual time: one heap of events, one source of randomness, one story.

Rules: nothing in the simulation reads a real clock or draws a number anywhere else; two events of the same microsecond
run in an order drawn from the seed; every event that is carried out enters the trace hash.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import msgspec

MS = 1000  # microseconds in a millisecond
STORY_EVENTS = 400

_encode = msgspec.msgpack.Encoder(enc_hook=lambda value: type(value).__name__).encode


class SimulationStuck(Exception):
    """More events than a run can need: something spins without time passing."""


class Engine:
    """The heap and the clock. ``at`` and ``after`` take global virtual time; hosts translate to their own clocks."""

    def __init__(self, seed: int, *, events_max: int = 400_000) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self._random = self.rng.random
        self.now_us = 0
        self.steps = 0
        self.events_max = events_max
        self.trace: Callable[[str], None] | None = None
        self.hash = 0
        self.story: deque[tuple[int, str, Any]] = deque(maxlen=STORY_EVENTS)
        self._heap: list[tuple[int, float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    @property
    def now_ms(self) -> int:
        return self.now_us // MS

    def at(self, when_us: int, fn: Callable[..., None], *args: Any) -> None:
        self._count += 1
        if when_us < self.now_us:
            when_us = self.now_us
        heappush(self._heap, (when_us, self._random(), self._count, fn, args))

    def after(self, delay_us: int, fn: Callable[..., None], *args: Any) -> None:
        self.at(self.now_us + delay_us, fn, *args)

    def run_until(self, until_us: int, done: Callable[[], bool] | None = None) -> bool:
        """Carry out events up to ``until_us``; stops early, and returns True, when ``done()`` holds after one."""
        heap, events_max = self._heap, self.events_max
        while heap and heap[0][0] <= until_us:
            self.now_us, _tie, _count, fn, args = heappop(heap)
            self.steps += 1
            if self.steps > events_max:
                raise SimulationStuck(f"over {self.events_max} events at {self.now_ms} virtual ms")
            fn(*args)
            if done is not None and done():
                return True
        self.now_us = max(self.now_us, until_us)
        return False

    def note(self, who: str, what: Any) -> None:
        """Put ``what`` into the story and the trace hash. Cheap: it is printed only when somebody reads it."""
        now_us = self.now_us
        self.story.append((now_us, who, what))
        self.hash = hash((self.hash, now_us, who, _encode(what)))
        if self.trace is not None:
            self.trace(render(self.story[-1]))

    # -- drawing -----------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return probability > 0 and self._random() < probability

    def between(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: list[Any]) -> Any:
        return items[int(self.rng.random() * len(items))]


def render(entry: tuple[int, str, Any]) -> str:
    """One line of the story; long byte strings are cut."""
    when_us, who, what = entry
    text = what if isinstance(what, str) else _short(what)
    return f"{when_us / MS:12.3f} {who:<6} {text}"


def _short(what: Any) -> str:
    text = repr(what)
    return text if len(text) <= 600 else text[:597] + "..."
