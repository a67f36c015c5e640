"""Requests are held to what the document says: parameters that it does not name and bodies of other types are refused,
so that a typing mistake is not silent and a form in a browser cannot change anything.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from aiohttp import web

from ferryline.protocol.errors import InvalidArgument, UnsupportedMediaType
from ferryline.protocol.limits import check_range
from ferryline_service.errors import Handler
from ferryline_service.operations import JSON, Operation, Operations
from ferryline_service.schemas import Schema

PARAMETERS_MAX = 200
TEXT_MAX = 4_096  # of a whole query string, encoded


def contract_middleware(operations: Operations) -> Any:
    """Raises InvalidArgument, UnsupportedMediaType. Routes that are not described are not looked at."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        if resource is not None:
            method = "GET" if request.method == "HEAD" else request.method
            operation = operations.get((method, resource.canonical))
            if operation is not None:
                check_query(request, operation)
                check_type(request, operation)
        return await handler(request)

    return middleware


def check_query(request: web.Request, operation: Operation) -> None:
    """Every parameter is known, and stands once unless it may stand more often."""
    if not request.query_string:
        return
    if len(request.raw_path.partition("?")[2]) > TEXT_MAX or len(request.query) > PARAMETERS_MAX:
        raise InvalidArgument(f"query: over {TEXT_MAX} bytes or {PARAMETERS_MAX} parameters", field="query")
    known = {one.name: one for one in operation.query}
    for name, count in Counter(name for name, _ in request.query.items()).items():
        if name not in known:
            there = f"; there are {', '.join(sorted(known))}" if known else ""
            raise InvalidArgument(f"{name[:40]!r}: no such query parameter{there}", field=name[:40])
        if count > 1 and not known[name].several:
            raise InvalidArgument(f"{name}: given {count} times", field=name)
        check_value(name, request.query[name], known[name].schema)


def check_value(name: str, text: str, schema: Schema) -> None:
    """Numbers are whole and within their limits, choices are among those that there are: also where other parameters
    make them count for nothing. Names and patterns are for whoever looks them up."""
    ways = schema.get("anyOf", [schema])
    choices = [choice for way in ways for choice in way.get("enum", ())]
    whole = next((way for way in ways if way.get("type") == "integer"), None)
    if text in choices or not (choices or whole):
        return
    if whole is None:
        raise InvalidArgument(f"{name}: {text[:40]!r} is none of {', '.join(filter(None, choices))}", field=name)
    if not text.removeprefix("-").isdigit() or not text.isascii() or len(text) > 20:
        raise InvalidArgument(f"{name}: {text[:40]!r} is not an integer", field=name)
    check_range(int(text), name, whole["minimum"], whole["maximum"])


def check_type(request: web.Request, operation: Operation) -> None:
    """A body is JSON, or what the route takes instead. One that does not say what it is, is taken at its word."""
    wanted = operation.raw or (JSON if operation.body is not None else "")
    if wanted and request.body_exists and "Content-Type" in request.headers and request.content_type != wanted:
        raise UnsupportedMediaType(f"Content-Type: {request.content_type[:80]!r} is not {wanted}", field="Content-Type")
