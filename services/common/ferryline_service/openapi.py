"""OpenAPI 3.1 documents of REST surfaces, made from the routes that are served and the table that describes them.

A route that is served and not described, or the reverse, is left out of nothing and fails a test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web
from pydantic.json_schema import models_json_schema

from ferryline.protocol.errors import BY_CODE
from ferryline_service.operations import JSON, Answer, Operation, Operations, Parameter
from ferryline_service.schemas import COUNT, FLAG, TEXT, Schema, component, one_of, shape

PROBLEM = "application/problem+json"
_PROBLEMS = {
    400: "The request is wrong; `detail` names the field and what is allowed.",
    401: "No token, or none that is believed.",
    403: "The principal may not do this.",
    404: "There is no such thing.",
    405: "The address takes other methods; `Allow` names them.",
    408: "The body did not get here whole in time.",
    409: "Something else stands in the way; it was not done.",
    412: "It was changed since the asker saw it.",
    413: "Too large.",
    415: "The body is of another type, or packed.",
    421: "Another broker leads this; `details.primary_url` is its address.",
    429: "Too much at once; `Retry-After` says when to come again.",
    500: "A mistake of ours; `request_id` names it in the log.",
    502: "What was asked for came back broken.",
    503: "Not now; `Retry-After` says when to come again.",
    504: "No answer in time; it may have been done.",
    507: "The disk is full.",
}
_EVERYWHERE = (400, 429, 500, 503, 504)
_SECURED = (401, 403)
_WITH_NAMES = (404, 405)
_WITH_BODY = (408, 413, 415)
_HEADERS = {
    "ETag": "Names this state: for If-Match and If-None-Match.",
    "Retry-After": "Whole seconds.",
    "WWW-Authenticate": "How to authenticate.",
    "Allow": "Methods that are taken.",
    "X-Request-Id": "As it was sent, or made here: it stands in the log.",
}


def problem_schema() -> Schema:
    """RFC 9457 problem details."""
    known = sorted(code for code, cls in BY_CODE.items() if cls.http_status)
    made = shape(
        {"remedy": {**TEXT, "description": "What to do about it, in one sentence."}},
        type={**TEXT, "description": "urn:ferryline:error: and the code."},
        title=TEXT,
        status={"type": "integer", "minimum": 400, "maximum": 599},
        detail=TEXT,
        code=one_of(*known),
        retriable={**FLAG, "description": "The same request may succeed later, unchanged."},
        definite={**FLAG, "description": "The request was surely not applied."},
        details={"type": "object"},
        request_id=TEXT,
    )
    return {**made, "description": "RFC 9457 problem details."}


def error_schema() -> Schema:
    """What became of one part of a request of which others were done."""
    return shape(
        {"retriable": FLAG, "definite": FLAG, "details": {"type": "object"}},
        code=TEXT,
        detail=TEXT,
    )


def document(
    title: str,
    routes: Iterable[web.AbstractRoute],
    operations: Operations,
    names: Mapping[str, Schema],
    schemas: Mapping[str, Schema],
    *,
    secured: bool = False,
) -> dict[str, Any]:
    """Everything that the router serves. ``names``: schemas of the parameters of paths, ``schemas``: components that
    answers refer to, ``secured``: access is on, so a token is needed."""
    bodies = dict.fromkeys(one.body for one in operations.values() if one.body is not None)
    _, made = models_json_schema(
        [(body, "validation") for body in bodies],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    ids: set[str] = set()
    for route in routes:
        path = route.resource.canonical if route.resource is not None else ""
        described = operations.get((route.method, path))
        if described is None or route.method == "HEAD":
            continue
        made_of = _operation(route, path, described, names)
        if made_of["operationId"] in ids:
            made_of["operationId"] += "_" + "_".join(re.findall(r"/(\w+)", path.removeprefix("/v1")))
        ids.add(made_of["operationId"])
        paths.setdefault(path, {})[route.method.lower()] = made_of
    components = {**made.get("$defs", {}), **schemas, "Problem": problem_schema(), "Error": error_schema()}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": "1", "license": {"name": "MIT", "identifier": "MIT"}},
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}] if secured else [],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key (fl_...) or a JWT of a configured issuer; nothing while access is off.",
                }
            },
        },
    }


def _operation(
    route: web.AbstractRoute, path: str, described: Operation, names: Mapping[str, Schema]
) -> dict[str, Any]:
    name = route.handler.__name__.strip("_")
    text = (route.handler.__doc__ or "").strip().partition("\n\n")[0]
    in_path = re.findall(r"{(\w+)}", path)
    parameters: list[dict[str, Any]] = [
        {"name": found, "in": "path", "required": True, "schema": names[found]} for found in in_path
    ]
    parameters += [_parameter(one, "query") for one in described.query]
    parameters += [_parameter(one, "header") for one in described.headers]
    made: dict[str, Any] = {
        "operationId": name,
        "summary": " ".join(text.split()) or name.replace("_", " "),
        "parameters": parameters,
        "responses": {str(status): _response(one) for status, one in described.answers.items()},
    }
    statuses = {*_EVERYWHERE, *described.problems, *(_WITH_NAMES if in_path else ())}
    statuses |= set(() if described.public else _SECURED)
    if described.public:
        made["security"] = []
    if described.body is not None or described.raw:
        statuses |= set(_WITH_BODY)
        made["requestBody"] = _body(described)
    made["responses"].update({str(status): _refusal(status) for status in sorted(statuses)})
    return made


def _parameter(one: Parameter, where: str) -> dict[str, Any]:
    schema = {"type": "array", "items": one.schema} if one.several else one.schema
    made = {"name": one.name, "in": where, "required": one.required, "description": one.text, "schema": schema}
    return {**made, "style": "form", "explode": True} if one.several else made


def _body(described: Operation) -> dict[str, Any]:
    if described.body is None:
        return {"required": True, "content": {described.raw: {"schema": {"type": "string", "format": "binary"}}}}
    content: dict[str, Any] = {"schema": component(described.body.__name__)}
    if described.example is not None:
        content["example"] = described.example
    return {"required": not described.optional, "content": {JSON: content}}


def _response(one: Answer) -> dict[str, Any]:
    made: dict[str, Any] = {"description": one.text}
    if one.media:
        made["content"] = {media: {"schema": schema} for media, schema in one.media.items()}
    if one.headers:
        made["headers"] = {name: {"description": _HEADERS[name], "schema": TEXT} for name in one.headers}
    return made


def _refusal(status: int) -> dict[str, Any]:
    headers = {401: ("WWW-Authenticate",), 405: ("Allow",), 412: (), 429: ("Retry-After",), 503: ("Retry-After",)}
    made = _response(Answer({PROBLEM: component("Problem")}, _PROBLEMS[status], headers.get(status, ())))
    if status in (429, 503):
        made["headers"]["Retry-After"]["schema"] = COUNT
    return made
