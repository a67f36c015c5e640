"""A client that does no thinking: frames and REST as given, right or wrong, and the answers as they come."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from ferryline.protocol.errors import ErrorInfo
from ferryline.protocol.frames import Frame, Kind, decode_frame, decode_header, encode_frame
from ferryline.protocol.limits import FRAME_BYTES_MAX
from ferryline.protocol.messages import (
    Fetch,
    FetchAnswer,
    FetchEntry,
    Hello,
    Produce,
    ProduceAnswer,
    ProduceEntry,
    ProduceResult,
)
from ferryline.protocol.metadata import ClusterMetadata, MetadataAnswer, MetadataRequest

T = TypeVar("T")
TIMEOUT_S = 10.0
CLOSED = "(closed)"  # the session ended without an answer


class Wire:
    """One session. Not for concurrent use: a request reads until its own answer comes."""

    def __init__(self, http: aiohttp.ClientSession, ws: aiohttp.ClientWebSocketResponse) -> None:
        self._http = http
        self.ws = ws
        self._correlations = itertools.count(1)

    @classmethod
    async def connect(cls, url: str, ca: Path, hello: Hello | None = None, *, greet: bool = True) -> Wire:
        """Open a session; with ``greet`` say HELLO and expect it to be answered well."""
        http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=str(ca))))
        try:
            ws = await http.ws_connect(f"{url}/v1/session", compress=0, max_msg_size=FRAME_BYTES_MAX)
            wire = cls(http, ws)
            if greet:
                answer = await wire.ask(Kind.HELLO, hello or Hello(client="wire"))
                assert not answer.is_error, decode_header(answer.header, ErrorInfo)
        except BaseException:
            await http.close()
            raise
        return wire

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.ws.close()
        await self._http.close()

    async def ask(self, kind: int, header: Any, payload: bytes = b"", *, timeout_s: float = TIMEOUT_S) -> Frame:
        """Send a request, return the first frame that answers it."""
        correlation = next(self._correlations)
        await self.ws.send_bytes(encode_frame(kind, correlation, header, payload))
        return await self.answer(correlation, timeout_s=timeout_s)

    async def answer(self, correlation: int | None = None, *, timeout_s: float = TIMEOUT_S) -> Frame:
        """The next answer (to ``correlation``). Raises ConnectionError when the session ends instead."""
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.ws.receive()
                if message.type is not aiohttp.WSMsgType.BINARY:
                    raise ConnectionError(f"session ended: {message.type.name} {self.ws.close_code}")
                frame = decode_frame(message.data)
                if frame.is_answer and correlation in (None, frame.correlation):
                    return frame

    async def code(self, kind: int, header: Any, payload: bytes = b"") -> str:
        """Code of the error that a request gets: of the frame, or the first one among its results; "" for none."""
        return await self._code(self.ask(kind, header, payload))

    async def code_of_raw(self, message: bytes | str) -> str:
        """The same for a message sent as it is."""
        await (self.ws.send_str(message) if isinstance(message, str) else self.ws.send_bytes(message))
        return await self._code(self.answer())

    async def _code(self, answer: Any) -> str:
        try:
            frame: Frame = await answer
        except ConnectionError:
            return CLOSED
        return code_of(frame)

    async def metadata(self) -> ClusterMetadata:
        frame = await self.ask(Kind.METADATA, MetadataRequest())
        found = ClusterMetadata()
        found.apply(decode_header(frame.header, MetadataAnswer))
        return found

    async def produce(
        self, topic_id: str, partition: int, partitions: int, batch: bytes, *, timeout_ms: int = 10_000
    ) -> ProduceResult:
        """One batch to one partition."""
        entry = ProduceEntry(topic_id, partition, partitions, len(batch))
        frame = await self.ask(Kind.PRODUCE, Produce(timeout_ms, [entry]), batch)
        if frame.is_error:
            return ProduceResult(0, error=decode_header(frame.header, ErrorInfo))
        return decode_header(frame.header, ProduceAnswer).results[0]

    async def fetch(self, topic_id: str, partition: int, offset: int, *, wait_ms: int = 1_000) -> tuple[Any, bytes]:
        """(result, payload) of one partition."""
        frame = await self.ask(Kind.FETCH, Fetch(wait_ms, 1 << 20, [FetchEntry(topic_id, partition, offset)]))
        if frame.is_error:
            return decode_header(frame.header, ErrorInfo), b""
        return decode_header(frame.header, FetchAnswer).results[0], bytes(frame.payload)


_RESULTS = {
    int(Kind.PRODUCE): ProduceAnswer,
    int(Kind.FETCH): FetchAnswer,
}


def code_of(frame: Frame) -> str:
    """The error code in an answer, "" when there is none."""
    if frame.is_error:
        return decode_header(frame.header, ErrorInfo).code
    from ferryline.protocol import messages

    kinds: dict[int, Any] = {
        **_RESULTS,
        int(Kind.OFFSETS): messages.OffsetsAnswer,
        int(Kind.CLAIM): messages.CommittedAnswer,
        int(Kind.COMMIT): messages.CommittedAnswer,
        int(Kind.COMMITTED): messages.CommittedAnswer,
    }
    if frame.kind not in kinds:
        return ""
    for result in decode_header(frame.header, kinds[frame.kind]).results:
        if result.error is not None:
            return str(result.error.code)
    return ""


class Rest:
    """REST by hand: status and body, whatever they are."""

    def __init__(self, url: str, ca: Path) -> None:
        self.url = url
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=str(ca)))
        )

    async def __aenter__(self) -> Rest:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def call(
        self, method: str, path: str, body: Any = None, *, encoded: bool = False, **options: Any
    ) -> tuple[int, Any]:
        """``body``: bytes as they are, anything else as JSON. ``encoded``: the path goes out as it is given."""
        if body is not None:
            options["data"] = body if isinstance(body, bytes | str) else json.dumps(body)
            options.setdefault("headers", {}).setdefault("Content-Type", "application/json")
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        url = URL(self.url + path, encoded=encoded)
        async with self._http.request(method, url, timeout=timeout, **options) as response:
            text = await response.text(errors="replace")
            try:
                return response.status, json.loads(text)
            except ValueError:
                return response.status, text

    async def code(self, method: str, path: str, body: Any = None, **options: Any) -> str:
        status, answer = await self.call(method, path, body, **options)
        if status < 400:
            return ""
        return str(answer.get("code")) if isinstance(answer, dict) else f"HTTP {status}"
