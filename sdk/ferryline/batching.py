"""When batches are opened and closed: linger, size, room in the window, and topics that change under way."""

from __future__ import annotations

import asyncio
import heapq
from time import time_ns
from typing import TYPE_CHECKING

from ferryline.accumulator import Accumulator, Batch, Record, TopicBuffer
from ferryline.core.producer import PARTIAL_IN_FLIGHT
from ferryline.protocol.errors import BufferFull, ClientClosed, DeadlineExceeded, FerrylineError, UnknownTopic
from ferryline.protocol.limits import check_name
from ferryline.protocol.partitioner import partition_of
from ferryline.protocol.records import BatchBuilder
from ferryline.sender import Sender

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.receipts import Receipts

_EARLY_S = 0.0005  # a timer may fire a hair before its time
_SMALL_S = 60.0  # how long batches stay small after a refusal for a quota
_SMALL_SHARE = 10  # then a batch is about this part of what the quota allows in a second
_SMALL_BYTES_MIN = 1024


class Batching:
    """Accumulators of a producer, by topic, and the bytes they hold.

    ``buffered`` counts every record from `send` to its last word; the producer adds, this class subtracts.
    """

    def __init__(
        self,
        client: Client,
        *,
        linger_s: float,
        batch_bytes: int,
        buffer_bytes: int,
        compression: str,
        delivery_ms: int,
        request_ms: int,
        receipts: Receipts | None = None,
    ) -> None:
        self.topics: dict[str, TopicBuffer] = {}
        self.buffered = 0
        self.closed = False
        self.stamp_ms = 0  # 0: read the clock
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._linger_s = linger_s
        self._batch_bytes = batch_bytes
        self._small_bytes = batch_bytes
        self._small_until = float("-inf")  # loop time
        self._buffer_bytes = buffer_bytes
        self._compression = compression
        self._delivery_ms = delivery_ms
        self._sender = Sender(
            client,
            request_timeout_ms=request_ms,
            partial_in_flight=PARTIAL_IN_FLIGHT if linger_s else PARTIAL_IN_FLIGHT + 1,  # without linger latency counts
            left=self._left,
            returned=self._returned,
            over_quota=self._over_quota,
            receipts=receipts,
        )
        self._numbers = 0
        self._lingering: list[tuple[float, int, TopicBuffer, Accumulator, BatchBuilder]] = []  # heap
        self._opened = 0
        self._hurried = False
        self._timer: asyncio.Handle | None = None
        self._timer_due = 0.0
        self.turn = asyncio.Lock()  # who waits for room, in the order of arrival; the holder waits in `room`
        self._space: tuple[int, asyncio.Future[None]] | None = None
        self._moved = asyncio.Event()
        self._flushes: list[tuple[int, asyncio.Future[None]]] = []
        client.watch.on_change.append(self._metadata_changed)

    def stamp(self) -> int:
        """The time in ms for records that are sent in this turn of the loop: the clock is read once for all of them."""
        self.stamp_ms = time_ns() // 1_000_000
        self._loop.call_soon(self._unstamp)
        return self.stamp_ms

    def _unstamp(self) -> None:
        self.stamp_ms = 0

    # -- topics ------------------------------------------------------------------------------------

    def topic(self, name: str) -> TopicBuffer:
        """The buffer of a topic. Raises UnknownTopic if the metadata has no such topic, ClientClosed when closed."""
        if self.closed:
            raise ClientClosed("the producer is closed")
        buffer = self.topics.get(name)
        if buffer is None:
            check_name(name)
            meta = self._client.routing.topic(name)
            if meta is None:
                self._client.watch.refresh()
                raise UnknownTopic(f"topic: {name!r} does not exist", field="topic", topic=name)
            buffer = self.topics[name] = TopicBuffer(meta)
            self._sender.tell_routes(buffer)
        return buffer

    def _metadata_changed(self) -> None:
        topics = self._client.routing.cluster.topics
        for name, buffer in list(self.topics.items()):
            meta = topics.get(buffer.id)
            if meta is None:  # deleted, or made again under another id
                del self.topics[name]
                self._moved.set()
                self._fail_parked(buffer, UnknownTopic(f"topic {name} was deleted", topic=name))
            elif meta.config.partitions != buffer.partitions and not buffer.moving:
                buffer.moving = True
            else:
                buffer.max_record_bytes = meta.config.max_record_bytes
            self._sender.tell_routes(buffer)
            if meta is None or buffer.moving:  # after the routes, so that the core fails or returns them unsent
                self._close_topic(buffer)
                self._sender.dispatch()
            self._move_if_settled(buffer)

    def _returned(self, batch: Batch) -> None:
        buffer = batch.topic
        buffer.unsettled -= 1
        buffer.returned.append(batch)
        self._move_if_settled(buffer)

    def _move_if_settled(self, old: TopicBuffer) -> None:
        """All that was hashed with the old partition count is settled or back: route the rest with the new one."""
        if not old.moving or old.unsettled or self.topics.get(old.name) is not old:
            return
        meta = self._client.routing.cluster.topics.get(old.id)
        if meta is None:
            return
        old.moving = False
        self._moved.set()
        new = self.topics[old.name] = TopicBuffer(meta)
        self._sender.tell_routes(new)
        for batch in old.returned:  # in order within each old partition, hence for each key
            for record in batch.records():
                self.place(new, record)
        for record, partition in old.parked:
            self.place(new, record, partition)
        self._sender.dispatch()

    def _fail_parked(self, buffer: TopicBuffer, error: FerrylineError) -> None:
        for (*_, size, future), _ in buffer.parked:
            self.buffered -= size
            if not future.done():
                future.set_exception(error)
        buffer.parked.clear()

    # -- records -----------------------------------------------------------------------------------

    def place(self, buffer: TopicBuffer, record: Record, partition: int | None = None) -> None:
        """Put a record where it belongs; the common path of the producer does the same inline."""
        if buffer.moving:
            buffer.parked.append((record, partition))
        elif partition is not None:
            self.append(buffer, buffer.accumulators[partition], record, keyed=False)
        elif record[1] is None:
            self.append(buffer, buffer.accumulators[buffer.turn], record, keyed=False)
        else:
            self.append(buffer, buffer.accumulators[partition_of(record[1], buffer.partitions)], record, keyed=True)

    def append(self, buffer: TopicBuffer, accumulator: Accumulator, record: Record, *, keyed: bool) -> None:
        """Append to an accumulator that may be empty or full."""
        timestamp_ms, key, value, pairs, size, future = record
        builder = accumulator.builder
        if builder is None or not builder.append(timestamp_ms, key, value, pairs):
            if builder is not None:
                self._close(buffer, accumulator)
                self._sender.dispatch()
            small = self._loop.time() < self._small_until
            batch_bytes = self._small_bytes if small else self._batch_bytes
            builder = accumulator.builder = BatchBuilder(batch_bytes, self._compression)
            builder.append(timestamp_ms, key, value, pairs)
            accumulator.opened_ms = self._sender.now_ms()
            self.stamp_ms = 0  # a caller that never lets the loop run must not stop time
            self._linger(buffer, accumulator, builder)
        accumulator.futures.append(future)
        accumulator.bytes += size
        accumulator.keyed = accumulator.keyed or keyed

    # -- closing batches ---------------------------------------------------------------------------

    def _linger(self, buffer: TopicBuffer, accumulator: Accumulator, builder: BatchBuilder) -> None:
        """Arrange for the batch to be closed: ``linger`` after the one before it in its partition was.

        So a record that comes after a pause leaves at once, while a stream of records makes batches of ``linger`` each.
        "At once" is the end of this turn of the loop: what is sent in one turn shares a batch.
        """
        now = self._loop.time()
        due = max(now, accumulator.closed_at + self._linger_s)
        self._opened += 1
        heapq.heappush(self._lingering, (due, self._opened, buffer, accumulator, builder))
        if self._timer is None or due < self._timer_due:
            self._arm(due, due <= now)

    def hurry(self) -> None:
        """Somebody waits for a record. If nothing is on its way beside it, nothing is gained by lingering."""
        if not self._hurried and self._lingering and self._sender.oldest() is None:
            self._hurried = True
            self._arm(self._loop.time(), True)

    def _arm(self, due: float, at_once: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_soon(self._lingered) if at_once else self._loop.call_at(due, self._lingered)

    def _lingered(self) -> None:
        self._timer = None
        now = float("inf") if self._hurried else self._loop.time() + _EARLY_S
        self._hurried = False
        queue = self._lingering
        while queue and queue[0][0] <= now:
            _, _, buffer, accumulator, builder = heapq.heappop(queue)
            if accumulator.builder is not builder:
                continue  # it was closed by size
            if self._sender.room(accumulator.key):
                self._close(buffer, accumulator)
            else:
                accumulator.waiting = True  # sending could not begin now anyway: let it grow
        if queue and self._timer is None:
            self._arm(queue[0][0], False)
        self._sender.dispatch()

    def close_open(self) -> None:
        """Close every open batch now."""
        for buffer in list(self.topics.values()):
            self._close_topic(buffer)
        self._lingering.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._hurried = False
        self._sender.dispatch()

    def _close_topic(self, buffer: TopicBuffer) -> None:
        for accumulator in buffer.accumulators:
            if accumulator.builder is not None:
                self._close(buffer, accumulator)

    def _close(self, buffer: TopicBuffer, accumulator: Accumulator) -> None:
        """Hand the open batch of a partition to the sender."""
        builder = accumulator.builder
        assert builder is not None
        self._numbers += 1
        batch = Batch(self._numbers, buffer, accumulator, builder)
        buffer.unsettled += 1
        if accumulator.key[1] == buffer.turn:
            buffer.turn = (buffer.turn + 1) % buffer.partitions
        accumulator.builder = None
        accumulator.closed_at = self._loop.time()
        accumulator.futures = []
        accumulator.bytes = 0
        accumulator.keyed = accumulator.waiting = False
        self._sender.add(batch, accumulator.opened_ms + self._delivery_ms)

    def _over_quota(self, batch: Batch, quota: str, limit: int) -> None:
        """Large batches would be let in whole and then be waited for long: begin smaller ones for a while."""
        share = max(1, limit // _SMALL_SHARE)
        if quota == "records":
            share *= max(1, len(batch.data) // len(batch.futures))
        elif quota != "bytes":
            return
        self._small_bytes = min(self._batch_bytes, max(_SMALL_BYTES_MIN, share))
        self._small_until = self._loop.time() + _SMALL_S

    # -- when batches leave ------------------------------------------------------------------------

    def _left(self, batch: Batch) -> None:
        """A batch has had its last word: whoever waited for that goes on."""
        buffer = batch.topic
        buffer.unsettled -= 1
        self.buffered -= batch.bytes
        accumulator = buffer.accumulators[batch.key[1]]
        if accumulator.waiting and self._sender.room(accumulator.key):
            self._close(buffer, accumulator)
        self._move_if_settled(buffer)
        self._let_in()
        if self._flushes:
            self._wake_flushes()

    def _let_in(self) -> None:
        if self._space is not None and self._space[0] <= self._buffer_bytes - self.buffered:
            _resolve(self._space[1])

    async def room(self, size: int) -> None:
        """Wait until ``size`` bytes fit; only for the holder of `turn`. Raises DeadlineExceeded, ClientClosed."""
        if size > self._buffer_bytes:
            raise BufferFull(f"a record of {size} bytes never fits buffer_bytes = {self._buffer_bytes}", size=size)
        self._space = (size, self._loop.create_future())
        try:
            async with asyncio.timeout(self._delivery_ms / 1000):
                await self._space[1]
        except TimeoutError:
            raise DeadlineExceeded("the buffer stayed full until the deadline") from None
        finally:
            self._space = None

    async def flush(self, timeout: float) -> None:
        """Close what is open and wait until everything sent so far is settled. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(timeout):
                while any(buffer.moving for buffer in self.topics.values()):  # then records are parked
                    self._moved.clear()
                    await self._moved.wait()
                self.close_open()
                if self._sender.oldest() is not None:
                    waiter: asyncio.Future[None] = self._loop.create_future()
                    self._flushes.append((self._numbers, waiter))
                    await waiter
        except TimeoutError:
            raise DeadlineExceeded(f"flush: {self.buffered} bytes are unsettled after {timeout:g} s") from None

    def _wake_flushes(self) -> None:
        oldest = self._sender.oldest()
        for upto, waiter in list(self._flushes):
            if oldest is None or oldest > upto or waiter.done():
                self._flushes.remove((upto, waiter))
                _resolve(waiter)

    def give_up(self) -> None:
        """Fail whatever has had no last word."""
        self.closed = True
        self._client.watch.on_change.remove(self._metadata_changed)
        if self._timer is not None:
            self._timer.cancel()
        closed: FerrylineError = ClientClosed("the producer was closed")
        for buffer in self.topics.values():
            self._close_topic(buffer)
            for batch in buffer.returned:
                batch.fail(closed)
            self._fail_parked(buffer, closed)
        self._sender.give_up()
        if self._space is not None and not self._space[1].done():
            self._space[1].set_exception(closed)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
