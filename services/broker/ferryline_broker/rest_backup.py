"""REST of a broker for backups: the bytes of a log as they are, out of a cluster and into an empty one.

``GET  /v1/replicas/{topic_id}/{p}/logs/{log}?from=&limit=``          whole batches below the high watermark
``PUT  /v1/replicas/{topic_id}/{p}/logs/{log}?from=&epoch_before=``   batches that continue it; durable when answered
``POST /v1/replicas/{topic_id}/{p}/restored``                         all is in; durable when answered

``log`` is ``records`` or ``state``. Where a log stands is told in headers, also with an empty body. Only the primary
reads out, because its high watermark is the newest; only a partition that is being restored takes anything in, and that
one has no primary: what is put in makes this copy no candidate for anything until the coordinator says so.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from ferryline.protocol.errors import (
    Conflict,
    CorruptBatch,
    InvalidArgument,
    NotPrimary,
    NotReady,
    OffsetOutOfRange,
    RecordTooLarge,
)
from ferryline.protocol.limits import BATCH_BYTES_MAX, OFFSET_MAX
from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.metadata import RESTORING
from ferryline.protocol.records import BatchHeader, encode_batch, split_batches
from ferryline_broker.audit import hosted_of, number_of
from ferryline_broker.core.events import Imported
from ferryline_broker.core.groups import RestoredEntry, encode_entry
from ferryline_broker.core.replica import ROLE_IDLE, ROLE_PRIMARY
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.replica_store import LOGS
from ferryline_broker.view import ClusterView

_READ_BYTES = 512 * 1024  # between two turns of the loop
_LIMIT_BYTES, _LIMIT_BYTES_MAX = 4 * 1024 * 1024, 16 * 1024 * 1024
_BODY_BYTES_MAX = BATCH_BYTES_MAX + _LIMIT_BYTES  # a batch always fits
_BODY_S, _FLUSH_S, _POLL_S = 60.0, 30.0, 0.005


class BackupApi:
    """Handlers of the routes above."""

    def __init__(self, driver: PartitionDriver, view: ClusterView) -> None:
        self._driver = driver
        self._view = view

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/replicas/{topic_id}/{partition}/logs/{log}", self.read),
            web.put("/v1/replicas/{topic_id}/{partition}/logs/{log}", self.put),
            web.post("/v1/replicas/{topic_id}/{partition}/restored", self.restored),
        ]

    # -- out ----------------------------------------------------------------------------------------

    async def read(self, request: web.Request) -> web.Response:
        hosted, log = self._hosted(request), _log_of(request)
        core = hosted.core
        restoring = core.part is not None and core.part.recovery_epoch == RESTORING
        if hosted.broken or (core.role != ROLE_PRIMARY and not restoring):
            primary, epoch = (core.part.primary, core.part.epoch) if core.part is not None else (0, 0)
            raise NotPrimary(f"{hosted.name}: this broker is {core.role} of it", primary=primary, epoch=epoch)
        if not restoring and not core.ready:
            raise NotReady(f"{hosted.name}: its primary does not know yet what is committed; ask again")
        start = number_of(request, "from", hosted.logs[log].log_start, 0, OFFSET_MAX)
        limit = number_of(request, "limit", _LIMIT_BYTES, 0, _LIMIT_BYTES_MAX)
        data = b"" if restoring else await self._bytes(hosted, log, start, limit)
        opened, epochs = hosted.logs[log], core.replica.epochs[log]
        standing = {
            "Log-Start": opened.log_start,
            "Log-End": opened.log_end,
            "High-Watermark": core.high_watermark[log],
            "Epoch": core.epoch,
            "Epoch-Before": epochs.before,
            "Tail-Epoch": epochs.tail_epoch,
        }
        headers = {f"Ferryline-{name}": str(value) for name, value in standing.items()}
        return web.Response(body=data, content_type="application/octet-stream", headers=headers)

    async def _bytes(self, hosted: HostedReplica, log: int, offset: int, limit: int) -> bytes:
        parts: list[bytes] = []
        opened, size = hosted.logs[log], 0
        if not opened.log_start <= offset <= hosted.core.high_watermark[log]:
            raise OffsetOutOfRange(
                f"from: {offset} is outside {opened.log_start}..{hosted.core.high_watermark[log]} (high watermark)",
                field="from",
                log_start=opened.log_start,
                high_watermark=hosted.core.high_watermark[log],
            )
        while size < limit and (data := opened.read(offset, _READ_BYTES, hosted.core.high_watermark[log])):
            parts.append(data)
            size += len(data)
            offset = split_batches(data)[-1][1].next_offset
            await asyncio.sleep(0)
        return b"".join(parts)

    # -- in -----------------------------------------------------------------------------------------

    async def put(self, request: web.Request) -> web.Response:
        hosted, log = self._hosted(request), _log_of(request)
        start = number_of(request, "from", 0, 0, OFFSET_MAX)
        before = number_of(request, "epoch_before", 0, 0, 2**31 - 1) if "epoch_before" in request.query else -1
        data = await _body(request)
        headers = _checked(data, start) if data else []
        self._check_open(hosted, headers)
        replica = hosted.core.replica
        if replica.log_end[log] != start and replica.epochs[log].tail_epoch != -1:
            raise Conflict(
                f"from: the {LOGS[log]} log of {hosted.name} ends at {replica.log_end[log]} here, not at {start}",
                field="from",
                log_end=replica.log_end[log],
            )
        if headers and headers[0][1].epoch < max(before, replica.epochs[log].tail_epoch):
            raise CorruptBatch(f"epoch: batch at {start} has {headers[0][1].epoch}, the log is further")
        await self._import(hosted, Imported(log, start, before, data, headers))
        return web.json_response({"log_end": hosted.logs[log].log_end})

    async def restored(self, request: web.Request) -> web.Response:
        """The last entry of the state log: what stands before it is from another cluster."""
        hosted = self._hosted(request)
        self._check_open(hosted, [])
        core = hosted.core
        end = core.log_end[STATE]
        data = encode_batch([(None, encode_entry(RestoredEntry()), [])], base_offset=end, epoch=core.epoch)
        await self._import(hosted, Imported(STATE, end, -1, data, split_batches(data)))
        hosted.store.write_checkpoint(*core.high_watermark)
        return web.json_response({"log_end": {name: core.log_end[log] for log, name in enumerate(LOGS)}})

    async def _import(self, hosted: HostedReplica, event: Imported) -> None:
        self._driver.feed(hosted, event)
        loop, core = asyncio.get_running_loop(), hosted.core
        end = loop.time() + _FLUSH_S
        while not hosted.broken and core.flushed[event.log] < core.log_end[event.log]:
            if loop.time() > end:
                raise NotReady(f"{hosted.name}: not on disk within {_FLUSH_S:g} s")
            await asyncio.sleep(_POLL_S)
        if hosted.broken or hosted.core.role != ROLE_IDLE:
            raise NotReady(f"{hosted.name} did not take it: {hosted.broken or hosted.core.stopped}")

    def _check_open(self, hosted: HostedReplica, headers: list[tuple[int, BatchHeader]]) -> None:
        core = hosted.core
        if hosted.broken or core.part is None or core.part.recovery_epoch != RESTORING or core.role != ROLE_IDLE:
            raise Conflict(f"{hosted.name} is not being restored; nothing may be put into it")
        if headers and headers[-1][1].epoch > core.epoch:
            raise InvalidArgument(
                f"epoch: a batch has {headers[-1][1].epoch}, restoring was begun at {core.epoch}", field="epoch"
            )

    def _hosted(self, request: web.Request) -> HostedReplica:
        return hosted_of(self._driver, self._view, request)


def _log_of(request: web.Request) -> int:
    name = request.match_info["log"]
    if name not in LOGS:
        raise InvalidArgument(f"log: {name[:40]!r} is not one of {', '.join(LOGS)}", field="log")
    return LOGS.index(name) if name != LOGS[RECORDS] else RECORDS


async def _body(request: web.Request) -> bytes:
    """Bounded in size and time; larger than what other requests may send, for one batch must fit."""
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.content.iter_chunked(256 * 1024):
                data += chunk
                if len(data) > _BODY_BYTES_MAX:
                    raise RecordTooLarge(f"body: over {_BODY_BYTES_MAX} bytes", limit=_BODY_BYTES_MAX)
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"body: not whole within {_BODY_S:g} s") from None
    return bytes(data)


def _checked(data: bytes, start: int) -> list[tuple[int, BatchHeader]]:
    """Headers of whole, sound batches that lie back to back from ``start`` on. Raises CorruptBatch."""
    headers = split_batches(data)
    offset, epoch = start, -1
    for _, header in headers:
        if header.base_offset != offset or header.epoch < epoch or header.size > BATCH_BYTES_MAX:
            raise CorruptBatch(f"batch at {header.base_offset} (epoch {header.epoch}) does not follow {offset}")
        offset, epoch = header.next_offset, header.epoch
    return headers
