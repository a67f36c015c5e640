"""The cluster in containers: what `make up` starts serves, survives a dead container, grows, and keeps its data.

One story, told in order, because each cluster takes seconds to start. The images are those of this tree:
`make test-containers` builds them first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl
from tests.integration.docker_driver import DockerCluster

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]

TOPIC, PARTITIONS, KEYS = "orders", 6, 16
Eventually = Callable[..., Awaitable[Any]]


@pytest.fixture
def cluster() -> Iterator[DockerCluster]:
    """A compose project of its own: name, volumes and port collide with nobody's."""
    volumes = Path(tempfile.mkdtemp(prefix="ferryline-compose-"))
    project = f"ferryline-smoke-{os.getpid()}"
    yield DockerCluster(project, volumes)
    # Whatever happened, no container, network or file stays.
    environment = {**os.environ, "FERRYLINE_VOLUMES": str(volumes)}
    down = ["scripts/compose", "--project-name", project, "down", "--volumes", "--remove-orphans", "--timeout", "10"]
    subprocess.run(down, env=environment, cwd=Path(__file__).resolve().parents[2], capture_output=True, check=True)
    shutil.rmtree(volumes)


@asynccontextmanager
async def connected(cluster: DockerCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.url, ca=cluster.ca) as client:
        yield client


class Traffic:
    """Numbers that rise within each key; remembers what was acknowledged."""

    def __init__(self) -> None:
        self.sent = [0] * KEYS
        self.acknowledged: dict[bytes, list[int]] = {b"k%d" % key: [] for key in range(KEYS)}

    async def send(self, producer: Any, count: int) -> None:
        """``count`` records to each key, one key after the other in flight at the same time."""

        async def one(key: int) -> None:
            for _ in range(count):
                number = self.sent[key]
                self.sent[key] += 1
                await producer.send(TOPIC, b"%d" % number, key=b"k%d" % key)
                self.acknowledged[b"k%d" % key].append(number)

        await asyncio.gather(*(one(key) for key in range(KEYS)))

    @property
    def total(self) -> int:
        return sum(map(len, self.acknowledged.values()))


async def read_all(client: fl.Client, group: str, count: int) -> dict[bytes, list[int]]:
    """What the topic holds, by key in the order of arrival; gives up by the test's time limit."""
    seen: dict[bytes, list[int]] = {}
    got = 0
    async with client.consumer(TOPIC, group=group) as consumer:
        async for message in consumer:
            seen.setdefault(message.key, []).append(int(message.raw))
            got += 1
            if got >= count:
                return seen
    raise AssertionError("the consumer ended by itself")


async def test_a_compose_cluster_serves_survives_grows_and_keeps_its_data(
    cluster: DockerCluster, eventually: Eventually
) -> None:
    traffic = Traffic()

    # 1. three brokers, no root inside, and records come back in order
    await cluster.start()
    assert len(cluster.brokers) == 3
    for name in ["coordinator", *cluster.brokers]:
        assert int(await in_container(cluster, name, "cat /proc/1/status | grep ^Uid: | cut -f2")) != 0, name
    async with connected(cluster) as client:
        await client.admin.create_topic(TOPIC, partitions=PARTITIONS, replication=2)
        async with client.producer() as producer:
            await traffic.send(producer, 20)
            assert await read_all(client, "first", traffic.total) == traffic.acknowledged

            # 2. a container dies in the middle; whoever was sending goes on, and nothing is missing
            sending = asyncio.create_task(traffic.send(producer, 60))
            await eventually(lambda: traffic.total > KEYS * 30, within_s=30)
            await cluster.kill(cluster.brokers[0])
            await asyncio.wait_for(sending, 60)
        assert await read_all(client, "second", traffic.total) == traffic.acknowledged
        await cluster.restart(cluster.brokers[0])

        # 3. from three brokers to five
        await cluster.add_broker()
        await cluster.add_broker()
        ids = [cluster.broker_id(name) for name in cluster.brokers]
        assert len(set(ids)) == 5, ids
        async with client.producer() as producer:
            await traffic.send(producer, 20)

    # 4. all containers away and back: other containers, other addresses, the same data
    await cluster.stop()
    again = DockerCluster(cluster.project, cluster._volumes, brokers=5)
    await again.start()
    assert sorted(again.broker_id(name) for name in again.brokers) == sorted(ids)
    async with connected(again) as client:
        assert await read_all(client, "third", traffic.total) == traffic.acknowledged
    assert Counter(map(len, traffic.acknowledged.values())) == {100: KEYS}
    await again.stop()


async def in_container(cluster: DockerCluster, name: str, command: str) -> str:
    """Output of a shell command inside a container."""
    done = await asyncio.to_thread(cluster._container(name).exec_run, ["sh", "-c", command])
    assert done.exit_code == 0, done.output
    return bytes(done.output).decode().strip()
