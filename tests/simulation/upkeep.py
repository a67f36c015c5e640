"""The chores of a simulated broker, as `ferryline_broker.upkeep` does them: retention and scrubbing.

Two invariants of its own: nothing is deleted by age whose true age is below the limit (unless the wall clock was moved
by less than what the broker can notice), and nothing by size that would leave less than the limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline.protocol.messages import LOG_DAMAGED, RECORDS
from ferryline_broker.core import events as ev
from ferryline_broker.core.events import Key
from ferryline_broker.log.interface import LogDamaged
from tests.simulation.engine import MS
from tests.simulation.ghost import Violation

if TYPE_CHECKING:
    from tests.simulation.broker import Broker
    from tests.simulation.replicas import Hosted

CLOCK_DRIFT_MAX_MS = 60_000  # as in the product: beyond it ages cannot be believed (rule L11)


class Expired(msgspec.Struct, frozen=True):
    """What retention would delete from one log."""

    end: int  # offset behind it
    by_age: bool
    appended_us: int  # true time of the last append to it; -1: not known
    bytes_left: int


class Upkeep:
    """The chores of one process life. With ``chores_ms`` 0 there are none."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.world = broker.world
        self._clock_distance = broker.host.wall_ms() - broker.host.now_ms()

    def start(self) -> None:
        if self.world.weather.chores_ms:
            self._later()

    def _later(self) -> None:
        gap_us = int(self.world.weather.chores_ms * MS * (0.5 + self.world.engine.rng.random()))
        self.broker.host.deliver_after(gap_us, self._chores)

    def _chores(self) -> None:
        broker = self.broker
        life = broker.host.life
        for key in sorted(broker.parts):
            if broker.host.life != life or not broker.host.alive:
                return
            hosted = broker.parts.get(key)
            if hosted is not None and hosted.core.role != "stopped":
                self._retention(key, hosted)
                if broker.host.alive and broker.parts.get(key) is hosted:
                    self._scrub(key, hosted)
        if broker.host.alive and broker.host.life == life:
            self._later()

    # -- retention ---------------------------------------------------------------------------------

    def _retention(self, key: Key, hosted: Hosted) -> None:
        host, core = self.broker.host, hosted.core
        drift = abs(host.wall_ms() - host.now_ms() - self._clock_distance)
        if drift > CLOCK_DRIFT_MAX_MS:
            self.world.count("retention waits for the clock")
            return
        if core.primary is None:
            return
        expired = hosted.files.expired(host.wall_ms(), core.retention_limit(host.now_ms()))
        if expired is None:
            return
        self._check(key, expired, drift)
        before = hosted.files.start(RECORDS)
        try:
            start = hosted.files.advance_start(RECORDS, expired.end)
        except StorageFull:
            return
        except StorageFailed as error:
            if not isinstance(error, LogDamaged):
                self.broker.leave_in_order()
            self.broker.replicas.feed(key, ev.StorageFailed(RECORDS, error.message))
            return
        if start > before:
            self.world.retained[key] = max(start, self.world.retained.get(key, 0))
            self.world.count("retention by age" if expired.by_age else "retention by size")
            self.world.copies(self.broker, key)[RECORDS].advance_start(start)
            self.broker.replicas.feed(key, ev.LogStartAdvanced(RECORDS, start))

    def _check(self, key: Key, expired: Expired, drift_ms: int) -> None:
        world = self.world
        if expired.by_age and expired.appended_us >= 0 and self.broker.host.jumped_ms == 0:
            age_ms = (world.engine.now_us - expired.appended_us) / MS
            if age_ms < world.weather.retention_ms * 0.98 - 2:
                raise Violation(
                    "retention by age keeps what is young",
                    f"{self.broker} {key} deletes up to {expired.end}, {age_ms:.0f} ms old, clock off by {drift_ms}",
                )
        if not expired.by_age and 0 <= expired.bytes_left < world.weather.retention_bytes:
            raise Violation("retention by size keeps enough", f"{self.broker} {key}: {expired} is left")

    # -- scrubbing ---------------------------------------------------------------------------------

    def _scrub(self, key: Key, hosted: Hosted) -> None:
        """Damage found while running: it is remembered on disk before the core hears of it."""
        found = hosted.files.scrub()
        if found >= 0:
            self.world.count("rot found by the scrubber")
            self.broker.replicas.feed(key, ev.StorageFailed(found, "damaged: found by the scrubber"))
            if self.broker.at_work:
                self.broker.node_event(ev.ReplicaOpened(key, LOG_DAMAGED))  # so that it is fetched anew
