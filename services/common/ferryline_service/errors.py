"""The one place where errors become answers of the REST surface: RFC 9457 problem details.

Body: ``{type, title, status, detail, code, retriable, definite, details, request_id}``.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pydantic
import structlog
from aiohttp import web

from ferryline.protocol.errors import (
    ConnectionLost,
    FerrylineError,
    InternalError,
    InvalidArgument,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    UnsupportedMediaType,
)
from ferryline_service.logs import get_logger
from ferryline_service.metrics import ServiceMetrics

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# Of every answer. Answers are for programs: a browser that is led here runs, frames and keeps nothing, and no answer
# tells which versions of which libraries wrote it.
_HEADERS = (
    ("Server", "ferryline"),
    ("Strict-Transport-Security", "max-age=31536000"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)
REQUEST_ID = web.RequestKey("ferryline_request_id", str)
_REQUEST_ID_PATTERN = re.compile(r"\A[A-Za-z0-9._-]{1,64}\Z")
BODY_S = 30.0  # for a whole body, 8 MiB at most: 2 Mbit/s
_log = get_logger()


def problem(error: FerrylineError, request_id: str, *, status: int | None = None) -> web.Response:
    """The answer for an error. A retriable 429 or 503 carries Retry-After, a 401 how to say who one is."""
    number = error.http_status if status is None else status
    body: dict[str, Any] = {
        "type": f"urn:ferryline:error:{error.code}",
        "title": type(error).__name__,
        "status": number,
        "detail": error.message,
        "code": error.code,
        "retriable": error.retriable,
        "definite": error.definite,
        "details": error.details,
        "request_id": request_id,
    }
    if error.remedy:
        body["remedy"] = error.remedy
    response = web.Response(
        status=number, body=json.dumps(body, default=str).encode(), content_type="application/problem+json"
    )
    if number in (429, 503):
        response.headers["Retry-After"] = str(_retry_after_s(error))
    elif number == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="ferryline"'
    return response


def _retry_after_s(error: FerrylineError) -> int:
    """Whole seconds, never too few: whoever comes when told is let in, as far as this can be known."""
    after_ms = error.details.get("retry_after_ms", 0)
    return max(1, math.ceil(after_ms / 1000)) if isinstance(after_ms, int | float) else 1


def from_validation(error: pydantic.ValidationError) -> InvalidArgument:
    """Names the first wrong field and what is wrong with it; never echoes the whole input."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "body"
    return InvalidArgument(f"{field}: {first['msg']}", field=field, errors=error.error_count())


def from_http(request: web.Request, http: web.HTTPException) -> FerrylineError:
    """What the HTTP library refused, as one of ours."""
    cls = {404: NotFound, 405: MethodNotAllowed}.get(http.status, MalformedRequest)
    return cls(f"{request.method} {request.path[:200]}: {http.reason}")


async def read_json(request: web.Request) -> Any:
    """Body as JSON. Raises MalformedRequest for anything else, also NaN and absurd nesting, and 408 for one that does
    not get whole: a sender that stops half-way would hold what it has sent for ever. UnsupportedMediaType for a body
    that says it is something else; one that does not say is taken at its word."""
    if "Content-Type" in request.headers and request.content_type != "application/json":
        raise UnsupportedMediaType(f"Content-Type: {request.content_type[:80]!r} is not JSON", field="Content-Type")
    try:
        async with asyncio.timeout(BODY_S):
            text = await request.text()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"body: not whole within {BODY_S:g} s") from None
    except (UnicodeError, LookupError) as error:
        raise MalformedRequest(f"body: not JSON: {str(error)[:200]}") from None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"body: not JSON: {str(error)[:200]}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def error_middleware(metrics: ServiceMetrics) -> Any:
    """Maps every failure to a problem; an unexpected one is logged once, with its request id, and told as INTERNAL."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        request_id = given if _REQUEST_ID_PATTERN.match(given) else uuid.uuid4().hex
        request[REQUEST_ID] = request_id
        # On every line that is logged while this request is worked on, in this task and those that it starts.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started = time.perf_counter()
        response = await _answer(request, handler, request_id, metrics)
        if not response.prepared:  # a session is over by now; its header went out long ago
            response.headers["X-Request-Id"] = request_id
            for name, value in _HEADERS:
                response.headers.setdefault(name, value)
            took = time.perf_counter() - started
            metrics.request_seconds.observe(took)
            _log.debug(
                "request", method=request.method, path=request.path[:200], status=response.status,
                ms=round(took * 1000, 1), remote=request.remote,
            )  # fmt: skip
        return response

    return middleware


async def _answer(
    request: web.Request, handler: Handler, request_id: str, metrics: ServiceMetrics
) -> web.StreamResponse:
    resource = request.match_info.route.resource
    metrics.request(f"{request.method} {resource.canonical if resource else 'unmatched'}")
    status, allow = None, ""
    error: FerrylineError
    try:
        if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            # Nothing is unpacked before anybody could say how large it gets.
            raise UnsupportedMediaType("Content-Encoding: send the body as it is", field="Content-Encoding")
        return await handler(request)
    except FerrylineError as raised:
        error = raised
    except pydantic.ValidationError as invalid:
        error = from_validation(invalid)
    except web.HTTPException as http:
        if http.status < 400:
            raise
        error, status = from_http(request, http), http.status
        if isinstance(http, web.HTTPMethodNotAllowed):
            allow = ",".join(sorted(http.allowed_methods))
    except ConnectionResetError:
        error = ConnectionLost("the client was gone before it was answered")  # nobody hears this
    except Exception as unexpected:
        _log.exception("request failed", path=request.path[:200])
        error = InternalError(f"{type(unexpected).__name__}; see the log for request {request_id}")
    metrics.error(error.code)
    response = problem(error, request_id, status=status)
    if allow:
        response.headers["Allow"] = allow
    return response
