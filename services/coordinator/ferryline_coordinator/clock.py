"""Time for the cores: CLOCK_BOOTTIME, which counts suspended time and never goes back."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Milliseconds since boot."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
