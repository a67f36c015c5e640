"""Sessions: a request ends in an answer or a typed error, whatever the other side does."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSMsgType, web

import ferryline as fl
from ferryline import transport
from ferryline.protocol.errors import (
    BadCredentials,
    ClientClosed,
    ClusterMismatch,
    ConnectionFailed,
    ConnectionLost,
    FerrylineError,
    Forbidden,
    RequestTimedOut,
    UnsupportedVersion,
)
from ferryline.protocol.frames import FLAG_ANSWER, FLAG_MORE, Kind, decode_frame, encode_error, encode_frame
from ferryline.protocol.messages import Done, HelloOk, Offsets, OffsetsAnswer
from ferryline.transport import Connector, Session, check_url
from ferryline_coordinator.authority import Authority
from ferryline_service.tls import server_context
from tests.polling import SOON_S, poll
from unit.sdk_fake_cluster import FakeCluster

Script = Callable[[web.WebSocketResponse], Awaitable[None]]


@asynccontextmanager
async def peer(script: Script, *, hello: bool = True, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that does what ``script`` says with each WebSocket, after a good HELLO unless told otherwise."""

    async def handle(request: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse(autoping=False)
        await ws.prepare(request)
        if hello:
            frame = decode_frame((await ws.receive()).data)
            await ws.send_bytes(answer(frame, HelloOk(1, "c", "broker", 1)))
        await script(ws)
        return ws

    app = web.Application()
    app.router.add_get("/v1/session", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield f"{'https' if context else 'http'}://localhost:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def answer(frame: Any, header: Any, flags: int = FLAG_ANSWER) -> bytes:
    return encode_frame(frame.kind, frame.correlation, header, flags=flags)


@asynccontextmanager
async def connected(url: str, connect_timeout: float = SOON_S) -> AsyncIterator[Session]:
    connector = Connector(connect_timeout=connect_timeout)
    try:
        session = await connector.open(url)
        try:
            yield session
        finally:
            await session.close()
    finally:
        await connector.close()


async def ask(session: Session, timeout: float = SOON_S) -> OffsetsAnswer:
    found, _ = await session.request(Kind.OFFSETS, Offsets([]), OffsetsAnswer, timeout=timeout)
    return found


async def silence(ws: web.WebSocketResponse) -> None:
    async for _ in ws:
        pass


# -- opening -----------------------------------------------------------------------------------------


async def test_a_refused_connection_is_told_with_its_address(unused_tcp_port: int) -> None:
    connector = Connector(connect_timeout=SOON_S)
    with pytest.raises(ConnectionFailed, match=str(unused_tcp_port)) as caught:
        await connector.open(f"http://127.0.0.1:{unused_tcp_port}")
    assert caught.value.definite
    await connector.close()


async def test_a_process_that_accepts_and_never_answers_is_given_up_in_time() -> None:
    ended: list[int] = []

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            writer.transport.abort()
            ended.append(1)

    server = await asyncio.start_server(never, "127.0.0.1", 0)
    connector = Connector(connect_timeout=0.3)
    port = server.sockets[0].getsockname()[1]
    for scheme in ("http", "https"):
        with pytest.raises(ConnectionFailed, match=r"within 0\.3 s"):
            await asyncio.wait_for(connector.open(f"{scheme}://127.0.0.1:{port}"), SOON_S)
    await connector.close()
    await poll(lambda: len(ended) == 2)
    server.close()
    await server.wait_closed()


async def test_a_peer_without_hello_is_given_up_in_time() -> None:
    async with peer(silence, hello=False) as url:
        with pytest.raises(ConnectionFailed):
            async with connected(url, connect_timeout=1):
                pass


@pytest.mark.parametrize("error", [UnsupportedVersion("1..1 and 2..3"), ClusterMismatch("another"), Forbidden("no")])
async def test_what_a_peer_refuses_a_hello_with_is_what_the_caller_gets(error: FerrylineError) -> None:
    async def refuse(ws: web.WebSocketResponse) -> None:
        frame = decode_frame((await ws.receive()).data)
        await ws.send_bytes(encode_error(frame.kind, frame.correlation, error))

    async with peer(refuse, hello=False) as url:
        with pytest.raises(type(error), match=error.message):
            async with connected(url):
                pass


@pytest.mark.parametrize(("status", "error"), [(401, BadCredentials), (403, Forbidden), (404, ConnectionFailed)])
async def test_an_upgrade_that_is_refused_is_told_by_its_reason(
    status: int, error: type[FerrylineError], aiohttp_free_app: Callable[[web.Application], Awaitable[str]]
) -> None:
    async def handle(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        return web.Response(status=status)

    app = web.Application()
    app.router.add_get("/v1/session", handle)
    connector = Connector(token="secret")
    with pytest.raises(error):
        await connector.open(await aiohttp_free_app(app))
    await connector.close()


@pytest.fixture
async def aiohttp_free_app() -> AsyncIterator[Callable[[web.Application], Awaitable[str]]]:
    runners: list[web.AppRunner] = []

    async def start(app: web.Application) -> str:
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def test_the_chain_and_the_host_name_are_verified(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    ours_ca, other_ca = tmp_path / "ours.crt", tmp_path / "other.crt"
    ours_ca.write_text(ours.ca_pem)
    other_ca.write_text(other.ca_pem)
    cert, key = ours.coordinator_files("c" * 32, ["localhost"])
    async with peer(silence, context=server_context(cert, key, ours_ca)) as url:
        for ca, good in ((ours_ca, True), (other_ca, False), (None, False)):
            connector = Connector(ca=str(ca) if ca else None)
            if good:
                session = await connector.open(url)
                assert session.peer.broker_id == 1
                await session.close()
            else:
                with pytest.raises(ConnectionFailed, match="not trusted"):
                    await connector.open(url)
            await connector.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1", "https://example.org/"])
def test_addresses_that_are_accepted(url: str) -> None:
    assert check_url(url) == url.rstrip("/")


# -- asking ------------------------------------------------------------------------------------------


async def test_answers_find_their_questions_in_any_order() -> None:
    async def backwards(ws: web.WebSocketResponse) -> None:
        frames = [decode_frame((await ws.receive()).data) for _ in range(3)]
        for frame in reversed(frames):
            await ws.send_bytes(encode_frame(frame.kind, frame.correlation, Done(frame.correlation), flags=FLAG_ANSWER))
        await silence(ws)

    async with peer(backwards) as url, connected(url) as session:
        found = await asyncio.gather(
            *(session.request(Kind.OFFSETS, Offsets([]), Done, timeout=SOON_S) for _ in range(3))
        )
        assert [done.coord_epoch for done, _ in found] == sorted(done.coord_epoch for done, _ in found)
        assert session.unanswered == 0


async def test_a_request_may_have_several_answers() -> None:
    async def several(ws: web.WebSocketResponse) -> None:
        frame = decode_frame((await ws.receive()).data)
        for number, flags in ((1, FLAG_ANSWER | FLAG_MORE), (2, FLAG_ANSWER | FLAG_MORE), (3, FLAG_ANSWER)):
            await ws.send_bytes(answer(frame, Done(number), flags))
        await ws.send_bytes(answer(frame, Done(4)))  # one too many
        await silence(ws)

    heard: list[Any] = []
    async with peer(several) as url, connected(url) as session:
        session.ask(Kind.OFFSETS, Offsets([]), (), lambda frame, error: heard.append((frame, error)))
        await poll(lambda: len(heard) == 3 and session.unanswered == 0)
        await asyncio.sleep(0.05)
        assert len(heard) == 3


async def test_an_error_answer_becomes_its_exception() -> None:
    async def refuse(ws: web.WebSocketResponse) -> None:
        frame = decode_frame((await ws.receive()).data)
        await ws.send_bytes(encode_error(frame.kind, frame.correlation, fl.UnknownTopic("nowhere", topic="t")))
        await silence(ws)

    async with peer(refuse) as url, connected(url) as session:
        with pytest.raises(fl.UnknownTopic) as caught:
            await ask(session)
        assert caught.value.details == {"topic": "t"}


async def test_no_answer_is_told_at_the_deadline_and_a_late_one_disturbs_nobody() -> None:
    async def late(ws: web.WebSocketResponse) -> None:
        frame = decode_frame((await ws.receive()).data)
        second = decode_frame((await ws.receive()).data)
        await ws.send_bytes(answer(frame, OffsetsAnswer([])))
        await ws.send_bytes(answer(second, OffsetsAnswer([])))
        await silence(ws)

    async with peer(late) as url, connected(url) as session:
        with pytest.raises(RequestTimedOut) as caught:
            await ask(session, timeout=0.1)
        assert not caught.value.definite
        assert await ask(session) == OffsetsAnswer([])


async def test_a_lost_connection_fails_everything_that_is_unanswered_as_perhaps_applied() -> None:
    async def leave(ws: web.WebSocketResponse) -> None:
        for _ in range(3):
            await ws.receive()
        assert ws._req is not None
        assert ws._req.transport is not None
        ws._req.transport.abort()

    lost: list[Session] = []
    async with peer(leave) as url, connected(url) as session:
        session.on_lost.append(lost.append)
        found = await asyncio.gather(*(ask(session) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in found] == [ConnectionLost] * 3
        assert not any(error.definite for error in found if isinstance(error, FerrylineError))
        assert lost == [session]
        assert not session.is_open
        with pytest.raises(ConnectionFailed) as caught:
            await ask(session)
        assert caught.value.definite, "nothing was sent"


@pytest.mark.parametrize(
    "nonsense", [b"", b"\x0c\x01", b"\xff" * 64, b"\x0c\x01\x00\x00" + b"\x02\0\0\0" + b"\xff" * 4]
)
async def test_bytes_that_are_no_frame_end_the_session_with_a_typed_error(nonsense: bytes) -> None:
    async def babble(ws: web.WebSocketResponse) -> None:
        await ws.receive()
        await ws.send_bytes(nonsense)
        await silence(ws)

    async with peer(babble) as url, connected(url) as session:
        with pytest.raises(ConnectionLost, match="not a frame"):
            await ask(session)


async def test_a_header_that_does_not_decode_fails_only_its_request() -> None:
    async def wrong(ws: web.WebSocketResponse) -> None:
        frame = decode_frame((await ws.receive()).data)
        await ws.send_bytes(answer(frame, ["not", "an", "answer"]))
        frame = decode_frame((await ws.receive()).data)
        await ws.send_bytes(answer(frame, OffsetsAnswer([])))
        await silence(ws)

    async with peer(wrong) as url, connected(url) as session:
        with pytest.raises(fl.errors.MalformedRequest, match="OffsetsAnswer"):
            await ask(session)
        assert await ask(session) == OffsetsAnswer([])


async def test_a_half_open_connection_is_found_by_its_missing_pong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PING_S", 0.2)
    pings = 0

    async def deaf(ws: web.WebSocketResponse) -> None:
        nonlocal pings
        async for message in ws:
            pings += message.type is WSMsgType.PING

    async with peer(deaf) as url, connected(url) as session:
        started = time.monotonic()
        with pytest.raises(ConnectionLost):
            await ask(session, timeout=60)
        assert time.monotonic() - started < SOON_S
        assert pings


async def test_a_congested_session_keeps_the_order_of_its_frames() -> None:
    numbers: list[int] = []

    async def slow(ws: web.WebSocketResponse) -> None:
        await asyncio.sleep(0.3)  # the client's buffers fill up meanwhile
        async for message in ws:
            frame = decode_frame(message.data)
            numbers.append(frame.correlation)
            await ws.send_bytes(answer(frame, Done()))

    heard: list[Any] = []
    async with peer(slow) as url, connected(url) as session:
        sent = [
            session.ask(Kind.PRODUCE, Done(), [b"x" * 300_000], lambda frame, error: heard.append(error))
            for _ in range(50)
        ]
        assert session._out.backlog, "nothing was held back: the test shows nothing"
        await poll(lambda: len(heard) == 50, within_s=10)
        assert numbers == sent
        assert heard == [None] * 50


async def test_closing_fails_what_is_unanswered_and_never_waits_long() -> None:
    async with peer(silence) as url, connected(url) as session:
        waiting = asyncio.create_task(ask(session, timeout=30))
        await asyncio.sleep(0.05)
        started = time.monotonic()
        await session.close()
        assert time.monotonic() - started < 5, "aiohttp alone waits 10 s for the other side's close"
        with pytest.raises(ClientClosed):
            await waiting


# -- connections and metadata ---------------------------------------------------------------------------


async def test_one_session_to_a_broker_is_shared_and_opened_once() -> None:
    async with FakeCluster(2) as cluster, fl.connect(cluster.coordinator.url) as client:
        sessions = await asyncio.gather(*(client.connections.session(1, timeout=SOON_S) for _ in range(20)))
        assert len(set(map(id, sessions))) == 1
        assert client.connections.ready(1) is sessions[0]
        assert client.connections.ready(9) is None
        with pytest.raises(fl.errors.PrimaryNotAvailable):
            await client.connections.session(9, timeout=1)


async def test_a_broker_behind_another_address_than_expected_is_not_used() -> None:
    async with FakeCluster(2) as cluster, fl.connect(cluster.coordinator.url) as client:
        cluster.brokers[1].endpoint.broker_id = 2
        with pytest.raises(ConnectionFailed, match="expected broker 1, found 2"):
            await client.connections.session(1, timeout=SOON_S)


async def test_another_cluster_at_the_same_address_is_refused() -> None:
    async with FakeCluster(1) as cluster, fl.connect(cluster.coordinator.url, timeout=SOON_S) as client:
        for node in (cluster.coordinator, cluster.brokers[1]):
            node.endpoint.cluster_id = "d" * 32
        with pytest.raises(ClusterMismatch):
            await client.connections.session(1, timeout=SOON_S)


async def test_a_change_of_the_metadata_arrives_at_once() -> None:
    async with FakeCluster(1) as cluster, fl.connect(cluster.coordinator.url) as client:
        cluster.create("new")
        await poll(lambda: client.routing.topic("new") is not None, within_s=SOON_S)


async def test_environment_names_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeCluster(1) as cluster:
        monkeypatch.setenv("FERRYLINE_URL", f"http://127.0.0.1:1, {cluster.coordinator.url}")
        monkeypatch.setenv("FERRYLINE_TOKEN", "t")
        async with fl.connect() as client:
            assert client.routing.cluster_id == cluster.cluster_id
            assert client.token == "t"


async def test_without_an_address_a_program_connects_as_the_command_line_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("FERRYLINE_URL", "FERRYLINE_CONTEXT", "FERRYLINE_TOKEN", "FERRYLINE_CA"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "config.toml"
    monkeypatch.setenv("FERRYLINE_CONFIG", str(file))
    async with FakeCluster(1) as cluster:
        file.write_text(
            f'current = "here"\n[contexts.here]\nurl = "{cluster.coordinator.url}"\ntoken = "of the context"\n'
        )
        async with fl.connect() as client:
            assert client.routing.cluster_id == cluster.cluster_id
            assert client.token == "of the context"
        monkeypatch.setenv("FERRYLINE_TOKEN", "of the environment")
        assert fl.connect().token == "of the environment"
        assert fl.connect(token="given").token == "given"
        assert fl.connect(cluster.coordinator.url, token="").token == "", (
            "an address of one cluster, no token of another"
        )
    file.write_text("current = 7")
    with pytest.raises(fl.errors.InvalidArgument, match="settings are wrong"):
        fl.connect()
