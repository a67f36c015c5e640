"""Roles of the comparison of queues: who receives and acknowledges, and who submits tasks."""

from __future__ import annotations

import time

from benchmarks.compare.child import READY, Clock, tell, wait_for_go
from benchmarks.compare.receivers import Handler, Receiving, receiving
from benchmarks.compare.spec import Outcome, Spec
from benchmarks.compare.tasks import Marks, submitter


async def receive(spec: Spec) -> Outcome:
    """Every record once, each handled and acknowledged; the clock stops when the server has all acknowledgements.

    With a warm-up it is subscribed and has handled so many before the clock starts; otherwise it is connected, and
    subscribing is measured. What never came, came twice, or was not acknowledged is an error.
    """
    handler = Handler(spec.count + spec.warm_up, stamps=spec.stamps)
    one = receiving(spec, handler)
    deadline = time.monotonic() + spec.timeout_s
    await one.connect()
    if spec.warm_up:
        await one.subscribe()
        await handle(one, spec.warm_up, deadline)
        if handler.distinct < spec.warm_up:
            raise SystemExit(f"{handler.distinct} records of {spec.warm_up} came to warm up with")
    tell(READY)
    wait_for_go()
    before, size = handler.distinct, handler.size
    clock = Clock()
    if not spec.warm_up:
        await one.subscribe()
    await handle(one, spec.warm_up + spec.count, deadline)
    await one.settled()
    missing = spec.warm_up + spec.count - handler.distinct
    errors = one.errors + missing + handler.repeated
    outcome = clock.outcome(handler.distinct - before, handler.size - size, errors, handler.times_ns)
    await one.close()
    return outcome


async def handle(one: Receiving, total: int, deadline: float) -> None:
    """Until ``total`` records were handled, or the deadline."""
    while one.handler.distinct < total and time.monotonic() < deadline:
        await one.step()


async def submit(spec: Spec) -> Outcome:
    """Tasks from the first call to the end of the last one, wherever it runs; the warm-up has run before the clock."""
    marks, total = Marks(spec.marks), spec.count + spec.warm_up
    one = submitter(spec)
    deadline = time.monotonic() + spec.timeout_s
    await one.open()
    await one.submit_all(range(spec.warm_up))
    await marks.wait(0, spec.warm_up, deadline)
    if wrong := marks.wrong(0, spec.warm_up):
        raise SystemExit(f"{wrong} of {spec.warm_up} tasks did not run to warm up with")
    tell(READY)
    wait_for_go()
    clock = Clock()
    await one.submit_all(range(spec.warm_up, total))
    await marks.wait(spec.warm_up, total, deadline)
    wrong = marks.wrong(spec.warm_up, total)
    outcome = clock.outcome(spec.count - wrong, 0, one.errors + wrong)
    await one.close()
    return outcome
