"""OpenAPI 3.1 documents of REST surfaces, made from the routes that are served and the models that they read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

Bodies = Mapping[tuple[str, str], type[BaseModel]]
Queries = Mapping[str, Mapping[str, str]]
_REFERENCE = "#/components/schemas/{model}"
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


def document(title: str, routes: Iterable[web.AbstractRoute], bodies: Bodies, queries: Queries) -> dict[str, Any]:
    """Everything under /v1 that the router serves; a route that nobody described still appears.

    ``bodies``: (method, path) -> model. ``queries``: path -> parameter of its GET and DELETE -> what it means.
    """
    models = [(model, "validation") for model in dict.fromkeys(bodies.values())]
    _, schemas = models_json_schema(models, ref_template=_REFERENCE)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.resource.canonical if route.resource is not None else ""
        if path.startswith("/v1/") and route.method != "HEAD":
            operation = _operation(route, path, bodies.get((route.method, path)), queries.get(path, {}))
            paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": "1"},
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": {**schemas.get("$defs", {}), "Problem": _PROBLEM}},
    }


def _operation(
    route: web.AbstractRoute, path: str, body: type[BaseModel] | None, queries: Mapping[str, str]
) -> dict[str, Any]:
    name = route.handler.__name__.strip("_")
    text = (route.handler.__doc__ or "").strip().partition("\n")[0]
    parameters: list[dict[str, Any]] = [
        {"name": found, "in": "path", "required": True, "schema": {"type": "string"}}
        for found in re.findall(r"{(\w+)}", path)
    ]
    if route.method in ("GET", "DELETE"):
        parameters += [
            {"name": query, "in": "query", "description": meaning, "schema": {"type": "string"}}
            for query, meaning in queries.items()
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
    if body is not None:
        reference = {"$ref": _REFERENCE.format(model=body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return operation
