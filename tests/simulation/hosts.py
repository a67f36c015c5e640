"""A host: something with a name, a clock of its own and process lives that begin and end.

Whatever is addressed to a host (frames, timers, completions of its disk) names the life that it belongs to; nothing
from an earlier life reaches a later one. A paused host (SIGSTOP) takes nothing in until it goes on; then everything
that waited is handed over in order, as from a full socket buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.simulation.engine import MS, Engine


class Host:
    """Invariant: ``alive`` implies life > 0; ``backlog`` is empty unless ``paused``."""

    def __init__(self, engine: Engine, name: str, drift: float = 0.0) -> None:
        self.engine = engine
        self.name = name
        self.life = 0
        self.alive = False
        self.paused = False
        self.backlog: list[tuple[int, Callable[..., None], tuple[Any, ...]]] = []
        self._rate = 1.0 + drift  # local time per global time
        self._epoch_us = engine.between(0, 10**9)  # uptime at the start: no two clocks agree
        self._wall_ms = engine.between(0, 10**12)  # of the wall clock above `now_ms`
        self.jumped_ms = 0  # sum of all jumps of the wall clock, whatever their direction
        self._at_us, self._at_ms = -1, 0  # the last answer of `now_ms`: asked several times at the same moment

    # -- time --------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        """This host's CLOCK_BOOTTIME: it counts on while the process is paused."""
        now_us = self.engine.now_us
        if now_us != self._at_us:
            self._at_us, self._at_ms = now_us, int(self._epoch_us + now_us * self._rate) // MS
        return self._at_ms

    def wall_ms(self) -> int:
        """What the wall clock shows: it may be set at any time."""
        return self.now_ms() + self._wall_ms

    def set_wall_clock(self, by_ms: int) -> None:
        self._wall_ms += by_ms
        self.jumped_ms += abs(by_ms)

    def global_us(self, local_ms: int) -> int:
        """The first global time at which `now_ms` is not below ``local_ms``."""
        guess = int((local_ms * MS - self._epoch_us) / self._rate)
        while int(self._epoch_us + guess * self._rate) // MS < local_ms:
            guess += 1
        return guess

    # -- lives -------------------------------------------------------------------------------------

    def begin_life(self) -> None:
        assert not self.alive
        self.life += 1
        self.alive = True

    def end_life(self) -> None:
        self.alive = False
        self.paused = False
        self.backlog.clear()

    def deliver(self, life: int, fn: Callable[..., None], *args: Any) -> None:
        """Run ``fn`` in this host's process, if that life still lasts; later, if it is paused."""
        if life != self.life or not self.alive:
            return
        if self.paused:
            self.backlog.append((life, fn, args))
            return
        fn(*args)

    def deliver_after(self, delay_us: int, fn: Callable[..., None], *args: Any) -> None:
        """Like `deliver` in the present life, ``delay_us`` from now."""
        self.engine.after(delay_us, self.deliver, self.life, fn, *args)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        if not self.paused:
            return
        self.paused = False
        backlog, self.backlog = self.backlog, []
        for life, fn, args in backlog:
            self.deliver(life, fn, *args)


class Alarm:
    """One timer of one core: it rings when the core's next deadline has come, however often that moves."""

    def __init__(self, host: Host, deadline_ms: Callable[[], int | None], ring: Callable[[], None]) -> None:
        self._host = host
        self._life = host.life
        self._deadline_ms = deadline_ms
        self._ring = ring
        self._armed_us = -1
        self._armed_ms: int | None = None  # the deadline that `_armed_us` stands for
        self.off = False

    def arm(self) -> None:
        """Call after every event of the core."""
        deadline_ms = self._deadline_ms()
        if deadline_ms is None or self.off:
            return
        if deadline_ms == self._armed_ms and self._armed_us >= 0:
            return
        when_us = max(self._host.engine.now_us + 1, self._host.global_us(deadline_ms))
        if self._armed_us < 0 or when_us < self._armed_us:
            self._armed_us, self._armed_ms = when_us, deadline_ms
            self._host.engine.at(when_us, self._host.deliver, self._life, self._due, when_us)

    def _due(self, when_us: int) -> None:
        if self.off or when_us != self._armed_us:
            return  # another, earlier alarm took its place
        self._armed_us = -1
        deadline_ms = self._deadline_ms()
        if deadline_ms is not None and self._host.now_ms() >= deadline_ms:
            self._ring()
        self.arm()
