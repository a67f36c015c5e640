"""Sessions of a client: one WebSocket per broker, many requests at once, and no way to hang.

A request ends in its answer, in an error answer, in ConnectionLost when the session ends (the request may have been
applied) or in RequestTimedOut at its deadline. A session that the peer has silently left (half-open connection,
stopped process) is found by pings: no pong within ``PING_S`` * 1.5 ends it.

Everything here belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiohttp import WSMsgType

from ferryline.outgoing import Buffer, Outgoing
from ferryline.protocol.errors import (
    BadCredentials,
    ClientClosed,
    ConnectionFailed,
    ConnectionLost,
    ErrorInfo,
    FerrylineError,
    Forbidden,
    InvalidArgument,
    MalformedRequest,
    RequestTimedOut,
    Throttled,
    from_info,
)
from ferryline.protocol.frames import (
    FLAG_ERROR,
    FLAG_MORE,
    PREFIX,
    Frame,
    Kind,
    decode_frame,
    decode_header,
    encode_frame,
)
from ferryline.protocol.limits import FRAME_BYTES_MAX
from ferryline.protocol.messages import Hello, HelloOk
from ferryline.receiver import Receiver
from ferryline.tokens import TokenLike, TokenSource
from ferryline.trust import Trust

log = logging.getLogger("ferryline.transport")

PING_S = 4.0  # together with half of it for the pong: how long a half-open connection can go unnoticed
CONNECT_S = 3.0  # TCP, TLS and HELLO together; a stopped process accepts connections and never answers
CORRELATION_MAX = 2**32 - 1

T = TypeVar("T")
_CLOSING_TURNS = 3  # of the loop, until an aborted TLS transport has closed its socket; the loop may end right after
_FULL_MS = 1_000  # pause of who finds a service full that does not say for how long
OnAnswer = Callable[[Frame | None, FerrylineError | None], None]


def check_url(url: str) -> str:
    """The URL without a trailing slash. Raises InvalidArgument unless it is https, or http on the loopback."""
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise InvalidArgument(f"url: {url[:200]!r} is not https://host:port", field="url")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise InvalidArgument(f"url: {url[:200]!r} would send in clear; use https", field="url")
    return f"{parts.scheme}://{parts.netloc}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Session:
    """One open session. ``peer`` is the HELLO answer: which service, which broker, which cluster."""

    def __init__(self, url: str, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.url = url
        self.peer = HelloOk(0, "")
        self.error: FerrylineError | None = None  # why it ended; None while it is open
        self.on_lost: list[Callable[[Session], None]] = []
        self._ws = ws
        connection = ws._response.connection
        if connection is None or connection.transport is None or connection.protocol is None:
            raise ConnectionLost(f"{url}: the connection is closed")
        self._transport = connection.transport
        self._out = Outgoing(url, connection.transport, connection.protocol, self._end)
        self._receiver = Receiver(connection.transport, ws, size_max=FRAME_BYTES_MAX)
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, OnAnswer] = {}
        self._correlation = 0
        self._reader: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        return self.error is None

    @property
    def unanswered(self) -> int:
        return len(self._pending)

    # -- requests ----------------------------------------------------------------------------------

    def ask(self, kind: int, header: Any, parts: Sequence[Buffer], on_answer: OnAnswer) -> int:
        """Send a request now; ``on_answer(frame, error)`` is called once for each answer, or once with an error.

        Frames leave in the order of the calls. Raises ConnectionFailed when the session has ended: nothing was sent.
        Returns the correlation, good for `forget`.
        """
        if self.error is not None:
            raise ConnectionFailed(f"the session to {self.url} has ended: {self.error}")
        correlation = self._next_correlation()
        head = encode_frame(kind, correlation, header)
        size = len(head) + sum(map(len, parts))
        if size > FRAME_BYTES_MAX:
            raise InvalidArgument(f"frame: {size} bytes is over the limit of {FRAME_BYTES_MAX}")
        self._pending[correlation] = on_answer
        self._out.send(head, parts)
        return correlation

    def forget(self, correlation: int) -> None:
        """Ignore whatever still comes for this request."""
        self._pending.pop(correlation, None)

    async def request(
        self, kind: int, header: Any, answer: type[T], *, timeout: float, parts: Sequence[Buffer] = ()
    ) -> tuple[T, memoryview]:
        """Ask and wait for the one answer: its header and payload.

        Raises the error that was answered, ConnectionLost, or RequestTimedOut after ``timeout`` seconds.
        """
        future: asyncio.Future[Frame] = self._loop.create_future()

        def on_answer(frame: Frame | None, error: FerrylineError | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            elif frame is not None:
                future.set_result(frame)

        correlation = self.ask(kind, header, parts, on_answer)
        try:
            async with asyncio.timeout(timeout):
                frame = await future
        except TimeoutError:
            raise RequestTimedOut(f"no answer from {self.url} within {timeout:g} s") from None
        finally:
            self.forget(correlation)
        return decode_header(frame.header, answer), frame.payload

    def _next_correlation(self) -> int:
        correlation = self._correlation
        while True:
            correlation = correlation + 1 if correlation < CORRELATION_MAX else 1
            if correlation not in self._pending:
                break
        self._correlation = correlation
        return correlation

    # -- reading -----------------------------------------------------------------------------------

    def start_reading(self) -> None:
        self._reader = self._loop.create_task(self._read())
        self._receiver.begin(self._arrived)

    def _arrived(self, message: bytes | bytearray) -> None:
        """A binary message, in the pass of the loop in which it was read."""
        if self.error is not None:
            return
        try:
            self._take(message)
        except MalformedRequest as malformed:
            self._end(ConnectionLost(f"{self.url} sent what is not a frame: {malformed}"))
        except Exception as failed:  # not foreseen; a session that nobody reads would leave its callers waiting
            log.exception("reading from %s failed", self.url)
            self._end(ConnectionLost(f"{self.url}: {type(failed).__name__}: {failed}"))

    def _take(self, message: bytes | bytearray) -> None:
        frame = decode_frame(message)
        on_answer = self._pending.get(frame.correlation)
        if on_answer is None:
            return
        error: FerrylineError | None = None
        if frame.flags & FLAG_ERROR:
            error = from_info(decode_header(frame.header, ErrorInfo))
        if frame.flags & (FLAG_MORE | FLAG_ERROR) != FLAG_MORE:  # else the request stays open
            del self._pending[frame.correlation]
        on_answer(None if error is not None else frame, error)

    async def _read(self) -> None:
        """What is no plain binary message, and the end."""
        ws, binary = self._ws, WSMsgType.BINARY
        error: FerrylineError
        try:
            while True:
                message = await ws.receive()
                if message.type is binary:
                    self._take(message.data)
                elif message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING, WSMsgType.ERROR):
                    error = ConnectionLost(f"the session to {self.url} ended: {_ending(ws)}")
                    break
        except MalformedRequest as malformed:
            error = ConnectionLost(f"{self.url} sent what is not a frame: {malformed}")
        except (OSError, aiohttp.ClientError) as failed:
            error = ConnectionLost(f"{self.url}: {failed or type(failed).__name__}")
        except Exception as failed:  # not foreseen; a session that nobody reads would leave its callers waiting
            log.exception("reading from %s failed", self.url)
            error = ConnectionLost(f"{self.url}: {type(failed).__name__}: {failed}")
        self._end(error)

    # -- ending ------------------------------------------------------------------------------------

    def _end(self, error: FerrylineError) -> None:
        if self.error is not None:
            return
        self.error = error
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._out.close()
        pending, self._pending = self._pending, {}
        for on_answer in pending.values():
            on_answer(None, error)
        callbacks, self.on_lost = self.on_lost, []
        for callback in callbacks:
            callback(self)
        self._ws._response.close()
        self._transport.abort()  # a TLS goodbye waits for the other side, and a dead one never answers

    async def close(self) -> None:
        """Say goodbye (at most a second) and end; whatever is unanswered fails with ClientClosed."""
        if self.error is not None:
            return
        writer = self._out.draining
        try:
            async with asyncio.timeout(1.0):
                if writer is not None:
                    await asyncio.wait([writer])
                if self._reader is not None:
                    self._reader.cancel()
                    await asyncio.wait([self._reader])
                await self._ws.close()
        except (TimeoutError, OSError, RuntimeError, aiohttp.ClientError):
            pass
        self._end(ClientClosed("the client was closed"))


def _abort(ws: aiohttp.ClientWebSocketResponse) -> None:
    connection = ws._response.connection
    transport = connection.transport if connection is not None else None
    ws._response.close()
    if transport is not None:
        transport.abort()


def _ending(ws: aiohttp.ClientWebSocketResponse) -> str:
    cause = ws.exception()
    if cause is not None:
        return str(cause) or type(cause).__name__
    return f"closed by the other side ({ws.close_code})"


class Connector:
    """Opens sessions with the client's TLS settings and credentials. One per event loop.

    ``ca``: path of the CA's certificate; None trusts what the system trusts. ``token``: shown with every request and
    session; one that comes from a function is replaced when it is due or refused.
    """

    def __init__(
        self,
        *,
        ca: str | None = None,
        token: TokenLike | TokenSource | None = None,
        client: str = "",
        connect_timeout: float = CONNECT_S,
    ) -> None:
        self.client = client
        self.connect_timeout = connect_timeout
        self._ca = ca
        self._token = token if isinstance(token, TokenSource) else TokenSource(token or "")
        self._trust = Trust(ca)
        self._http: aiohttp.ClientSession | None = None
        self._closed = False

    @property
    def http(self) -> aiohttp.ClientSession:
        """The HTTP client for REST calls, with TLS and credentials set. Raises ConnectionFailed once closed."""
        if self._closed:  # a reconnect that comes late must not open what nobody will close
            raise ConnectionFailed("the client was closed")
        self._trust.refresh()
        if self._http is None or self._http.closed:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._trust.context, keepalive_timeout=30),
                middlewares=(self._token.authorize,),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._http

    async def open(self, url: str, cluster_id: str = "", *, timeout: float | None = None) -> Session:
        """An open, greeted session. Raises ConnectionFailed (nothing was sent) or what the service refused with."""
        limit = self.connect_timeout if timeout is None else min(timeout, self.connect_timeout)
        try:
            async with asyncio.timeout(limit):
                ws = await self.http.ws_connect(
                    f"{url}/v1/session",
                    compress=0,
                    max_msg_size=FRAME_BYTES_MAX + PREFIX.size,
                    heartbeat=PING_S,
                    autoclose=False,
                )
                try:
                    return await self._greet(url, ws, cluster_id, limit)
                except BaseException:
                    _abort(ws)
                    raise
        except TimeoutError:
            raise ConnectionFailed(f"{url}: no session within {limit:g} s", url=url) from None
        except aiohttp.WSServerHandshakeError as error:
            raise _handshake_error(url, error) from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise ConnectionFailed(f"{url}: the certificate is not trusted: {error}", url=url) from None
        except (OSError, aiohttp.ClientError, ValueError) as error:
            raise ConnectionFailed(f"{url}: {error or type(error).__name__}", url=url) from None
        except (ConnectionLost, RequestTimedOut) as error:
            raise ConnectionFailed(f"{url}: {error.message}", url=url) from None

    async def _greet(self, url: str, ws: aiohttp.ClientWebSocketResponse, cluster_id: str, timeout: float) -> Session:
        session = Session(url, ws)
        session.start_reading()
        hello = Hello(cluster_id=cluster_id, client=self.client)
        session.peer, _ = await session.request(Kind.HELLO, hello, HelloOk, timeout=timeout)
        return session

    def sibling(self, client: str) -> Connector:
        """Another one to the same cluster, for a loop of its own."""
        return Connector(ca=self._ca, token=self._token, client=client)

    async def close(self) -> None:
        self._closed = True
        await self._token.close()
        if self._http is not None:
            await self._http.close()
            for _ in range(_CLOSING_TURNS):
                await asyncio.sleep(0)


def _handshake_error(url: str, error: aiohttp.WSServerHandshakeError) -> FerrylineError:
    if error.status == 401:
        shown = "Authorization" in error.request_info.headers
        return BadCredentials(f"{url}: the token was refused" if shown else f"{url}: a token is needed")
    if error.status == 403:
        return Forbidden(f"{url}: access denied")
    if error.status == 429:
        after_s = error.headers.get("Retry-After", "") if error.headers is not None else ""
        after_ms = int(after_s) * 1_000 if after_s.isascii() and after_s.isdigit() else _FULL_MS
        return Throttled(f"{url}: takes no more sessions at the moment", retry_after_ms=after_ms)
    return ConnectionFailed(f"{url}: answered {error.status} instead of a session", url=url)
