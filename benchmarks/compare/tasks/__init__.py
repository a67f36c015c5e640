"""Systems that run tasks: for each a module that declares the same task, a way to submit it, and how a worker starts.

The task marks in a file, mapped into memory by every process, that it ran: the same few hundred nanoseconds for all.
A module is imported by the worker, as its users' modules are, and by who submits; both find what they need in the
environment.
"""

from __future__ import annotations

import asyncio
import importlib
import mmap
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from benchmarks.compare.spec import Spec

SYSTEMS = {
    "ferryline": "benchmarks.compare.tasks.ferryline_tasks",
    "celery": "benchmarks.compare.tasks.celery_tasks",
    "dramatiq": "benchmarks.compare.tasks.dramatiq_tasks",
}
CONCURRENCY = 16  # the default of ours and, on two cores, of Dramatiq (2 processes of 8 threads)
POLL_S = 0.002


class Marks:
    """How often each task ran, a byte for each. A file that exists is opened; all who open it see the same."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @staticmethod
    def create(path: Path, total: int) -> None:
        path.write_bytes(bytes(total))

    def add(self, number: int) -> None:
        """Task ``number`` runs."""
        self._map[number] += 1

    async def wait(self, first: int, end: int, deadline: float) -> None:
        """Until every task of these ran; the deadline ends it too."""
        while time.monotonic() < deadline:
            first = self._map.find(b"\0", first, end)
            if first < 0:
                return
            await asyncio.sleep(POLL_S)

    def wrong(self, first: int, end: int) -> int:
        """How many of these tasks ran never, or more than once."""
        return end - first - self._map[first:end].count(b"\1")


class Submitter(ABC):
    """Who submits tasks of one system, as its documentation advises."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.errors = 0

    @abstractmethod
    async def open(self) -> None: ...

    @abstractmethod
    async def submit_all(self, numbers: Iterable[int]) -> None:
        """A task for each number. Returns when each was accepted."""

    @abstractmethod
    async def close(self) -> None: ...


def environment(spec: Spec) -> dict[str, str]:
    """What the module of a system reads, in a worker and in who submits."""
    found = {"BENCH_SERVERS": spec.servers, "BENCH_QUEUE": spec.topic, "BENCH_MARKS": spec.marks}
    return found | {"BENCH_CA": spec.ca, "BENCH_HANDLER": spec.handler}


def submitter(spec: Spec) -> Submitter:
    """Raises ImportError when the library is not installed."""
    os.environ.update(environment(spec))
    made: Submitter = importlib.import_module(SYSTEMS[spec.client]).make(spec)
    return made
