"""What every role says to the comparison, and the clock by which it is measured."""

from __future__ import annotations

import resource
import sys
import time

import psutil
from benchmarks.compare.spec import Outcome, latencies

READY, STOP = "READY", "STOP"


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def wait_for_go() -> None:
    if not sys.stdin.readline():
        raise SystemExit("the comparison is gone")


class Clock:
    """Wall and processor time of this process since it was made."""

    def __init__(self) -> None:
        self._cpu = cpu_s()
        self.started_ns = time.monotonic_ns()

    def outcome(self, records: int, size: int, errors: int, times_ns: list[int] | None = None) -> Outcome:
        ended = time.monotonic_ns()
        used = cpu_s() - self._cpu
        memory = psutil.Process().memory_info().rss
        return Outcome(self.started_ns, ended, records, size, used, memory, errors, latencies(times_ns or []))
