"""What the OpenAPI document of a coordinator says beyond its routes: bodies and queries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiohttp import web
from pydantic import BaseModel

from ferryline_coordinator.models import (
    AddPartitions,
    AlterTopic,
    Bind,
    CreateExchange,
    CreateTopic,
    Join,
    MemberHeartbeat,
    Recover,
    Renew,
)
from ferryline_coordinator.models_access import AddKey, AlterPrincipal, CreatePrincipal
from ferryline_coordinator.rest_backup import Finish, Restore
from ferryline_coordinator.rest_certificates import Rotate
from ferryline_service.access import audit_rest
from ferryline_service.openapi import document as describe

_BODIES: dict[tuple[str, str], type[BaseModel]] = {
    ("POST", "/v1/topics"): CreateTopic,
    ("PATCH", "/v1/topics/{topic}"): AlterTopic,
    ("POST", "/v1/topics/{topic}/partitions"): AddPartitions,
    ("POST", "/v1/exchanges"): CreateExchange,
    ("POST", "/v1/exchanges/{exchange}/bindings"): Bind,
    ("POST", "/v1/partitions/recover"): Recover,
    ("POST", "/v1/groups/{group}/heartbeat"): MemberHeartbeat,
    ("POST", "/v1/certificates/rotate"): Rotate,
    ("POST", "/v1/restore"): Restore,
    ("POST", "/v1/restore/finish"): Finish,
    ("POST", "/v1/principals"): CreatePrincipal,
    ("PATCH", "/v1/principals/{principal}"): AlterPrincipal,
    ("POST", "/v1/principals/{principal}/keys"): AddKey,
    ("POST", "/v1/join"): Join,
    ("POST", "/v1/renew"): Renew,
}
_QUERIES: dict[str, dict[str, str]] = {
    "/v1/principals/{principal}": {"version": "DELETE: refuse if the principal has another one."},
    audit_rest.PATH: audit_rest.QUERIES,
    "/v1/topics/{topic}/route": {"key": "The key, as UTF-8 text. Required."},
    "/v1/exchanges/{exchange}/route": {
        "routing_key": "Of the record; empty if left out.",
        "header": "name=value, of the record; may stand several times.",
    },
    "/v1/partitions": {"topic": "Of this topic only.", "state": "offline, under_replicated or moving."},
    "/v1/metadata": {
        "since": "Revision that is known; -1 for everything.",
        "coord_epoch": "Coordinator epoch under which it became known.",
        "wait_ms": "How long to wait for a change; at most 60000.",
        "cluster_id": "Refuse if this is another cluster.",
    },
}


def document(routes: Iterable[web.AbstractRoute]) -> dict[str, Any]:
    """Everything under /v1 that the router serves."""
    return describe("Ferryline coordinator", routes, _BODIES, _QUERIES)
