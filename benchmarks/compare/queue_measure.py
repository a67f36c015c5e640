"""Measurements of queues: a sender and a receiver in a process each; and of tasks, with a worker in one of its own."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare.processes import Program, usage
from benchmarks.compare.spec import Outcome, Spec
from benchmarks.compare.tasks import CONCURRENCY, SYSTEMS, Marks, environment
from benchmarks.compare.work import ROOT, MeasurementFailed, Work, deadline_of, result_of, run_together, workers

RECEIVER_WARM_UP = 200
TASK_WARM_UP = 200
LEFT_S = 10.0  # counters of servers may lag
BIN = Path(sys.executable).parent


def _queue(work: Work, groups: list[str]) -> dict[str, dict[str, Any]]:
    """Sent as fast as it goes and received meanwhile, from the first send to the last acknowledgement."""
    warm = RECEIVER_WARM_UP
    send = work.spec("produce", warm_up=warm)
    receive = work.spec("receive", warm_up=warm, group=groups[0])
    return {"queue": with_left(work, groups[0], _sent_and_received(work, send, receive))}


def _pace(work: Work, groups: list[str]) -> dict[str, dict[str, Any]]:
    """At a fixed rate; the latency of a record is from its send to the handler, in another process."""
    rate, warm = work.workload.rate, RECEIVER_WARM_UP
    send = work.spec("pace", rate=rate, first=warm, warm_up=warm, throughput=False)
    receive = work.spec("receive", rate=rate, warm_up=warm, stamps=True, group=groups[0], throughput=False)
    return {"queue-pace": with_left(work, groups[0], _sent_and_received(work, send, receive))}


def _sent_and_received(work: Work, send: Spec, receive: Spec) -> dict[str, Any]:
    """The receiver has handled the sender's warm-up when the clock starts."""
    deadline = deadline_of(send)
    with workers([send], deadline) as (sending,), workers([receive], deadline) as (receiving,):
        before = work.peer.usage()
        for worker in (receiving, sending):
            worker.say("GO")
        sent, got = sending.outcome(deadline), receiving.outcome(deadline)
        after = work.peer.usage()
    whole = replace(got, started_ns=min(sent.started_ns, got.started_ns), ended_ns=max(sent.ended_ns, got.ended_ns))
    found = result_of([whole], before, after)
    return _with_parts(found, {"sender": sent, "receiver": got})


def _with_parts(found: dict[str, Any], clients: dict[str, Outcome]) -> dict[str, Any]:
    """What each process of ours used, beside the sum; an error is one whoever saw it."""
    found["client_cpu_s"] = sum(one.cpu_s for one in clients.values())
    found["client_rss"] = sum(one.rss_bytes for one in clients.values())
    found["errors"] = sum(one.errors for one in clients.values())
    found["parts_cpu_s"] = {name: one.cpu_s for name, one in clients.items()}
    return found


def _drain(work: Work, groups: list[str]) -> dict[str, dict[str, Any]]:
    """A backlog, received and acknowledged, with nothing sent meanwhile; subscribing is part of it."""
    run_together(work, [work.spec("produce")])
    found = run_together(work, [work.spec("receive", group=groups[0])])
    found["parts_cpu_s"] = {"receiver": found["client_cpu_s"]}
    return {"queue-drain": with_left(work, groups[0], found)}


def with_left(work: Work, group: str, found: dict[str, Any]) -> dict[str, Any]:
    """What the server still holds unacknowledged, though the receiver says that it acknowledged all, is an error."""
    deadline = time.monotonic() + LEFT_S
    while (left := work.peer.left(work.topic, group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    found["errors"] += left
    return found


def worker_command(client: str) -> list[str]:
    """How a user starts a worker of this system, with `CONCURRENCY` tasks at once."""
    module = SYSTEMS[client]
    if client == "celery":
        options = ["--concurrency", str(CONCURRENCY), "--loglevel", "ERROR"]
        return [str(BIN / "celery"), "--app", f"{module}:app", "worker", *options]
    if client == "dramatiq":
        return [str(BIN / "dramatiq"), module, "--processes", "2", "--threads", str(CONCURRENCY // 2)]
    return [str(BIN / "ferryline"), "worker", "run", f"{module}:app", "--concurrency", str(CONCURRENCY), "--here"]


def _tasks(work: Work, _: list[str]) -> dict[str, dict[str, Any]]:
    """From the first call of a task to the end of the last one. The worker is started as its users start it."""
    with tempfile.TemporaryDirectory(prefix="bench-tasks-") as name:
        folder = Path(name)
        Marks.create(folder / "marks", TASK_WARM_UP + work.count)
        settings = work.variant.topic
        handler = settings.get("handler", "")
        spec = work.spec("submit", warm_up=TASK_WARM_UP, marks=str(folder / "marks"), handler=handler)
        command = worker_command(work.variant.client)
        path = os.pathsep.join(one for one in (str(ROOT), os.environ.get("PYTHONPATH", "")) if one)
        env = environment(spec) | {"PYTHONPATH": path, "BENCH_ACKS_LATE": settings.get("acks_late", "")}
        worker = Program("worker", command, folder, env)
        try:
            deadline = deadline_of(spec)
            with workers([spec], deadline) as (submitting,):
                before, worked = work.peer.usage(), usage([worker.pid])
                submitting.say("GO")
                outcome = submitting.outcome(deadline)
                after, works = work.peer.usage(), usage([worker.pid])
        except MeasurementFailed as error:
            raise MeasurementFailed(f"{error}\nits worker: {worker.tail()}") from None
        finally:
            worker.end()
    used = works.since(worked)
    found = result_of([outcome], before, after)
    worker_part = replace(outcome, cpu_s=used.cpu_s, rss_bytes=used.rss, errors=0)
    return {"tasks": _with_parts(found, {"submitter": outcome, "worker": worker_part})}


QUEUE_KINDS = {
    "queue": _queue,
    "queue-drain": _drain,
    "queue-pace": _pace,
    "tasks": _tasks,
}
