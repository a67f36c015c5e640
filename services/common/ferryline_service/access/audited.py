"""What the audit log is told: changes and refusals, as requests and frames come by. The gate decides, this listens.

    auditor = Auditor(AuditLog(data_dir / "audit"), gate)
    app = web.Application(middlewares=[error_middleware(metrics), auditor.middleware(), gate.middleware()])
    endpoint.on_refused = auditor.refused_frame

A change is a request that is no GET and takes more than ``read`` or ``write`` on something, and the joining of a
broker. One that changes several things names each of them itself (`tell`). Changes are told while access is off, too;
then everybody does them.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import pydantic
from aiohttp import web

from ferryline.protocol.access import CLUSTER, MANAGE
from ferryline.protocol.errors import (
    FerrylineError,
    InternalError,
    InvalidArgument,
    QuotaExceeded,
    Unauthorized,
    Unavailable,
)
from ferryline.protocol.frames import Kind
from ferryline_service.access.audit_log import DONE, FAILED, OTHERS, REFUSED, AuditLog
from ferryline_service.access.caller import NOBODY, Caller
from ferryline_service.access.gate import CALLER, SESSION_PATH, Gate
from ferryline_service.access.rules import NODE, PATH, PUBLIC, Need, Rule
from ferryline_service.errors import REQUEST_ID

if TYPE_CHECKING:
    from ferryline_service.server_session import ServerSession

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BODY_BYTES_MAX = 64 * 1024
FAILED_MAX = 100  # failures of one request that get lines of their own: changes of others are not rotated away by them
TOLD = web.RequestKey("ferryline_told", list)
_LOOKS = ("GET", "HEAD", "OPTIONS")
_CONNECT = "connect"
_NAMES = ("name", "topic", "exchange", "principal")  # in a body or an error, where the path names nothing
_KIND_NAMES = {int(kind): kind.name.lower() for kind in Kind}


def tell(request: web.Request, action: str, resource: str, name: str, error: FerrylineError | None = None) -> None:
    """For a handler that changes several things: one of them was changed, or not."""
    request.setdefault(TOLD, []).append((action, resource, name, error))


def changes(method: str, rule: Rule) -> bool:
    """Whether such a request changes something, as opposed to using it."""
    if method in _LOOKS or rule is NODE:
        return False
    return not rule.needs or any(need.action == MANAGE for need in rule.needs)


class Auditor:
    """Between one gate and one log."""

    def __init__(self, log: AuditLog, gate: Gate) -> None:
        self.log = log
        self._gate = gate

    def middleware(self) -> Any:
        """Stands before the gate's, which it hears refuse."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            rule = self._gate.rule_of(request)
            if rule is None:  # there is no such route
                return await handler(request)
            try:
                response = await handler(request)
            except (Unauthorized, QuotaExceeded) as error:
                self._ended(request, rule, REFUSED, error)
                raise
            except Unavailable:
                raise  # nothing was decided, here and now
            except Exception as error:
                if changes(request.method, rule):
                    self._ended(request, rule, FAILED, error)
                raise
            if changes(request.method, rule):
                await self._changed(request, rule)
            return response

        return middleware

    def refused_frame(self, session: ServerSession, kind: int, error: FerrylineError) -> None:
        """A frame, or an entry of one, that the caller may not send."""
        details = error.details
        self.log.note(
            _known(session.caller),
            session.remote,
            _KIND_NAMES.get(kind, str(kind)),
            str(details.get("resource", "quota" if "quota" in details else "")),
            str(details.get("name", details.get("quota", ""))),
            REFUSED,
            error.code,
        )

    def changed_frame(
        self, session: ServerSession, action: str, resource: str, name: str, code: str, details: dict[str, Any]
    ) -> None:
        """What a frame has changed, or failed to."""
        outcome = FAILED if code else DONE
        self.log.note(_known(session.caller), session.remote, action, resource, name, outcome, code, **details)

    async def _changed(self, request: web.Request, rule: Rule) -> None:
        if self._told(request):
            return
        body = await _body(request) if rule is not PUBLIC else None  # what nodes send to join holds a token
        if request.query.get("dry_run") in ("true", "1") or (isinstance(body, Mapping) and body.get("dry_run") is True):
            return
        details = {"body": json.dumps(body, separators=(",", ":"))} if body else {}
        self._note(request, rule, body, DONE, "", details)

    def _told(self, request: web.Request) -> bool:
        """Lines for what the handler itself has told. Returns whether there was anything.

        Every change is told, however many there are: none must be hidden behind a thousand others.
        """
        told, failures = request.get(TOLD, []), 0
        caller, request_id = _known(request.get(CALLER)), request.get(REQUEST_ID, "")
        for action, resource, name, error in told:
            code = "" if error is None else error.code
            outcome = DONE if error is None else REFUSED if isinstance(error, Unauthorized) else FAILED
            failures += outcome == FAILED
            if outcome != FAILED or failures <= FAILED_MAX:
                self.log.note(caller, request.remote, action, resource, name, outcome, code, request_id)
        if failures > FAILED_MAX:
            more = {"failures": failures - FAILED_MAX}
            self.log.note(caller, request.remote, told[-1][0], OTHERS, OTHERS, FAILED, "", request_id, **more)
        return bool(told)

    def _ended(self, request: web.Request, rule: Rule, outcome: str, error: Exception) -> None:
        """Refused or failed. A body that was perhaps not read yet is left alone: the error names what it read."""
        if self._told(request):
            return
        details = error.details if isinstance(error, FerrylineError) else {}
        self._note(request, rule, details, outcome, _code(error), {})

    def _note(
        self, request: web.Request, rule: Rule, body: Any, outcome: str, code: str, details: dict[str, Any]
    ) -> None:
        need = _need(rule)
        resource, name = _resource(request, need), _name(request, need, body)
        action = _CONNECT if request.path == SESSION_PATH else request.match_info.handler.__name__.strip("_")
        request_id = request.get(REQUEST_ID, "")
        caller = _known(request.get(CALLER))
        self.log.note(caller, request.remote, action, resource, name, outcome, code, request_id, **details)


