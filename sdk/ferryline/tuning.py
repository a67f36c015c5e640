"""Settings of the process that pay for programs which move many records. Nothing here happens by itself."""

from __future__ import annotations

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES = 32 * 1024 * 1024  # glibc's upper limit
_TRIM_THRESHOLD_BYTES = 512 * 1024 * 1024


def tune_process(*, gc_threshold: int = 50_000) -> None:
    """Make allocation cheap for a program that does little else than produce or consume. Call it once, at start.

    Garbage collection: a producer with a future per record allocates hundreds of thousands of objects that reference
    counting frees; the default threshold of 700 scans the young ones all the time, and the old ones again and again.
    What exists now is frozen (never scanned again), and the threshold raised.

    malloc (glibc): buffers of 256 KiB and more are otherwise mapped and unmapped for each batch, page faults included.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(gc_threshold, 20, 50)
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
        except (OSError, AttributeError):
            pass  # another C library: its own defaults stay
