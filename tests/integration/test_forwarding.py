"""Records posted to a broker that does not lead their partition: stored once, whatever happens to the one that does."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from typing import Any

import aiohttp
import pytest

import ferryline as fl
from ferryline.cli.drill import healed
from ferryline.cli.driver import ProcessCluster

pytestmark = pytest.mark.process

TOPIC, PARTITIONS, POSTERS, POSTS = "forwarded", 3, 8, 40


async def post(http: aiohttp.ClientSession, url: str, value: str, partition: int) -> tuple[int, Any]:
    records = {"records": [{"value": value, "partition": partition}]}
    async with http.post(f"{url}/v1/topics/{TOPIC}/records", json=records) as response:
        return response.status, await response.json(content_type=None)


async def everything(client: fl.Client) -> Counter[str]:
    """How often each value is in the topic."""
    found: Counter[str] = Counter()
    async with client.consumer(TOPIC) as consumer:
        while messages := await consumer.pull(1000, 2.0):
            found.update(message.raw.decode() for message in messages)
    return found


async def test_what_is_forwarded_is_stored_once_while_its_primary_is_killed(start_cluster: Any) -> None:
    cluster: ProcessCluster = await start_cluster(brokers=3)
    stored: set[str] = set()
    definite: set[str] = set()
    context = ssl.create_default_context(cafile=str(cluster.ca))
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic(TOPIC, partitions=PARTITIONS, replication=2)
        assert await healed(client, TOPIC, PARTITIONS, 2, 60.0)
        info = await client.admin.describe_topic(TOPIC)
        victim = cluster.name_of(info.partitions[0].primary)
        asked = cluster.url_of(next(name for name in cluster.brokers if name != victim))
        killed = asyncio.Event()

        async def poster(number: int, http: aiohttp.ClientSession) -> None:
            for step in range(POSTS):
                value = f"{number}-{step}"
                status, body = await post(http, asked, value, (number + step) % PARTITIONS)
                if status == 200:
                    stored.add(value)
                elif body["definite"]:
                    definite.add(value)
                    await asyncio.sleep(0.05)
                if len(stored) > POSTERS * POSTS // 4 and not killed.is_set():
                    killed.set()
                    await cluster.kill(victim)

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http:
            await asyncio.gather(*(poster(number, http) for number in range(POSTERS)))
        assert killed.is_set()
        found = await everything(client)
    assert stored <= set(found), "what was answered with 200 is there"
    assert not definite & set(found), "what was surely refused is not"
    assert set(found.values()) == {1}, "nothing is there twice"
    assert len(stored) > POSTERS * POSTS // 3, "most went on after the kill, or before it"
