"""REST on a broker: metadata, and records for people with curl.

``GET  /v1/metadata?revision=``
``POST /v1/topics/{topic}/records``                        {"records": [{"key", "value", "headers", "partition"}, ...]}
``GET  /v1/topics/{topic}/partitions/{p}/records?offset=&wait_ms=&limit=``    JSON, or NDJSON when asked for

Keys and values are UTF-8 text, or ``{"base64": "..."}``. A broker that is not the primary answers 421 and names the
primary's URL in ``details.primary_url``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from ferryline.protocol.errors import (
    BY_CODE,
    FerrylineError,
    InternalError,
    InvalidArgument,
    StorageFailed,
    from_info,
)
from ferryline.protocol.limits import HEADER_NAME_BYTES_MAX, HEADERS_MAX, OFFSET_MAX, WAIT_MS_MAX, check_range
from ferryline.protocol.messages import RECORDS
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.partitioner import partition_of
from ferryline.protocol.records import BatchHeader, decode_batch, encode_batch
from ferryline_broker.clock import wall_ms
from ferryline_broker.core.events import AnswerProduce, Produced, Refuse
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.walk import checked_batches
from ferryline_broker.ports import Answer
from ferryline_broker.produce import check_batch, refusal_info
from ferryline_broker.proof import Proof
from ferryline_broker.rest_shared import Bytes64, elsewhere, leads, query_int, raw_bytes, shown_bytes, whole
from ferryline_broker.view import ClusterView
from ferryline_service.errors import read_json

_PRODUCE_TIMEOUT_MS = 30_000
_RECORDS_MAX = 10_000
_READ_BYTES = 1024 * 1024


class RecordIn(BaseModel):
    """One record to append."""

    model_config = ConfigDict(extra="forbid")

    key: str | Bytes64 | None = None
    value: str | Bytes64 | None = None
    headers: dict[str, str | Bytes64 | None] = Field(default={}, max_length=HEADERS_MAX)
    partition: int | None = Field(None, ge=0)


class RecordsIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    records: list[RecordIn] = Field(min_length=1, max_length=_RECORDS_MAX)


class _Appended:
    """A future for each token; REST is not the hot path."""

    def __init__(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        self.futures: list[asyncio.Future[AnswerProduce]] = [loop.create_future() for _ in range(count)]

    def settle(self, index: int, answer: Answer) -> None:
        future = self.futures[index]
        if future.done():
            return
        if isinstance(answer, AnswerProduce):
            future.set_result(answer)
        else:
            assert isinstance(answer, Refuse), answer
            future.set_exception(from_info(refusal_info(answer)))

    def emit(self) -> None:
        return


class _Readable:
    """Wakes a REST reader when its partition has more."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def emit(self) -> None:
        self.event.set()


