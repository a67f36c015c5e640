"""One measurement: workers in processes of their own, and what the servers used between start and end."""

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

from benchmarks.compare.peers import Peer, Variant
from benchmarks.compare.plan import Workload
from benchmarks.compare.processes import Usage
from benchmarks.compare.spec import Outcome, Spec, group_of
from benchmarks.compare.worker import READY, STOP

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 0.1  # of the records, before the clock
WARM_UP_MAX = 20_000
READER_WARM_UP = 200
PROCESSES = 2  # that producers share: 50 interpreters on two cores would measure their start
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
        base = replace(base, fan_out=load.readers > 1)
        return replace(base, **changes)


def measure(work: Work) -> dict[str, dict[str, Any]]:
    """Results by what they measure: "produce" and "consume" of a produce workload, else the kind of the workload.

    Raises MeasurementFailed or PeerFailed. The topic is gone afterwards.
    """
    groups = [f"{work.topic}-g{number}" for number in range(work.workload.readers)]
    passes = 1 if work.variant.slow else work.workload.passes
    groups += [group_of(groups[0], number) for number in range(1, passes)]
    work.peer.create(work.topic, work.workload.partitions, work.variant, groups)
    try:
        return _KINDS[work.workload.kind](work, groups)
    finally:
        work.peer.delete(work.topic, work.workload.partitions)


def _deadline(spec: Spec) -> float:
    return time.monotonic() + spec.timeout_s + MARGIN_S


def _result(outcomes: list[Outcome], before: Usage, after: Usage) -> dict[str, Any]:
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


def _run(work: Work, specs: list[Spec]) -> dict[str, Any]:
    """Workers of one kind, from the same moment."""
    deadline = _deadline(specs[0])
    with workers(specs, deadline) as started:
        before = work.peer.usage()
        for worker in started:
            worker.say("GO")
        outcomes = [worker.outcome(deadline) for worker in started]
        return _result(outcomes, before, work.peer.usage())


def _produce(work: Work, _: list[str]) -> dict[str, dict[str, Any]]:
    producers = work.workload.producers
    processes = min(producers, PROCESSES)
    each, warm = work.count // processes, int(min(WARM_UP_MAX, work.count * WARM_UP)) // producers
    specs = [
        work.spec("produce", first=number * each, count=each, warm_up=warm, producers=producers // processes)
        for number in range(processes)
    ]
    return {"produce": _run(work, specs)}


def _produce_consume(work: Work, groups: list[str]) -> dict[str, dict[str, Any]]:
    found = _produce(work, groups)
    stored = work.count + int(min(WARM_UP_MAX, work.count * WARM_UP))
    found["consume"] = _run(work, [work.spec("read", count=stored, group=groups[0], passes=len(groups))])
    return found


def _latency(work: Work, _: list[str]) -> dict[str, dict[str, Any]]:
    return {"latency": _run(work, [work.spec("latency", throughput=False)])}


def _end_to_end(work: Work, groups: list[str]) -> dict[str, dict[str, Any]]:
    """One producer and one consumer process; the latency of a record is from its send to the consumer's hands."""
    rate, warm = work.workload.rate, READER_WARM_UP
    pace = work.spec("pace", rate=rate, warm_up=warm, throughput=False)
    read = work.spec("read", rate=rate, warm_up=warm, stamps=True, group=groups[0], throughput=False)
    return {"end-to-end": _with_readers(work, pace, [read])}


def _fan_out(work: Work, groups: list[str]) -> dict[str, dict[str, Any]]:
    """One producer as fast as it can, every group gets everything, each reader in a process of its own."""
    send = work.spec("produce", warm_up=READER_WARM_UP)
    reads = [work.spec("read", warm_up=READER_WARM_UP, group=group) for group in groups]
    return {"fan-out": _with_readers(work, send, reads)}


def _with_readers(work: Work, sender: Spec, readers: list[Spec]) -> dict[str, Any]:
    """Readers are warm when they have the sender's warm-up; what the readers find is the result."""
    deadline = _deadline(sender)
    with workers([sender], deadline) as (sending,), workers(readers, deadline) as reading:
        before = work.peer.usage()
        for worker in (*reading, sending):
            worker.say("GO")
        sent = sending.outcome(deadline)
        outcomes = [worker.outcome(deadline) for worker in reading]
        found = _result(outcomes, before, work.peer.usage())
    found["client_cpu_s"] += sent.cpu_s
    found["errors"] += sent.errors
    return found


def _backlog(work: Work, groups: list[str]) -> dict[str, dict[str, Any]]:
    """A consumer works off a backlog while a producer goes on at a fixed rate."""
    _run(work, [work.spec("produce")])
    deadline = _deadline(work.spec("read"))
    pace = work.spec("pace", rate=work.workload.rate, count=1_000_000_000, first=work.count, throughput=False)
    with (
        workers([pace], deadline) as (pacing,),
        workers([work.spec("read", stamps=True, group=groups[0])], deadline) as (reading,),
    ):
        before = work.peer.usage()
        for worker in (pacing, reading):
            worker.say("GO")
        outcome = reading.outcome(deadline)
        after = work.peer.usage()
        pacing.say(STOP)
        paced = pacing.outcome(deadline)
    found = _result([outcome], before, after)
    found["client_cpu_s"] += paced.cpu_s
    found["errors"] += paced.errors
    found["sent_per_s"] = paced.records / max(1e-9, (paced.ended_ns - paced.started_ns) / 1e9)
    return {"backlog": found}


_KINDS = {
    "produce": _produce_consume,
    "produce-only": _produce,
    "latency": _latency,
    "end-to-end": _end_to_end,
    "fan-out": _fan_out,
    "backlog": _backlog,
}
