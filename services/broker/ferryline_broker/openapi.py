"""What the OpenAPI document of a broker says beyond its routes: bodies and queries."""

from __future__ import annotations

from aiohttp import web
from pydantic import BaseModel

from ferryline_broker.audit import RepairIn
from ferryline_broker.rest_models import KeepIn, PurgeIn, ReceiveIn, RecordsIn, RedriveIn, SelectIn, SettleIn
from ferryline_service.errors import Handler
from ferryline_service.openapi import document

_QUEUE = "/v1/queues/{topic}/{group}"
_REPLICA = "/v1/replicas/{topic_id}/{partition}"
_BODIES: dict[tuple[str, str], type[BaseModel]] = {
    ("POST", "/v1/topics/{topic}/records"): RecordsIn,
    ("POST", f"{_QUEUE}/receive"): ReceiveIn,
    ("POST", f"{_QUEUE}/settle"): SettleIn,
    ("POST", f"{_QUEUE}/keep"): KeepIn,
    ("POST", f"{_QUEUE}/purge"): PurgeIn,
    ("POST", f"{_QUEUE}/pause"): SelectIn,
    ("POST", f"{_QUEUE}/resume"): SelectIn,
    ("POST", f"{_QUEUE}/redrive"): RedriveIn,
    ("POST", f"{_REPLICA}/repair"): RepairIn,
}
_PARTITION = {"partition": "This one only; otherwise all that this broker leads."}
_QUERIES: dict[str, dict[str, str]] = {
    "/v1/metadata": {"revision": "Revision that is known; -1 for everything."},
    "/v1/topics/{topic}/partitions/{partition}/records": {
        "offset": "Of the first record; 0 if left out.",
        "wait_ms": "How long to wait for a record; at most 60000.",
        "limit": "Records at most; 1 to 10000, 100 if left out.",
        "secondary": "1: also where this broker is not the primary.",
    },
    _QUEUE: _PARTITION,
    f"{_QUEUE}/stats": _PARTITION,
    f"{_QUEUE}/peek": {
        **_PARTITION,
        "offset": "Of the first record; the group's start if left out.",
        "count": "Records of each partition at most; 1 to 1000, 100 if left out.",
    },
    f"{_QUEUE}/explain": {"partition": "Required.", "offset": "Required."},
}


def openapi_handler(router: web.UrlDispatcher) -> Handler:
    """The handler that tells of everything on ``router``."""

    async def openapi(_: web.Request) -> web.StreamResponse:
        """This document."""
        return web.json_response(document("Ferryline broker", router.routes(), _BODIES, _QUERIES))

    return openapi
