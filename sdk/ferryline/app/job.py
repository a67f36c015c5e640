"""A job: one submitted call of a task, wherever it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Generic, TypeVar

from ferryline.app.errors import JobFailed
from ferryline.app.statuses import JobState, JobStatus, status_of
from ferryline.options import check_seconds
from ferryline.protocol.errors import DeadlineExceeded, FerrylineError, UnknownTopic

if TYPE_CHECKING:
    from ferryline.app.queue import Place, TaskQueue
    from ferryline.app.results import Entry

R = TypeVar("R")
CHECK_S = 5.0  # silence for so long: ask the queue itself, for who is killed writes nothing
TIMEOUT_S_MAX = 366 * 86_400.0


class Job(Generic[R]):
    """One call of a task. Made by ``task.submit`` and, for any process that knows the id, by ``app.job``.

    ``id`` is that of its record, too; ``queue`` the name of its queue.
    """

    def __init__(self, queue: TaskQueue, job_id: str, entry: Entry, place: Place | None = None) -> None:
        self.id = job_id
        self._queue = queue
        self._entry = entry  # also keeps what becomes known of it
        self._place = place  # of its record, once that is known

    @property
    def queue(self) -> str:
        return self._queue.topic

    def __repr__(self) -> str:
        return f"<Job {self.id} of {self.queue}>"

    async def status(self, *, timeout: float = 30.0) -> JobStatus:
        """Where it is now, by what workers wrote and, while it has no end, by its queue. Raises FerrylineError."""
        check_seconds(timeout, "timeout", 0.0, TIMEOUT_S_MAX)
        try:
            async with asyncio.timeout(timeout):
                return await self._status(timeout)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.id}: no status within {timeout:g} s", job=self.id) from None

    async def result(self, timeout: float | None = None) -> R:
        """Wait until it has ended, and return what the task returned.

        Raises JobFailed when it is dead or forgotten, DeadlineExceeded after ``timeout`` seconds (default: for ever).
        """
        status = JobStatus(self.id, JobState.QUEUED)
        limit = check_seconds(timeout, "timeout", 0.0, TIMEOUT_S_MAX) if timeout is not None else None
        try:
            async with asyncio.timeout(limit):
                async for latest in self.watch():
                    status = latest
        except TimeoutError:
            raise DeadlineExceeded(f"{self.id}: no result within {limit:g} s; it is {status}", job=self.id) from None
        if status.state is not JobState.DONE or self._entry.record is None:
            raise JobFailed(f"{self.id}: {status}", status.traceback, job=self.id, state=str(status.state))
        found: R = self._queue.decode_result(self._entry.record)
        return found

    async def watch(self) -> AsyncIterator[JobStatus]:
        """Its status now, and whenever it changes, until it has ended. What was never accepted is waited for."""
        from ferryline.app.results import Watcher

        with Watcher(self._entry) as watcher:
            status = await self._patiently(None)
            yield status
            while not status.ended:
                record = await watcher.next(CHECK_S)
                following = status_of(record) if record is not None else await self._patiently(status)
                if following.step > status.step or (record is None and following.step != status.step):
                    status = following  # a record may tell what the queue has told before
                    yield status

    async def _patiently(self, before: JobStatus | None) -> JobStatus:
        """`status`; while nobody can say, what it was before."""
        while True:
            try:
                return await self._status(CHECK_S * 2)
            except FerrylineError as error:
                if not error.retriable and not error.refresh_metadata and not isinstance(error, DeadlineExceeded):
                    raise
                if before is not None:
                    return before
                await asyncio.sleep(0.2)

    async def _status(self, timeout: float) -> JobStatus:
        entry, queue = self._entry, self._queue
        try:
            await queue.results.complete(entry, timeout)
            if (status := self._known()) is not None and status.ended:
                return status
            if self._place is None and entry.record is not None:
                self._place = queue.place_of(entry.record)
            if self._place is None:
                self._place = await queue.find(self.id, entry.since_ms, timeout)
            told = await queue.explain(self._place, timeout) if self._place is not None else None
            if told is not None and told.get("state") == "settled":  # its end may have been written meanwhile
                await queue.results.reread(entry, timeout)
                if (known := self._known()) is not None and known.ended:
                    return known
        except UnknownTopic:  # nobody has submitted or worked there yet
            status = told = None
        return queue.combined(self.id, status, told, self._place)

    def _known(self) -> JobStatus | None:
        return status_of(self._entry.record) if self._entry.record is not None else None
