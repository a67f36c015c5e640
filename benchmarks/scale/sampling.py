"""What the kernel says about a process, and clusters to measure."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferryline.cli.driver import ProcessCluster

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """One look at a process: resident bytes, open descriptors, CPU seconds so far."""

    rss: int
    descriptors: int
    cpu_s: float


def usage(pid: int) -> Usage:
    """Raises FileNotFoundError when the process is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return Usage(resident, len(os.listdir(f"/proc/{pid}/fd")), (int(fields[11]) + int(fields[12])) / _TICKS)


def usages(cluster: ProcessCluster) -> dict[str, Usage]:
    """Of every running service, by name."""
    return {name: usage(service.pid) for name, service in cluster.local.services.items() if service.running}


async def idle(cluster: ProcessCluster, seconds: float) -> dict[str, dict[str, float]]:
    """What each service costs while nobody asks for anything: CPU percent over ``seconds``, memory, descriptors."""
    before, began = usages(cluster), time.monotonic()
    await asyncio.sleep(seconds)  # the measurement itself
    after, passed = usages(cluster), time.monotonic() - began
    return {
        name: {
            "cpu_percent": round(100 * (one.cpu_s - before[name].cpu_s) / passed, 2),
            "rss": one.rss,
            "descriptors": one.descriptors,
        }
        for name, one in after.items()
    }


@asynccontextmanager
async def fresh_cluster(brokers: int = 3, **options: Any) -> AsyncIterator[ProcessCluster]:
    """A cluster in a folder of its own, not started; killed and removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="ferryline-scale-") as folder:
        cluster = ProcessCluster(Path(folder), brokers=brokers, **options)
        try:
            yield cluster
        finally:
            await cluster.kill_all()


async def until(condition: Callable[[], bool], timeout_s: float, what: str, poll_s: float = 0.01) -> float:
    """Poll until it holds; returns the seconds it took. Raises TimeoutError naming ``what``."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        await asyncio.sleep(poll_s)
    return time.monotonic() - began


async def start_timed(
    cluster: ProcessCluster, names: list[str] | None = None, timeout_s: float = 300.0
) -> dict[str, float]:
    """Start services (default: all, the coordinator first); seconds from its exec to READY for each."""
    local, took = cluster.local, {}
    if names is None:
        began = time.monotonic()
        local.spawn("coordinator")
        await until(lambda: local.is_ready("coordinator"), timeout_s, "coordinator")
        took["coordinator"] = round(time.monotonic() - began, 3)
        names = cluster.brokers
    began = time.monotonic()
    for name in names:
        local.spawn(name)
    waiting = list(names)
    while waiting:
        for name in list(waiting):
            if local.is_ready(name):
                took[name] = round(time.monotonic() - began, 3)
                waiting.remove(name)
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(f"{', '.join(waiting)}: not ready within {timeout_s:.0f} s")
        await asyncio.sleep(0.005)
    return took


def spread(values: list[float]) -> dict[str, float]:
    """p50, p99, worst and count of a list of seconds."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)

    return {"count": len(ordered), "p50": at(0.5), "p99": at(0.99), "worst": round(ordered[-1], 4)}
