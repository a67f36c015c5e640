"""The server's side of a session: one WebSocket, frames in, frames out.

    endpoint = SessionEndpoint(server="broker", cluster_id=..., on_frame=handler, metrics=metrics)
    app.router.add_routes(endpoint.routes())

A handler gets every frame after the HELLO: ``on_frame(session, frame)``. It answers with `ServerSession.answer` or
`fail`, now or later, in any order; what it raises becomes an error answer. A handler that returns a coroutine gets a
task of its own; a plain function is the fast path.

Outbound bytes are collected until the loop comes round, then written at once: a hundred small answers cost one TLS
record and one system call. aiohttp's writer would pay both for each frame, so this module writes the WebSocket frames
(unmasked, RFC 6455 section 5.2) itself; pings and the closing handshake stay with aiohttp, which writes whole frames
too.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from ferryline.protocol.errors import (
    ClusterMismatch,
    FerrylineError,
    Forbidden,
    InternalError,
    MalformedRequest,
    RequestTimedOut,
    ShuttingDown,
    Throttled,
    UnsupportedVersion,
)
from ferryline.protocol.frames import (
    FLAG_ANSWER,
    FLAG_MORE,
    PREFIX,
    Frame,
    Kind,
    decode_frame,
    decode_header,
    encode_error,
    encode_frame,
    encode_value,
)
from ferryline.protocol.limits import FRAME_BYTES_MAX
from ferryline.protocol.messages import PROTOCOL_MAX, PROTOCOL_MIN, ROLE_BROKER, Hello, HelloOk
from ferryline_service.logs import get_logger
from ferryline_service.metrics import ServiceMetrics
from ferryline_service.tls import identity_broker_id, node_identity

Buffer = bytes | bytearray | memoryview
OnFrame = Callable[["ServerSession", Frame], Awaitable[None] | None]

HELLO_TIMEOUT_S = 10.0
PING_S = 10.0  # a peer that does not answer a ping within half of this is gone
WRITE_HIGH_BYTES = 2 * 1024 * 1024  # above this the transport holds us back; below it a frame never waits
OUT_BYTES_MAX = 128 * 1024 * 1024  # a peer that asks for more than this and does not read it is cut off
HOLD_S = 2.0  # longest pause in reading from a peer; well below PING_S / 2
TASKS_MAX = 10_000  # unfinished coroutine handlers of one session
SESSIONS_MAX = 10_000
_JOIN_BYTES_MAX = 64 * 1024  # copying less than this is cheaper than a TLS record of its own

_SHORT = struct.Struct("!BB").pack
_MEDIUM = struct.Struct("!BBH").pack
_LONG = struct.Struct("!BBQ").pack
_BINARY = 0x82  # FIN + binary
_log = get_logger()


def websocket_prefix(size: int) -> bytes:
    """Head of an unmasked binary WebSocket frame that carries ``size`` bytes."""
    if size < 126:
        return _SHORT(_BINARY, size)
    if size < 65536:
        return _MEDIUM(_BINARY, 126, size)
    return _LONG(_BINARY, 127, size)


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


class ServerSession:
    """One open session. Created by the endpoint after a good HELLO; used from the loop's thread only.

    ``role``/``broker_id``: "client"/0, or "broker" with the id that the peer's certificate proves. ``identity`` is the
    role of the certificate even when the peer said it is a client. ``state`` belongs to the handler.
    """

    def __init__(
        self, endpoint: SessionEndpoint, request: web.Request, ws: web.WebSocketResponse, hello: Hello
    ) -> None:
        self.role = hello.role
        self.broker_id = hello.broker_id if hello.role == ROLE_BROKER else 0
        self.hello = hello
        self.identity: str | None = None
        self.remote = request.remote or ""
        self.version = 0
        self.state: Any = None
        self.closed = False
        self.close_callbacks: list[Callable[[ServerSession], None]] = []
        self._endpoint = endpoint
        self._ws = ws
        self._protocol = request.protocol
        self._transport = cast(asyncio.Transport, request.transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._loop = asyncio.get_running_loop()
        self._out: list[Buffer] = []
        self._out_bytes = 0
        self._flush_due = False
        self._draining: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._hold: asyncio.Future[None] | None = None

    # -- sending ------------------------------------------------------------------------------------

    def send(self, frame: bytes, parts: Sequence[Buffer] = ()) -> None:
        """Queue one frame: ``frame`` is prefix and header (and payload, or the payload is ``parts``). Never blocks.

        The buffers must not change until written. After the session closed, nothing happens.
        """
        if self.closed:
            return
        size = len(frame)
        if parts:
            for part in parts:
                size += len(part)
            self._out.append(websocket_prefix(size) + frame)
            self._out.extend(parts)
        else:
            self._out.append(websocket_prefix(size))
            self._out.append(frame)
        self._out_bytes += size
        if not self._flush_due:
            self._flush_due = True
            if self._draining is None:
                self._loop.call_soon(self._flush)
        if self._out_bytes > self._endpoint.out_bytes_max:
            self.abort(f"the peer left {self._out_bytes} bytes unread")

    def answer(
        self, kind: int, correlation: int, header: Any, parts: Sequence[Buffer] = (), *, more: bool = False
    ) -> None:
        """Answer a request. ``more``: further answers to it follow."""
        encoded = encode_value(header)
        flags = FLAG_ANSWER | FLAG_MORE if more else FLAG_ANSWER
        self.send(PREFIX.pack(kind, flags, 0, correlation, len(encoded)) + encoded, parts)

    def tell(self, kind: int, header: Any, parts: Sequence[Buffer] = ()) -> None:
        """Send a frame that has no answer."""
        encoded = encode_value(header)
        self.send(PREFIX.pack(kind, 0, 0, 0, len(encoded)) + encoded, parts)

    def fail(self, kind: int, correlation: int, error: FerrylineError) -> None:
        """Answer a request with an error."""
        self._endpoint.metrics.error(error.code)
        self.send(encode_error(kind, correlation, error))

    @property
    def writable(self) -> bool:
        """False while the peer reads more slowly than we write: hold large answers back, or wait with `drained`."""
        return self._draining is None

    async def drained(self) -> None:
        """Return once the peer has caught up, or the session closed."""
        if self._draining is not None:
            await asyncio.wait([self._draining])

    def flush(self) -> None:
        """Write what is queued now instead of when the loop comes round; for whoever has collected answers himself."""
        if self._out and self._draining is None:
            self._flush()

    def _flush(self) -> None:
        self._flush_due = False
        out = self._out
        if not out or self.closed or self._draining is not None:
            return
        self._out = []
        if self._out_bytes <= _JOIN_BYTES_MAX:
            self._transport.write(b"".join(out))
        else:
            self._transport.writelines(_coalesced(out))
        self._out_bytes = 0
        if self._protocol.writing_paused:
            self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._protocol._drain_helper()  # aiohttp offers no public wait for a raw transport
        except (OSError, RuntimeError):
            return  # connection lost: the read loop ends the session
        finally:
            self._draining = None
        if self._out:
            self._flush()
        else:
            self._flush_due = False

    # -- holding the peer back ----------------------------------------------------------------------

    @property
    def held(self) -> bool:
        """Is reading on hold?"""
        return self._hold is not None

    def hold_reading(self, limit_s: float = HOLD_S) -> None:
        """Handle no further frame until `resume_reading`, or for ``limit_s``: the peer's sends then wait in TCP.

        Bounded, because pongs are not read either and a peer that looks dead would be cut off.
        """
        if self._hold is None and not self.closed:
            self._hold = self._loop.create_future()
            self._loop.call_later(limit_s, self._resume, self._hold)

    def resume_reading(self) -> None:
        if self._hold is not None:
            self._resume(self._hold)

    def _resume(self, hold: asyncio.Future[None]) -> None:
        if not hold.done():
            hold.set_result(None)
        if self._hold is hold:
            self._hold = None

    # -- closing ------------------------------------------------------------------------------------

    async def close(self, code: int = WSCloseCode.OK, reason: str = "") -> None:
        """Write what is queued, then end the session."""
        if not self.closed:
            self._flush()
        await self._ws.close(code=code, message=reason.encode()[:120])

    def abort(self, reason: str) -> None:
        """End the session at once, dropping what is queued."""
        if self.closed:
            return
        _log.warning("session aborted", peer=self.peer, reason=reason)
        self._out, self._out_bytes = [], 0
        self._transport.abort()
        self._finish()

    @property
    def peer(self) -> str:
        name = f"broker-{self.broker_id}" if self.broker_id else (self.hello.client or "client")
        return f"{name}@{self.remote}"

    def _finish(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.resume_reading()
        for task in list(self._tasks):
            task.cancel()
        callbacks, self.close_callbacks = self.close_callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                _log.exception("close callback failed", peer=self.peer)

    # -- receiving ----------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Hand frames to the handler until the session ends, however it ends."""
        ws, on_frame, counts = self._ws, self._endpoint.on_frame, self._endpoint.metrics.frames
        binary = WSMsgType.BINARY
        while not self.closed:
            if self._hold is not None:
                await self._hold
            message = await ws.receive()
            if message.type is not binary:
                if await self._odd(message):
                    return
                continue
            data = message.data
            try:
                frame = decode_frame(data)
            except MalformedRequest as error:
                self._refuse_structure(data, error)
                await self.close(WSCloseCode.PROTOCOL_ERROR, error.message)
                return
            counts[frame.kind] += 1
            try:
                result = on_frame(self, frame)
            except FerrylineError as error:
                self.fail(frame.kind, frame.correlation, error)
                continue
            except Exception as error:
                self._unexpected(frame, error)
                continue
            if result is not None:
                self._own(frame, result)

    async def _odd(self, message: WSMessage) -> bool:
        """A message that is no frame. Returns whether the session is over."""
        if message.type is WSMsgType.TEXT:
            self.fail(0, 0, MalformedRequest("a session carries binary messages, not text"))
            await self.close(WSCloseCode.UNSUPPORTED_DATA, "binary only")
            return True
        # close, error (also a message over the limit: aiohttp has answered 1009), closed
        return message.type not in (WSMsgType.PING, WSMsgType.PONG)

    def _refuse_structure(self, data: bytes, error: MalformedRequest) -> None:
        kind, correlation = 0, 0
        if len(data) >= PREFIX.size:
            kind, _, _, correlation, _ = PREFIX.unpack_from(data)
        self.fail(kind, correlation, error)

    def _unexpected(self, frame: Frame, error: BaseException) -> None:
        _log.error("frame handler failed", peer=self.peer, kind=frame.kind, exc_info=error)
        self.fail(frame.kind, frame.correlation, InternalError(f"{type(error).__name__}; see the service's log"))

    def _own(self, frame: Frame, result: Awaitable[None]) -> None:
        if len(self._tasks) >= TASKS_MAX:
            if asyncio.iscoroutine(result):
                result.close()
            self.fail(frame.kind, frame.correlation, Throttled(f"more than {TASKS_MAX} requests are unanswered"))
            return
        task = self._loop.create_task(self._await(frame, result))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _await(self, frame: Frame, result: Awaitable[None]) -> None:
        try:
            await result
        except FerrylineError as error:
            self.fail(frame.kind, frame.correlation, error)
        except Exception as error:
            self._unexpected(frame, error)


