"""The client's side of a session between nodes: broker to coordinator, broker to broker.

    connection = await NodeConnection.connect(http, url, hello=Hello(role="broker", ...), tls=files.client,
                                              expect="coordinator", on_frame=..., on_close=...)
    answer = await connection.request(Kind.HEARTBEAT, header, timeout_s=2.0)

It connects once; connecting again after `on_close` is the caller's decision.

Frames are written as they are sent, without a task in between: a fetch of a secondary is on the path of every
acknowledgement. The frame is built here with a mask of zeros. Masks protect proxies from scripts in browsers (RFC 6455,
10.3); between two nodes inside TLS there is neither, and zeros spare a pass over the bytes.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import aiohttp
from aiohttp import WSMsgType

from ferryline.protocol.errors import (
    ConnectionFailed,
    ConnectionLost,
    ErrorInfo,
    FerrylineError,
    MalformedRequest,
    RequestTimedOut,
    from_info,
)
from ferryline.protocol.frames import (
    Frame,
    Kind,
    decode_frame,
    decode_header,
    encode_frame,
    encode_frame_parts,
    masked_prefix,
)
from ferryline.protocol.limits import FRAME_BYTES_MAX
from ferryline.protocol.messages import Hello, HelloOk
from ferryline_service.logs import get_logger
from ferryline_service.receiver import Receiver
from ferryline_service.session import PING_S, Buffer
from ferryline_service.tls import node_identity

T = TypeVar("T")
CONNECT_TIMEOUT_S = 5.0
OUT_BYTES_MAX = 64 * 1024 * 1024  # queued and unsent; above it the peer is taken for dead
_CORRELATION_MAX = 2**32 - 1
_log = get_logger()


def raise_error(frame: Frame) -> None:
    """Raise the error that an answer carries, if it carries one."""
    if frame.is_error:
        raise from_info(decode_header(frame.header, ErrorInfo))


class NodeConnection:
    """An open session to another node. Every request ends in an answer, an error of the peer, RequestTimedOut or
    ConnectionLost; frames that answer nothing go to ``on_frame``; ``on_close`` is called exactly once.
    """

    def __init__(self, ws: aiohttp.ClientWebSocketResponse, url: str, hello: HelloOk, identity: str | None) -> None:
        self.url = url
        self.server = hello
        self.identity = identity
        self.closed = False
        self.on_frame: Callable[[NodeConnection, Frame], None] | None = None
        self.on_close: Callable[[NodeConnection], None] | None = None
        self._ws = ws
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, asyncio.Future[Frame]] = {}
        self._correlation = 0
        self._transport = ws._writer.transport  # aiohttp has no public way to it
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def connect(
        cls,
        http: aiohttp.ClientSession,
        url: str,
        *,
        hello: Hello,
        tls: ssl.SSLContext | None,
        expect: str | None = None,
        on_frame: Callable[[NodeConnection, Frame], None] | None = None,
        on_close: Callable[[NodeConnection], None] | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> NodeConnection:
        """Open a session and exchange HELLOs.

        ``expect``: role that the peer's certificate must prove ("coordinator", "broker-3"); it is checked against the
        cluster of ``hello`` when ``tls`` is given. Raises ConnectionFailed, or the peer's refusal.
        """
        try:
            async with asyncio.timeout(timeout_s):
                ws = await http.ws_connect(
                    f"{url.rstrip('/')}/v1/session",
                    ssl=tls if tls is not None else True,
                    compress=0,
                    max_msg_size=FRAME_BYTES_MAX,
                    heartbeat=PING_S,
                )
                receiver = Receiver(ws._writer.transport, ws, size_max=FRAME_BYTES_MAX - 1, server=False)
                try:
                    identity = node_identity(ws.get_extra_info("peercert"), hello.cluster_id)
                    if expect is not None and tls is not None and identity != expect:
                        raise ConnectionFailed(f"{url}: expected {expect}, its certificate names {identity}")
                    frame = encode_frame(Kind.HELLO, 0, hello)
                    # Not by aiohttp, under a mask of its own: the other side's receiver would leave that, and all that
                    # follows, to aiohttp, and each frame of a secondary would wait there for a task to wake up.
                    transport = ws._writer.transport
                    if transport.is_closing():
                        raise ConnectionResetError("it ended before the HELLO")
                    transport.write(masked_prefix(len(frame)) + frame)
                    greeting = decode_header(await _hello_answer(ws, url), HelloOk)
                except BaseException:
                    await ws.close()
                    raise
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ConnectionFailed(f"{url}: {type(error).__name__}: {str(error)[:200]}") from None
        connection = cls(ws, url, greeting, identity)
        connection.on_frame, connection.on_close = on_frame, on_close
        connection._tasks = [connection._loop.create_task(connection._read())]
        receiver.begin(connection._message)
        return connection

    # -- sending ------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """Write a whole frame. Never blocks; frames leave in this order. After the end, nothing happens."""
        if self.closed or self._transport.is_closing():
            return
        self._transport.write(masked_prefix(len(frame)) + frame)
        if self._transport.get_write_buffer_size() > OUT_BYTES_MAX:
            _log.warning("peer does not read", url=self.url)
            self.abort()

    def tell(self, kind: int, header: Any, parts: Sequence[Buffer] = ()) -> None:
        """Send a frame that has no answer."""
        self.send(encode_frame_parts(kind, 0, header, list(parts)))

    async def request(self, kind: int, header: Any, parts: Sequence[Buffer] = (), *, timeout_s: float) -> Frame:
        """Send a request and return its answer. Raises the error it carries, RequestTimedOut or ConnectionLost."""
        if self.closed:
            raise ConnectionLost(f"{self.url}: the session has ended")
        self._correlation = correlation = self._correlation % _CORRELATION_MAX + 1
        answer: asyncio.Future[Frame] = self._loop.create_future()
        self._pending[correlation] = answer
        self.send(encode_frame_parts(kind, correlation, header, list(parts)))
        timer = self._loop.call_later(timeout_s, self._expire, correlation, kind)
        try:
            frame = await answer
        finally:
            timer.cancel()
            self._pending.pop(correlation, None)
        raise_error(frame)
        return frame

    async def call(self, kind: int, header: Any, answer: type[T], *, timeout_s: float) -> T:
        """`request`, with the header of the answer decoded."""
        frame = await self.request(kind, header, timeout_s=timeout_s)
        return decode_header(frame.header, answer)

    async def close(self) -> None:
        """End the session and wait until it has ended."""
        self._end()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def abort(self) -> None:
        """End the session at once, dropping what is not written."""
        self._transport.abort()
        self._end()

    # -- inside -------------------------------------------------------------------------------------

    def _expire(self, correlation: int, kind: int) -> None:
        answer = self._pending.pop(correlation, None)
        if answer is not None and not answer.done():
            answer.set_exception(RequestTimedOut(f"{self.url}: no answer to kind {kind} in time"))

    def _message(self, data: bytes | bytearray) -> None:
        """A binary message, in the pass of the loop in which it was read."""
        if self.closed:
            return
        try:
            self._arrived(decode_frame(data))
        except MalformedRequest as error:
            _log.warning("malformed frame from a node", url=self.url, error=str(error))
            self._end()
        except Exception:
            _log.exception("session to a node failed", url=self.url)
            self._end()

    async def _read(self) -> None:
        """What is no plain binary message, and the end."""
        try:
            while not self.closed:
                message = await self._ws.receive()
                if message.type is not WSMsgType.BINARY:
                    break
                self._arrived(decode_frame(message.data))
        except MalformedRequest as error:
            _log.warning("malformed frame from a node", url=self.url, error=str(error))
        except (OSError, aiohttp.ClientError) as error:  # a pong to a ping that came just before the connection broke
            _log.info("session to a node broke", url=self.url, error=str(error))
        except Exception:
            _log.exception("session to a node failed", url=self.url)
        finally:
            self._end()

    def _arrived(self, frame: Frame) -> None:
        if frame.is_answer and frame.correlation:
            answer = self._pending.pop(frame.correlation, None)
            if answer is not None and not answer.done():
                answer.set_result(frame)
        elif self.on_frame is not None:
            try:
                self.on_frame(self, frame)
            except FerrylineError as error:
                _log.warning("frame from a node refused", url=self.url, kind=frame.kind, error=str(error))

    def _end(self) -> None:
        if self.closed:
            return
        self.closed = True
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            if not answer.done():
                answer.set_exception(ConnectionLost(f"{self.url}: the session ended before the answer"))
        self._tasks.append(self._loop.create_task(self._close_socket()))
        if self.on_close is not None:
            self.on_close(self)

    async def _close_socket(self) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._ws.close()
        except (TimeoutError, aiohttp.ClientError, OSError, RuntimeError):
            pass


async def _hello_answer(ws: aiohttp.ClientWebSocketResponse, url: str) -> memoryview:
    message = await ws.receive()
    if message.type is not WSMsgType.BINARY:
        raise ConnectionFailed(f"{url}: the session ended before HELLO was answered")
    frame = decode_frame(message.data)
    raise_error(frame)
    if frame.kind != Kind.HELLO or not frame.is_answer:
        raise MalformedRequest(f"{url}: HELLO was answered with kind {frame.kind}")
    return frame.header
