"""Streams over REST with access on: they end with the key that opened them, also while records keep coming."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.contract_campaign import TOPICS, Curl, running

pytestmark = pytest.mark.process


async def last_event(url: str, key: str, context: ssl.SSLContext, began: asyncio.Event) -> dict[str, Any]:
    """What a stream says at its end."""
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
    name, said = "", {}
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers, ssl=context) as response:
        assert response.status == 200
        async for raw in response.content:
            began.set()
            field, _, value = raw.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data" and name == "end":
                said = json.loads(value)
    return said


async def watched(curl: Curl, ca: Path, busy: str, idle: str, record: str) -> list[str]:
    """Codes with which a busy and an idle stream end when their key is revoked."""
    granted = [{"resource": "topic", "pattern": TOPICS[0], "actions": ["read"]}]
    curl("POST", f"{curl.url}/v1/principals", {"name": "reader", "grants": granted})
    key = await asyncio.to_thread(curl, "POST", f"{curl.url}/v1/principals/reader/keys", {"expires_ms": 0})
    context, began = ssl.create_default_context(cafile=str(ca)), [asyncio.Event(), asyncio.Event()]
    streams = [
        asyncio.create_task(last_event(url, key["key"], context, event))
        for url, event in zip((busy, idle), began, strict=True)
    ]

    async def write() -> None:
        while True:
            await asyncio.to_thread(curl, "POST", record, {"records": [{"value": "more", "partition": 0}]})

    writer = asyncio.create_task(write())
    try:
        async with asyncio.timeout(60):
            for event in began:
                await event.wait()
            path = f"{curl.url}/v1/principals/reader/keys/{key['id']}"
            assert await asyncio.to_thread(curl, "DELETE", path) is not None
            return [said["code"] for said in await asyncio.gather(*streams)]
    finally:
        writer.cancel()
        for stream in streams:
            stream.cancel()
        await asyncio.gather(writer, *streams, return_exceptions=True)


async def test_streams_end_with_their_key(tmp_path: Path) -> None:
    with running(tmp_path / "cluster", access=True) as (cluster, curl, _):
        parts = {part["partition"]: part for part in curl("GET", f"{curl.url}/v1/topics/{TOPICS[0]}")["partitions"]}
        brokers = {one["id"]: one["external"] for one in curl("GET", f"{curl.url}/v1/brokers")["brokers"]}
        urls = [f"{brokers[parts[n]['primary']]}/v1/topics/{TOPICS[0]}/partitions/{n}/records" for n in (0, 1)]
        record = f"{cluster.urls[1]}/v1/topics/{TOPICS[0]}/records"
        codes = await watched(curl, cluster.ca, f"{urls[0]}?offset=start", f"{urls[1]}?offset=start", record)
        assert codes == ["BAD_CREDENTIALS", "BAD_CREDENTIALS"]