def _coalesced(buffers: list[Buffer]) -> list[Buffer]:
    """Join runs of small buffers and leave large ones as they are: each element becomes a TLS write of its own."""
    joined: list[Buffer] = []
    run: list[Buffer] = []
    size = 0
    for buffer in buffers:
        if len(buffer) > _JOIN_BYTES_MAX // 4:
            if run:
                joined.append(b"".join(run))
                run, size = [], 0
            joined.append(buffer)
            continue
        run.append(buffer)
        size += len(buffer)
        if size > _JOIN_BYTES_MAX:
            joined.append(b"".join(run))
            run, size = [], 0
    if run:
        joined.append(b"".join(run))
    return joined


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
        if len(self.sessions) + self._pending >= self._sessions_max:
            raise Throttled(f"{self._sessions_max} sessions are open")
        ws = web.WebSocketResponse(compress=False, max_msg_size=FRAME_BYTES_MAX, heartbeat=PING_S, timeout=2.0)
        if not ws.can_prepare(request).ok:
            raise MalformedRequest("this address takes WebSocket upgrades only")
        self._pending += 1
        try:
            await ws.prepare(request)
            session = await self._greet(request, ws)
        finally:
            self._pending -= 1
        if session is not None:
            await self._serve(session)
        return ws

    async def _serve(self, session: ServerSession) -> None:
        self.sessions.add(session)
        self.metrics.sessions.set(len(self.sessions))
        try:
            if self.on_open is not None:
                self.on_open(session)
            await session._read()
        finally:
            self.sessions.discard(session)
            self.metrics.sessions.set(len(self.sessions))
            session._finish()

    async def _greet(self, request: web.Request, ws: web.WebSocketResponse) -> ServerSession | None:
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
        session = ServerSession(self, request, ws, hello)
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

    def _identity(self, request: web.Request, hello: Hello) -> str | None:
        identity = node_identity(request.get_extra_info("peercert"), self.cluster_id)
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
