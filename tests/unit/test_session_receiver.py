"""What sessions do with frames that are not plain, come early, or come while reading is on hold."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from ferryline.protocol.frames import Frame, Kind, decode_frame, encode_frame, masked_prefix
from ferryline.protocol.messages import Done, Hello
from ferryline_service.metrics import ServiceMetrics
from ferryline_service.session import ServerSession, SessionEndpoint
from ferryline_service.tls import node_client_context
from tests.polling import poll
from tests.unit.broker_world import TestCa

HELLO = encode_frame(Kind.HELLO, 1, Hello(client="raw"))


def asking(correlation: int, payload: bytes = b"") -> bytes:
    return encode_frame(Kind.OFFSETS, correlation, Done(0), payload)


def plain(frame: bytes) -> bytes:
    """As our own clients write it."""
    return masked_prefix(len(frame)) + frame


def fragments(frame: bytes) -> bytes:
    """The same message in two frames, under a real mask."""

    def part(first: int, data: bytes) -> bytes:
        mask = b"\x05\x06\x07\x08"
        return bytes([first, 0x80 | len(data)]) + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))

    return part(0x02, frame[:5]) + part(0x80, frame[5:])


@asynccontextmanager
async def serving(on_frame: Callable[[ServerSession, Frame], None]) -> AsyncIterator[int]:
    endpoint = SessionEndpoint(server="broker", cluster_id="c", on_frame=on_frame, metrics=ServiceMetrics("broker"))
    app = web.Application()
    app.router.add_routes(endpoint.routes())
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await endpoint.close()
        await runner.cleanup()


def upgrade() -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    head = (
        f"GET /v1/session HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}"
    )
    return f"{head}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()


async def answers(reader: asyncio.StreamReader, count: int) -> list[int]:
    """Correlations of the next ``count`` frames."""
    found = []
    for _ in range(count):
        _, size = await reader.readexactly(2)
        assert size < 126
        found.append(decode_frame(await reader.readexactly(size)).correlation)
    return found


async def greeted(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A raw connection, upgraded, whose HELLO was answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(upgrade())
    await reader.readuntil(b"\r\n\r\n")
    writer.write(plain(HELLO))
    assert await answers(reader, 1) == [1]
    return reader, writer


def echo(session: ServerSession, frame: Frame) -> None:
    session.answer(frame.kind, frame.correlation, Done(0))


@pytest.mark.parametrize("pause", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 9])
async def test_frames_that_come_with_the_upgrade_or_before_the_hello_is_answered_are_served(
    pause: bool, cut: int
) -> None:
    async with serving(echo) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sent = plain(HELLO) + plain(asking(2)) + plain(asking(3)) + fragments(asking(4)) + plain(asking(5))
        writer.write(upgrade() + sent[:cut])
        if pause:
            await reader.readuntil(b"\r\n\r\n")
        writer.write(sent[cut:])
        if not pause:
            await reader.readuntil(b"\r\n\r\n")
        assert await answers(reader, 5) == [1, 2, 3, 4, 5]
        writer.write(plain(asking(6)))
        assert await answers(reader, 1) == [6]
        writer.close()


async def test_plain_fragmented_and_really_masked_messages_and_pings_mix_in_order() -> None:
    async with serving(echo) as port, asyncio.timeout(10), aiohttp.ClientSession() as http:
        reader, writer = await greeted(port)
        writer.write(plain(asking(2)) + b"\x89\x80\0\0\0\0" + plain(asking(3)))
        found = await reader.readexactly(2 * len(asking(2)) + 2 * 2 + 2)
        assert found.count(b"\x8a\x00") == 1, "a ping gets its pong"
        writer.write(fragments(asking(4)) + plain(asking(5)) + plain(asking(6)))
        assert await answers(reader, 3) == [4, 5, 6]
        writer.close()
        ws = await http.ws_connect(f"http://127.0.0.1:{port}/v1/session")  # masks as RFC 6455 says
        await ws.send_bytes(HELLO)
        await ws.send_bytes(asking(2, os.urandom(100_000)))
        assert [decode_frame((await ws.receive()).data).correlation for _ in range(2)] == [1, 2]
        await ws.close()


async def test_what_comes_in_one_piece_waits_with_the_rest_while_reading_is_on_hold() -> None:
    seen: list[int] = []
    sessions: list[ServerSession] = []

    def hold(session: ServerSession, frame: Frame) -> None:
        seen.append(frame.correlation)
        sessions.append(session)
        if frame.correlation in (2, 4):
            session.hold_reading(60.0)

    async with serving(hold) as port, asyncio.timeout(10):
        _, writer = await greeted(port)
        writer.write(b"".join(plain(asking(number)) for number in range(2, 6)))
        await poll(lambda: seen == [2])
        writer.write(plain(asking(6)))
        sessions[0].resume_reading()
        await poll(lambda: seen == [2, 3, 4])
        sessions[0].resume_reading()
        await poll(lambda: seen == [2, 3, 4, 5, 6])
        writer.close()


async def test_a_frame_that_makes_no_sense_ends_the_session_after_the_answers_before_it() -> None:
    async with serving(echo) as port, asyncio.timeout(10):
        reader, writer = await greeted(port)
        writer.write(plain(asking(2)) + plain(b"short") + plain(asking(3)))
        assert await answers(reader, 1) == [2]
        _, size = await reader.readexactly(2)
        assert decode_frame(await reader.readexactly(size)).is_error
        first, size = await reader.readexactly(2)
        assert (first, (await reader.readexactly(size))[:2]) == (0x88, (1002).to_bytes(2, "big"))
        writer.close()


async def test_what_looks_like_a_frame_inside_an_early_frame_is_not_taken_for_one() -> None:
    """The upgrade comes with the beginning of a message, and the rest of it begins like a frame of its own."""
    async with serving(echo) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        begun, inside = plain(HELLO) + plain(asking(2, plain(asking(99)))), len(plain(asking(99)))
        writer.write(upgrade() + begun[:-inside])
        await reader.readuntil(b"\r\n\r\n")
        writer.write(begun[-inside:] + plain(asking(3)))
        assert await answers(reader, 3) == [1, 2, 3]
        writer.close()


@pytest.mark.parametrize("gone", ["transport", "protocol"])
async def test_who_goes_before_the_upgrade_is_no_error_of_ours(tmp_path: Path, gone: str) -> None:
    """TLS forgets the protocol of a connection that has ended a pass of the loop before aiohttp forgets the transport:
    a request whose turn came in between was an internal error (`ferryline chaos`, coordinators on etcd)."""
    endpoint = SessionEndpoint(
        server="broker", cluster_id="c", on_frame=lambda session, frame: None, metrics=ServiceMetrics("broker")
    )
    arrived, raised = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def late(request: web.Request) -> web.StreamResponse:
        arrived.set()
        transport = request.transport
        assert transport is not None

        def connected() -> bool:
            return request.transport is not None and (gone == "transport" or transport.get_protocol() is not None)

        while connected():  # noqa: ASYNC110 - the very pass of the loop in which it happens
            await asyncio.sleep(0)
        try:
            return await endpoint.handle(request)
        except Exception as error:
            raised.set_result((error, request.transport))
            raise

    app = web.Application()
    app.router.add_get("/v1/session", late)
    runner, tls = web.AppRunner(app), TestCa(tmp_path, "c").files(tmp_path / "tls", None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls.server).start()
    try:
        port, context = runner.addresses[0][1], node_client_context(tls.ca)
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="127.0.0.1")
        writer.write(upgrade())
        await asyncio.wait_for(arrived.wait(), 30)
        writer.transport.abort()
        error, transport = await asyncio.wait_for(raised, 30)
        assert isinstance(error, ConnectionResetError), error
        assert (transport is None) == (gone == "transport")
    finally:
        await runner.cleanup()
