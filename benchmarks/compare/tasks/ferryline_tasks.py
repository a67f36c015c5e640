"""Ferryline's tasks, as docs/workers.md says: `submit_many`, so many together.

``BENCH_HANDLER=no-results``: a task whose results nobody asks for, as Celery's ``ignore_result``;
``BENCH_HANDLER=subscriber``: a handler of a topic instead, whose records are sent: what a task is without id, status
and result.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterable
from typing import Any

from benchmarks.compare.spec import Spec
from benchmarks.compare.tasks import Marks, Submitter

import ferryline as fl

WINDOW = 500  # tasks, or records, that are sent together
TOGETHER = 2  # of these on their way: one is made while the other is stored

app = fl.App(os.environ["BENCH_SERVERS"], name="bench", ca=os.environ["BENCH_CA"])
marks = Marks(os.environ["BENCH_MARKS"])


async def mark(number: int) -> None:
    marks.add(number)


HANDLER = os.environ.get("BENCH_HANDLER", "")
AS_SUBSCRIBER = HANDLER == "subscriber"
if AS_SUBSCRIBER:
    app.subscriber(os.environ["BENCH_QUEUE"])(mark)
else:
    task = app.task(queue=os.environ["BENCH_QUEUE"], results=HANDLER != "no-results")(mark)


class FerrylineSubmitter(Submitter):
    async def open(self) -> None:
        await app.__aenter__()

    async def submit_all(self, numbers: Iterable[int]) -> None:
        left, topic = iter(numbers), self.spec.topic

        async def some() -> None:
            while part := list(itertools.islice(left, WINDOW)):
                if AS_SUBSCRIBER:
                    outcomes: list[Any] = [*await app.producer.send_many(topic, part)]
                else:
                    outcomes = [*await task.submit_many([(number,) for number in part])]
                self.errors += sum(isinstance(one, fl.FerrylineError) for one in outcomes)

        async with asyncio.TaskGroup() as group:
            for _ in range(TOGETHER):
                group.create_task(some())

    async def close(self) -> None:
        await app.__aexit__()


def make(spec: Spec) -> Submitter:
    """Who submits, for one measurement."""
    return FerrylineSubmitter(spec)
