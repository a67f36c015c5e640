"""The clocks of a broker. Durations come from CLOCK_BOOTTIME, which counts suspend; the wall clock is never used for
safety, only for retention and time stamps."""

from __future__ import annotations

import time

_clock_gettime_ns = time.clock_gettime_ns
_BOOTTIME = time.CLOCK_BOOTTIME


def now_ms() -> int:
    """Milliseconds since boot."""
    return _clock_gettime_ns(_BOOTTIME) // 1_000_000


def wall_ms() -> int:
    """Milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000
