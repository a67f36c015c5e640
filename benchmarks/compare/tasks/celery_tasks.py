"""Celery on Redis, as its first steps say: JSON, no result backend, `delay` for each task."""

from __future__ import annotations

import os
from collections.abc import Iterable

from benchmarks.compare.spec import Spec
from benchmarks.compare.tasks import Marks, Submitter
from celery import Celery

app = Celery("bench", broker=f"redis://{os.environ['BENCH_SERVERS']}/0")
app.conf.task_default_queue = os.environ["BENCH_QUEUE"]
app.conf.task_acks_late = bool(os.environ.get("BENCH_ACKS_LATE"))
marks = Marks(os.environ["BENCH_MARKS"])


@app.task(ignore_result=True)
def mark(number: int) -> None:
    marks.add(number)


class CelerySubmitter(Submitter):
    async def open(self) -> None:
        """The first call connects."""

    async def submit_all(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            mark.delay(number)

    async def close(self) -> None:
        app.close()


def make(spec: Spec) -> Submitter:
    """Who submits, for one measurement."""
    return CelerySubmitter(spec)
