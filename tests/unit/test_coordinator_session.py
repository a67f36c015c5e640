"""Sessions of `ferryline_service`, over real sockets on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ferryline.protocol.errors import (
    ClusterMismatch,
    ConnectionFailed,
    ConnectionLost,
    ErrorInfo,
    FerrylineError,
    Forbidden,
    InternalError,
    InvalidArgument,
    RequestTimedOut,
    UnsupportedVersion,
)
from ferryline.protocol.frames import Frame, Kind, decode_frame, decode_header, encode_frame
from ferryline.protocol.messages import Done, Hello, HelloOk
from ferryline_service.metrics import ServiceMetrics
from ferryline_service.node import NodeConnection
from ferryline_service.session import OnFrame, ServerSession, SessionEndpoint, websocket_prefix

CLUSTER = "c-1"
Eventually = Callable[..., Awaitable[object]]


@asynccontextmanager
async def serving(on_frame: OnFrame, **options: object) -> AsyncIterator[tuple[SessionEndpoint, str]]:
    settings: dict[str, object] = {"trust_hello": True, **options}
    endpoint = SessionEndpoint(
        server="broker",
        cluster_id=CLUSTER,
        on_frame=on_frame,
        metrics=ServiceMetrics("broker"),
        **settings,  # type: ignore[arg-type]
    )
    app = web.Application()
    app.router.add_routes(endpoint.routes())
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield endpoint, f"http://127.0.0.1:{port}"
    finally:
        await endpoint.close()
        await runner.cleanup()


def echo(session: ServerSession, frame: Frame) -> None:
    session.answer(frame.kind, frame.correlation, Done(7), [frame.payload])


@asynccontextmanager
async def connected(url: str, **hello: object) -> AsyncIterator[NodeConnection]:
    greeting = Hello(cluster_id=CLUSTER, **hello)  # type: ignore[arg-type]
    async with aiohttp.ClientSession() as http:
        connection = await NodeConnection.connect(http, url, hello=greeting, tls=None)
        try:
            yield connection
        finally:
            await connection.close()


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 200_000, 3_000_000])
async def test_a_payload_of_any_size_comes_back_unchanged(size: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    async with serving(echo) as (_, url), connected(url) as connection:
        assert connection.server == HelloOk(1, CLUSTER, "broker", 0)
        frame = await connection.request(Kind.PRODUCE, Done(), [payload], timeout_s=30)
        assert bytes(frame.payload) == payload
        assert decode_header(frame.header, Done) == Done(7)


async def test_frames_of_a_node_are_handled_as_they_are_read_and_wait_for_no_task() -> None:
    tasks: list[asyncio.Task[Any] | None] = []

    def noting(session: ServerSession, frame: Frame) -> None:
        tasks.append(asyncio.current_task())
        echo(session, frame)

    async with serving(noting) as (_, url), connected(url) as connection:
        for size in (0, 500_000):
            await connection.request(Kind.PRODUCE, Done(), [bytes(size)], timeout_s=30)
    assert tasks == [None, None]


async def test_many_answers_in_any_order_reach_their_own_request() -> None:
    held: list[tuple[ServerSession, Frame]] = []

    def hold(session: ServerSession, frame: Frame) -> None:
        held.append((session, frame))
        if len(held) == 500:
            for session_, frame_ in reversed(held):
                session_.answer(frame_.kind, frame_.correlation, decode_header(frame_.header, Done))

    async with serving(hold) as (_, url), connected(url) as connection:
        calls = [connection.call(Kind.METADATA, Done(n), Done, timeout_s=30) for n in range(500)]
        assert [done.coord_epoch for done in await asyncio.gather(*calls)] == list(range(500))


@pytest.mark.parametrize("as_coroutine", [False, True])
async def test_what_a_handler_raises_becomes_the_answer_and_the_session_goes_on(as_coroutine: bool) -> None:
    def refuse(session: ServerSession, frame: Frame) -> None:
        if frame.kind == Kind.CLAIM:
            raise InvalidArgument("generation: 0 is outside 1..2", field="generation")
        if frame.kind == Kind.COMMIT:
            raise ZeroDivisionError
        echo(session, frame)

    def on_frame(session: ServerSession, frame: Frame) -> Awaitable[None] | None:
        async def later() -> None:
            refuse(session, frame)

        return later() if as_coroutine else refuse(session, frame)

    async with serving(on_frame) as (_, url), connected(url) as connection:
        with pytest.raises(InvalidArgument, match="generation: 0") as refused:
            await connection.request(Kind.CLAIM, Done(), timeout_s=30)
        assert refused.value.details == {"field": "generation"}
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            await connection.request(Kind.COMMIT, Done(), timeout_s=30)
        await connection.request(Kind.FETCH, Done(), timeout_s=30)


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (Hello(version_min=7, version_max=9), UnsupportedVersion),
        (Hello(cluster_id="other"), ClusterMismatch),
        (Hello(role="broker", broker_id=3), Forbidden),
    ],
)
async def test_a_bad_hello_gets_its_error(hello: Hello, error: type[FerrylineError]) -> None:
    async with serving(echo, trust_hello=False) as (endpoint, url), aiohttp.ClientSession() as http:
        with pytest.raises(error) as refused:
            await NodeConnection.connect(http, url, hello=hello, tls=None)
        if error is UnsupportedVersion:
            assert "1..1" in refused.value.message
            assert "7..9" in refused.value.message
        assert not endpoint.sessions


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "MALFORMED_REQUEST"),
        (b"\x01\x00\x00", "MALFORMED_REQUEST"),
        (encode_frame(Kind.FETCH, 1, Hello()), "MALFORMED_REQUEST"),
        (encode_frame(Kind.HELLO, 1, "nonsense"), "MALFORMED_REQUEST"),
        (b"\x01\x00\x00\x00" + b"\xff" * 8, "MALFORMED_REQUEST"),
    ],
)
async def test_nonsense_instead_of_a_hello_gets_an_error_and_a_close(raw: bytes, code: str) -> None:
    async with serving(echo) as (_, url), aiohttp.ClientSession() as http:
        ws = await http.ws_connect(f"{url}/v1/session")
        await ws.send_bytes(raw)
        frame = decode_frame((await ws.receive()).data)
        assert decode_header(frame.header, ErrorInfo).code == code
        assert (await ws.receive()).type is aiohttp.WSMsgType.CLOSE
        assert ws.close_code == 1008


async def greeted(http: aiohttp.ClientSession, url: str) -> aiohttp.ClientWebSocketResponse:
    ws = await http.ws_connect(f"{url}/v1/session")
    await ws.send_bytes(encode_frame(Kind.HELLO, 1, Hello()))
    assert decode_header(decode_frame((await ws.receive()).data).header, HelloOk).cluster_id == CLUSTER
    return ws


OVERSIZED = b"\x82\xff" + (33 << 20).to_bytes(8, "big") + b"mask"  # head of a masked frame of 33 MiB


@pytest.mark.parametrize(
    ("raw", "close_code"),
    [
        (b"\x82\x83\0\0\0\0" + b"\x0b\x00\x00", 1002),  # shorter than a frame's prefix
        (b"\x82\x8c\0\0\0\0" + b"\x0b\x00\x00\x00" + b"\xff" * 8, 1002),  # header longer than the frame
        (b"\x81\x81\0\0\0\0x", 1003),  # text
        (b"\x82\x03abc", 1002),  # a client's frame without mask
        (OVERSIZED + bytes(4096), 1009),
    ],
)
async def test_a_broken_or_oversized_frame_ends_only_its_own_session(raw: bytes, close_code: int) -> None:
    async with serving(echo) as (_, url), aiohttp.ClientSession() as http, connected(url) as other:
        ws = await greeted(http, url)
        ws._conn.transport.write(raw)  # type: ignore[union-attr]
        while (await ws.receive()).type is aiohttp.WSMsgType.BINARY:
            pass
        assert ws.close_code == close_code
        await other.request(Kind.FETCH, Done(), timeout_s=30)


async def test_a_half_sent_frame_disturbs_nobody_and_its_session_is_forgotten(eventually: Eventually) -> None:
    async with serving(echo) as (endpoint, url), aiohttp.ClientSession() as http, connected(url) as other:
        ws = await greeted(http, url)
        transport = ws._conn.transport  # type: ignore[union-attr]
        transport.write(b"\x82\xfe\x04\x00mask" + bytes(100))
        await eventually(lambda: len(endpoint.sessions) == 2)
        transport.abort()
        await eventually(lambda: len(endpoint.sessions) == 1)
        await other.request(Kind.FETCH, Done(), timeout_s=30)


async def test_who_says_nothing_is_told_so_and_closed() -> None:
    async with serving(echo, hello_timeout_s=0.05) as (_, url), aiohttp.ClientSession() as http:
        ws = await http.ws_connect(f"{url}/v1/session")
        frame = decode_frame((await ws.receive()).data)
        assert decode_header(frame.header, ErrorInfo).code == RequestTimedOut.code


async def test_a_peer_that_asks_and_does_not_read_is_cut_off(eventually: Eventually) -> None:
    def flood(session: ServerSession, frame: Frame) -> None:
        for _ in range(64):
            session.answer(frame.kind, frame.correlation, Done(), [bytes(1 << 20)])

    closed: list[ServerSession] = []
    async with serving(flood, out_bytes_max=16 << 20) as (endpoint, url), aiohttp.ClientSession() as http:
        endpoint.on_open = lambda session: session.close_callbacks.append(closed.append)
        ws = await greeted(http, url)
        ws._conn.transport.pause_reading()  # type: ignore[union-attr]
        await ws.send_bytes(encode_frame(Kind.FETCH, 2, Done()))
        await eventually(lambda: len(closed) == 1 and not endpoint.sessions)


async def test_a_slow_reader_still_gets_everything_in_order() -> None:
    def stream(session: ServerSession, frame: Frame) -> None:
        for number in range(64):
            session.answer(frame.kind, frame.correlation, Done(number), [bytes(1 << 18)], more=number < 63)

    async with serving(stream) as (_, url), aiohttp.ClientSession() as http:
        ws = await greeted(http, url)
        transport = ws._conn.transport  # type: ignore[union-attr]
        transport.pause_reading()
        await ws.send_bytes(encode_frame(Kind.FETCH, 2, Done()))
        await asyncio.sleep(0.1)
        transport.resume_reading()
        for number in range(64):
            frame = decode_frame((await ws.receive()).data)
            assert decode_header(frame.header, Done) == Done(number)
            assert len(frame.payload) == 1 << 18


async def test_requests_end_when_the_other_side_is_gone_or_silent() -> None:
    def swallow(session: ServerSession, frame: Frame) -> None:
        if frame.kind == Kind.COMMIT:
            session.abort("test")

    ended: list[NodeConnection] = []
    async with serving(swallow) as (_, url), connected(url) as connection:
        connection.on_close = ended.append
        with pytest.raises(RequestTimedOut):
            await connection.request(Kind.FETCH, Done(), timeout_s=0.05)
        with pytest.raises(ConnectionLost):
            await connection.request(Kind.COMMIT, Done(), timeout_s=30)
        assert ended == [connection]
        with pytest.raises(ConnectionLost):
            await connection.request(Kind.FETCH, Done(), timeout_s=30)
    async with aiohttp.ClientSession() as http:
        with pytest.raises(ConnectionFailed):
            await NodeConnection.connect(http, "http://127.0.0.1:1", hello=Hello(), tls=None)


def test_the_websocket_prefix_follows_the_three_length_forms() -> None:
    assert websocket_prefix(5) == b"\x82\x05"
    assert websocket_prefix(126) == b"\x82\x7e\x00\x7e"
    assert websocket_prefix(65536) == b"\x82\x7f" + (65536).to_bytes(8, "big")
