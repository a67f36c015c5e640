"""The producer: checks records, routes them by key, and tells of each what became of it.

The way of a record: `Producer.send_nowait` -> accumulator of its partition -> linger or size closes the batch
(`Batching`) -> `Sender` and its core -> PRODUCE frame to the primary -> answer -> the futures of the batch, one loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

from ferryline import tracing
from ferryline.accumulator import RECORD_OVERHEAD, Pairs, RecordFuture, TopicBuffer
from ferryline.batching import Batching
from ferryline.delivery import with_delivery
from ferryline.message import RecordMetadata
from ferryline.options import check_seconds
from ferryline.protocol.errors import (
    BufferFull,
    ClientClosed,
    FerrylineError,
    InvalidArgument,
)
from ferryline.protocol.limits import BATCH_BYTES_DEFAULT, OFFSET_MAX, check_name, check_range
from ferryline.protocol.records import CODECS
from ferryline.publishing import Publisher
from ferryline.record_checks import HeadersLike, check_partition, checked_serializer, pairs_of, too_large
from ferryline.serializers import CONTENT_TYPE, Encoded, Serializer, encode

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.receipts import Receipts, ReceiptsLike

log = logging.getLogger("ferryline.producer")

BATCH_BYTES_LIMIT = 8 * 1024 * 1024  # a full batch of empty records stays below BATCH_RECORDS_MAX
BUFFER_BYTES_DEFAULT = 64 * 1024 * 1024
_NO_HEADERS: Pairs = []


class Producer:
    """Sends records. Made by ``client.producer()``; use it with ``async with``, or call `start` and `close`.

    Acknowledged means committed on every in-sync replica. Records of one partition are stored in the order of the
    calls, each at most once. For use from one event loop.

    ``receipts``: a file, or a callable, that gets a line for each acknowledged batch (`ferryline.receipts`).
    """

    def __init__(
        self,
        client: Client,
        *,
        linger: float = 0.005,
        batch_bytes: int = BATCH_BYTES_DEFAULT,
        buffer_bytes: int = BUFFER_BYTES_DEFAULT,
        compression: str = "none",
        delivery_timeout: float = 120.0,
        request_timeout: float = 30.0,
        serializer: Serializer | None = None,
        receipts: ReceiptsLike | None = None,
    ) -> None:
        if compression not in CODECS:
            raise InvalidArgument(
                f"compression: {compression!r} is not one of {', '.join(CODECS)}", field="compression"
            )
        check_range(batch_bytes, "batch_bytes", 1024, BATCH_BYTES_LIMIT)
        check_range(buffer_bytes, "buffer_bytes", batch_bytes, 2**40)
        self._client = client
        self._options: dict[str, Any] = {
            "linger_s": check_seconds(linger, "linger", 0.0, 60.0),
            "batch_bytes": batch_bytes,
            "buffer_bytes": buffer_bytes,
            "compression": compression,
            "delivery_ms": int(check_seconds(delivery_timeout, "delivery_timeout", 0.001, 86_400.0) * 1000),
            "request_ms": int(check_seconds(request_timeout, "request_timeout", 0.001, 600.0) * 1000),
        }
        self._buffer_bytes = buffer_bytes
        self._encode: Callable[[Any], Encoded] = encode if serializer is None else checked_serializer(serializer)
        self._batching: Any = None  # Batching, once started; not Optional, for the common path
        self._topics: dict[str, TopicBuffer] = {}  # the dict of `Batching`
        self._new_future: Callable[[], RecordFuture] = _not_started
        self._closed = False
        self._receipts_to = receipts
        self._receipts: Receipts | None = None
        self._publisher = Publisher(self, client, self._encode)

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Producer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Connect the client if it is not connected yet. Raises ConnectionFailed when nobody answers in time."""
        if self._closed:
            raise ClientClosed("the producer is closed")
        if self._batching is not None:
            return
        await self._client.start()
        if self._receipts_to is not None:
            from ferryline.receipts import Receipts

            self._receipts = Receipts(self._receipts_to)
        self._batching = Batching(self._client, **self._options, receipts=self._receipts)
        self._topics = self._batching.topics
        # The C class itself: asyncio's create_future is a Python call around it, once per record.
        self._new_future = partial(asyncio.Future, loop=asyncio.get_running_loop())
        self._client.closables.append(self)

    async def close(self, timeout: float = 30.0) -> None:
        """Send what is buffered, wait for the answers at most ``timeout`` seconds, then fail what is left."""
        batching, started = self._batching, not self._closed
        self._closed = True
        self._new_future = _closed
        if batching is None or not started:
            return
        try:
            await batching.flush(timeout)
        except FerrylineError as error:
            log.warning("closing: %s", error)
        finally:
            self._client.closables.remove(self)
            batching.give_up()
            if self._receipts is not None:
                self._receipts.close()

    # -- sending -----------------------------------------------------------------------------------

    async def send(
        self,
        topic: str,
        value: Any,
        key: str | bytes | None = None,
        headers: HeadersLike | None = None,
        *,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        priority: int | None = None,
        delay: float | None = None,
        ttl: float | None = None,
        id: str | None = None,
    ) -> RecordMetadata:
        """Send one record and wait until it is committed. Waits for room when the buffer is full.

        For queues: ``priority`` 0 to 9, the highest first; not delivered before ``delay`` seconds from now, nor after
        ``ttl`` seconds; a second record with the same ``id`` is not delivered again. They become headers.

        Raises before anything is sent: UnknownTopic, RecordTooLarge, SerializationFailed, InvalidArgument. Afterwards:
        DeadlineExceeded (surely not stored), OutcomeUnknown (perhaps stored), or the refusal of the broker.
        """
        if priority is not None or delay is not None or ttl is not None or id is not None:
            headers = with_delivery(headers, priority=priority, delay=delay, ttl=ttl, id=id)
        if tracing.active is not None:
            with tracing.active.sending(topic, headers) as headers:
                return await self._sent(topic, value, key, headers, partition, timestamp_ms)
        return await self._sent(topic, value, key, headers, partition, timestamp_ms)

    async def _sent(
        self,
        topic: str,
        value: Any,
        key: str | bytes | None,
        headers: HeadersLike | None,
        partition: int | None,
        timestamp_ms: int | None,
    ) -> RecordMetadata:
        if topic not in self._topics:
            await self._learn(topic)
        if not self._running().turn.locked():
            try:
                future = self.send_nowait(topic, value, key, headers, partition=partition, timestamp_ms=timestamp_ms)
            except BufferFull:
                pass
            else:
                self._running().hurry()
                return await future
        async with self._running().turn:
            future = await self._when_there_is_room(
                lambda: self.send_nowait(topic, value, key, headers, partition=partition, timestamp_ms=timestamp_ms)
            )
        return await future

    def send_nowait(
        self,
        topic: str,
        value: Any,
        key: str | bytes | None = None,
        headers: HeadersLike | None = None,
        *,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> RecordFuture:
        """Buffer one record; the future tells where it was stored, or why not. Raises BufferFull instead of waiting.

        The topic must be known (`start` learns all topics): UnknownTopic otherwise. Let the loop run now and then:
        answers are read only while it does.
        """
        if type(value) is bytes and headers is None and partition is None and timestamp_ms is None:
            # The common path: one lookup, one append. Whatever is unusual finds no open batch here, and goes on below.
            if type(key) is str:
                key = key.encode()
            buffer = self._topics.get(topic)
            if buffer is not None and type(key) is bytes:
                accumulator = buffer.accumulators[crc32(key) % buffer.partitions]  # as partitioner.partition_of
                size = len(value) + len(key)
                batching, builder = self._batching, accumulator.builder
                size_counted = size + RECORD_OVERHEAD
                if (
                    builder is not None
                    and size <= buffer.max_record_bytes
                    and batching.buffered + size_counted <= self._buffer_bytes
                ):
                    future = self._new_future()
                    if builder.append(batching.stamp_ms or batching.stamp(), key, value, _NO_HEADERS):
                        accumulator.futures.append(future)
                        accumulator.bytes += size_counted
                        accumulator.keyed = True
                        batching.buffered += size_counted
                        return future
        return self._send(topic, value, key, headers, partition, timestamp_ms)

    def _send(
        self,
        topic: str,
        value: Any,
        key: str | bytes | None,
        headers: HeadersLike | None,
        partition: int | None,
        timestamp_ms: int | None,
    ) -> RecordFuture:
        """Everything that `send_nowait` promises, step by step."""
        pairs = _NO_HEADERS if headers is None else pairs_of(headers)
        if type(value) is bytes:
            size = len(value)
        else:
            value, content_type = self._encode(value)
            size = len(value) if value is not None else 0
            if content_type is not None:
                pairs = [*pairs, (CONTENT_TYPE, content_type)]
        if key is not None:
            if type(key) is str:
                key = key.encode()
            elif type(key) is not bytes:
                raise InvalidArgument(f"key: {type(key).__name__} is none of bytes, str, None", field="key")
            size += len(key)
        if pairs:
            for name, data in pairs:
                size += len(name) + (len(data) if data is not None else 0)
        buffer = self._topics.get(topic)
        if buffer is None:
            buffer = self._running().topic(topic)
        if size > buffer.max_record_bytes:
            raise too_large(buffer, value, key, size)
        batching = self._running()
        size += RECORD_OVERHEAD
        if batching.buffered + size > self._buffer_bytes:
            raise self._full(size)
        if timestamp_ms is None:
            timestamp_ms = batching.stamp_ms or batching.stamp()
        elif timestamp_ms.__class__ is not int or not 0 <= timestamp_ms < OFFSET_MAX:
            raise InvalidArgument(f"timestamp_ms: {timestamp_ms!r} is not a time in ms", field="timestamp_ms")
        if partition is not None:
            check_partition(buffer, partition)
        future = self._new_future()
        batching.buffered += size
        batching.place(buffer, (timestamp_ms, key, value, pairs, size, future), partition)
        return future

    async def send_many(
        self, topic: str, records: Iterable[Any], *, headers: HeadersLike | None = None
    ) -> list[RecordMetadata | FerrylineError]:
        """Send records, each a value or a tuple (key, value); one result or error for each, in order."""
        if tracing.active is not None:
            headers = tracing.active.injected(headers)
        if topic not in self._topics:
            await self._learn(topic)
        outcomes: list[RecordFuture | FerrylineError] = []
        async with self._running().turn:
            for record in records:
                key, value = record if type(record) is tuple and len(record) == 2 else (None, record)
                try:
                    outcomes.append(
                        await self._when_there_is_room(partial(self.send_nowait, topic, value, key, headers))
                    )
                except FerrylineError as error:
                    outcomes.append(error)
        self._running().close_open()
        results: list[RecordMetadata | FerrylineError] = []
        for outcome in outcomes:
            try:
                results.append(outcome if isinstance(outcome, FerrylineError) else await outcome)
            except FerrylineError as error:
                results.append(error)
        return results

    async def publish(
        self,
        exchange: str,
        value: Any,
        routing_key: str = "",
        headers: HeadersLike | None = None,
        *,
        key: str | bytes | None = None,
        mandatory: bool = False,
        timestamp_ms: int | None = None,
        priority: int | None = None,
        delay: float | None = None,
        ttl: float | None = None,
        id: str | None = None,
    ) -> dict[str, RecordMetadata]:
        """Send one record to every topic that the exchange names for it, and wait until it is committed in each.

        Returns where it stands, by topic. ``key`` chooses the partition, and the lane of queues, in each topic; the
        other arguments are as of `send`. What reaches no topic, not by an alternate exchange either, is counted
        (`unroutable`), and refused if it is ``mandatory``: Unroutable.

        Raises PartlyPublished when one of several topics failed: its ``results`` have each topic's outcome. Where there
        is one topic, its error is raised. Raises UnknownExchange, InvalidArgument.
        """
        if priority is not None or delay is not None or ttl is not None or id is not None:
            headers = with_delivery(headers, priority=priority, delay=delay, ttl=ttl, id=id)
        return await self._publisher.publish(exchange, value, routing_key, headers, key, timestamp_ms, mandatory)

    @property
    def unroutable(self) -> dict[str, int]:
        """How many records that were not mandatory reached no topic, by exchange."""
        return dict(self._publisher.unroutable)

    async def flush(self, timeout: float = 120.0) -> None:
        """Send everything buffered now and wait until each of these records is settled, one way or the other.

        Raises DeadlineExceeded after ``timeout`` seconds; sending goes on.
        """
        if self._batching is not None and not self._closed:
            await self._batching.flush(timeout)

    @property
    def buffered_bytes(self) -> int:
        """What counts against ``buffer_bytes``: all records that have had no last word."""
        return self._batching.buffered if self._batching is not None else 0

    # -- off the common path -----------------------------------------------------------------------

    def _running(self) -> Batching:
        if self._closed:
            raise ClientClosed("the producer is closed")
        if self._batching is None:
            raise ClientClosed("the producer was not started: use `async with`, or await start()")
        batching: Batching = self._batching
        return batching

    async def _when_there_is_room(self, send: Callable[[], RecordFuture]) -> RecordFuture:
        while True:
            try:
                return send()
            except BufferFull as full:
                await self._running().room(full.details["size"])

    async def _learn(self, topic: str) -> None:
        """Make sure that a topic is known. Raises UnknownTopic if nobody knows it."""
        check_name(topic)
        if self._closed:
            raise ClientClosed("the producer is closed")
        await self.start()
        await self._client.learn_topic(topic)

    def _full(self, size: int) -> BufferFull:
        return BufferFull(
            f"buffer_bytes: {self.buffered_bytes} of {self._buffer_bytes} bytes wait for acknowledgement",
            field="buffer_bytes",
            limit=self._buffer_bytes,
            size=size,
        )


def _not_started() -> RecordFuture:
    raise ClientClosed("the producer was not started: use `async with`, or await start()")


def _closed() -> RecordFuture:
    raise ClientClosed("the producer is closed")
