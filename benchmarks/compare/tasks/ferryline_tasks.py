"""Ferryline's tasks, as docs/workers.md says: `submit` for each, many of them at once.

``BENCH_HANDLER=subscriber``: a handler of a topic instead, whose records are sent: what a task is without id, status
and result.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

from benchmarks.compare.spec import Spec
from benchmarks.compare.tasks import Marks, Submitter

import ferryline as fl

WINDOW = 500  # tasks on their way

app = fl.App(os.environ["BENCH_SERVERS"], name="bench", ca=os.environ["BENCH_CA"])
marks = Marks(os.environ["BENCH_MARKS"])


async def mark(number: int) -> None:
    marks.add(number)


AS_SUBSCRIBER = os.environ.get("BENCH_HANDLER") == "subscriber"
if AS_SUBSCRIBER:
    app.subscriber(os.environ["BENCH_QUEUE"])(mark)
else:
    task = app.task(queue=os.environ["BENCH_QUEUE"])(mark)


class FerrylineSubmitter(Submitter):
    async def open(self) -> None:
        await app.__aenter__()

    async def submit_all(self, numbers: Iterable[int]) -> None:
        left, topic = iter(numbers), self.spec.topic

        async def some() -> None:
            for number in left:
                await (app.producer.send(topic, number) if AS_SUBSCRIBER else task.submit(number))

        async with asyncio.TaskGroup() as group:
            for _ in range(WINDOW):
                group.create_task(some())

    async def close(self) -> None:
        await app.__aexit__()


def make(spec: Spec) -> Submitter:
    """Who submits, for one measurement."""
    return FerrylineSubmitter(spec)
