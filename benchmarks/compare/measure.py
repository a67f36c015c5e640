"""One measurement: workers in processes of their own, and what the servers used between start and end."""

from __future__ import annotations

from typing import Any

from benchmarks.compare.child import STOP
from benchmarks.compare.queue_measure import QUEUE_KINDS
from benchmarks.compare.spec import Spec, group_of
from benchmarks.compare.work import Work, deadline_of, result_of, run_together, workers

WARM_UP = 0.1  # of the records, before the clock
WARM_UP_MAX = 20_000
READER_WARM_UP = 200
PROCESSES = 2  # that producers share: 50 interpreters on two cores would measure their start


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


def _produce(work: Work, _: list[str]) -> dict[str, dict[str, Any]]:
    producers = work.workload.producers
    processes = min(producers, PROCESSES)
    each, warm = work.count // processes, int(min(WARM_UP_MAX, work.count * WARM_UP)) // producers
    specs = [
        work.spec("produce", first=number * each, count=each, warm_up=warm, producers=producers // processes)
        for number in range(processes)
    ]
    return {"produce": run_together(work, specs)}


def _produce_consume(work: Work, groups: list[str]) -> dict[str, dict[str, Any]]:
    found = _produce(work, groups)
    stored = work.count + int(min(WARM_UP_MAX, work.count * WARM_UP))
    found["consume"] = run_together(work, [work.spec("read", count=stored, group=groups[0], passes=len(groups))])
    return found


def _latency(work: Work, _: list[str]) -> dict[str, dict[str, Any]]:
    return {"latency": run_together(work, [work.spec("latency", throughput=False)])}


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
    deadline = deadline_of(sender)
    with workers([sender], deadline) as (sending,), workers(readers, deadline) as reading:
        before = work.peer.usage()
        for worker in (*reading, sending):
            worker.say("GO")
        sent = sending.outcome(deadline)
        outcomes = [worker.outcome(deadline) for worker in reading]
        found = result_of(outcomes, before, work.peer.usage())
    found["client_cpu_s"] += sent.cpu_s
    found["errors"] += sent.errors
    return found


def _backlog(work: Work, groups: list[str]) -> dict[str, dict[str, Any]]:
    """A consumer works off a backlog while a producer goes on at a fixed rate."""
    run_together(work, [work.spec("produce")])
    deadline = deadline_of(work.spec("read"))
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
    found = result_of([outcome], before, after)
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
    **QUEUE_KINDS,
}
