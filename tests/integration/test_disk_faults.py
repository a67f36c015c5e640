"""Disks of real brokers that rot, fill up or fail: the brokers find it, say so and mend it, and nobody has to help."""

from __future__ import annotations

import asyncio
import json
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
SWITCHES = "faults.json"  # in the folder of each broker, which is its working directory
FAULTS = {"FERRYLINE_ALLOW_SABOTAGE": "1", "FERRYLINE_TEST_FAULTS": SWITCHES}
ROOM = ("--disk-reserve-bytes", "1048576", "--disk-reserve-percent", "0")  # this disk holds other things, too
SPACE_AGAIN = 75
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


def disk(cluster: ProcessCluster, name: str, write: str) -> None:
    """Let writes of that broker fail from now on, or no more."""
    path = cluster.local.services[name].folder / SWITCHES
    temp = path.with_suffix(".new")
    temp.write_text(json.dumps({"write": write}))
    temp.rename(path)


def keep_running(cluster: ProcessCluster, ends: list[tuple[str, int | None]]) -> None:
    """What a supervisor does: start again whoever has ended."""
    for service in list(cluster.local.ended()):
        ends.append((service.name, service.process.returncode if service.process is not None else None))
        cluster.local.spawn(service.name)


async def refused(client: fl.Client, within_s: float) -> fl.FerrylineError:
    """The first failed send that knows why."""
    async with client.producer(delivery_timeout=1.5) as producer, asyncio.timeout(within_s):
        while True:
            try:
                await producer.send(TOPIC, b"-1")
            except fl.FerrylineError as error:
                if "bytes are free" in str(error):
                    return error


@pytest.mark.parametrize("copies", [pytest.param(1, marks=pytest.mark.slow), 2])
async def test_disks_that_are_full_cost_nothing_and_everything_comes_back_once_there_is_space(
    start_cluster: Callable[..., Awaitable[ProcessCluster]], eventually: Eventually, copies: int
) -> None:
    """1. every disk fills up  2. writes are refused, reads go on, nobody ends  3. there is space: each broker ends with
    75, is started again by whoever looks after it, and nothing acknowledged is missing.
    """
    cluster = await start_cluster(brokers=copies, env=FAULTS, broker_args=[*ROOM, "--lag-max-ms", "1000"])
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic(TOPIC, partitions=1, replication=copies)
        await send(client, 0, 100)
        for name in cluster.brokers:
            disk(cluster, name, "ENOSPC")
        error = await refused(client, 20.0)
        assert "bytes are free" in str(error), error
        assert [number for number in await values(client) if number >= 0] == list(range(100)), "reads go on"
        assert list(cluster.local.ended()) == []
        for name in cluster.brokers:
            disk(cluster, name, "")
        ends: list[tuple[str, int | None]] = []

        async def whole_again() -> bool:
            keep_running(cluster, ends)
            part = await the_part(client)
            return bool(ends) and part.primary != 0 and set(part.isr) == set(part.replicas)

        await eventually(whole_again, within_s=WITHIN_S)
        assert {status for _, status in ends} == {SPACE_AGAIN}
        await send(client, 100, 20)
        assert [number for number in await values(client) if number >= 0] == list(range(120))


async def test_a_write_that_fails_ends_the_broker_after_the_other_copy_leads(
    start_cluster: Callable[..., Awaitable[ProcessCluster]], eventually: Eventually
) -> None:
    cluster = await start_cluster(brokers=2, env=FAULTS, broker_args=ROOM)
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic(TOPIC, partitions=1, replication=2)
        await send(client, 0, 50)
        victim = cluster.name_of((await the_part(client)).primary)
        disk(cluster, victim, "EIO")
        await send(client, 50, 50)
        assert (await the_part(client)).primary != cluster.broker_id(victim)
        ended = [service.name for service in cluster.local.ended()]

        def left() -> bool:
            return not cluster.local.services[victim].running

        await eventually(left, within_s=WITHIN_S)
        process = cluster.local.services[victim].process
        assert process is not None
        assert process.returncode == 1
        assert set(ended) <= {victim}
        disk(cluster, victim, "")
        await cluster.restart(victim)

        async def whole_again() -> bool:
            part = await the_part(client)
            return set(part.isr) == set(part.replicas)

        await eventually(whole_again, within_s=WITHIN_S)
        assert await values(client) == list(range(100))
