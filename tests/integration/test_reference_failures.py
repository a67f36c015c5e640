"""What the project that Ferryline comes from promised and did not do: each of it as a test against real processes.

1. it promoted a secondary through a path that the broker did not serve
2. it replicated after the producer had been answered
3. a broker that restarted had forgotten its partitions
4. its client lost the order of a key
5. its tests printed "passed" after data was lost
"""

from __future__ import annotations

import asyncio
import time

import pytest

import ferryline as fl
from ferryline.cli.drill import healed, partitions_of
from ferryline.cli.driver import ProcessCluster
from tests.integration.kill_campaign import fits, run_seed

pytestmark = pytest.mark.process

TOPIC = "reference"


async def topic_with(client: fl.Client, partitions: int = 1) -> None:
    await client.admin.create_topic(TOPIC, partitions=partitions, replication=2)
    assert await healed(client, TOPIC, partitions, 2, 60.0)


async def test_a_promoted_secondary_really_serves(cluster: ProcessCluster) -> None:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client, client.producer() as producer:
        await topic_with(client)
        await producer.send(TOPIC, b"before", key="k")
        part = partitions_of(client, TOPIC)[0]
        await cluster.kill(cluster.name_of(part.primary))
        async with asyncio.timeout(10):
            await producer.send(TOPIC, b"after", key="k")
        now = partitions_of(client, TOPIC)[0]
        assert now.primary in part.replicas
        assert now.primary != part.primary
        async with client.consumer(TOPIC) as consumer:
            values: list[bytes | None] = []
            while len(values) < 2:
                values += [message.raw for message in await consumer.pull(10, 5.0)]
        assert values == [b"before", b"after"]


async def test_an_acknowledged_record_is_on_the_secondary_when_the_primary_dies_at_that_moment(
    cluster: ProcessCluster,
) -> None:
    """The primary is killed as soon as the acknowledgement is here, again and again: there is no later."""
    acked: list[bytes] = []
    async with fl.connect(cluster.urls, ca=cluster.ca) as client, client.producer(linger=0) as producer:
        await topic_with(client)
        for number in range(4):
            value = b"record %d" % number
            await producer.send(TOPIC, value, key="k")
            victim = cluster.name_of(partitions_of(client, TOPIC)[0].primary)
            await cluster.kill(victim)
            acked.append(value)
            value = b"next to %d" % number
            await producer.send(TOPIC, value, key="k")
            acked.append(value)
            await cluster.restart(victim)
            assert await healed(client, TOPIC, 1, 2, 60.0)
    assert await read_all(cluster, len(acked)) == acked


async def test_a_restarted_broker_remembers_its_partitions(start_cluster: object) -> None:
    """One broker, one copy: what it forgets is gone."""
    cluster: ProcessCluster = await start_cluster(brokers=1)  # type: ignore[operator]
    async with fl.connect(cluster.urls, ca=cluster.ca) as client, client.producer() as producer:
        await client.admin.create_topic(TOPIC, partitions=3, replication=1)
        sent = [b"%d" % number for number in range(300)]
        assert all(isinstance(one, fl.RecordMetadata) for one in await producer.send_many(TOPIC, sent))
        for _ in range(2):
            await cluster.kill("broker-1")
            await cluster.restart("broker-1")
        await producer.send(TOPIC, b"last")
    found = await read_all(cluster, 301)
    assert sorted(found) == sorted([*sent, b"last"])


async def test_the_order_of_a_key_survives_retries_in_the_client(cluster: ProcessCluster) -> None:
    """Many batches in flight while primaries are killed: whatever is sent again stays behind what came before it."""
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await topic_with(client)
        async with client.producer(linger=0, batch_bytes=1024) as producer:
            futures = []
            for number in range(6_000):
                futures.append(producer.send_nowait(TOPIC, b"%d" % number, key="k"))
                if number == 3_000:
                    victim = cluster.name_of(partitions_of(client, TOPIC)[0].primary)
                    await cluster.kill(victim)
                if number % 20 == 0:
                    await asyncio.sleep(0.001)
            await producer.flush()
            offsets = [(await future).offset for future in futures]
    assert offsets == sorted(offsets)
    assert len(set(offsets)) == len(offsets)
    assert await read_all(cluster, 6_000) == [b"%d" % number for number in range(6_000)]


async def test_a_test_fails_when_data_is_lost(start_cluster: object) -> None:
    """The program of the kill campaign says so when a broker acknowledges before it replicates."""
    from ferryline.cli.drill import Plan

    env = {"FERRYLINE_ALLOW_SABOTAGE": "1", "FERRYLINE_SABOTAGE": "ack-before-replicate"}
    accounts = []
    for seed in (3, 4, 5):  # on a busy machine next to nothing may be on its way when the broker dies
        plan = Plan(records=30_000, keys=8, partitions=8, seed=seed, fault="kill-ahead", delivery_s=6.0, recovery_s=6.0)
        accounts.append(await run_seed(plan, env=env))
        if not fits(accounts[-1]):
            return
    pytest.fail(f"nothing was found: {accounts}")


async def read_all(cluster: ProcessCluster, count: int) -> list[bytes]:
    """All values of the topic, as a fresh client reads them."""
    values: list[bytes] = []
    end = time.monotonic() + 90
    async with fl.connect(cluster.urls, ca=cluster.ca) as client, client.consumer(TOPIC) as consumer:
        while len(values) < count:
            assert time.monotonic() < end, f"{len(values)} of {count} records"
            values += [message.raw or b"" for message in await consumer.pull(10_000, 1.0)]
        values += [message.raw or b"" for message in await consumer.pull(10, 0.5)]
    return values
