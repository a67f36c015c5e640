"""REST of a broker for proofs: what its copies hold, and how a damaged copy is replaced.

``GET  /v1/replicas/{topic_id}/{p}``            where the copy stands
``GET  /v1/replicas/{topic_id}/{p}/digests?log=&from=&below=&limit=&batches=&producer=``
``POST /v1/replicas/{topic_id}/{p}/repair``     {"reason"}: set this copy aside and fetch it again

``log`` is ``records`` or ``state``; nothing above the high watermark is looked at. ``limit`` bounds the bytes of one
answer, ``next`` says where to go on. Reading takes turns with the traffic: a few ms at a time, then as long a pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from ferryline.protocol.errors import Conflict, InvalidArgument, NotReady
from ferryline.protocol.limits import OFFSET_MAX, check_range
from ferryline.protocol.messages import LOG_DAMAGED, RECORDS
from ferryline.protocol.metadata import PartitionMeta
from ferryline_broker.core.events import HandOverAsked
from ferryline_broker.core.replica import ROLE_PRIMARY, ROLE_SECONDARY
from ferryline_broker.digests import Digests, Walk
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.interface import LogDamaged
from ferryline_broker.log.replica_store import LOGS
from ferryline_broker.view import ClusterView
from ferryline_service.errors import read_json
from ferryline_service.logs import get_logger

_log = get_logger()
_SLICE_S = 0.004  # of reading between two turns of the loop
_LIMIT_BYTES, _LIMIT_BYTES_MAX = 64 * 1024 * 1024, 256 * 1024 * 1024
_HANDOVER_S, _HANDOVER_AGAIN_S, _POLL_S = 10.0, 1.0, 0.02


class RepairIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reason: str = Field("asked for by an operator", max_length=400)


class AuditApi:
    """Handlers of the routes above."""

    def __init__(self, driver: PartitionDriver, view: ClusterView, broker_id: int) -> None:
        self._driver = driver
        self._view = view
        self._broker_id = broker_id

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/replicas/{topic_id}/{partition}", self.status),
            web.get("/v1/replicas/{topic_id}/{partition}/digests", self.digests),
            web.post("/v1/replicas/{topic_id}/{partition}/repair", self.repair),
        ]

    # -- handlers -----------------------------------------------------------------------------------

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(self._status(self._hosted(request)))

    async def digests(self, request: web.Request) -> web.Response:
        hosted = self._hosted(request)
        name = request.query.get("log", LOGS[RECORDS])
        if name not in LOGS:
            raise InvalidArgument(f"log: {name[:40]!r} is not one of {', '.join(LOGS)}", field="log")
        number = LOGS.index(name)
        log = hosted.logs[number]
        below = min(number_of(request, "below", OFFSET_MAX, 0, OFFSET_MAX), hosted.core.high_watermark[number])
        start = number_of(request, "from", log.log_start, 0, OFFSET_MAX)
        limit = number_of(request, "limit", _LIMIT_BYTES, 1, _LIMIT_BYTES_MAX)
        producer: int | None = None
        if request.query.get("batches", "") in ("1", "true"):
            producer = number_of(request, "producer", Walk.ALL, 0, 2**63 - 1)
        walk = Walk(log, start, below, limit, producer=producer)
        if start < log.log_start:
            walk.found.gone = True
        else:
            await _in_turns(walk.steps())
        found = walk.found
        if found.wrong is not None:
            self._found_wrong(hosted, number, found.wrong.reason)
        return web.json_response({**self._status(hosted), "log": name, "below": below, **_shown(found)})

    async def repair(self, request: web.Request) -> web.Response:
        reason = RepairIn.model_validate(await read_json(request)).reason
        hosted = self._hosted(request)
        self._check_repairable(hosted)
        was_primary = hosted.core.role == ROLE_PRIMARY
        if was_primary:
            await self._hand_over(hosted)
            self._check_repairable(hosted)
        if hosted.core.role not in (ROLE_SECONDARY, "stopped"):
            raise NotReady(f"{hosted.name} is changing its role; ask again")
        _log.warning("copy set aside on request", partition=hosted.name, reason=reason)
        damage = LogDamaged(f"set aside: {reason}", offset=-1)
        self._driver.storage_failed(hosted, RECORDS, damage)
        return web.json_response({"partition": hosted.name, "was_primary": was_primary}, status=202)

    # -- inside -------------------------------------------------------------------------------------

    def _hosted(self, request: web.Request) -> HostedReplica:
        return hosted_of(self._driver, self._view, request)

    def _status(self, hosted: HostedReplica) -> dict[str, Any]:
        core = hosted.core
        logs = {
            name: {
                "log_start": hosted.logs[number].log_start,
                "log_end": hosted.logs[number].log_end,
                "high_watermark": core.high_watermark[number],
            }
            for number, name in enumerate(LOGS)
        }
        stopped = hosted.broken or core.stopped
        return {
            "broker": self._broker_id,
            "role": "stopped" if stopped else core.role,
            "stopped": stopped,
            "log_state": core.report().log_state if not hosted.broken else LOG_DAMAGED,
            "repairing": core.replica.repairing,
            "epoch": core.epoch,
            "logs": logs,
        }

    def _found_wrong(self, hosted: HostedReplica, log: int, reason: str) -> None:
        """Say so in the log; what is done about it is the operator's word (`repair`), or the scrubber's."""
        _log.error("audit found damage", partition=hosted.name, log=LOGS[log], why=reason)

    def _check_repairable(self, hosted: HostedReplica) -> None:
        """Never give up a copy that might be the best there is. Raises Conflict."""
        part: PartitionMeta | None = hosted.core.part
        others = [b for b in (part.isr if part is not None else ()) if b != self._broker_id and self._alive(b)]
        if not others:
            raise Conflict(
                f"{hosted.name}: no other copy is in sync and up, so this one is kept as it is", broker=self._broker_id
            )

    def _alive(self, broker_id: int) -> bool:
        broker = self._view.broker(broker_id)
        return broker is not None and not broker.fenced and not broker.stopping

    async def _hand_over(self, hosted: HostedReplica) -> None:
        """Let another copy lead. Raises NotReady if nobody took over in time."""
        loop = asyncio.get_running_loop()
        end, ask = loop.time() + _HANDOVER_S, 0.0
        while hosted.core.role == ROLE_PRIMARY or (hosted.core.part is not None and not hosted.core.part.primary):
            now = loop.time()
            if now > end:
                raise NotReady(f"{hosted.name}: no other broker took over within {_HANDOVER_S:g} s")
            if now >= ask and hosted.core.role == ROLE_PRIMARY:
                ask = now + _HANDOVER_AGAIN_S
                self._driver.feed(hosted, HandOverAsked())
            await asyncio.sleep(_POLL_S)


def hosted_of(driver: PartitionDriver, view: ClusterView, request: web.Request) -> HostedReplica:
    """The copy that a path names. Raises InvalidArgument, NotPrimary, UnknownPartition."""
    topic_id, text = request.match_info["topic_id"], request.match_info["partition"]
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise InvalidArgument(f"partition: {text[:40]!r} is not a number", field="partition")
    hosted = driver.replicas.get((topic_id, int(text)))
    if hosted is None:
        raise view.not_here(topic_id, int(text))
    return hosted


async def _in_turns(steps: Iterator[None]) -> None:
    """Run ``steps`` beside the traffic."""
    began = perf_counter()
    for _ in steps:
        took = perf_counter() - began
        if took > _SLICE_S:
            await asyncio.sleep(took)
            began = perf_counter()


def _shown(found: Digests) -> dict[str, Any]:
    wrong = found.wrong
    return {
        "next": found.next,
        "gone": found.gone,
        "bytes": found.bytes,
        "blocks": [[b.start, b.end, b.batches, b.bytes, b.digest] for b in found.blocks],
        "batches": [
            [h.base_offset, h.next_offset, h.epoch, h.crc, h.producer_id, h.producer_epoch, h.base_sequence, h.size]
            for h in found.batches
        ],
        "wrong": None
        if wrong is None
        else {"offset": wrong.offset, "file": wrong.file, "position": wrong.position, "reason": wrong.reason},
    }


def number_of(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """An integer of the query string. Raises InvalidArgument naming it and its limits."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise InvalidArgument(f"{name}: {text[:40]!r} is not a number", field=name)
    return check_range(int(text), name, low, high)
