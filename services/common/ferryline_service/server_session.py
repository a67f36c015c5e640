"""One open session, as its server sees it: frames in, frames out.

Outbound bytes are collected until the loop comes round, then written at once: a hundred small answers cost one TLS
record and one system call. aiohttp's writer would pay both for each frame, so this module writes the WebSocket frames
(unmasked, RFC 6455 section 5.2) itself; pings and the closing handshake stay with aiohttp, which writes whole frames
too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from ferryline.protocol.errors import (
    FerrylineError,
    InternalError,
    MalformedRequest,
    QuotaExceeded,
    Throttled,
    Unauthorized,
)
from ferryline.protocol.frames import (
    FLAG_ANSWER,
    FLAG_MORE,
    PREFIX,
    Frame,
    decode_frame,
    encode_error,
    encode_value,
)
from ferryline.protocol.messages import ROLE_BROKER, Hello
from ferryline_service.access.caller import UNCHECKED
from ferryline_service.access.gate import CALLER
from ferryline_service.logs import get_logger
from ferryline_service.receiver import Receiver
from ferryline_service.websocket_bytes import JOIN_BYTES_MAX, Buffer, coalesced, websocket_prefix

if TYPE_CHECKING:
    from ferryline_service.session import SessionEndpoint

WRITE_HIGH_BYTES = 2 * 1024 * 1024  # above this the transport holds us back; below it a frame never waits
HOLD_S = 2.0  # longest pause in reading from a peer; well below half of PING_S
TASKS_MAX = 10_000  # unfinished coroutine handlers of one session
_log = get_logger()


class ServerSession:
    """One open session. Created by the endpoint after a good HELLO; used from the loop's thread only.

    ``role``/``broker_id``: "client"/0, or "broker" with the id that the peer's certificate proves. ``identity`` is the
    role of the certificate even when the peer said it is a client. ``caller``: whoever opened it and what they may do
    now; the gate replaces it. ``state`` belongs to the handler.
    """

    def __init__(
        self,
        endpoint: SessionEndpoint,
        request: web.Request,
        ws: web.WebSocketResponse,
        hello: Hello,
        receiver: Receiver,
    ) -> None:
        self.role = hello.role
        self.broker_id = hello.broker_id if hello.role == ROLE_BROKER else 0
        self.hello = hello
        self.identity: str | None = None
        self.caller = request.get(CALLER, UNCHECKED)
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
        self._receiver = receiver
        self._held_back: deque[bytes | bytearray] = deque()  # came in one piece with what put reading on hold
        self._silent = False  # at the latest when it is closed
        self._refused = False  # `_read` ends the session for a frame that makes no sense

    # -- sending ------------------------------------------------------------------------------------

    def send(self, frame: bytes, parts: Sequence[Buffer] = ()) -> None:
        """Queue one frame: ``frame`` is prefix and header (and payload, or the payload is ``parts``). Never blocks.

        The buffers must not change until written. After the session closed, nothing happens.
        """
        if self._silent:
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

    def note_refused(self, kind: int, error: FerrylineError) -> None:
        """The caller was refused something in a frame of this kind. Frames that are refused whole are noted here."""
        if self._endpoint.on_refused is not None:
            self._endpoint.on_refused(self, kind, error)

    def note_changed(self, action: str, resource: str, name: str, code: str, **details: Any) -> None:
        """The caller changed something by a frame, or failed to, with ``code``."""
        if self._endpoint.on_changed is not None:
            self._endpoint.on_changed(self, action, resource, name, code, details)

    def fail(self, kind: int, correlation: int, error: FerrylineError) -> None:
        """Answer a request with an error."""
        self._endpoint.metrics.error(error.code)
        self.send(encode_error(kind, correlation, error))

    @property
    def writable(self) -> bool:
        """False while the peer reads more slowly than we write: hold large answers back, or wait with `drained`."""
        return self._draining is None

    @property
    def queued_bytes(self) -> int:
        """Collected and not yet handed to the transport."""
        return self._out_bytes

    @property
    def unsent_bytes(self) -> int:
        """Everything that the kernel has not taken yet."""
        if self.closed or self._transport.is_closing():
            return 0  # a transport that was closed may not even be asked
        return self._out_bytes + self._transport.get_write_buffer_size()

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
        if self._transport.is_closing():  # the read loop will notice; a closed TLS transport cannot even be written to
            self._out, self._out_bytes = [], 0
            return
        self._out = []
        if self._out_bytes <= JOIN_BYTES_MAX:
            self._transport.write(b"".join(out))
        else:
            self._transport.writelines(coalesced(out))
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
            if self._receiver.direct and not self._transport.is_closing():
                self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._hold is not None:
            self._resume(self._hold)

    def _resume(self, hold: asyncio.Future[None]) -> None:
        if self._hold is hold:
            self._hold = None
            if self._receiver.direct:
                self._loop.call_soon(self._go_on)
        if not hold.done():
            hold.set_result(None)

    def _go_on(self) -> None:
        """Handle what was held back, then read again."""
        while self._held_back and self._hold is None and not self.closed:
            self._take(self._held_back.popleft())
        if self._hold is None and not self._transport.is_closing() and not self._protocol._reading_paused:
            self._transport.resume_reading()

    # -- closing ------------------------------------------------------------------------------------

    def fall_silent(self) -> None:
        """Take and answer nothing more: for the peer it is as if the connection had broken now. What was answered is
        still written."""
        self.flush()
        self._silent = self._refused = True

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
        self.closed = self._silent = True
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

    def _begin(self) -> None:
        self._receiver.begin(self._arrived)

    def _arrived(self, data: bytes | bytearray) -> None:
        """A binary message, in the pass of the loop in which it was read."""
        if self._hold is not None or self._held_back:
            self._held_back.append(data)
        elif not self.closed:
            self._take(data)

    def _take(self, data: bytes | bytearray) -> None:
        """Hand a frame to the handler. One that makes no sense is left to `_read`, and none is taken after it."""
        if self._refused:
            return
        try:
            frame = decode_frame(data)
        except MalformedRequest:
            self._refused = True
            self._receiver.queue(data)
        else:
            self._handle(frame)

    def _handle(self, frame: Frame) -> None:
        self._endpoint.metrics.frames[frame.kind] += 1
        try:
            if self.caller.limited:
                self._endpoint.gate.quotas.request(self.caller)
            result = self._endpoint.on_frame(self, frame)
        except FerrylineError as error:
            if isinstance(error, Unauthorized | QuotaExceeded):
                self.note_refused(frame.kind, error)
            self.fail(frame.kind, frame.correlation, error)
        except Exception as error:
            self._unexpected(frame, error)
        else:
            if result is not None:
                self._own(frame, result)

    async def _read(self) -> None:
        """Take what is no plain binary message, until the session ends, however it ends."""
        ws, binary = self._ws, WSMsgType.BINARY
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
            if not self._silent:
                self._handle(frame)

    async def _odd(self, message: WSMessage) -> bool:
        """A message that is no frame. Returns whether the session is over."""
        if message.type is WSMsgType.TEXT:
            self.fail(0, 0, MalformedRequest("a session carries binary messages, not text"))
            await self.close(WSCloseCode.UNSUPPORTED_DATA, "binary only")
            return True
        # close, error (also a message over the limit: aiohttp has answered 1009), closed
        return message.type not in (WSMsgType.PING, WSMsgType.PONG)

    def _refuse_structure(self, data: bytes | bytearray, error: MalformedRequest) -> None:
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
