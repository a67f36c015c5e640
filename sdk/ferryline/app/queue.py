"""The queue of some tasks: its two topics, and what can be learned there of a job.

Jobs stand in the topic of the queue's name, read by the group `GROUP`; what became of them in ``<queue>.results``,
keyed by job. There are eight partitions of results: whoever looks for a job reads one of them (`results_partition`),
from the job's submission on. Results are kept for a day.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline import tracing
from ferryline.accumulator import Pairs
from ferryline.app.job import Job
from ferryline.app.reading import read_back
from ferryline.app.results import SKEW_MS, Entry, ResultsReader, now_ms
from ferryline.app.statuses import JobStatus, StatusRecord, combined, new_id, told_by_id
from ferryline.delivery import delivery_headers
from ferryline.message import RecordMetadata
from ferryline.protocol.errors import BufferFull, FerrylineError, OutcomeUnknown, UnknownGroup
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
HEADER_RESULTS = "fl-results"  # `NO_RESULTS`: nobody asks what became of it, unless it fails
NO_RESULTS = b"none"
STICK_MS = 5  # jobs without a key that are submitted so close together share a partition, and a batch
RESULTS = ".results"
RESULT_PARTITIONS = 8
RESULT_RETENTION_MS = 86_400_000
DEDUPE_MS = 300_000  # for so long a queue remembers ids


class Place(msgspec.Struct, frozen=True):
    """Where the record of a job stands in its queue, and since when. ``kept``: its result will be, too."""

    partition: int
    offset: int
    at_ms: int
    kept: bool = True


class Submission(msgspec.Struct, frozen=True):
    """A job that is about to be sent: what its record needs beside the arguments, and the entry of what comes of it."""

    name: str
    partition: int
    headers: Pairs
    entry: Entry
    place_ms: int  # when it was made; -1: somebody chose its id, so its record may be an older one
    kept: bool


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
        self._turn = secrets.randbits(10)
        self._turned_ms = 0

    # -- topics ------------------------------------------------------------------------------------

    @property
    def attempts(self) -> int:
        """How many attempts the queue's own policy allows, as far as that is known."""
        meta = self._app.client.routing.topic(self.topic)
        return meta.config.retry.attempts if meta is not None else 0

    @property
    def result_partitions(self) -> int:
        """How many partitions the topic of results has."""
        meta = self._app.client.routing.topic(self.results_topic)
        return meta.config.partitions if meta is not None else RESULT_PARTITIONS

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
        self, task: Task[Any, Any], data: bytes, *, key: str | bytes | None, delay: float | None, priority: int | None,
        job_id: str | None,
    ) -> Job[Any]:  # fmt: skip
        """Store a call of a task. Returns once it is committed."""
        await self.ensure()
        raw, count = key.encode() if isinstance(key, str) else key, await self._partitions()
        one = self._prepared(task, raw, count, delivery_headers(priority=priority, delay=delay), job_id)
        return await self._sent(one, data, raw)

    async def submit_many(
        self, task: Task[Any, Any], calls: Iterable[bytes], *, key: str | bytes | None, delay: float | None,
        priority: int | None,
    ) -> list[Job[Any] | FerrylineError]:  # fmt: skip
        """Store calls of a task, together. Returns once each of them is committed, or has failed."""
        await self.ensure()
        raw, count = key.encode() if isinstance(key, str) else key, await self._partitions()
        delivery = delivery_headers(priority=priority, delay=delay)
        send = self._app.producer.send_nowait
        begun: list[tuple[Submission, asyncio.Future[RecordMetadata]] | Job[Any] | FerrylineError] = []
        for data in calls:
            one = self._prepared(task, raw, count, delivery, None)
            headers = one.headers if tracing.active is None else tracing.active.injected(one.headers)
            try:
                try:
                    begun.append((one, send(self.topic, data, raw, headers, partition=one.partition)))
                except BufferFull:
                    begun.append(await self._sent(one, data, raw))  # waits for room
            except FerrylineError as error:
                begun.append(error)
        return [await self._outcome(*one) if isinstance(one, tuple) else one for one in begun]

    async def _outcome(self, one: Submission, sent: asyncio.Future[RecordMetadata]) -> Job[Any] | FerrylineError:
        try:
            return self._job(one, await sent)
        except FerrylineError as error:
            return _with_job(error, one.name)

    async def _sent(self, one: Submission, data: bytes, raw: bytes | None) -> Job[Any]:
        try:
            stored = await self._app.producer.send(self.topic, data, raw, one.headers, partition=one.partition)
        except FerrylineError as error:
            raise _with_job(error, one.name) from None
        return self._job(one, stored)

    async def _partitions(self) -> int:
        meta = self._app.client.routing.topic(self.topic) or await self._app.client.learn_topic(self.topic)
        return meta.config.partitions

    def _prepared(
        self, task: Task[Any, Any], raw: bytes | None, count: int, delivery: Pairs, job_id: str | None
    ) -> Submission:
        ms = now_ms()
        if job_id is None:
            partition = self._next_partition(ms) % count if raw is None else partition_of(raw, count)
            name = new_id(task.name, ms, partition, secrets.token_hex(8))
            identity = delivery_headers(id=name)
            entry = self.results.entry(name, ms, new=True)
        else:
            name, identity = job_id, delivery_headers(id=job_id)
            # Copies meet in one partition, whose queue drops all but the first; that may be minutes old.
            partition = partition_of(job_id.encode() if raw is None else raw, count)
            entry = self.results.entry(name, ms - DEDUPE_MS)
        headers = [(HEADER_TASK, task.name.encode()), (CONTENT_TYPE, JSON), *delivery, *identity]
        if not task.keeps_results:
            headers.append((HEADER_RESULTS, NO_RESULTS))
        return Submission(name, partition, headers, entry, ms if job_id is None else -1, task.keeps_results)

    def _next_partition(self, ms: int) -> int:
        if not 0 <= ms - self._turned_ms < STICK_MS:
            self._turned_ms = ms
            self._turn += 1
        return self._turn

    def _job(self, one: Submission, stored: RecordMetadata) -> Job[Any]:
        known = one.place_ms >= 0
        place = Place(stored.partition, stored.offset, one.place_ms, one.kept) if known else None
        return Job(self, one.name, one.entry, place)

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
                    kept = message.headers.get(HEADER_RESULTS) != NO_RESULTS
                    found = Place(message.partition, message.offset, message.timestamp_ms, kept)
        return found

    async def explain(self, place: Place, timeout: float) -> Mapping[str, Any]:
        """What the queue says of a record."""
        try:
            queue = Queue(self._app.client, self.topic, GROUP)
            return await queue.explain(place.partition, place.offset, timeout=timeout)
        except UnknownGroup:  # no worker has ever asked
            return {"state": "available", "attempts": 0}

    def place_of(self, record: StatusRecord) -> Place:
        return Place(record.partition, record.offset, record.at_ms, record.kept)

    def combined(
        self, job_id: str, known: JobStatus | None, told: Mapping[str, Any] | None, place: Place | None
    ) -> JobStatus:
        """What is to be said of a job without a known end."""
        meta = self._app.client.routing.topic(self.topic)
        by_id = told_by_id(job_id)
        at_ms = place.at_ms if place is not None else by_id[0] if by_id is not None else now_ms()
        kept_ms = meta.config.retention_ms if meta is not None and told is None else RESULT_RETENTION_MS
        return combined(
            job_id, known, told, self.attempts, old=0 <= kept_ms < now_ms() - at_ms,
            kept=place is None or place.kept,
        )  # fmt: skip

    def decode_result(self, record: StatusRecord) -> Any:
        """The result of a job; as plain JSON when its task is not known here."""
        task = self.tasks.get(record.task)
        return task.results.decode(record.result) if task is not None else msgspec.json.decode(record.result)


def _with_job(error: FerrylineError, job_id: str) -> FerrylineError:
    """The error of a submission; where nobody knows whether it was stored, ``app.job(id).status()`` tells later.

    All records of a batch fail with one error, so each job gets one of its own.
    """
    if isinstance(error, OutcomeUnknown):
        return OutcomeUnknown(error.message, **{**error.details, "job": job_id})
    return error
