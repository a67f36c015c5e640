"""Connections that make no progress are ended; those that work, or wait for an answer, are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import web

from ferryline_service import errors
from ferryline_service.errors import error_middleware, read_json
from ferryline_service.metrics import ServiceMetrics
from ferryline_service.slow_connections import SlowConnections
from tests.polling import poll

PATIENCE_S = 0.5  # an honest request of these tests begins sooner, on a busy machine too
ANSWER = b"x" * 40_000_000  # more than the buffers of two sockets
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """A service as far as connections go: a long poll, a large answer, a body to read."""

    def __init__(self) -> None:
        app = web.Application(middlewares=[error_middleware(ServiceMetrics("test"))])
        app.router.add_get("/poll", self._poll)
        app.router.add_get("/large", self._large)
        app.router.add_post("/body", self._body)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.port = 0
        self.released = asyncio.Event()
        self.slow: SlowConnections
        self.opened: list[asyncio.StreamWriter] = []

    async def _poll(self, _: web.Request) -> web.Response:
        await self.released.wait()
        return web.Response(text="released")

    async def _large(self, _: web.Request) -> web.Response:
        return web.Response(body=ANSWER)

    async def _body(self, request: web.Request) -> web.Response:
        return web.json_response(await read_json(request))

    async def connect(self, limit: int = 65536) -> Streams:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        self.opened.append(writer)
        return reader, writer

    async def close(self) -> None:
        self.slow.close()
        for writer in self.opened:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        await self.runner.cleanup()


@asynccontextmanager
async def serving(**patience: float) -> AsyncIterator[Server]:
    server = Server()
    await server.runner.setup()
    site = web.TCPSite(server.runner, "127.0.0.1", 0)
    await site.start()
    server.port = server.runner.addresses[0][1]
    server.slow = SlowConnections(server.runner, **patience)
    server.slow.start()
    try:
        yield server
    finally:
        await server.close()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the server ends the connection, within a while."""
    try:
        async with asyncio.timeout(10):
            return await reader.read() is not None
    except ConnectionError:
        return True


async def test_a_head_that_never_gets_whole_ends_the_connection() -> None:
    async with serving(request_s=PATIENCE_S) as server:
        for beginning in (b"", b"GET / HTT", b"GET /large HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            reader, writer = await server.connect()
            writer.write(beginning)
            assert await ended(reader)
        assert server.slow.ended == 3


async def test_a_byte_now_and_then_does_not_help() -> None:
    async with serving(request_s=PATIENCE_S) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\nX-Slow: ")

        def drip() -> bool:
            if not writer.is_closing():
                writer.write(b"a")
            return server.slow.ended == 1

        await poll(drip, within_s=10)
        assert await ended(reader)


async def test_a_connection_that_is_kept_alive_may_rest_longer() -> None:
    async with serving(request_s=PATIENCE_S, idle_s=60) as server:
        resting = await server.connect()
        resting[1].write(b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        assert b"200 OK" in await resting[0].readuntil(b"\r\n\r\n")
        await resting[0].readexactly(2)
        silent, _ = await server.connect()
        assert await ended(silent), "meanwhile this one was ended"
        resting[1].write(b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        assert b"200 OK" in await resting[0].readuntil(b"\r\n\r\n")


async def test_a_request_that_waits_for_its_answer_is_left_alone() -> None:
    async with serving(request_s=PATIENCE_S, idle_s=PATIENCE_S, unread_s=PATIENCE_S) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /poll HTTP/1.1\r\nHost: x\r\n\r\n")
        silent, _ = await server.connect()
        assert await ended(silent)
        server.released.set()
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")


async def test_an_answer_that_nobody_reads_ends_the_connection() -> None:
    async with serving(request_s=60, unread_s=PATIENCE_S) as server:
        reader, writer = await server.connect(limit=1024)
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await poll(lambda: server.slow.ended == 1, within_s=20)
        got = 0
        try:
            while chunk := await reader.read(65536):
                got += len(chunk)
        except ConnectionError:
            pass
        assert got < len(ANSWER)


async def test_half_a_body_is_answered_with_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "BODY_S", PATIENCE_S)
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(b'POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 200\r\n\r\n{"half": ')
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"408" in head.splitlines()[0]
