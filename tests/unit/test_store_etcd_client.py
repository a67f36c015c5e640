"""The client of etcd's gateway against gateways that answer badly, and the lease on a clock of the test's own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from ferryline_coordinator.store import etcd_client, etcd_lease
from ferryline_coordinator.store.etcd_client import EtcdClient, EtcdRefused, EtcdUnavailable
from ferryline_coordinator.store.etcd_lease import SAFE_PART, Lease
from ferryline_coordinator.store.etcd_requests import Values
from ferryline_coordinator.store.interface import StoreUnusable
from tests.polling import SOON_S

Handler = Callable[[web.Request], Awaitable[web.Response]]
Serve = Callable[[Handler], Awaitable[str]]


def good(cluster: int = 7, **fields: Any) -> web.Response:
    return web.json_response({"header": {"cluster_id": str(cluster), "revision": "3"}, **fields})


def refusal(status: int, code: int, message: str) -> web.Response:
    return web.json_response({"error": message, "message": message, "code": code}, status=status)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """One gateway on loopback for each handler; returns its URL."""
    runners: list[web.AppRunner] = []

    async def start(handler: Handler) -> str:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/v3/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}"

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., EtcdClient]]:
    made: list[EtcdClient] = []

    def make(*endpoints: str, **options: str) -> EtcdClient:
        made.append(EtcdClient(endpoints, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for client in made:
        await client.close()


async def test_a_dead_a_silent_and_a_leaderless_member_are_passed_over(
    serve: Serve, connect: Callable[..., EtcdClient], free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_client, "ATTEMPT_S", 2.0)  # time enough for the one that answers

    async def silent(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return good()

    async def leaderless(_: web.Request) -> web.Response:
        return refusal(503, 14, "etcdserver: no leader")

    async def healthy(_: web.Request) -> web.Response:
        return good(count="5")

    dead = f"http://127.0.0.1:{free_port()}"
    client = connect(dead, await serve(silent), await serve(leaderless), await serve(healthy))
    unanswered: list[str] = []
    answer = await client.call("kv/range", {}, within_s=30, unanswered=unanswered)
    assert answer["count"] == "5"
    assert len(unanswered) == 3, "each of them may have applied it, for all we know"
    again: list[str] = []
    await client.call("kv/range", {}, within_s=30, unanswered=again)
    assert again == [], "it stays with the one that answers"


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(text="<html>a proxy</html>", status=502),
        web.Response(text="[1, 2]"),
        web.Response(text='{"header": {"rev', status=200),
        refusal(503, 14, "etcdserver: request timed out"),
        refusal(500, 2, "etcdserver: leader changed"),
        refusal(429, 8, "etcdserver: too many requests"),
    ],
    ids=["proxy", "list", "torn", "timed out", "leader changed", "too many"],
)
async def test_what_is_no_answer_is_unavailable_after_the_time_given(
    serve: Serve, connect: Callable[..., EtcdClient], answer: web.Response
) -> None:
    body, status = answer.body, answer.status

    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=body, status=status)

    client = connect(await serve(handler))
    began = time.monotonic()
    with pytest.raises(EtcdUnavailable):
        await client.call("kv/txn", {}, within_s=0.3)
    assert 0.2 < time.monotonic() - began < SOON_S


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, 3, "etcdserver: request is too large"),
        (404, 5, "etcdserver: requested lease not found"),
        (403, 7, "etcdserver: permission denied"),
        (429, 8, "etcdserver: mvcc: database space exceeded"),
        (400, 11, "etcdserver: mvcc: required revision has been compacted"),
    ],
)
async def test_a_refusal_for_good_is_told_at_once(
    serve: Serve, connect: Callable[..., EtcdClient], status: int, code: int, message: str
) -> None:
    asked = 0

    async def handler(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return refusal(status, code, message)

    client = connect(await serve(handler))
    with pytest.raises(EtcdRefused, match=message) as refused:
        await client.call("kv/txn", {}, within_s=5)
    assert asked == 1
    found = (refused.value.not_found, refused.value.no_space, refused.value.compacted)
    assert found == (code == 5, code == 8, code == 11)


async def test_two_etcd_clusters_behind_one_list_of_endpoints_are_noticed(
    serve: Serve, connect: Callable[..., EtcdClient]
) -> None:
    down = False

    async def one(_: web.Request) -> web.Response:
        return refusal(503, 14, "etcdserver: no leader") if down else good(cluster=1)

    async def other(_: web.Request) -> web.Response:
        return good(cluster=2)

    client = connect(await serve(one), await serve(other))
    await client.call("kv/range", {}, within_s=SOON_S)
    down = True
    with pytest.raises(StoreUnusable, match="belongs to etcd cluster 2"):
        await client.call("kv/range", {}, within_s=SOON_S)


async def test_a_token_is_got_with_the_password_and_again_when_it_has_ended(
    serve: Serve, connect: Callable[..., EtcdClient]
) -> None:
    given, valid = 0, ""

    async def handler(request: web.Request) -> web.Response:
        nonlocal given, valid
        body = json.loads(await request.read())
        if request.path.endswith("auth/authenticate"):
            assert body == {"name": "coordinator", "password": "secret"}
            given += 1
            valid = f"token-{given}"
            return good(token=valid)
        if request.headers.get("Authorization") != valid:
            return refusal(401, 16, "etcdserver: invalid auth token")
        return good(count="1")

    client = connect(await serve(handler), user="coordinator", password="secret")
    assert (await client.call("kv/range", {}, within_s=SOON_S))["count"] == "1"
    assert (await client.call("kv/range", {}, within_s=SOON_S))["count"] == "1"
    assert given == 1
    valid = "gone"
    assert (await client.call("kv/range", {}, within_s=SOON_S))["count"] == "1"
    assert given == 2


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


async def test_a_lease_is_trusted_from_when_its_keep_alive_was_sent_and_not_a_moment_longer(
    serve: Serve, connect: Callable[..., EtcdClient], eventually: Callable[..., Awaitable[Any]]
) -> None:
    clock, kept, answered = Clock(), 0, True

    async def handler(request: web.Request) -> web.Response:
        nonlocal kept
        if request.path.endswith("lease/grant"):
            clock.now += 1.0  # the answer took a second: that second is not ours
            return good(ID="99", TTL="5")
        if not answered:
            return refusal(503, 14, "etcdserver: no leader")
        kept += 1
        clock.now += 0.25
        return web.json_response({"result": {"header": {"cluster_id": "7"}, "ID": "99", "TTL": "5"}})

    lease = Lease(connect(await serve(handler)), 5.0, clock)
    assert not lease.holds()
    await lease.grant()
    assert lease.id == 99
    assert lease.left_s() == pytest.approx(5.0 * SAFE_PART - 1.0)
    await eventually(lambda: kept == 1)
    await eventually(lambda: lease.left_s() == pytest.approx(5.0 * SAFE_PART - 0.25))
    answered = False
    clock.now += 5.0 * SAFE_PART - 0.26
    assert lease.holds()
    clock.now += 0.02
    assert not lease.holds(), "by the clock alone, whether the loop has come round or not"
    await asyncio.wait_for(lease.ended.wait(), SOON_S)
    assert lease.id == 0
    await lease.stop()


async def test_a_lease_that_etcd_does_not_know_any_more_has_ended(
    serve: Serve, connect: Callable[..., EtcdClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_lease, "KEEP_PART", 0.01)

    async def handler(request: web.Request) -> web.Response:
        if request.path.endswith("lease/grant"):
            return good(ID="99", TTL="5")
        return web.json_response({"result": {"header": {"cluster_id": "7"}, "ID": "99"}})

    lease = Lease(connect(await serve(handler)), 5.0)
    await lease.grant()
    await asyncio.wait_for(lease.ended.wait(), SOON_S)
    assert not lease.holds()
    await lease.stop()


def test_values_come_back_as_they_went_in_and_nothing_else_does() -> None:
    plain = Values()
    for value in (b"", b"x", b"ab" * 10_000, bytes(range(256)) * 30):
        assert plain.unwrap("k", plain.wrap("k", value)) == value
    assert len(plain.wrap("k", b"ab" * 10_000)) < 1_000
    for broken in (b"", b"\x01not compressed", b"\x02sealed", b"\x09later"):
        with pytest.raises(StoreUnusable):
            plain.unwrap("k", broken)
