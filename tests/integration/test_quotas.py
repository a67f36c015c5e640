"""Quotas in a real cluster: who is over one waits, loses nothing and needs no code for it; Redis shares them."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from tests.integration.quota_campaign import RATE, WITHIN, Key, run
from tests.polling import poll

pytestmark = pytest.mark.process

ACCESS = """
[[principals]]
name = "root"
grants = [{{resource = "cluster", actions = ["manage"]}}, {{resource = "topic", actions = ["manage"]}}]
keys = [{root}]

[[principals]]
name = "records"
grants = [{{resource = "topic", actions = ["read", "write"]}}, {{resource = "group", actions = ["manage"]}}]
quota = {{records = 500}}
keys = [{records}]

[[principals]]
name = "requests"
grants = [{{resource = "topic", actions = ["read"]}}, {{resource = "group", actions = ["manage"]}}]
quota = {{requests = 20}}
keys = [{requests}]

[[principals]]
name = "one-session"
quota = {{connections = 1}}
keys = [{sessions}]

[[principals]]
name = "keeper"
grants = [{{resource = "topic", pattern = "kept*", actions = ["manage"]}}]
quota = {{stored_bytes = 200000}}
keys = [{keeper}]
"""
COUNT = 1_500


class Limited:
    """A cluster of one broker with a principal for each kind of quota."""

    def __init__(self, cluster: ProcessCluster, keys: dict[str, Key]) -> None:
        self.cluster = cluster
        self.keys = keys
        self.context = ssl.create_default_context(cafile=cluster.ca)

    def connect(self, who: str) -> fl.Client:
        return fl.connect(self.cluster.url, ca=str(self.cluster.ca), token=self.keys[who].token)

    @asynccontextmanager
    async def http(self, who: str) -> AsyncIterator[aiohttp.ClientSession]:
        headers = {"Authorization": f"Bearer {self.keys[who].token}"}
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=self.context)) as session:
            yield session


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    folder = tmp_path_factory.mktemp("quotas")
    keys = {name: Key() for name in ("root", "records", "requests", "sessions", "keeper")}
    file = folder / "access.toml"
    file.write_text(ACCESS.format(**{name: key.toml for name, key in keys.items()}))
    cluster = ProcessCluster(folder, brokers=1, coordinator_args=["--access", str(file)])
    cluster.local.start()
    yield Limited(cluster, keys)
    cluster.local.kill_all()


def least_s(records: int, rate: int, answer: int) -> float:
    """What ``records`` take at least: a second of the rate is there at once, and the last answer is not waited for."""
    return (records - rate - answer) / rate


async def test_a_producer_a_consumer_and_a_receiver_over_their_quota_wait_and_lose_nothing(limited: Limited) -> None:
    async with limited.connect("root") as root:
        await root.admin.create_topic("orders", partitions=2, replication=1, flush="replicated")
    async with limited.connect("records") as client:
        began = time.monotonic()
        async with client.producer(batch_bytes=4 * 1024) as producer:
            futures = [producer.send_nowait("orders", f"{n}", key=f"k{n % 7}") for n in range(COUNT)]
            stored = await asyncio.gather(*futures)
        assert time.monotonic() - began >= least_s(COUNT, 500, 300)
        assert len({(one.partition, one.offset) for one in stored}) == COUNT  # each once, none in the place of another

        began, seen = time.monotonic(), {}
        async with client.consumer("orders", start="start", value=str) as consumer:
            async for message in consumer:
                seen.setdefault(message.key, []).append(int(message.value))
                if sum(map(len, seen.values())) == COUNT:
                    break
        assert sorted(n for numbers in seen.values() for n in numbers) == list(range(COUNT))
        assert all(numbers == sorted(numbers) for numbers in seen.values())

        done = 0
        async with client.receiver("orders", group="packing", value=str) as receiver:
            async for received in receiver:
                async with received.processing():
                    done += 1
                if done == 1_000:
                    break
    assert await refused(limited) > 0


async def refused(limited: Limited) -> float:
    """How often the broker has said QUOTA_EXCEEDED."""
    async with limited.http("root") as http, http.get(f"{limited.cluster.urls[1]}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("ferryline_quota_refused_total"))


async def test_administration_obeys_retry_after_and_a_program_without_a_client_is_told_it(limited: Limited) -> None:
    async with limited.connect("requests") as client:
        began = time.monotonic()
        for _ in range(60):
            await client.admin.list_groups(timeout=60.0)
        assert time.monotonic() - began >= least_s(60, 20, 1)
    async with limited.http("requests") as http:
        for _ in range(200):
            async with http.get(f"{limited.cluster.url}/v1/groups") as response:
                if response.status == 429:
                    problem = await response.json()
                    break
                assert response.status == 200
        else:
            pytest.fail("200 requests were let in one after the other")
    assert problem["code"] == "QUOTA_EXCEEDED"
    assert problem["retriable"]
    assert problem["details"]["quota"] == "requests"
    assert 1 <= int(response.headers["Retry-After"]) <= 3


async def test_sessions_over_the_quota_are_refused_until_one_has_ended(limited: Limited) -> None:
    url = f"{limited.cluster.urls[1]}/v1/session"
    async with limited.http("sessions") as http:
        first = await http.ws_connect(url)
        with pytest.raises(aiohttp.WSServerHandshakeError) as over:
            await http.ws_connect(url)
        assert over.value.status == 429
        assert over.value.headers is not None
        assert over.value.headers["Retry-After"] == "1"
        await first.close()

        async def opened() -> bool:
            try:
                await (await http.ws_connect(url)).close()
            except aiohttp.WSServerHandshakeError:
                return False
            return True

        await poll(opened)


async def test_whoever_holds_too_much_may_read_and_delete_but_not_write(limited: Limited) -> None:
    async with limited.connect("keeper") as client:
        made = await client.admin.create_topic("kept", partitions=1, replication=1)
        assert made.owner == "keeper"
        await client.admin.create_topic("kept-too", partitions=1, replication=1)
    broker = limited.cluster.urls[1]
    async with limited.http("keeper") as http, limited.http("root") as root:

        async def writes(topic: str, size: int) -> int:
            records = {"records": [{"value": "x" * size}]}
            async with http.post(f"{broker}/v1/topics/{topic}/records", json=records) as response:
                problem = await response.json()
                if response.status == 429:
                    assert problem["details"]["quota"] == "stored_bytes"
                    assert response.headers["Retry-After"] == "5"
            return response.status

        for _ in range(3):
            assert await writes("kept", 100_000) == 200
        await poll(lambda: _is(writes("kept-too", 1), 429), within_s=30)  # all topics of the owner count
        assert await writes("kept", 1) == 429
        async with http.get(f"{broker}/v1/topics/kept/partitions/0/records?limit=1") as response:
            assert response.status == 200
        async with root.post(f"{broker}/v1/topics/kept/records", json={"records": [{"value": "x"}]}) as response:
            assert response.status == 200  # it is the writer who has to have room
        async with limited.connect("keeper") as client:
            await client.admin.delete_topic("kept")
        await poll(lambda: _is(writes("kept-too", 1), 200), within_s=30)


async def _is(status: object, wanted: int) -> bool:
    return await status == wanted  # type: ignore[misc]


@pytest.mark.redis
async def test_two_brokers_share_a_quota_and_go_on_with_their_share_when_redis_is_killed(tmp_path: Path) -> None:
    """The campaign, in short: its windows are as narrow as a slow machine allows."""
    campaign = await run(tmp_path, 6.0, short=True)
    for window in campaign.windows:
        assert not window.failed, window
        assert window.refused > 0, window
        assert window.admitted <= window.expected * (1 + 3 * WITHIN), window
        assert window.admitted >= window.expected / 2, window
    assert {window.expected for window in campaign.windows} == {RATE, RATE // 2}
