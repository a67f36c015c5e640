"""Changes find the active coordinator, and are not held up by one that is silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

import ferryline as fl
from ferryline.protocol.errors import CoordinatorStandby, RequestTimedOut
from ferryline.protocol.metadata import MetadataAnswer
from tests.polling import SOON_S

Serve = Callable[[str, str], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """A coordinator that is "active", on "standby" (naming ``active``), or "silent"."""
    runners: list[web.AppRunner] = []

    async def start(kind: str, active: str = "") -> str:
        async def handler(_: web.Request) -> web.Response:
            if kind == "silent":
                await asyncio.sleep(30)
            if kind == "active":
                return web.json_response({"groups": [{"group": "found"}]})
            details = {"active": active} if active else {}
            problem = {"code": CoordinatorStandby.code, "detail": "on standby", "details": details}
            return web.json_response(problem, status=503)

        app = web.Application()
        app.router.add_get("/v1/groups", handler)
        app.router.add_delete("/v1/groups/{group}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


def known(urls: list[str]) -> fl.Client:
    """A client that has its first picture of the cluster: these coordinators have no sessions."""
    client = fl.connect(urls, timeout=60)
    client.watch.take(MetadataAnswer("c", 1, 1, True))
    return client


async def test_a_standby_is_passed_over_and_its_hint_followed(serve: Serve) -> None:
    active = await serve("active", "")
    standby, ignorant = await serve("standby", active), await serve("standby", "")
    client = known([ignorant, standby])
    try:
        assert await client.admin.list_groups() == [{"group": "found"}]
        await client.admin.delete_group("found")
    finally:
        await client.close()


async def test_without_an_active_one_a_change_ends_in_time_and_was_surely_not_made(serve: Serve) -> None:
    client = known([await serve("standby", ""), await serve("standby", "")])
    try:
        began = time.monotonic()
        with pytest.raises((CoordinatorStandby, RequestTimedOut)):
            await client.admin.delete_group("g", timeout=0.5)
        assert time.monotonic() - began < SOON_S
    finally:
        await client.close()


async def test_a_silent_coordinator_costs_its_time_once(serve: Serve) -> None:
    silent, active = await serve("silent", ""), await serve("active", "")
    client = known([silent, active])
    try:
        with pytest.raises(RequestTimedOut):
            await client.admin.delete_group("g", timeout=0.5)
        began = time.monotonic()
        await client.admin.delete_group("g", timeout=30)
        assert time.monotonic() - began < 5, "asking the silent one again costs ten seconds"
    finally:
        await client.close()
