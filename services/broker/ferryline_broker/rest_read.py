"""REST on a broker: committed records, as an answer or as a stream that goes on.

``GET /v1/topics/{topic}/partitions/{p}/records?offset=&wait_ms=&limit=``

As JSON; as NDJSON if that is accepted, which goes on for ever with ``follow=true``; or as server-sent events, which
always do. A broker that is not the primary answers 421 and names the primary's URL in ``details.primary_url``.

A stream reads a bounded piece, writes it, and reads on when that is gone: nothing piles up here for a slow reader, and
one that takes nothing for `_SLOW_S` is cut off. Streams end when the broker stops or is not the primary any more, and
with the token of whoever reads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from aiohttp import web

from ferryline.protocol.access import READ, TOPIC
from ferryline.protocol.errors import (
    BY_CODE,
    CorruptBatch,
    FerrylineError,
    InternalError,
    ShuttingDown,
    StorageFailed,
    Throttled,
    from_info,
)
from ferryline.protocol.limits import OFFSET_MAX, WAIT_MS_MAX
from ferryline.protocol.messages import RECORDS
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.records import decode_batch
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.walk import checked_batches
from ferryline_broker.proof import Proof
from ferryline_broker.rest_shared import elsewhere, query_flag, query_int, shown_bytes, whole
from ferryline_broker.view import ClusterView
from ferryline_service.access.caller import UNCHECKED, Caller
from ferryline_service.access.gate import CALLER
from ferryline_service.access.quotas import Quotas
from ferryline_service.errors import REQUEST_ID

RECORDS_MAX = 10_000  # of one answer
_READ_BYTES = 1024 * 1024
_SHOWN_BYTES = 8 * 1024 * 1024  # of one answer, before JSON; what is read may be packed a thousandfold
STREAMS_MAX = 1_000  # each holds a connection and up to `_READ_BYTES` of records
_PIECE = 500  # records written at once to a stream
_SLOW_S = 30.0  # a reader that takes nothing for so long is gone
_LOOK_MS = 1_000  # a stream looks so often whether its reader is still there, and may still read
HEARTBEAT_MS = 15_000  # a comment on an idle stream: proxies end connections on which nothing happens
NDJSON, EVENTS = "application/x-ndjson", "text/event-stream"

Authenticate = Callable[[web.Request], Awaitable[Caller]]


class _Readable:
    """Wakes a REST reader when its partition has more."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def emit(self) -> None:
        self.event.set()


