"""Schedules: tasks that are submitted when their time comes, by every worker, and run once.

Each worker submits each firing, under an id that is made of the task and the time it was due; the queue remembers ids
for five minutes and hands out the first copy only. So nobody has to be elected, and a firing comes as long as one
worker lives. One that is late, because its process was stopped, leaves out what is older than `LATE_S`: the
queue might have forgotten the others' copies.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from ferryline.app.cron import Cron, Every
from ferryline.app.statuses import ID_SEPARATOR
from ferryline.protocol.errors import FerrylineError, InvalidArgument

if TYPE_CHECKING:
    from ferryline.app.task import Task

log = logging.getLogger("ferryline.app")

LATE_S = 120.0  # far below the five minutes for which ids are remembered: clocks of workers differ, too
SLEEP_S_MAX = 60.0  # the clock is looked at this often: it may be set


class Times(Protocol):
    """When a schedule fires."""

    def next_after(self, moment: datetime) -> datetime:
        """The first firing after a moment."""
        ...


def schedule_of(cron: str | None, every: float | None, tz: str) -> Times:
    """The times of a declaration. Raises InvalidArgument."""
    if (cron is None) == (every is None):
        raise InvalidArgument("schedule: either a cron expression or every= is needed", field="cron")
    if every is not None:
        return Every(every)
    assert cron is not None
    return Cron(cron, tz)


class Schedule:
    """A task and its times."""

    def __init__(self, task: Task[Any, Any], times: Times) -> None:
        self.task = task
        self.times = times

    def check(self) -> None:
        """Raises InvalidArgument when the task cannot be called without arguments."""
        if required := self.task.codecs[0].required:
            raise InvalidArgument(f"{self.task.what}: scheduled, but parameter {required[0]!r} has no default")

    def job_id(self, due: datetime) -> str:
        """The id of a firing, the same in every worker."""
        return f"{self.task.name}{ID_SEPARATOR}{due:%Y-%m-%dT%H:%M:%S}Z"

    async def run(self) -> None:
        """Submit every firing from now on, until cancelled."""
        due = self.times.next_after(_now())
        while True:
            if (left := (due - _now()).total_seconds()) > 0:
                await asyncio.sleep(min(left, SLEEP_S_MAX))
                continue
            if _now() - due > timedelta(seconds=LATE_S):
                log.warning("%s: %s is left out: this process was stopped, or its clock set", self.task.what, due)
                due = self.times.next_after(_now() - timedelta(seconds=LATE_S))
                continue
            await self._submit(due)
            due = self.times.next_after(due)

    async def _submit(self, due: datetime) -> None:
        """Try until it is stored, or too late."""
        end = due + timedelta(seconds=LATE_S)
        while True:
            try:
                await self.task.submit(id=self.job_id(due))
                return
            except FerrylineError as error:
                log.warning("%s: %s: %s", self.task.what, due, error)
                if not error.retriable or _now() > end:
                    return
                await asyncio.sleep(0.5)


def _now() -> datetime:
    return datetime.fromtimestamp(time.time(), UTC)