class RestApi:
    """Handlers of the routes above; each reads or appends through the same cores as the sessions."""

    def __init__(self, driver: PartitionDriver, view: ClusterView) -> None:
        self._driver = driver
        self._view = view
        self._stopping = asyncio.Event()
        self._readers: set[_Readable] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/metadata", self.metadata),
            web.post("/v1/topics/{topic}/records", self.append),
            web.get("/v1/topics/{topic}/partitions/{partition}/records", self.read),
        ]

    def close(self) -> None:
        """Let every long poll end."""
        self._stopping.set()
        for reader in self._readers:
            reader.emit()

    # -- handlers -----------------------------------------------------------------------------------

    async def metadata(self, request: web.Request) -> web.Response:
        known = query_int(request, "revision", -1, -1, OFFSET_MAX)
        answer = self._view.metadata.answer()
        fields: dict[str, Any] = {name: getattr(answer, name) for name in answer.__struct_fields__}
        if known >= answer.revision:
            fields.update(full=False, brokers=[], topics=[], partitions=[])
        shown = {name: _plain(value) for name, value in fields.items()}
        return web.Response(body=msgspec.json.encode(shown), content_type="application/json")

    async def append(self, request: web.Request) -> web.Response:
        topic = self._view.topic_named(request.match_info["topic"])
        asked = RecordsIn.model_validate(await read_json(request))
        chosen: dict[int, list[tuple[int, tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]]]] = {}
        for index, record in enumerate(asked.records):
            encoded = _encoded(record, index)
            chosen.setdefault(self._partition(topic, record, encoded[0], index), []).append((index, encoded))
        # All or nothing as far as this broker can tell: nothing is appended while one partition is elsewhere.
        hosted = {partition: self._primary(topic, partition) for partition in chosen}
        order = sorted(chosen)
        batches: list[tuple[bytearray, BatchHeader]] = []
        for partition in order:
            data = encode_batch([record for _, record in chosen[partition]], timestamp_ms=wall_ms())
            batches.append((data, check_batch(memoryview(data), topic)))
        waiting = _Appended(len(chosen))
        for number, partition in enumerate(order):
            token = self._driver.token(waiting, number, hosted[partition])
            self._driver.feed(hosted[partition], Produced(token, *batches[number], _PRODUCE_TIMEOUT_MS))
        outcomes = await asyncio.gather(*waiting.futures, return_exceptions=True)
        results: list[dict[str, Any]] = [{} for _ in asked.records]
        for partition, outcome in zip(order, outcomes, strict=True):
            for step, (index, _) in enumerate(chosen[partition]):
                results[index] = {"partition": partition, **_outcome(outcome, step)}
        failed = next((outcome for outcome in outcomes if isinstance(outcome, FerrylineError)), None)
        if failed is not None and len(order) == 1:
            raise failed
        return web.json_response({"results": results}, status=200 if failed is None else 207)

    async def read(self, request: web.Request) -> web.StreamResponse:
        topic = self._view.topic_named(request.match_info["topic"])
        partition = whole(request.match_info["partition"], "partition", 0, topic.config.partitions - 1)
        offset = query_int(request, "offset", 0, 0, OFFSET_MAX)
        wait_ms = query_int(request, "wait_ms", 0, 0, WAIT_MS_MAX)
        limit = query_int(request, "limit", 100, 1, _RECORDS_MAX)
        secondary = request.query.get("secondary", "") in ("1", "true")
        hosted = self._hosted(topic, partition)
        records = await self._records(hosted, topic, offset, wait_ms, limit, secondary)
        if "application/x-ndjson" in request.headers.get("Accept", ""):
            body = b"".join(json.dumps(record).encode() + b"\n" for record in records)
            return web.Response(body=body, content_type="application/x-ndjson")
        following = records[-1]["offset"] + 1 if records else offset
        core = hosted.core
        shown = {
            "records": records,
            "next_offset": following,
            "high_watermark": core.high_watermark[RECORDS],
            "log_start": core.log_start[RECORDS],
        }
        return web.json_response(shown)

    # -- inside -------------------------------------------------------------------------------------

    async def _records(
        self, hosted: HostedReplica, topic: TopicMeta, offset: int, wait_ms: int, limit: int, secondary: bool
    ) -> list[dict[str, Any]]:
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
                try:
                    found, offset = _shown(hosted, offset, verdict.below, limit)
                except StorageFailed as failure:
                    self._driver.storage_failed(hosted, RECORDS, failure)
                    raise
            left = deadline - asyncio.get_running_loop().time()
            if found or left <= 0 or self._stopping.is_set():
                return found
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

    def _partition(self, topic: TopicMeta, record: RecordIn, key: bytes | None, index: int) -> int:
        count = topic.config.partitions
        if record.partition is not None:
            return check_range(record.partition, f"records.{index}.partition", 0, count - 1)
        if key is not None:
            return partition_of(key, count)
        mine = [part.partition for part in self._view.metadata.partitions_of(topic.id) if leads(self._driver, part.key)]
        return mine[index % len(mine)] if mine else index % count

    def _hosted(self, topic: TopicMeta, partition: int) -> HostedReplica:
        hosted = self._driver.replicas.get((topic.id, partition))
        if hosted is None:
            raise elsewhere(self._view, topic.id, partition)
        return hosted

    def _primary(self, topic: TopicMeta, partition: int) -> HostedReplica:
        if not leads(self._driver, (topic.id, partition)):
            raise elsewhere(self._view, topic.id, partition)
        return self._hosted(topic, partition)


def _shown(hosted: HostedReplica, offset: int, below: int, limit: int) -> tuple[list[dict[str, Any]], int]:
    """Up to ``limit`` records from ``offset`` on, and where to go on."""
    data = hosted.read(offset, below, _READ_BYTES, at_least_one=True)
    found: list[dict[str, Any]] = []
    for at, header in checked_batches(hosted.name, data, offset):
        if header.is_control:
            offset = max(offset, header.next_offset)
            continue
        for record in decode_batch(memoryview(data)[at : at + header.size], header):
            if record.offset < offset:
                continue
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


def _encoded(record: RecordIn, index: int) -> tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]:
    headers: list[tuple[str, bytes | None]] = []
    for name, value in record.headers.items():
        if len(name.encode(errors="replace")) > HEADER_NAME_BYTES_MAX:
            raise InvalidArgument(f"records.{index}.headers: name over {HEADER_NAME_BYTES_MAX} bytes", field="headers")
        headers.append((name, raw_bytes(value, f"records.{index}.headers.{name[:40]}")))
    return raw_bytes(record.key, f"records.{index}.key"), raw_bytes(record.value, f"records.{index}.value"), headers


def _outcome(outcome: AnswerProduce | BaseException, step: int) -> dict[str, Any]:
    if isinstance(outcome, AnswerProduce):
        return {"offset": outcome.base_offset + step, "epoch": outcome.epoch}
    error = outcome if isinstance(outcome, FerrylineError) else InternalError(type(outcome).__name__)
    return {"error": {"code": error.code, "detail": error.message, "definite": error.definite}}


def _plain(value: Any) -> Any:
    """Structs as objects with names: people read this."""
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value