def _known(caller: Caller | None) -> Caller | None:
    return None if caller is NOBODY else caller


def _need(rule: Rule) -> Need | None:
    """What the request was about: what it takes to manage, or else the first thing that is needed."""
    return next((need for need in rule.needs if need.action == MANAGE), rule.needs[0] if rule.needs else None)


def _resource(request: web.Request, need: Need | None) -> str:
    """``topic``, ``group``, ``exchange``; of what belongs to the cluster: ``broker``, ``principal`` and so on."""
    if need is not None and need.resource != CLUSTER:
        return need.resource
    resource = request.match_info.route.resource
    noun = resource.canonical.split("/")[2] if resource is not None and resource.canonical.count("/") > 1 else ""
    return noun.removesuffix("s") if noun.endswith("s") else CLUSTER


def _name(request: web.Request, need: Need | None, body: Any) -> str:
    """Name of what was changed: a topic, a principal, a broker's number."""
    found = request.match_info
    if need is not None and need.source == PATH and need.resource in found:
        others = [value for name, value in found.items() if name != need.resource]
        return "/".join([found[need.resource], *others])
    if found:
        return "/".join(found.values())
    named = [body[name] for name in _NAMES if isinstance(body.get(name), str)] if isinstance(body, Mapping) else []
    return named[0] if named else ""


async def _body(request: web.Request) -> Any:
    """The JSON that the handler has read; None without one, or where it is more than a line can tell."""
    if request.content_type != "application/json" or not 0 < (request.content_length or 0) <= BODY_BYTES_MAX:
        return None
    try:
        return json.loads(await request.text())
    except (ValueError, LookupError, RecursionError, web.HTTPException, OSError):
        return None


def _code(error: Exception) -> str:
    if isinstance(error, FerrylineError):
        return error.code
    if isinstance(error, pydantic.ValidationError):
        return InvalidArgument.code
    return f"HTTP_{error.status}" if isinstance(error, web.HTTPException) else InternalError.code
