"""Every block of docs/queues.md, run as it stands there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.drill import healed
from ferryline.cli.driver import ProcessCluster
from tests.polling import poll

pytestmark = pytest.mark.process

PAGE = Path(__file__).resolve().parents[2] / "docs/queues.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
async def client(cluster: ProcessCluster, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[fl.Client]:
    monkeypatch.setenv("FERRYLINE_URL", ",".join(cluster.urls))
    monkeypatch.setenv("FERRYLINE_CA", str(cluster.ca))
    async with fl.connect() as client:
        await client.admin.create_topic("jobs", partitions=3, replication=2)
        assert await healed(client, "jobs", 3, 2, 60.0)
        yield client


async def unsettled(client: fl.Client, group: str) -> int:
    """How many records a group has not done yet; -1 before it has received anywhere."""
    try:
        return sum(part.unsettled for part in await client.queue("jobs", group).stats())
    except fl.UnknownGroup:
        return -1


async def run_until(work: Coroutine[Any, Any, Any], done: Callable[[], Awaitable[bool]]) -> None:
    """Run what would run for ever until something is done."""
    task = asyncio.create_task(work)

    async def enough() -> bool:
        assert not task.done(), task.result()
        return await done()

    try:
        await poll(enough, within_s=20)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def dead(client: fl.Client) -> list[str]:
    """Why records are in the dead letters."""
    await poll(lambda: client.routing.topic("jobs.dlq") is not None, within_s=10)
    async with client.consumer("jobs.dlq") as consumer:
        return sorted(message.headers.text("fl-dead-reason") for message in await consumer.pull(100, 2.0))


async def test_every_block_of_the_page_on_queues_runs(client: fl.Client, capsys: pytest.CaptureFixture[str]) -> None:
    page: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), page)
    job = page["Job"]
    async with client.producer(linger=0) as producer:
        for number in range(20):
            await producer.send("jobs", job(f"u{number}", number), key=f"k{number % 5}")
        await producer.send("jobs", job("wide", 20_000), key="wide")
        await producer.send("jobs", b"not json", key="k1")

    async def all_done(group: str) -> bool:
        return await unsettled(client, group) == 0

    await run_until(page["work"](), lambda: all_done("media"))
    (unreadable,) = await dead(client)
    assert "does not parse as Job" in unreadable

    async def too_wide() -> bool:
        return "too wide" in await dead(client)

    await run_until(page["careful"](client), too_wide)
    assert await page["in_batches"](client) == 0
    assert await unsettled(client, "batches") == 0
    await run_until(page["many_at_once"](client), lambda: all_done("parallel"))
    await asyncio.to_thread(page["blocking"], 20)
    assert len(capsys.readouterr().out.splitlines()) >= 19, "all of the 20 but the one that does not parse"
