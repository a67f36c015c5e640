"""One role in a process of its own: `python -m benchmarks.compare.worker SPEC`.

Says READY on stdout when it is connected and warm, begins at a line on stdin, and ends with one line of JSON (an
Outcome). The clock runs from that line, or from the first records for a reader, to the last confirmation, or record.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from benchmarks.compare.child import READY, Clock, tell, wait_for_go
from benchmarks.compare.clients import Adapter, adapter
from benchmarks.compare.queue_roles import receive, submit
from benchmarks.compare.spec import Outcome, Spec, group_of, sent_ns

WARM_ONE_AT_A_TIME = 50
UNCOUNTED_MAX = 0.5  # of the records may come before the clock starts


async def produce(spec: Spec) -> Outcome:
    """``spec.producers`` connections share ``spec.count`` records; all confirmed before the clock stops."""
    adapters = [adapter(spec) for _ in range(spec.producers)]
    shares = [(number, len(adapters)) for number in range(len(adapters))]

    def each(work: Callable[[Adapter, int, int], Coroutine[Any, Any, None]]) -> Coroutine[Any, Any, None]:
        return together([work(one, number, of) for one, (number, of) in zip(adapters, shares, strict=True)], adapters)

    async def start(one: Adapter, number: int, of: int) -> None:
        await one.open_producer()
        if count := part(spec.warm_up, number, of):
            await one.send_all(spec.first + spec.count + number * spec.warm_up, count)

    async def send(one: Adapter, number: int, of: int) -> None:
        before = sum(part(spec.count, earlier, of) for earlier in range(number))
        await one.send_all(spec.first + before, part(spec.count, number, of))

    await each(start)
    tell(READY)
    wait_for_go()
    clock = Clock()
    await each(send)
    outcome = clock.outcome(spec.count, spec.count * spec.value_bytes, sum(one.errors for one in adapters))
    await each(lambda one, *_: one.close())
    return outcome


def part(total: int, number: int, of: int) -> int:
    """Share ``number`` of ``total`` cut into ``of`` nearly equal ones."""
    return total * (number + 1) // of - total * number // of


async def together(work: list[Coroutine[Any, Any, None]], adapters: list[Adapter]) -> None:
    """All at once: in this loop, or in a thread each for clients that block."""
    if len(work) > 1 and adapters[0].blocking:
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, one) for one in work))
    else:
        await asyncio.gather(*work)


async def latency(spec: Spec) -> Outcome:
    """One record at a time, send to confirmation."""
    one = adapter(spec)
    await one.open_producer()
    for number in range(WARM_ONE_AT_A_TIME):
        await one.send_one(spec.first + spec.count + number)
    tell(READY)
    wait_for_go()
    times: list[int] = []
    clock = Clock()
    for number in range(spec.first, spec.first + spec.count):
        started = time.perf_counter_ns()
        await one.send_one(number)
        times.append(time.perf_counter_ns() - started)
    outcome = clock.outcome(spec.count, spec.count * spec.value_bytes, one.errors, times)
    await one.close()
    return outcome


async def pace(spec: Spec) -> Outcome:
    """Records with a time stamp at ``spec.rate`` a second, until ``spec.count`` or until a line on stdin."""
    one = adapter(spec)
    await one.open_producer()
    for number in range(spec.warm_up):
        await one.send_stamped(number, 0)
    await one.drain()
    tell(READY)
    wait_for_go()
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    sent = 0
    clock = Clock()
    started = time.perf_counter()
    while sent < spec.count and not stop.is_set():
        if (pause := started + sent / spec.rate - time.perf_counter()) > 0:
            await one.idle(pause)
            continue
        await one.send_stamped(spec.first + sent, time.monotonic_ns())
        sent += 1
    await one.drain()
    outcome = clock.outcome(sent, sent * spec.value_bytes, one.errors)
    await one.close()
    return outcome


async def read(spec: Spec) -> Outcome:
    """Everything up to ``spec.count`` records, from the first ones that come; those are not counted.

    With a warm-up, READY comes after that many records: the group is joined and reading. Without, connecting and
    joining happen after the start and before the clock.
    """
    one = adapter(spec)
    deadline = time.monotonic() + spec.timeout_s
    if spec.warm_up:
        await one.open_consumer()
        await read_warm_up(one, spec, deadline)
    tell(READY)
    wait_for_go()
    outcomes = []
    for number in range(spec.passes):
        if number:
            one = adapter(replace(spec, group=group_of(spec.group, number)))
        if not spec.warm_up:
            await one.open_consumer()
        outcomes.append(await (read_stamped if spec.stamps else read_plain)(one, spec, deadline))
        await one.close()
    return outcomes[0] if len(outcomes) == 1 else added(outcomes)


def added(outcomes: list[Outcome]) -> Outcome:
    """Passes one after another as one, without the time between them."""
    return Outcome(
        started_ns=0,
        ended_ns=sum(one.ended_ns - one.started_ns for one in outcomes),
        records=sum(one.records for one in outcomes),
        value_bytes=sum(one.value_bytes for one in outcomes),
        cpu_s=sum(one.cpu_s for one in outcomes),
        rss_bytes=max(one.rss_bytes for one in outcomes),
        errors=sum(one.errors for one in outcomes),
    )


async def read_warm_up(one: Adapter, spec: Spec, deadline: float) -> None:
    seen = 0
    while seen < spec.warm_up and time.monotonic() < deadline:
        seen += len(await one.read_values()) if spec.stamps else (await one.read())[0]
    if seen != spec.warm_up:
        raise SystemExit(f"{seen} records of {spec.warm_up} came to warm up with")


async def read_plain(one: Adapter, spec: Spec, deadline: float) -> Outcome:
    """A reader that is warm is measured from the start; one that joins first, from its first records on."""
    seen = size = uncounted = 0
    clock = Clock() if spec.warm_up else None
    while seen < spec.count and time.monotonic() < deadline:
        count, read_bytes = await one.read()
        seen += count
        if clock is not None:
            size += read_bytes
        elif count:
            clock, uncounted = Clock(), count
    return judged(clock, spec, seen, uncounted, size, [])


def judged(clock: Clock | None, spec: Spec, seen: int, uncounted: int, size: int, times_ns: list[int]) -> Outcome:
    """What a reader measured. Too much of it in one piece is no measurement."""
    if clock is None or uncounted > seen * UNCOUNTED_MAX:
        raise SystemExit(f"{seen} records of {spec.count} came, {uncounted} of them at once: nothing to measure")
    return clock.outcome(seen - uncounted, size, max(0, spec.count - seen), times_ns)


async def read_stamped(one: Adapter, spec: Spec, deadline: float) -> Outcome:
    """Records without a stamp are a backlog of ``spec.count``: it ends with the last one. Else latencies."""
    times: list[int] = []
    old = seen = uncounted = 0
    clock = Clock() if spec.warm_up else None
    while old < spec.count and time.monotonic() < deadline:
        values = await one.read_values()
        now = time.monotonic_ns()
        if values and clock is None:
            clock, uncounted = Clock(), len(values)
        seen += len(values)
        for value in values:
            stamp = sent_ns(value)
            if spec.rate:
                times.append(now - stamp)
                old += 1
            else:
                old += not stamp
    missing = max(0, spec.count - old)
    counted = replace(spec, count=seen + missing)
    return judged(clock, counted, seen, uncounted, (seen - uncounted) * spec.value_bytes, times)


ROLES: dict[str, Callable[[Spec], Coroutine[Any, Any, Outcome]]] = {
    "produce": produce,
    "latency": latency,
    "pace": pace,
    "read": read,
    "receive": receive,
    "submit": submit,
}


def main(argv: list[str]) -> int:
    """Returns the exit status; a failure is a traceback on stderr."""
    import uvloop

    import ferryline as fl

    spec = Spec.from_json(argv[0])
    fl.tune_process()  # fewer garbage collections, for every client alike
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        tell(runner.run(ROLES[spec.role](spec)).as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
