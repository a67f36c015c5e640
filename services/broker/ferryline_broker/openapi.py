"""The contract of a broker's REST surface: one table that says of every route what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from ferryline.protocol.limits import OFFSET_MAX, PARTITIONS_MAX, WAIT_MS_MAX
from ferryline_broker.answers import SCHEMAS
from ferryline_broker.audit import RepairIn
from ferryline_broker.log.replica_store import LOGS
from ferryline_broker.rest_models import (
    KeepIn,
    OffsetsIn,
    PublishIn,
    PurgeIn,
    ReceiveIn,
    RecordsIn,
    RedriveIn,
    SelectIn,
    SettleIn,
)
from ferryline_broker.rest_read import EVENTS, NDJSON, RECORDS_MAX
from ferryline_service.errors import Handler
from ferryline_service.openapi import document
from ferryline_service.operations import JSON, Answer, Operation, Operations, Parameter, answer
from ferryline_service.schemas import ASKED_FLAG, NAME_SCHEMA, TEXT, Schema, component, one_of
from ferryline_service.shared_operations import SHARED

_QUEUE = "/v1/queues/{topic}/{group}"
_REPLICA = "/v1/replicas/{topic_id}/{partition}"
_BINARY = "application/octet-stream"
_PARTITION: Schema = {"type": "integer", "minimum": 0, "maximum": PARTITIONS_MAX - 1}
_NAMES: dict[str, Schema] = {
    "topic": NAME_SCHEMA,
    "exchange": NAME_SCHEMA,
    "group": NAME_SCHEMA,
    "partition": _PARTITION,
    "topic_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "log": one_of(*LOGS),
}


def _number(name: str, low: int, high: int, text: str, *, required: bool = False) -> Parameter:
    return Parameter(name, {"type": "integer", "minimum": low, "maximum": high}, text, required=required)


def _one(name: str) -> Answer:
    return answer(component(name))


def _both(name: str) -> dict[int, Answer]:
    """All of it was done, or some of it."""
    return {200: _one(name), 207: Answer({JSON: component(name)}, "Done in part; the answer says what failed.")}


_THIS_ONE = Parameter("partition", _PARTITION, "This one only; otherwise all that this broker leads.")
_FROM: Schema = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": OFFSET_MAX}, one_of("start", "end")]}
_RECORDS = Answer({JSON: component("Records"), NDJSON: TEXT, EVENTS: TEXT}, "Records, as the header Accept asks.")

OPERATIONS: Operations = {
    **SHARED,
    ("GET", "/v1/metadata"): Operation(
        {200: _one("Metadata")}, query=(_number("revision", -1, OFFSET_MAX, "That is known; -1 for everything."),)
    ),
    ("POST", "/v1/topics/{topic}/records"): Operation(
        _both("Appended"),
        RecordsIn,
        problems=(409, 421, 507),
        example={"records": [{"key": "customer-7", "value": '{"id": 1}', "headers": {"src": "web"}}]},
    ),
    ("POST", "/v1/exchanges/{exchange}/publish"): Operation(
        _both("Published"),
        PublishIn,
        problems=(409, 421, 507),
        example={"records": [{"routing_key": "eu.order.created", "value": "{}"}]},
    ),
    ("GET", "/v1/topics/{topic}/partitions/{partition}/records"): Operation(
        {200: _RECORDS},
        query=(
            Parameter("offset", _FROM, "Of the first record; 0 if left out."),
            _number("wait_ms", 0, WAIT_MS_MAX, "For a record."),
            _number("limit", 1, RECORDS_MAX, "Records at most; 100 if left out."),
            Parameter("secondary", ASKED_FLAG, "Also where this broker is not the primary."),
            Parameter("follow", ASKED_FLAG, "NDJSON that goes on until the reader leaves."),
        ),
        headers=(
            Parameter(
                "Last-Event-ID",
                {"type": "integer", "minimum": 0, "maximum": OFFSET_MAX - 1},
                "Begin after this offset.",
            ),
        ),
        problems=(421,),
    ),
    ("GET", "/v1/groups/{group}/offsets"): Operation(
        _both("Offsets"), query=(Parameter("topic", NAME_SCHEMA, "Of this topic only."),)
    ),
    ("PUT", "/v1/groups/{group}/offsets"): Operation(
        _both("Moved"),
        OffsetsIn,
        problems=(409,),
        example={"offsets": [{"topic": "orders", "partition": 0, "offset": "start"}], "dry_run": True},
    ),
    ("POST", f"{_QUEUE}/receive"): Operation(
        {200: _one("Received")}, ReceiveIn, optional=True, problems=(409, 421), example={"records": 10, "wait_ms": 0}
    ),
    ("POST", f"{_QUEUE}/settle"): Operation(_both("Settled"), SettleIn, problems=(409, 421)),
    ("POST", f"{_QUEUE}/keep"): Operation(_both("Kept"), KeepIn, optional=True, problems=(409, 421)),
    ("POST", f"{_QUEUE}/purge"): Operation(_both("Purged"), PurgeIn, optional=True, problems=(409, 421)),
    ("POST", f"{_QUEUE}/pause"): Operation(_both("Paused"), SelectIn, optional=True, problems=(409, 421)),
    ("POST", f"{_QUEUE}/resume"): Operation(_both("Paused"), SelectIn, optional=True, problems=(409, 421)),
    ("POST", f"{_QUEUE}/redrive"): Operation(_both("Redriven"), RedriveIn, optional=True, problems=(409, 421)),
    ("GET", f"{_QUEUE}/stats"): Operation(_both("Stats"), query=(_THIS_ONE,), problems=(421,)),
    ("GET", f"{_QUEUE}/peek"): Operation(
        _both("Peeked"),
        query=(
            _THIS_ONE,
            _number("offset", -1, OFFSET_MAX, "Of the first record; the group's start if left out."),
            _number("count", 1, 1_000, "Records of each partition at most; 100 if left out."),
        ),
        problems=(421,),
    ),
    ("GET", f"{_QUEUE}/explain"): Operation(
        _both("Explained"),
        query=(
            Parameter("partition", _PARTITION, "Of the record.", required=True),
            _number("offset", 0, OFFSET_MAX, "Of the record.", required=True),
        ),
        problems=(421,),
    ),
    ("DELETE", _QUEUE): Operation(_both("Deleted"), query=(_THIS_ONE,), problems=(409, 421)),
    ("GET", "/v1/certificates"): Operation({200: _one("Certificates")}),
    ("POST", "/v1/certificates/renew"): Operation({200: _one("Certificates")}),
    ("GET", _REPLICA): Operation({200: _one("Replica")}, problems=(421,)),
    ("GET", f"{_REPLICA}/digests"): Operation(
        {200: _one("Digests")},
        query=(
            Parameter("log", one_of(*LOGS), "Which log."),
            _number("from", 0, OFFSET_MAX, "Where to begin."),
            _number("below", 0, OFFSET_MAX, "Where to end; the high watermark if left out."),
            _number("limit", 1, 256 * 1024 * 1024, "Bytes to look at."),
            Parameter("batches", ASKED_FLAG, "Tell of every batch."),
            _number("producer", 0, 2**63 - 1, "Batches of this producer only."),
        ),
        problems=(421,),
    ),
    ("POST", f"{_REPLICA}/repair"): Operation({202: _one("Repairing")}, RepairIn, problems=(409, 421)),
    ("GET", f"{_REPLICA}/logs/{{log}}"): Operation(
        {200: Answer({_BINARY: TEXT}, "Whole batches.")},
        query=(
            _number("from", 0, OFFSET_MAX, "Where to begin."),
            _number("limit", 0, 16 * 1024 * 1024, "Bytes, about."),
        ),
        problems=(421,),
    ),
    ("PUT", f"{_REPLICA}/logs/{{log}}"): Operation(
        {200: _one("LogEnd")},
        raw=_BINARY,
        query=(
            _number("from", 0, OFFSET_MAX, "Where the batches begin."),
            _number("epoch_before", 0, 2**31 - 1, "Of the record before them."),
        ),
        problems=(409, 421),
    ),
    ("POST", f"{_REPLICA}/restored"): Operation({200: _one("LogEnds")}, problems=(409, 421)),
}


def openapi_handler(router: web.UrlDispatcher, secured: Callable[[], bool]) -> Handler:
    """The handler that tells of everything on ``router``. ``secured``: access is on."""

    async def openapi(_: web.Request) -> web.StreamResponse:
        """This document."""
        made = document("Ferryline broker", router.routes(), OPERATIONS, _NAMES, SCHEMAS, secured=secured())
        return web.json_response(made)

    return openapi