class ReadApi:
    """Handler of the route above. ``authenticate``: who asks; a stream asks again every second."""

    def __init__(
        self,
        driver: PartitionDriver,
        view: ClusterView,
        authenticate: Authenticate | None = None,
        heartbeat_ms: int = HEARTBEAT_MS,
        quotas: Quotas | None = None,
    ) -> None:
        self._driver = driver
        self._view = view
        self._authenticate = authenticate
        self._heartbeat_ms = heartbeat_ms
        self._quotas = quotas or Quotas()
        self._stopping = asyncio.Event()
        self._readers: set[_Readable] = set()
        self.streams = 0

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/topics/{topic}/partitions/{partition}/records", self.read)]

    def close(self) -> None:
        """Let every long poll and stream end."""
        self._stopping.set()
        for reader in self._readers:
            reader.emit()

    async def read(self, request: web.Request) -> web.StreamResponse:
        """Committed records from an offset on: an answer, or a stream."""
        topic = self._view.topic_named(request.match_info["topic"])
        partition = whole(request.match_info["partition"], "partition", 0, topic.config.partitions - 1)
        wait_ms = query_int(request, "wait_ms", 0, 0, WAIT_MS_MAX)
        limit = query_int(request, "limit", 100, 1, RECORDS_MAX)
        secondary, follow = query_flag(request, "secondary"), query_flag(request, "follow")
        accepted = request.headers.get("Accept", "")
        hosted = self._hosted(topic, partition)
        offset = _first(request, hosted)
        if EVENTS in accepted or follow:
            return await self._stream(request, hosted, topic, offset, secondary, EVENTS in accepted)
        caller = request.get(CALLER, UNCHECKED)
        self._quotas.check(caller)
        records, following = await self._records(hosted, topic, offset, wait_ms, limit, secondary)
        lines = [_line(record) for record in records]
        self._quotas.charge(caller, records=len(records), bytes=sum(map(len, lines)))
        if NDJSON in accepted:
            return web.Response(body=b"".join(lines), content_type=NDJSON)
        shown = {
            "records": records,
            "next_offset": following,
            "high_watermark": hosted.core.high_watermark[RECORDS],
            "log_start": hosted.core.log_start[RECORDS],
        }
        return web.json_response(shown)

    # -- streams ------------------------------------------------------------------------------------

    async def _stream(
        self, request: web.Request, hosted: HostedReplica, topic: TopicMeta, offset: int, secondary: bool, events: bool
    ) -> web.StreamResponse:
        """Write records as they are committed, until the reader goes, or a last line says why it ends."""
        if self.streams >= STREAMS_MAX:
            raise Throttled(f"{STREAMS_MAX} streams are open at this broker", limit=STREAMS_MAX)
        caller = request.get(CALLER, UNCHECKED)
        self._quotas.opened(caller)
        self.streams += 1
        loop = asyncio.get_running_loop()
        try:
            # What can be refused is refused as a problem, before the stream begins.
            records, offset = await self._records(hosted, topic, offset, 0, _PIECE, secondary)
            response = web.StreamResponse(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
            response.content_type = EVENTS if events else NDJSON
            response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")
            await response.prepare(request)
            if request.method == "HEAD":
                return response  # what was written now would be taken for the next answer of this connection
            try:
                silent_ms, allowed_at = 0, loop.time()
                while not self._stopping.is_set():
                    if loop.time() - allowed_at >= _LOOK_MS / 1000:
                        await self._still_allowed(request, topic)
                        allowed_at = loop.time()
                    if records:
                        data = b"".join(map(_event if events else _line, records))
                        await _write(request, response, data)
                        await self._paid(caller, len(records), len(data))
                        silent_ms = 0
                    elif silent_ms >= self._heartbeat_ms:
                        await _write(request, response, b": alive\n\n" if events else b"\n")
                        silent_ms = 0
                    wait_ms = min(_LOOK_MS, self._heartbeat_ms)
                    records, offset = await self._records(hosted, topic, offset, wait_ms, _PIECE, secondary)
                    silent_ms += wait_ms
                    if request.transport is None:
                        raise ConnectionResetError("the reader is gone")
                raise ShuttingDown("this broker is stopping")
            except FerrylineError as ended:
                await _write(request, response, _end(ended, events))
            except ConnectionResetError:
                pass  # nobody reads any more
            return response
        finally:
            self.streams -= 1
            self._quotas.closed(caller)

    async def _paid(self, caller: Caller, records: int, size: int) -> None:
        """Book what was written, and return once more may be; or once this broker stops."""
        self._quotas.charge(caller, records=records, bytes=size)
        while (wait_ms := self._quotas.wait_ms(caller)) and not self._stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(min(wait_ms, _LOOK_MS) / 1000):
                    await self._stopping.wait()

    async def _still_allowed(self, request: web.Request, topic: TopicMeta) -> None:
        """Raises BadCredentials or Forbidden once the token that the stream was opened with allows it no more."""
        if self._authenticate is not None:
            (await self._authenticate(request)).check(READ, TOPIC, topic.name)

    # -- reading ------------------------------------------------------------------------------------

    async def _records(
        self, hosted: HostedReplica, topic: TopicMeta, offset: int, wait_ms: int, limit: int, secondary: bool
    ) -> tuple[list[dict[str, Any]], int]:
        """Records from ``offset`` on, and where to go on; none when there were none for ``wait_ms``."""
        deadline = asyncio.get_running_loop().time() + wait_ms / 1000
        proved = False
        while True:
            verdict = hosted.check_read(offset, -1, secondary)
            if verdict.unproven and not proved:
                await self._prove(hosted)
                proved = True
                continue
            if verdict.code == "NOT_PRIMARY":
                raise elsewhere(self._view, topic.id, hosted.key[1])
            if verdict.code:
                cls = BY_CODE.get(verdict.code, InternalError)
                raise cls(verdict.message, log_start=hosted.core.log_start[RECORDS], high_watermark=verdict.below)
            found: list[dict[str, Any]] = []
            if offset < verdict.below:
                began = offset
                try:
                    found, offset = _shown(hosted, offset, verdict.below, limit)
                except StorageFailed as failure:
                    self._driver.storage_failed(hosted, RECORDS, failure)
                    raise
                if not found and offset > began:
                    continue  # there was nothing but control batches before one that did not fit beside them
            left = deadline - asyncio.get_running_loop().time()
            if found or left <= 0 or self._stopping.is_set():
                return found, offset
            reader = _Readable()
            hosted.readers[reader] = None
            self._readers.add(reader)
            try:
                async with asyncio.timeout(left):
                    await reader.event.wait()
            except TimeoutError:
                pass
            finally:
                hosted.readers.pop(reader, None)
                self._readers.discard(reader)

    async def _prove(self, hosted: HostedReplica) -> None:
        """Raises what stands in the way, unless this broker is still the primary."""
        waiter = _Readable()
        proof = Proof(self._driver, hosted, waiter)
        await waiter.event.wait()
        if proof.error is not None:
            raise from_info(proof.error)

    def _hosted(self, topic: TopicMeta, partition: int) -> HostedReplica:
        hosted = self._driver.replicas.get((topic.id, partition))
        if hosted is None:
            raise elsewhere(self._view, topic.id, partition)
        return hosted


def _first(request: web.Request, hosted: HostedReplica) -> int:
    """The offset to begin at: after the last event that a reader saw, or as the query says."""
    seen = request.headers.get("Last-Event-ID")
    if seen:
        return whole(seen, "Last-Event-ID", 0, OFFSET_MAX - 1) + 1
    text = request.query.get("offset", "0")
    if text == "end":
        return hosted.core.high_watermark[RECORDS]
    return hosted.core.log_start[RECORDS] if text == "start" else whole(text, "offset", 0, OFFSET_MAX)


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Returns once most of it has left. Raises ConnectionResetError; a reader that takes nothing is cut off."""
    try:
        async with asyncio.timeout(_SLOW_S):
            await response.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the reader of a stream takes nothing") from None


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _event(record: dict[str, Any]) -> bytes:
    return f"id: {record['offset']}\ndata: {json.dumps(record)}\n\n".encode()


def _end(error: FerrylineError, events: bool) -> bytes:
    """Why a stream ends, as its last event or line."""
    told = {"code": error.code, "detail": error.message, "retriable": error.retriable, "details": error.details}
    return f"event: end\ndata: {json.dumps(told)}\n\n".encode() if events else _line({"end": told})


def _shown(hosted: HostedReplica, offset: int, below: int, limit: int) -> tuple[list[dict[str, Any]], int]:
    """Up to ``limit`` records from ``offset`` on, and where to go on."""
    data = hosted.read(offset, below, _READ_BYTES, at_least_one=True)
    found: list[dict[str, Any]] = []
    size = 0
    for at, header in checked_batches(hosted.name, data, offset):
        if header.is_control:
            offset = max(offset, header.next_offset)
            continue
        try:
            records = decode_batch(memoryview(data)[at : at + header.size], header)
        except CorruptBatch:
            if found:
                return found, offset  # whoever goes on from here is told
            raise
        for record in records:
            if record.offset < offset:
                continue
            size += len(record.key or b"") + len(record.value or b"")
            size += sum(len(name) + len(value or b"") for name, value in record.headers)
            if size > _SHOWN_BYTES and found:
                return found, offset
            found.append(
                {
                    "offset": record.offset,
                    "timestamp_ms": record.timestamp,
                    "key": shown_bytes(record.key),
                    "value": shown_bytes(record.value),
                    "headers": {name: shown_bytes(value) for name, value in record.headers},
                }
            )
            offset = record.offset + 1
            if len(found) == limit:
                return found, offset
    return found, offset
