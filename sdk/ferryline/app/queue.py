"""The queue of some tasks: its two topics, and what can be learned there of a job.

Jobs stand in the topic of the queue's name, read by the group `GROUP`; what became of them in ``<queue>.results``,
keyed by job. There are eight partitions of results: whoever looks for a job reads one of them, from the job's
submission on. Results are kept for a day.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.app.job import Job
from ferryline.app.reading import read_back
from ferryline.app.results import SKEW_MS, ResultsReader, now_ms
from ferryline.app.statuses import JobStatus, StatusRecord, combined, new_id, told_by_id
from ferryline.protocol.errors import OutcomeUnknown, UnknownGroup
from ferryline.protocol.limits import check_name
from ferryline.protocol.partitioner import partition_of
from ferryline.queue_admin import Queue
from ferryline.serializers import CONTENT_TYPE, JSON

if TYPE_CHECKING:
    from ferryline.app.app import App
    from ferryline.app.task import Task

log = logging.getLogger("ferryline.app")

GROUP = "tasks"
HEADER_TASK = "fl-task"  # name of the task that a record is a call of
RESULTS = ".results"
RESULT_PARTITIONS = 8
RESULT_RETENTION_MS = 86_400_000
DEDUPE_MS = 300_000  # for so long a queue remembers ids


class Place(msgspec.Struct, frozen=True):
    """Where the record of a job stands in its queue, and since when."""

    partition: int
    offset: int
    at_ms: int


class TaskQueue:
    """One queue of an app. Usable while the app is connected."""

    def __init__(self, app: App, topic: str) -> None:
        self.topic = check_name(topic, "queue")
        self.results_topic = check_name(topic + RESULTS, "queue")
        self.tasks: dict[str, Task[Any, Any]] = {}
        self._app = app
        self._reader: ResultsReader | None = None
        self._there = False
        self._making = asyncio.Lock()
        self._turn = itertools.count(secrets.randbits(10))

    # -- topics ------------------------------------------------------------------------------------

    @property
    def attempts(self) -> int:
        """How many attempts the queue's own policy allows, as far as that is known."""
        meta = self._app.client.routing.topic(self.topic)
        return meta.config.retry.attempts if meta is not None else 0

    async def ensure(self) -> None:
        """Make the topics that are not there, and allow as many attempts as any of the tasks asks for."""
        if self._there:
            return
        async with self._making:
            client = self._app.client
            copies = max(1, min(2, len(client.routing.live_brokers())))
            wanted = max((task.retry.attempts for task in self.tasks.values() if task.retry is not None), default=0)
            retry = {"attempts": wanted} if wanted else None
            made = await client.admin.create_topic(self.topic, exist_ok=True, replication=copies, retry=retry)
            if made.config.retry.attempts < wanted:
                log.info("%s: attempts: %d instead of %d", self.topic, wanted, made.config.retry.attempts)
                await client.admin.alter_topic(self.topic, retry={"attempts": wanted})
            await client.admin.create_topic(
                self.results_topic, exist_ok=True, replication=copies, partitions=RESULT_PARTITIONS,
                retention_ms=RESULT_RETENTION_MS,
            )  # fmt: skip
            self._there = True

    @property
    def results(self) -> ResultsReader:
        """What workers wrote. Raises ClientClosed while the app is not connected."""
        if self._reader is None:
            self._reader = ResultsReader(self._app.client, self.results_topic)
        return self._reader

    async def close(self) -> None:
        """Read no more results. The app may connect again."""
        reader, self._reader, self._there = self._reader, None, False
        if reader is not None:
            await reader.close()

    # -- submitting --------------------------------------------------------------------------------

    async def submit(
        self, task: str, data: bytes, *, key: str | bytes | None, delay: float | None, priority: int | None,
        job_id: str | None,
    ) -> Job[Any]:  # fmt: skip
        """Store a call of a task. Returns once it is committed."""
        await self.ensure()
        meta = await self._app.client.learn_topic(self.topic)
        count, ms = meta.config.partitions, now_ms()
        raw = key.encode() if isinstance(key, str) else key
        if job_id is None:
            partition = next(self._turn) % count if raw is None else partition_of(raw, count)
            name = new_id(task, ms, partition, secrets.token_hex(8))
            entry = self.results.entry(name, ms, new=True)
        else:
            # Copies meet in one partition, whose queue drops all but the first; that may be minutes old.
            name, partition = job_id, partition_of(job_id.encode() if raw is None else raw, count)
            entry = self.results.entry(name, ms - DEDUPE_MS)
        headers = [(HEADER_TASK, task.encode()), (CONTENT_TYPE, JSON)]
        try:
            stored = await self._app.producer.send(
                self.topic, data, key, headers, partition=partition, priority=priority, delay=delay, id=name
            )
        except OutcomeUnknown as error:
            error.details["job"] = name  # app.job(name).status() tells later
            raise
        place = Place(stored.partition, stored.offset, ms) if job_id is None else None
        return Job(self, name, entry, place)

    def job(self, job_id: str) -> Job[Any]:
        """A job that was submitted somewhere."""
        told = told_by_id(job_id)
        return Job(self, job_id, self.results.entry(job_id, told[0] if told is not None else 0))

    # -- looking -----------------------------------------------------------------------------------

    async def find(self, job_id: str, since_ms: int, timeout: float) -> Place | None:
        """Where the record of a job stands; None: the queue has none."""
        meta = await self._app.client.learn_topic(self.topic)
        count, told = meta.config.partitions, told_by_id(job_id)
        likely = told[1] if told is not None else partition_of(job_id.encode(), count)
        others = [number for number in range(count) if number != likely] if told is None else []
        for partitions in ([likely] if likely < count else [], others):
            found = await self._look_through(partitions, job_id, since_ms, timeout) if partitions else None
            if found is not None:
                return found
        return None

    async def _look_through(self, partitions: list[int], job_id: str, since_ms: int, timeout: float) -> Place | None:
        """The first record with this id, or the first after so long that the queue had forgotten the one before."""
        found: Place | None = None
        async for batch in read_back(self._app.client, self.topic, partitions, since_ms - SKEW_MS, timeout):
            for message in batch:
                if message.id == job_id and (found is None or message.timestamp_ms - found.at_ms >= DEDUPE_MS):
                    found = Place(message.partition, message.offset, message.timestamp_ms)
        return found

    async def explain(self, place: Place, timeout: float) -> Mapping[str, Any]:
        """What the queue says of a record."""
        try:
            queue = Queue(self._app.client, self.topic, GROUP)
            return await queue.explain(place.partition, place.offset, timeout=timeout)
        except UnknownGroup:  # no worker has ever asked
            return {"state": "available", "attempts": 0}

    def place_of(self, record: StatusRecord) -> Place:
        return Place(record.partition, record.offset, record.at_ms)

    def combined(
        self, job_id: str, known: JobStatus | None, told: Mapping[str, Any] | None, place: Place | None
    ) -> JobStatus:
        """What is to be said of a job without a known end."""
        meta = self._app.client.routing.topic(self.topic)
        by_id = told_by_id(job_id)
        at_ms = place.at_ms if place is not None else by_id[0] if by_id is not None else now_ms()
        kept_ms = meta.config.retention_ms if meta is not None and told is None else RESULT_RETENTION_MS
        return combined(job_id, known, told, self.attempts, old=0 <= kept_ms < now_ms() - at_ms)

    def decode_result(self, record: StatusRecord) -> Any:
        """The result of a job; as plain JSON when its task is not known here."""
        task = self.tasks.get(record.task)
        return task.results.decode(record.result) if task is not None else msgspec.json.decode(record.result)
