"""The OpenAPI 3.1 document of the REST surface, made from the routes that are served and the models they read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

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

_REFERENCE = "#/components/schemas/{model}"
_BODIES: dict[tuple[str, str], type[BaseModel]] = {
    ("POST", "/v1/topics"): CreateTopic,
    ("PATCH", "/v1/topics/{topic}"): AlterTopic,
    ("POST", "/v1/topics/{topic}/partitions"): AddPartitions,
    ("POST", "/v1/exchanges"): CreateExchange,
    ("POST", "/v1/exchanges/{exchange}/bindings"): Bind,
    ("POST", "/v1/partitions/recover"): Recover,
    ("POST", "/v1/groups/{group}/heartbeat"): MemberHeartbeat,
    ("POST", "/v1/join"): Join,
    ("POST", "/v1/renew"): Renew,
}
_QUERIES: dict[str, dict[str, str]] = {
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
_PROBLEM = {
    "type": "object",
    "description": "RFC 9457 problem details. `definite`: the request was surely not applied.",
    "required": ["type", "title", "status", "detail", "code", "retriable", "definite", "details", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "retriable": {"type": "boolean"},
        "definite": {"type": "boolean"},
        "details": {"type": "object"},
        "remedy": {"type": "string"},
        "request_id": {"type": "string"},
    },
}


def document(routes: Iterable[web.AbstractRoute]) -> dict[str, Any]:
    """Everything under /v1 that the router serves; a route that nobody described still appears."""
    models = [(model, "validation") for model in dict.fromkeys(_BODIES.values())]
    _, schemas = models_json_schema(models, ref_template=_REFERENCE)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.resource.canonical if route.resource is not None else ""
        if path.startswith("/v1/") and route.method != "HEAD":
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Ferryline coordinator", "version": "1"},
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": {**schemas.get("$defs", {}), "Problem": _PROBLEM}},
    }


def _operation(route: web.AbstractRoute, path: str) -> dict[str, Any]:
    name = route.handler.__name__.strip("_")
    text = (route.handler.__doc__ or "").strip().partition("\n")[0]
    parameters: list[dict[str, Any]] = [
        {"name": found, "in": "path", "required": True, "schema": {"type": "string"}}
        for found in re.findall(r"{(\w+)}", path)
    ]
    if route.method == "GET":
        parameters += [
            {"name": query, "in": "query", "description": meaning, "schema": {"type": "string"}}
            for query, meaning in _QUERIES.get(path, {}).items()
        ]
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": text or name.replace("_", " "),
        "parameters": parameters,
        "responses": {
            "2XX": {"description": "Done.", "content": {"application/json": {"schema": {"type": "object"}}}},
            "default": {
                "description": "Refused or failed.",
                "content": {"application/problem+json": {"schema": {"$ref": _REFERENCE.format(model="Problem")}}},
            },
        },
    }
    body = _BODIES.get((route.method, path))
    if body is not None:
        reference = {"$ref": _REFERENCE.format(model=body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return operation
