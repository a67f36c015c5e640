"""Dramatiq on Redis, as its guide says: an actor, `send` for each task. It always acknowledges after the work."""

from __future__ import annotations

import os
from collections.abc import Iterable

import dramatiq
from benchmarks.compare.spec import Spec
from benchmarks.compare.tasks import Marks, Submitter
from dramatiq.brokers.redis import RedisBroker

broker = RedisBroker(url=f"redis://{os.environ['BENCH_SERVERS']}/0")
dramatiq.set_broker(broker)
marks = Marks(os.environ["BENCH_MARKS"])


@dramatiq.actor(queue_name=os.environ["BENCH_QUEUE"])
def mark(number: int) -> None:
    marks.add(number)


class DramatiqSubmitter(Submitter):
    async def open(self) -> None:
        """The first call connects."""

    async def submit_all(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            mark.send(number)

    async def close(self) -> None:
        broker.close()


def make(spec: Spec) -> Submitter:
    """Who submits, for one measurement."""
    return DramatiqSubmitter(spec)
