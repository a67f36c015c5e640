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
    RequestTimedOut,
    UnknownTopic,
    from_info,
)
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.limits import FRAME_ENTRIES_MAX
from ferryline.protocol.messages import Fetch, FetchAnswer, FetchEntry, FetchResult
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.records import BatchHeader, split_batches
from ferryline.requests import Key
from ferryline.tasks import Tasks
from ferryline.transport import Session

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.fetcher")

WAIT_MS = 5_000  # how long a fetch parks at the broker
ANSWER_S = 5.0  # beyond that, until a fetch counts as lost
FRAME_BYTES = 8 * 1024 * 1024  # one answer, over all its partitions
_BACKOFF = Backoff(10, 500)


class Asked:
    """One FETCH frame on its way, and the partitions that wait for it.

    Sent and answered without a task: a consumer of single records pays for each turn of the loop.
    """

    __slots__ = ("broker", "correlation", "fetcher", "partitions", "request", "session", "ticket", "timer")

    def __init__(self, fetcher: Fetcher, broker: int, ticket: int, partitions: list[Partition], request: Fetch) -> None:
        self.fetcher = fetcher
        self.broker = broker
        self.ticket = ticket
        self.partitions = partitions
        self.request = request
        self.session: Session | None = None
        self.correlation = 0
        self.timer: asyncio.TimerHandle | None = None

    def send(self, session: Session) -> None:
        """Ask; whatever becomes of it comes to `on_answer`."""
        self.session = session
        try:
            self.correlation = session.ask(Kind.FETCH, self.request, (), self.on_answer)
        except FerrylineError as error:
            self.on_answer(None, error)
            return
        timeout_s = self.request.wait_ms / 1000 + ANSWER_S
        self.timer = asyncio.get_running_loop().call_later(timeout_s, self._overdue)
        self.fetcher.asked.add(self)

    def on_answer(self, frame: Frame | None, error: FerrylineError | None) -> None:
        self._close()
        told = False
        try:
            if frame is not None:
                answer = decode_header(frame.header, FetchAnswer)
                self.fetcher.take(self.ticket, answer, frame.payload)
                told = bool(answer.results)
        except FerrylineError as malformed:
            error = malformed
        except Exception:  # not foreseen; it must not end the session, which others use too
            log.exception("a fetch answer could not be taken")
        if error is not None:
            self.fetcher.refresh()
        self.settle(error, told=told)

    def settle(self, error: FerrylineError | None = None, *, told: bool = False) -> None:
        """Whatever happened, no partition waits for a fetch that has ended.

        ``told``: it was answered. An answer names only partitions that have something; the others are asked for again
        at once, and are not failures.
        """
        for partition in self.partitions:
            if partition.ticket == self.ticket:
                if told:
                    partition.ticket = 0
                else:
                    self.fetcher.lost(partition, error)
        self.fetcher.schedule()

    def forget(self) -> None:
        """Heed no answer."""
        self._close()
        if self.session is not None:
            self.session.forget(self.correlation)

    def _overdue(self) -> None:
        self.forget()
        self.on_answer(None, RequestTimedOut("no answer to a fetch"))

    def _close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.fetcher.asked.discard(self)


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
        self.asked: set[Asked] = set()
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
        for asked in list(self.asked):
            asked.forget()
        self._tasks.cancel()
        await self._tasks.join()
        self.wake()

    def refresh(self) -> None:
        """Ask for the metadata again."""
        self._client.watch.refresh()

    @property
    def due(self) -> bool:
        """Whether something is to be fetched as soon as the loop comes round."""
        return self._scheduled is not None

    async def breathe(self) -> None:
        """Send what is due and let the loop run once: brokers work while the application does, and what has arrived is
        read. An application that always finds records would otherwise fetch only when it has none left."""
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._fetch_idle()
        await asyncio.sleep(0)

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
        asked = Asked(self, broker, self._tickets, partitions, Fetch(self._wait_ms, FRAME_BYTES, entries))
        session = self._client.connections.ready(broker)
        if session is not None:
            asked.send(session)
        else:
            self._tasks.spawn(self._connect(asked))

    async def _connect(self, asked: Asked) -> None:
        connections = self._client.connections
        try:
            session = await connections.session(asked.broker, timeout=connections.connector.connect_timeout + 1)
        except FerrylineError as error:
            asked.on_answer(None, error)
        except BaseException:
            asked.settle()
            raise
        else:
            asked.send(session)

    def lost(self, partition: Partition, error: FerrylineError | None) -> None:
        """The fetch of a partition has ended without an answer."""
        partition.ticket = 0
        if not self._closed and (error is not None or partition.retry_at <= self._loop.time()):
            self._failed(partition, error)

    def take(self, ticket: int, answer: FetchAnswer, payload: memoryview) -> None:
        """Results of a fetch, for the partitions that still wait for it."""
        at = 0
        for result in answer.results:
            partition = self.partitions.get((result.topic_id, result.partition))
            if partition is not None and partition.ticket == ticket:
                self._arrived(partition, result, payload[at : at + result.size])
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
            _check_contiguous(found, partition.fetch_offset)
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
        delay_ms = _BACKOFF.pause_ms(partition.failures, self._jitter.next(), error)
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


def _check_contiguous(found: list[tuple[int, BatchHeader]], offset: int) -> None:
    """No CRC covers where a batch begins: a flipped bit there would skip records, or give them other offsets."""
    for _, header in found:
        if not header.base_offset <= offset < header.next_offset:
            raise CorruptBatch(f"a batch holds {header.base_offset}..{header.next_offset - 1}, {offset} belongs there")
        offset = header.next_offset
