"""Disks of real brokers that rot, fill up or fail: the brokers find it, say so and mend it, and nobody has to help."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl
from ferryline.admin import PartitionInfo
from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.records import split_batches

pytestmark = pytest.mark.process

TOPIC = "orders"
WITHIN_S = 40.0
Eventually = Callable[..., Awaitable[Any]]


async def the_part(client: fl.Client) -> PartitionInfo:
    (part,) = (await client.admin.describe_topic(TOPIC)).partitions
    return part


async def folder_of(cluster: ProcessCluster, client: fl.Client, broker: int) -> Path:
    """Where a broker keeps its copy."""
    topic = await client.admin.describe_topic(TOPIC)
    root = cluster.local.data_dir(cluster.name_of(broker))
    return next(path for path in root.glob(f"*/partitions/{topic.id}-0") if path.is_dir())


async def send(client: fl.Client, first: int, count: int) -> None:
    async with client.producer() as producer:
        for number in range(first, first + count):
            await producer.send(TOPIC, b"%d" % number)


async def values(client: fl.Client) -> list[int]:
    """Everything that a reader gets."""
    found: list[int] = []
    async with client.consumer(TOPIC, start="start") as consumer:
        while batch := await consumer.pull(max_wait=2.0):
            found += [int(message.value) for message in batch]
    return found


@pytest.mark.parametrize("role", ["secondary", "primary"])
async def test_rot_in_the_segment_that_is_being_written_is_found_and_mended_though_nobody_reads_it(
    start_cluster: Callable[..., Awaitable[ProcessCluster]], eventually: Eventually, role: str
) -> None:
    cluster = await start_cluster(brokers=2, broker_args=["--retention-ms", "500"])
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic(TOPIC, partitions=1, replication=2)
        await send(client, 0, 50)
        before = await the_part(client)
        assert set(before.isr) == set(before.replicas)
        victim = next(broker for broker in before.replicas if (broker == before.primary) == (role == "primary"))
        folder = await folder_of(cluster, client, victim)
        (segment,) = (folder / "records").glob("*.log")
        assert not list((folder / "records").glob("*.seal"))
        at, header = split_batches(segment.read_bytes())[20]
        with segment.open("r+b") as file:
            file.seek(at + header.size - 5)
            byte = file.read(1)[0]
            file.seek(at + header.size - 5)
            file.write(bytes([byte ^ 0x10]))

        async def whole_again() -> bool:
            return (folder / "damaged-1").is_dir() and victim in (await the_part(client)).isr

        await eventually(whole_again, within_s=WITHIN_S)
        assert "scrubber found damage" in cluster.logs(cluster.name_of(victim))
        (mended,) = (folder / "records").glob("*.log")
        split_batches(mended.read_bytes())  # every checksum holds
        await send(client, 50, 10)
        assert await values(client) == list(range(60))
