"""One cell in one round: its workers, each a process, and what they and the servers used."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.compare.child import READY
from benchmarks.compare.peers import Peer, Variant
from benchmarks.compare.plan import Workload
from benchmarks.compare.processes import Usage
from benchmarks.compare.spec import Outcome, Spec

ROOT = Path(__file__).resolve().parents[2]
MARGIN_S = 60.0


class MeasurementFailed(Exception):
    """A worker ended with an error or gave no answer in time. The message ends with the end of its stderr."""


class Worker:
    """A child process and the lines it says."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self._said = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare.worker", spec.as_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )

    def line(self, deadline: float) -> str:
        """The next line it says. Raises MeasurementFailed when it ends first, or at the deadline."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._said:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise MeasurementFailed(f"{self.spec.client} {self.spec.role}: no answer in time\n{self._tail()}")
                data = os.read(self.process.stdout.fileno(), 65_536)
                if not data:
                    self.process.wait(5.0)
                    raise MeasurementFailed(f"{self.spec.client} {self.spec.role} failed:\n{self._tail()}")
                self._said += data
        line, self._said = self._said.split(b"\n", 1)
        return line.decode()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def ready(self, deadline: float) -> None:
        if (line := self.line(deadline)) != READY:
            raise MeasurementFailed(f"{self.spec.client} {self.spec.role} said {line!r} instead of {READY}")

    def outcome(self, deadline: float) -> Outcome:
        return Outcome.from_json(json.loads(self.line(deadline)))

    def end(self) -> None:
        """Let it close its connections; -9 when it takes too long, or when nobody waits for it any more."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.wait(10.0 if self._said or self.process.poll() is None else 0.1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def kill(self) -> None:
        self.process.kill()

    def _tail(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2_000:]


@contextmanager
def workers(specs: list[Spec], deadline: float) -> Iterator[list[Worker]]:
    """All started at once and ready; ended at the end, by force after a failure."""
    started: list[Worker] = []
    try:
        started += [Worker(spec) for spec in specs]
        for worker in started:
            worker.ready(deadline)
        yield started
    except BaseException:
        for worker in started:
            worker.kill()
        raise
    finally:
        for worker in started:
            worker.end()


@dataclass(frozen=True)
class Work:
    """One cell in one round: everything it takes to measure it."""

    workload: Workload
    variant: Variant
    peer: Peer
    topic: str
    count: int

    def spec(self, role: str, **changes: Any) -> Spec:
        load, variant = self.workload, self.variant
        base = Spec(variant.client, role, self.topic, self.peer.servers, self.peer.ca)
        base = replace(base, partitions=load.partitions, count=self.count, value_bytes=load.value_bytes)
        base = replace(base, fan_out=load.readers > 1, one_by_one=variant.one_by_one)
        return replace(base, **changes)


def deadline_of(spec: Spec) -> float:
    return time.monotonic() + spec.timeout_s + MARGIN_S


def result_of(outcomes: list[Outcome], before: Usage, after: Usage) -> dict[str, Any]:
    """Several workers at once count as one: from the first start to the last end."""
    seconds = (max(one.ended_ns for one in outcomes) - min(one.started_ns for one in outcomes)) / 1e9
    records = sum(one.records for one in outcomes)
    used = after.since(before)
    found: dict[str, Any] = {
        "records": records,
        "seconds": seconds,
        "records_per_s": records / seconds,
        "mb_per_s": sum(one.value_bytes for one in outcomes) / seconds / 1e6,
        "client_cpu_s": sum(one.cpu_s for one in outcomes),
        "server_cpu_s": used.cpu_s,
        "server_written": used.written,
        "server_rss": used.rss,
        "client_rss": sum(one.rss_bytes for one in outcomes),
        "errors": sum(one.errors for one in outcomes),
    }
    if any(one.latency_ms for one in outcomes):
        found["latency_ms"] = dict(next(one.latency_ms for one in outcomes if one.latency_ms))
    return found


def run_together(work: Work, specs: list[Spec]) -> dict[str, Any]:
    """Workers of one kind, from the same moment."""
    deadline = deadline_of(specs[0])
    with workers(specs, deadline) as started:
        before = work.peer.usage()
        for worker in started:
            worker.say("GO")
        outcomes = [worker.outcome(deadline) for worker in started]
        return result_of(outcomes, before, work.peer.usage())
