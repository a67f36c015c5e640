"""What workers wrote of jobs, as this process sees it: the reader of one topic of results.

One consumer without a group follows the end of the topic, for everybody here who waits. What was written before it
began is read once for each partition in which a job is looked for, from that job's submission on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import msgspec

from ferryline.app.reading import read_back
from ferryline.app.statuses import JobState, StatusRecord, results_partition, supersedes
from ferryline.message import Message
from ferryline.protocol.errors import FerrylineError
from ferryline.tasks import Tasks

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.app")

SKEW_MS = 60_000  # how far clocks of submitters and workers may be apart
NEWS_MAX = 1_000  # changes of one job that a watcher may be behind
_AGAIN_S = 1.0

_STATES = frozenset(JobState)
_decoder = msgspec.json.Decoder(StatusRecord)


class Entry:
    """One job. ``complete``: everything that was written of it is known, and what will be is followed."""

    __slots__ = ("__weakref__", "complete", "job_id", "offset", "record", "since_ms", "watchers")

    def __init__(self, job_id: str, since_ms: int, complete: bool) -> None:
        self.job_id = job_id
        self.since_ms = since_ms
        self.complete = complete
        self.record: StatusRecord | None = None
        self.offset = -1  # of the last record that was looked at
        self.watchers: list[Watcher] = []

    def apply(self, offset: int, record: StatusRecord) -> None:
        """A record about this job; the history may repeat what was followed already."""
        if offset <= self.offset:
            return
        self.offset = offset
        if supersedes(record, self.record):
            self.record = record
            for watcher in self.watchers:
                watcher.tell(record)


class Watcher:
    """Somebody who wants each change of one job."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._news: deque[StatusRecord] = deque(maxlen=NEWS_MAX)
        self._event = asyncio.Event()

    def __enter__(self) -> Watcher:
        self._entry.watchers.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._entry.watchers.remove(self)

    def tell(self, record: StatusRecord) -> None:
        self._news.append(record)
        self._event.set()

    async def next(self, timeout: float) -> StatusRecord | None:
        """The next change; None when there was none for ``timeout`` seconds."""
        if not self._news:
            self._event.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._event.wait()
            except TimeoutError:
                return None
        return self._news.popleft()


class ResultsReader:
    """The records of one topic of results, for the jobs that somebody holds an `Entry` of."""

    def __init__(self, client: Client, topic: str) -> None:
        self.topic = topic
        self._client = client
        self._entries: WeakValueDictionary[str, Entry] = WeakValueDictionary()
        self._following = False  # from here on nothing is missed
        self._starting = asyncio.Lock()
        self._scanning: dict[int, asyncio.Lock] = {}
        self._tasks = Tasks()

    def entry(self, job_id: str, since_ms: int, *, new: bool = False) -> Entry:
        """The entry of a job that was submitted at ``since_ms``, or, if it is ``new``, is going to be."""
        found = self._entries.get(job_id)
        if found is None:
            found = self._entries[job_id] = Entry(job_id, since_ms, complete=new and self._following)
        found.since_ms = min(found.since_ms, since_ms)
        return found

    async def complete(self, entry: Entry, timeout: float) -> None:
        """Learn what was written of a job before. Raises FerrylineError."""
        await self._follow()
        if not entry.complete:
            await self.reread(entry, timeout)

    async def reread(self, entry: Entry, timeout: float) -> None:
        """Read again up to the present end, for this job and all others of its partition that want it."""
        meta = await self._client.learn_topic(self.topic)
        count = meta.config.partitions
        partition = results_partition(entry.job_id, count)
        async with self._scanning.setdefault(partition, asyncio.Lock()):
            following = self._following
            wanting = [
                one
                for one in list(self._entries.values())
                if (one is entry or not one.complete) and results_partition(one.job_id, count) == partition
            ]
            since_ms = min(one.since_ms for one in wanting) - SKEW_MS
            async for batch in read_back(self._client, self.topic, [partition], since_ms, timeout):
                self._take(batch)
            for one in wanting:
                one.complete = following and self._following

    async def close(self) -> None:
        self._tasks.cancel()
        await self._tasks.join()

    async def _follow(self) -> None:
        async with self._starting:
            if self._following:
                return
            consumer = self._client.consumer(self.topic, start="end")
            await consumer.start()
            self._following = True
            self._tasks.spawn(self._read(consumer))

    async def _read(self, consumer: Any) -> None:
        try:
            while True:
                self._take(await consumer.pull(5_000, 86_400.0))
        except FerrylineError as error:
            log.warning("%s: %s; it is read again", self.topic, error)
            await asyncio.sleep(_AGAIN_S)
        finally:
            # Whoever waits looks at the whole again at the next check, which begins to follow anew.
            self._following = False
            for entry in list(self._entries.values()):
                entry.complete = False
            await consumer.close()

    def _take(self, batch: list[Message[bytes]]) -> None:
        for message in batch:
            entry = self._entries.get((message.key or b"").decode(errors="replace"))
            if entry is None:
                continue
            try:
                record = _decoder.decode(message.raw or b"")
            except msgspec.MsgspecError as error:
                log.warning("%r: %s", message, error)
            else:
                if record.state in _STATES:  # not of a later version
                    entry.apply(message.offset, record)


def now_ms() -> int:
    """The time, as it stands in ids and status records."""
    return time.time_ns() // 1_000_000
