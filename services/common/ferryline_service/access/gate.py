"""Who asks, and may they? Every request and every session of a service passes here, once the service has a policy.

    gate = Gate("broker", cluster_id)
    app = web.Application(middlewares=[error_middleware(metrics), gate.middleware()])
    ... routes ...
    gate.guard(app.router, RULES)      # a route without a rule: RuleMissing, the service does not start
    gate.take(policy)                  # at registration, and whenever the coordinator tells of another one

With access off (`AccessPolicy.enabled` is False) everybody is `UNCHECKED` and nothing is looked at.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import WSCloseCode, web

from ferryline.protocol.access import AccessPolicy
from ferryline.protocol.errors import BadCredentials, FerrylineError, Forbidden, InvalidArgument, NotReady
from ferryline_service.access.caller import NOBODY, UNCHECKED, Caller
from ferryline_service.access.keys import KEY_PREFIX
from ferryline_service.access.principals import Principals, Verified
from ferryline_service.access.quotas import Quotas
from ferryline_service.access.rules import BODY, ENTRY, NODE, PATH, PUBLIC, Need, RouteRules, Rule, RuleMissing
from ferryline_service.errors import read_json
from ferryline_service.tls import node_identity

if TYPE_CHECKING:
    from ferryline_service.server_session import ServerSession

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CALLER = web.RequestKey("ferryline_caller", Caller)
SESSION_PATH = "/v1/session"
_LOOK_AGAIN_S = 3_600.0  # wall clocks are set: who expires later than this is looked at again


class TokenVerifier(Protocol):
    """Believes JWTs (`verifier.py`)."""

    def take(self, policy: AccessPolicy) -> None: ...

    async def verify(self, token: str) -> Verified:
        """Raises BadCredentials, or Unavailable when the issuer's keys cannot be had."""

    async def close(self) -> None: ...


