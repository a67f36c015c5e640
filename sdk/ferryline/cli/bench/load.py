"""What is measured and how it is told: the same load for every client, and one form of result."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ferryline.cli.checker import percentile


@dataclass(frozen=True)
class Load:
    """One measurement. Records carry distinct keys and ``value_bytes`` of value."""

    topic: str = "bench"
    url: str = ""  # of the cluster; comma separated
    ca: str = ""
    token: str = ""
    records: int = 500_000
    value_bytes: int = 100
    warm_up: int = 20_000
    linger_ms: float = 5.0
    compression: str = "none"
    partitions: int = 12
    replication: int = 2
    rate: float = 0.0  # records a second for end-to-end latency; 0 is as fast as possible
    timeout_s: float = 120.0

    def value(self) -> bytes:
        return (b"ferryline-" * (self.value_bytes // 10 + 1))[: self.value_bytes]

    @staticmethod
    def key_of(number: int) -> bytes:
        """Distinct for each record, of constant length."""
        return b"%012d" % number


@dataclass(frozen=True)
class Measured:
    """One result. Times in seconds (``latency_ms``: in ms); ``cpu_s`` is this process's user and system time."""

    records: int = 0
    seconds: float = 0.0
    records_per_s: float = 0.0
    mb_per_s: float = 0.0
    cpu_s: float = 0.0
    errors: int = 0
    latency_ms: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Stopwatch:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self._cpu = _cpu_s()
        self._started = time.perf_counter()

    def measured(self, records: int, size: int, *, errors: int = 0) -> Measured:
        seconds = time.perf_counter() - self._started
        return Measured(records, seconds, records / seconds, size / seconds / 1e6, _cpu_s() - self._cpu, errors=errors)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def latency_of(times: Sequence[float], *, errors: int = 0) -> Measured:
    """Percentiles of latencies in seconds."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}
    found = {name: percentile(times, share) * 1000 for name, share in shares.items()}
    total = sum(times)
    return Measured(len(times), total, len(times) / total if total else 0.0, latency_ms=found, errors=errors)


def tune_process() -> None:
    """As a client that cares would: fewer garbage collections. Applied to every client that is compared."""
    import gc

    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
