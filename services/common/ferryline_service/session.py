"""Sessions, the server's side: one WebSocket each at ``GET /v1/session``, frames in, frames out.

    endpoint = SessionEndpoint(server="broker", cluster_id=..., on_frame=handler, metrics=metrics)
    app.router.add_routes(endpoint.routes())

A handler gets every frame after the HELLO: ``on_frame(session, frame)``. It answers with `ServerSession.answer` or
`fail`, now or later, in any order; what it raises becomes an error answer. A handler that returns a coroutine gets a
task of its own; a plain function is the fast path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import WSCloseCode, WSMsgType, web

from ferryline.protocol.errors import (
    ClusterMismatch,
    FerrylineError,
    Forbidden,
    MalformedRequest,
    RequestTimedOut,
    ShuttingDown,
    Throttled,
    UnsupportedVersion,
)
from ferryline.protocol.frames import (
    FLAG_ANSWER,
    Frame,
    Kind,
    decode_frame,
    decode_header,
    encode_error,
    encode_frame,
)
from ferryline.protocol.limits import FRAME_BYTES_MAX
from ferryline.protocol.messages import PROTOCOL_MAX, PROTOCOL_MIN, ROLE_BROKER, Hello, HelloOk
from ferryline_service.access.caller import UNCHECKED
from ferryline_service.access.gate import CALLER, Gate
from ferryline_service.metrics import ServiceMetrics
from ferryline_service.receiver import Receiver
from ferryline_service.server_session import ServerSession
from ferryline_service.tls import identity_broker_id, node_identity
from ferryline_service.websocket_bytes import Buffer, websocket_prefix

__all__ = ["Buffer", "OnFrame", "ServerSession", "SessionEndpoint", "common_version", "websocket_prefix"]

OnFrame = Callable[[ServerSession, Frame], Awaitable[None] | None]
OnRefused = Callable[[ServerSession, int, FerrylineError], None]  # a frame of this kind, or an entry of one
OnChanged = Callable[[ServerSession, str, str, str, str, dict[str, Any]], None]  # action, resource, name, code, details
HELLO_TIMEOUT_S = 10.0
PING_S = 10.0  # a peer that does not answer a ping within half of this is gone
OUT_BYTES_MAX = 128 * 1024 * 1024  # a peer that asks for more than this and does not read it is cut off
SESSIONS_MAX = 10_000


def common_version(ours: tuple[int, int], theirs: tuple[int, int]) -> int:
    """Highest version that both sides speak. Raises UnsupportedVersion, naming both ranges."""
    low, high = max(ours[0], theirs[0]), min(ours[1], theirs[1])
    if low > high:
        raise UnsupportedVersion(
            f"no common protocol version: this side speaks {ours[0]}..{ours[1]}, the peer {theirs[0]}..{theirs[1]}",
            ours=list(ours),
            theirs=list(theirs),
        )
    return high


class SessionEndpoint:
    """Accepts sessions at ``GET /v1/session``, checks their HELLO and owns them until they end.

    ``cluster_id`` and ``broker_id`` may be set later (a broker learns its own at registration). ``trust_hello`` takes
    the role from the HELLO without a certificate: only for plain HTTP on loopback in tests.
    """

    def __init__(
        self,
        *,
        server: str,
        cluster_id: str,
        on_frame: OnFrame,
        metrics: ServiceMetrics,
        on_open: Callable[[ServerSession], None] | None = None,
        admit: Callable[[], None] | None = None,
        gate: Gate | None = None,
        broker_id: int = 0,
        versions: tuple[int, int] = (PROTOCOL_MIN, PROTOCOL_MAX),
        trust_hello: bool = False,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
        out_bytes_max: int = OUT_BYTES_MAX,
        sessions_max: int = SESSIONS_MAX,
    ) -> None:
        self.server = server
        self.cluster_id = cluster_id
        self.broker_id = broker_id
        self.on_frame = on_frame
        self.on_open = on_open
        self.admit = admit  # raises what every HELLO is refused with
        self.gate = gate or Gate(server, cluster_id)  # without one nobody is asked who they are
        self.on_refused: OnRefused | None = None
        self.on_changed: OnChanged | None = None
        self.metrics = metrics
        self.out_bytes_max = out_bytes_max
        self.sessions: set[ServerSession] = set()
        self._versions = versions
        self._trust_hello = trust_hello
        self._hello_timeout_s = hello_timeout_s
        self._sessions_max = sessions_max
        self._pending = 0
        self._closing = False

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/session", self.handle)]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if self._closing:
            raise ShuttingDown("this service is stopping")
        if len(self.sessions) + self._pending >= self._sessions_max and not self._is_node(request):
            raise Throttled(f"{self._sessions_max} sessions are open")  # clients cannot crowd out the nodes
        caller, quotas = request.get(CALLER, UNCHECKED), self.gate.quotas
        quotas.opened(caller)
        try:
            return await self._accept(request)
        finally:
            quotas.closed(caller)

    async def _accept(self, request: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse(compress=False, max_msg_size=FRAME_BYTES_MAX, heartbeat=PING_S, timeout=2.0)
        if not ws.can_prepare(request).ok:
            raise MalformedRequest("this address takes WebSocket upgrades only")
        self._pending += 1
        try:
            receiver = Receiver(_transport(request), ws, size_max=FRAME_BYTES_MAX - 1, server=True)
            await ws.prepare(request)
            receiver.upgraded()
            session = await self._greet(request, ws, receiver)
        finally:
            self._pending -= 1
        if session is not None:
            await self._serve(session)
        return ws

    async def _serve(self, session: ServerSession) -> None:
        self.sessions.add(session)
        self.metrics.sessions.set(len(self.sessions))
        try:
            self.gate.opened(session)
            if self.on_open is not None:
                self.on_open(session)
            session._begin()
            await session._read()
        finally:
            self.sessions.discard(session)
            self.metrics.sessions.set(len(self.sessions))
            self.gate.closed(session)
            session._finish()

    async def _greet(self, request: web.Request, ws: web.WebSocketResponse, receiver: Receiver) -> ServerSession | None:
        """Read and answer the HELLO. A bad one gets its error and the session ends."""
        kind, correlation = int(Kind.HELLO), 0
        try:
            message = await self._first(ws)
            if message is None:
                return None
            frame = decode_frame(message)
            kind, correlation = frame.kind, frame.correlation
            if kind != Kind.HELLO:
                raise MalformedRequest(f"the first frame of a session is HELLO, not kind {kind}")
            if self.admit is not None:
                self.admit()
            hello = decode_header(frame.header, Hello)
            version = common_version(self._versions, (hello.version_min, hello.version_max))
            if hello.cluster_id and self.cluster_id and hello.cluster_id != self.cluster_id:
                raise ClusterMismatch(f"this is cluster {self.cluster_id}, you look for {hello.cluster_id[:64]}")
            identity = self._identity(request, hello)
        except FerrylineError as error:
            self.metrics.error(error.code)
            await ws.send_bytes(encode_error(kind, correlation, error))
            await ws.close(code=WSCloseCode.POLICY_VIOLATION, message=error.code.encode())
            return None
        session = ServerSession(self, request, ws, hello, receiver)
        session.identity, session.version = identity, version
        session.send(
            encode_frame(
                Kind.HELLO,
                correlation,
                HelloOk(version, self.cluster_id, self.server, self.broker_id),
                flags=FLAG_ANSWER,
            )
        )
        return session

    async def _first(self, ws: web.WebSocketResponse) -> bytes | None:
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                message = await ws.receive()
        except TimeoutError:
            raise RequestTimedOut(f"no HELLO within {self._hello_timeout_s:g} s") from None
        if message.type is WSMsgType.BINARY:
            return cast(bytes, message.data)
        if message.type is WSMsgType.TEXT:
            raise MalformedRequest("a session carries binary messages, not text")
        return None

    def _is_node(self, request: web.Request) -> bool:
        return node_identity(request.get_extra_info("peercert"), self.cluster_id) is not None

    def _identity(self, request: web.Request, hello: Hello) -> str | None:
        identity = node_identity(request.get_extra_info("peercert"), self.cluster_id)
        if not request.get(CALLER, UNCHECKED).service:
            identity = None  # of a broker that was forgotten: whoever holds it came in by a token, like any client
        if self._trust_hello and identity is None and hello.role == ROLE_BROKER:
            identity = f"broker-{hello.broker_id}"
        if hello.role == ROLE_BROKER and (not hello.broker_id or identity_broker_id(identity) != hello.broker_id):
            raise Forbidden(f"role broker needs the certificate of broker {hello.broker_id}; yours names {identity}")
        return identity

    async def close(self) -> None:
        """Refuse new sessions and end the open ones: call it in on_shutdown, or stopping waits for every read loop."""
        self._closing = True
        if self.sessions:
            ending = [session.close(WSCloseCode.GOING_AWAY, "stopping") for session in list(self.sessions)]
            await asyncio.wait([asyncio.ensure_future(closing) for closing in ending], timeout=2.0)


def _transport(request: web.Request) -> asyncio.Transport:
    """What the session stands on. Raises ConnectionResetError: whoever asked for it went before it was made."""
    transport = request.transport
    if transport is None or transport.get_protocol() is None:  # TLS forgets the protocol before aiohttp the transport
        raise ConnectionResetError("the connection of the session has ended")
    return transport
