"""Fetching: keeps the buffers of a consumer's partitions filled, from whoever is their primary.

Each partition is in at most one outstanding fetch; all idle partitions of a broker share the next one, which parks
there until one of them has data. A fetch that was overtaken (seek, revocation, new primary) is told by its ticket and
changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from ferryline.core.retry import Backoff, Jitter
from ferryline.partition import Partition, located
from ferryline.protocol.errors import (
    CorruptBatch,
    FerrylineError,
    LogTruncated,
    OffsetOutOfRange,
    UnknownTopic,
    from_info,
)
from ferryline.protocol.frames import Kind
from ferryline.protocol.limits import FRAME_ENTRIES_MAX
from ferryline.protocol.messages import Fetch, FetchAnswer, FetchEntry, FetchResult
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.records import split_batches
from ferryline.requests import Key
from ferryline.tasks import Tasks

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.fetcher")

WAIT_MS = 5_000  # how long a fetch parks at the broker
FRAME_BYTES = 8 * 1024 * 1024  # one answer, over all its partitions
_BACKOFF = Backoff(10, 500)


class Fetcher:
    """Fills the buffers of ``partitions`` and keeps ``ready``, the queue of those that have data or an error."""

    def __init__(self, client: Client, *, partition_bytes: int, buffer_bytes: int, wait_ms: int = WAIT_MS) -> None:
        self.partitions: dict[Key, Partition] = {}
        self.ready: deque[Partition] = deque()
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._partition_bytes = partition_bytes
        self._buffer_bytes = buffer_bytes
        self._wait_ms = wait_ms
        self._tickets = 0
        self._jitter = Jitter(id(self))
        self._scheduled: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = Tasks()
        self._news: asyncio.Future[bool] | None = None
        self._closed = False
        client.watch.on_change.append(self._metadata_changed)

    # -- partitions --------------------------------------------------------------------------------

    def add(self, partition: Partition) -> None:
        self.partitions[partition.key] = partition
        self.schedule()

    def remove(self, key: Key) -> Partition | None:
        partition = self.partitions.pop(key, None)
        if partition is not None:
            partition.gone = True
            partition.drop()
        return partition

    def offer(self, partition: Partition) -> None:
        """Queue a partition that may have something for the application."""
        if not partition.queued and not partition.paused and (partition.has_data or partition.error is not None):
            partition.queued = True
            self.ready.append(partition)
            self.wake()

    def refill(self, partition: Partition) -> None:
        """Records were taken from a partition: queue it again if there is more, fetch if it runs low."""
        self.offer(partition)
        if not partition.ticket and partition.buffered <= self._partition_bytes // 2:
            self.schedule()

    def wake(self) -> None:
        """Let the application look again."""
        if self._news is not None:
            _resolve(self._news, True)

    async def news(self, timeout: float | None) -> bool:
        """Wait until something may have arrived. Returns False when ``timeout`` seconds passed without."""
        if self.ready:
            return True
        if timeout is not None and timeout <= 0:
            return False
        future: asyncio.Future[bool] = self._loop.create_future()
        self._news = future
        timer = self._loop.call_later(timeout, _resolve, future, False) if timeout is not None else None
        try:
            return await future
        finally:
            if timer is not None:
                timer.cancel()

    async def close(self) -> None:
        self._closed = True
        self._client.watch.on_change.remove(self._metadata_changed)
        for handle in (self._scheduled, self._timer):
            if handle is not None:
                handle.cancel()
        self._tasks.cancel()
        await self._tasks.join()
        self.wake()

    # -- fetching ----------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Look for partitions to fetch once the loop comes round."""
        if self._scheduled is None and not self._closed:
            self._scheduled = self._loop.call_soon(self._fetch_idle)

    def _wants(self, partition: Partition, now: float, room: bool) -> bool:
        if partition.ticket or partition.revoked or partition.paused or partition.error is not None:
            return False
        if partition.buffered and (not room or partition.buffered > self._partition_bytes // 2):
            return False
        return partition.retry_at <= now

    def _fetch_idle(self) -> None:
        self._scheduled = None
        now = self._loop.time()
        room = sum(partition.buffered for partition in self.partitions.values()) < self._buffer_bytes
        by_broker: dict[int, list[Partition]] = {}
        later = 0.0
        for partition in self.partitions.values():
            if partition.retry_at > now:
                later = partition.retry_at if not later else min(later, partition.retry_at)
            elif self._wants(partition, now, room):
                route = self._client.routing.route(partition.key)
                if route.broker == NO_BROKER:
                    self._failed(partition, None)
                    later = partition.retry_at if not later else min(later, partition.retry_at)
                else:
                    partition.target = (route.broker, route.epoch)
                    by_broker.setdefault(route.broker, []).append(partition)
        for broker, idle in by_broker.items():
            for start in range(0, len(idle), FRAME_ENTRIES_MAX):
                self._begin(broker, idle[start : start + FRAME_ENTRIES_MAX])
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if later:
            self._timer = self._loop.call_at(later + 0.0005, self.schedule)

    def _begin(self, broker: int, partitions: list[Partition]) -> None:
        self._tickets += 1
        entries = []
        for partition in partitions:
            partition.ticket = self._tickets
            entries.append(
                FetchEntry(*partition.key, partition.fetch_offset, partition.fetch_epoch, self._partition_bytes)
            )
        self._tasks.spawn(self._fetch_and_settle(broker, self._tickets, partitions, entries))

    async def _fetch_and_settle(
        self, broker: int, ticket: int, partitions: list[Partition], entries: list[FetchEntry]
    ) -> None:
        try:
            await self._fetch(broker, ticket, partitions, entries)
        finally:  # whatever happened, no partition waits for a fetch that has ended
            for partition in partitions:
                if partition.ticket == ticket:
                    partition.ticket = 0
                    if not self._closed and partition.retry_at <= self._loop.time():
                        self._failed(partition, None)
            self.schedule()

    async def _fetch(self, broker: int, ticket: int, partitions: list[Partition], entries: list[FetchEntry]) -> None:
        connections = self._client.connections
        request = Fetch(self._wait_ms, FRAME_BYTES, entries)
        try:
            session = await connections.session(broker, timeout=connections.connector.connect_timeout + 1)
            answer, payload = await session.request(
                Kind.FETCH, request, FetchAnswer, timeout=self._wait_ms / 1000 + 5.0
            )
        except FerrylineError as error:
            self._client.watch.refresh()
            for partition in partitions:
                if partition.ticket == ticket:
                    partition.ticket = 0
                    self._failed(partition, error)
            return
        at = 0
        for result in answer.results:
            partition_or_none = self.partitions.get((result.topic_id, result.partition))
            if partition_or_none is not None and partition_or_none.ticket == ticket:
                self._arrived(partition_or_none, result, payload[at : at + result.size])
            at += result.size

    def _arrived(self, partition: Partition, result: FetchResult, payload: memoryview) -> None:
        partition.ticket = 0
        if result.error is not None:
            self._refused(partition, from_info(result.error))
            return
        partition.failures, partition.retry_at = 0, 0.0
        partition.high_watermark = result.high_watermark
        partition.log_start = result.log_start
        if not payload:
            return
        try:
            found = split_batches(payload, verify=False)
        except CorruptBatch as error:
            partition.error = located(error, partition)
        else:
            for at, header in found:
                partition.batches.append((header, payload[at : at + header.size]))
                partition.buffered += header.size
            last = found[-1][1]
            partition.fetch_offset = max(partition.fetch_offset, last.next_offset)
            partition.fetch_epoch = last.epoch
            partition.skip_control()
        self.offer(partition)

    def _refused(self, partition: Partition, error: FerrylineError) -> None:
        if isinstance(error, OffsetOutOfRange) and partition.policy and "log_start" in error.details:
            # Retention moved the start between the look and the fetch; nothing was consumed, so nothing is lost.
            partition.jump(int(error.details["log_start"]))
            partition.policy = True
        elif isinstance(error, (OffsetOutOfRange, LogTruncated)):
            partition.error = located(error, partition)
            self.offer(partition)
        elif error.retriable or error.refresh_metadata:
            if "primary" in error.details and self._client.routing.hint(
                partition.key, error.details.get("primary"), error.details.get("epoch")
            ):
                return  # fetch there at once
            if not self._client.routing.exists(partition.key) and isinstance(error, UnknownTopic):
                partition.error = located(error, partition)
                self.offer(partition)
                return
            self._failed(partition, error)
        else:
            partition.error = located(error, partition)
            self.offer(partition)

    def _failed(self, partition: Partition, error: FerrylineError | None) -> None:
        partition.failures += 1
        delay_ms = _BACKOFF.delay_ms(partition.failures, self._jitter.next())
        partition.retry_at = self._loop.time() + delay_ms / 1000
        if error is None or error.refresh_metadata:
            self._client.watch.refresh()

    def _metadata_changed(self) -> None:
        """Leave old primaries at once: a fetch parked at a paused broker would wait for its deadline."""
        routing = self._client.routing
        for partition in self.partitions.values():
            route = routing.route(partition.key)
            if (route.broker, route.epoch) != partition.target:
                partition.ticket = 0
                partition.retry_at = 0.0
                partition.failures = 0
                if not routing.exists(partition.key) and partition.error is None:
                    name, number = partition.source.topic, partition.source.partition
                    partition.error = UnknownTopic(f"topic {name} was deleted", topic=name, partition=number)
                    self.offer(partition)
        self.schedule()


def _resolve(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)