class Gate:
    """Knows the policy and whoever has a session open. Used from the loop's thread only.

    ``policy`` None: it is not known yet; nodes are served, clients are told to come back.
    """

    def __init__(
        self,
        service: str,
        cluster_id: str = "",
        *,
        verifier: TokenVerifier | None = None,
        quotas: Quotas | None = None,
        unknown: Callable[[], FerrylineError] | None = None,
        wall_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self.service = service
        self.cluster_id = cluster_id
        self.policy: AccessPolicy | None = None
        self.quotas = quotas or Quotas()
        # Whether a certificate's role is one of this cluster still: a broker that was forgotten keeps its certificate.
        self.is_node: Callable[[str], bool] = lambda identity: True
        self._verifier = verifier
        self._unknown = unknown or (lambda: NotReady(f"this {service} does not know yet who may do what"))
        self._wall_ms = wall_ms
        self._principals = Principals(AccessPolicy())
        self._rules: dict[Any, Rule] = {}
        self._sessions: dict[ServerSession, asyncio.TimerHandle | None] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def enabled(self) -> bool:
        """Access is on, as far as is known."""
        return self.policy is not None and self.policy.enabled

    # -- the policy ---------------------------------------------------------------------------------

    def take(self, policy: AccessPolicy, *, registered: bool = False) -> None:
        """Decide by ``policy`` from now on, unless a later one is known. ``registered``: whatever was known before,
        this is what the coordinator in charge says.

        Sessions whose principal or key is no more are ended; the others get what they are granted now.
        """
        if self.policy is not None and policy.revision <= self.policy.revision and not registered:
            return
        self.policy, former = policy, self._principals
        self._principals = Principals(policy)
        if self._verifier is not None:
            self._verifier.take(policy)
        self.quotas.take(policy)
        for session in list(self._sessions):
            self._renew(session, former)

    def forget(self) -> None:
        """Whoever told the policy is not in charge any more: serve no client before the next one has told its own."""
        self.policy = None

    def _renew(self, session: ServerSession, former: Principals) -> None:
        assert self.policy is not None
        if session.identity is not None:
            return  # a node's
        if not self.policy.enabled:
            session.caller = UNCHECKED
            return
        caller = self._principals.again(session.caller, former)
        if caller is None:
            self._end(session, "the policy ended what this session was opened with")
        else:
            session.caller = caller
            self._arm(session)

    # -- requests -----------------------------------------------------------------------------------

    async def authenticate(self, request: web.Request) -> Caller:
        """Who asks. Raises BadCredentials (nobody, as far as this cluster knows), NotReady, Unavailable."""
        policy = self.policy
        if policy is not None and not policy.enabled:
            return UNCHECKED
        node = node_identity(request.get_extra_info("peercert"), self.cluster_id)
        if node is not None and self.is_node(node):
            return Caller(node, service=True)
        if policy is None:
            if request.path == SESSION_PATH:
                return NOBODY  # its HELLO is answered with why not, and by whom instead
            raise self._unknown()
        token = _bearer(request)
        if token.startswith(KEY_PREFIX):
            return self._principals.by_key(token, self._wall_ms())
        if self._verifier is None or not policy.issuers:
            raise BadCredentials("the token is no API key, and no issuer of other tokens is configured")
        verified = await self._verifier.verify(token)
        return self._principals.by_token(verified)

    def guard(self, router: web.UrlDispatcher, rules: RouteRules) -> None:
        """Learn the rule of every route. Raises RuleMissing naming those that have none."""
        missing = []
        for route in router.routes():
            path = route.resource.canonical if route.resource is not None else ""
            rule = rules.get((route.method, path))
            if rule is None and route.method == "HEAD":
                rule = rules.get(("GET", path))
            if rule is None:
                missing.append(f"{route.method} {path}")
            else:
                self._rules[route] = rule
        if missing:
            raise RuleMissing(f"{self.service}: no access rule for {', '.join(missing)}")

    def rule_of(self, request: web.Request) -> Rule | None:
        """The rule of the route that was found; None where there is no such route."""
        info = request.match_info
        return self._rules.get(info.route) if info.http_exception is None else None

    def middleware(self) -> Any:
        """Authenticates, applies the rule of the route, and leaves the caller under CALLER."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            info = request.match_info
            if info.http_exception is not None:
                return await handler(request)  # there is no such route
            rule = self._rules.get(info.route)
            if rule is None:
                raise Forbidden(f"{request.method} {request.path[:200]}: no rule allows it")
            if rule is PUBLIC or (rule.who == "metrics" and self.policy is not None and self.policy.open_metrics):
                request[CALLER] = NOBODY
                return await handler(request)
            caller = request[CALLER] = await self.authenticate(request)
            if not caller.service:
                self.quotas.request(caller)  # first: who may not do it pays, too, or could ask without end
                await _apply(rule, request, caller)
            return await handler(request)

        return middleware

    async def admit(self, request: web.Request) -> Caller:
        """Who asks, if they may: for an answer that takes long, in its midst. Raises what the gate refuses with."""
        caller = await self.authenticate(request)
        rule = self.rule_of(request)
        if rule is None:
            raise Forbidden(f"{request.method} {request.path[:200]}: no rule allows it")
        if not caller.service:
            await _apply(rule, request, caller)
        return caller

    # -- sessions -----------------------------------------------------------------------------------

    def opened(self, session: ServerSession) -> None:
        """Watch over a session until `closed`: it ends with what it was opened with."""
        self._sessions[session] = None
        if session.identity is None and session.caller is NOBODY and self.policy is not None:
            self._renew(session, self._principals)  # the policy came between the upgrade and the HELLO
        self._arm(session)

    def closed(self, session: ServerSession) -> None:
        timer = self._sessions.pop(session, None)
        if timer is not None:
            timer.cancel()

    def _arm(self, session: ServerSession) -> None:
        """One timer, at the end of what the session is open with now."""
        timer = self._sessions.get(session)
        if timer is not None:
            timer.cancel()
            self._sessions[session] = None
        expires_ms = session.caller.expires_ms
        if expires_ms and session in self._sessions:
            left_s = min(_LOOK_AGAIN_S, max(0.0, (expires_ms - self._wall_ms()) / 1000))
            self._sessions[session] = asyncio.get_running_loop().call_later(left_s, self._expire, session)

    def _expire(self, session: ServerSession) -> None:
        if session.caller.expires_ms and self._wall_ms() >= session.caller.expires_ms:
            self._end(session, "the token has expired; connect again with a new one")
        else:
            self._arm(session)

    def _end(self, session: ServerSession, reason: str) -> None:
        """Nothing is done for it from now on; what was answered is still written.

        What is unanswered stays so: a refusal would be an error of the request, but what a broken connection left open
        its client asks again, over a session with another token.
        """
        session.fall_silent()
        session.caller = NOBODY
        task = asyncio.get_running_loop().create_task(session.close(WSCloseCode.GOING_AWAY, reason))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        if self._verifier is not None:
            await self._verifier.close()


def _bearer(request: web.Request) -> str:
    """The token that was sent. Raises BadCredentials."""
    given = request.headers.getall("Authorization", [])
    if not given:
        raise BadCredentials("a token is needed: Authorization: Bearer TOKEN")
    scheme, _, token = given[0].partition(" ")
    if len(given) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise BadCredentials("expected one header Authorization: Bearer TOKEN")
    return token.strip()


async def _apply(rule: Rule, request: web.Request, caller: Caller) -> None:
    """Raises Forbidden unless all is granted that the rule needs, but for what the handler decides one by one."""
    if rule is NODE:
        raise Forbidden(f"{caller.name} is no node of this cluster", principal=caller.name)
    for need in rule.needs:
        if need.source != ENTRY:
            caller.check(need.action, need.resource, await _named(need, request))


async def _named(need: Need, request: web.Request) -> str:
    if need.source == PATH:
        return request.match_info[need.resource]
    if need.source == BODY:
        body = await read_json(request)
        name = body.get("name") if isinstance(body, Mapping) else None
        if not isinstance(name, str):
            raise InvalidArgument("name: expected text", field="name")
        return name
    return "*"
