"""Disks that fill up or fail under a running broker: it refuses, lets others lead, and comes back by a new start."""

from __future__ import annotations

import asyncio
import json
import os
from itertools import count
from pathlib import Path

import pytest

from ferryline.protocol.frames import decode_header
from ferryline.protocol.messages import FetchEntry, Report
from ferryline.protocol.metadata import TopicMeta
from ferryline_broker.app import EXIT_FAILED, EXIT_SPACE
from ferryline_broker.faulty import FaultFile, FaultyStorage
from unit.broker_world import BrokerWorld, RunningBroker, eventually
from unit.test_broker_path import read_all

QUICK = {"disk_check_ms": 50, "lag_max_ms": 300, "stop_ms": 1_000}


class Disk:
    """The storage of one broker, and the switch that makes its writes fail."""

    def __init__(self, folder: Path, name: str) -> None:
        self._switches = folder / f"{name}.json"
        self.storage = FaultyStorage(
            str(folder / "brokers"), FaultFile(str(self._switches), count().__next__), lossy=False
        )  # looks at the file each time

    def fails(self, write: str) -> None:
        """Let writes to records fail: a checkpoint that happens to be due must not be what fails first."""
        temp = self._switches.with_suffix(".new")
        temp.write_text(json.dumps({"write": write, "path": "/records/"}))
        if self._switches.exists():
            stamp = self._switches.stat().st_mtime_ns + 1
            os.utime(temp, ns=(stamp, stamp))
        temp.rename(self._switches)


async def a_broker(world: BrokerWorld, disk: Disk) -> RunningBroker:
    return await world.broker(storage=disk.storage, **QUICK)


async def ended(broker: RunningBroker) -> int:
    status = await asyncio.wait_for(broker._task, 15)
    await broker._http.close()
    return status


def damage_told(world: BrokerWorld) -> set[str]:
    reports = [decode_header(frame.header, Report) for frame in world.coordinator.reports]
    return {replica.log_state for report in reports for replica in report.replicas}


async def produce(world: BrokerWorld, broker: RunningBroker, topic: TopicMeta, value: bytes) -> str:
    """ "" when it was acknowledged, or the code of the refusal."""
    result = (await (await world.client(broker.url)).produce(topic, 0, [value])).error
    return result.code if result is not None else ""


async def test_the_only_copy_on_a_full_disk_serves_reads_and_comes_back_by_itself(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        disk = Disk(tmp_path, "one")
        broker = await a_broker(world, disk)
        topic = await world.topic("orders", [(broker.id,)])
        assert await produce(world, broker, topic, b"kept") == ""
        disk.fails("ENOSPC")
        assert await produce(world, broker, topic, b"x" * 5000) in ("COMMIT_UNKNOWN", "STORAGE_FULL")
        client = await world.client(broker.url)
        await eventually(lambda: broker.broker.upkeep.disk_full, "noticed")
        refused = (await client.produce(topic, 0, [b"y"])).error
        assert refused is not None
        assert (refused.code, refused.definite) == ("STORAGE_FULL", True)
        assert str(tmp_path / "brokers") in refused.message
        assert "0 bytes are free" in refused.message
        answer, _ = await client.fetch([FetchEntry(topic.id, 0, 0)])
        assert answer.results[0].error is None, "reads go on"
        assert await read_all(client, topic) == [b"kept"]
        await asyncio.sleep(0.3)
        assert not broker._task.done(), "there is no space yet"
        assert world.coordinator.resigned == [], "there is nobody to hand over to"
        disk.fails("")
        assert await ended(broker) == EXIT_SPACE
        assert damage_told(world) == set(), "nothing that was acknowledged is in doubt"
        world.coordinator.fence(broker.id)
        back = await a_broker(world, disk)
        assert back.id == broker.id
        await eventually(lambda: world.primary(topic.id) is back, "it leads again, in a later epoch")
        assert await produce(world, back, topic, b"new") == ""
        assert await read_all(await world.client(back.url), topic) == [b"kept", b"new"]


async def test_a_primary_whose_disk_is_full_lets_the_other_copy_lead_and_joins_it_again(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        disk = Disk(tmp_path, "one")
        first = await a_broker(world, disk)
        second = await world.broker(**QUICK)
        topic = await world.topic("orders", [(first.id, second.id)])
        assert await produce(world, first, topic, b"kept") == ""
        disk.fails("ENOSPC")
        assert await produce(world, first, topic, b"x" * 5000) == "COMMIT_UNKNOWN"
        await eventually(lambda: world.primary(topic.id) is second, "it has handed over", within_s=15)
        assert world.coordinator.resigned[0].entries[0].reason == "handover"
        await eventually(
            lambda: world.coordinator.partitions[topic.id, 0].isr == (second.id,), "and nobody waits for it any more"
        )
        assert await produce(world, second, topic, b"alone") == ""
        assert await produce(world, first, topic, b"y") == "NOT_PRIMARY"
        disk.fails("")
        assert await ended(first) == EXIT_SPACE
        back = await a_broker(world, disk)
        assert back.id == first.id
        await eventually(lambda: back.id in world.coordinator.partitions[topic.id, 0].isr, "in sync again", within_s=15)
        world.coordinator.lead((topic.id, 0), back.id, (first.id, second.id))
        await eventually(lambda: world.primary(topic.id) is back, "it may lead")
        found = await read_all(await world.client(back.url), topic)
        assert [value for value in found if len(value) < 5000] == [b"kept", b"alone"]


async def test_a_secondary_whose_disk_is_full_leaves_the_in_sync_set_and_joins_again(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        disk = Disk(tmp_path, "two")
        first = await world.broker(**QUICK)
        second = await a_broker(world, disk)
        topic = await world.topic("orders", [(first.id, second.id)])
        assert await produce(world, first, topic, b"0") == ""
        disk.fails("ENOSPC")
        assert await produce(world, first, topic, b"1") == "", "acknowledged once the set is smaller"
        assert world.coordinator.partitions[topic.id, 0].isr == (first.id,)
        assert second.broker.partitions.replicas[topic.id, 0].core.full is not None
        disk.fails("")
        assert await ended(second) == EXIT_SPACE
        back = await a_broker(world, disk)
        await eventually(lambda: back.id in world.coordinator.partitions[topic.id, 0].isr, "in sync again", within_s=15)
        assert damage_told(world) == set()
        log = back.broker.partitions.replicas[topic.id, 0].logs[0]
        assert log.log_end == first.broker.partitions.replicas[topic.id, 0].logs[0].log_end


async def test_where_every_disk_is_full_the_partition_stays_put_and_nothing_acknowledged_is_lost(
    tmp_path: Path,
) -> None:
    async with BrokerWorld(tmp_path) as world:
        disks = [Disk(tmp_path, "one"), Disk(tmp_path, "two")]
        brokers = [await a_broker(world, disk) for disk in disks]
        topic = await world.topic("orders", [tuple(broker.id for broker in brokers)])
        acked = [b"%d" % number for number in range(20)]
        for value in acked:
            assert await produce(world, brokers[0], topic, value) == ""
        for disk in disks:
            disk.fails("ENOSPC")
        assert await produce(world, brokers[0], topic, b"x" * 5000) != ""
        await asyncio.sleep(1.0)
        assert world.coordinator.partitions[topic.id, 0].epoch <= 4, "it is not handed round and round"
        for disk in disks:
            disk.fails("")
        assert [await ended(broker) for broker in brokers] == [EXIT_SPACE] * 2
        for broker in brokers:
            world.coordinator.fence(broker.id)
        back = [await a_broker(world, disk) for disk in disks]
        await eventually(lambda: world.primary(topic.id) is not None, "somebody leads", within_s=15)
        leading = world.primary(topic.id)
        assert leading is not None
        assert leading in back
        found = await read_all(await world.client(leading.url), topic)
        assert [value for value in found if len(value) < 5000] == acked


async def test_a_failed_write_hands_over_what_it_can_and_ends_the_process(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        disk = Disk(tmp_path, "one")
        first = await a_broker(world, disk)
        second = await world.broker(**QUICK)
        hit = await world.topic("hit", [(first.id, second.id)])
        other = await world.topic("other", [(first.id, second.id)])
        for topic in (hit, other):
            assert await produce(world, first, topic, b"kept") == ""
        disk.fails("EIO")
        assert await produce(world, first, hit, b"x" * 5000) == "COMMIT_UNKNOWN"
        assert await ended(first) == EXIT_FAILED
        assert damage_told(world) == {"damaged"}
        assert (other.id, 0) in {
            (entry.topic_id, entry.partition) for resign in world.coordinator.resigned for entry in resign.entries
        }
        world.coordinator.fence(first.id)
        await eventually(lambda: world.primary(hit.id) is second, "the other copy leads")
        for topic in (hit, other):
            assert await read_all(await world.client(second.url), topic) == [b"kept"]


@pytest.mark.parametrize("write", ["ENOSPC", "EIO"])
async def test_the_beginning_of_a_batch_that_failed_is_cut_off_before_the_log_is_used_again(
    tmp_path: Path, write: str
) -> None:
    async with BrokerWorld(tmp_path) as world:
        disk = Disk(tmp_path, "one")
        broker = await a_broker(world, disk)
        topic = await world.topic("orders", [(broker.id,)])
        assert await produce(world, broker, topic, b"kept") == ""
        hosted = broker.broker.partitions.replicas[topic.id, 0]
        folder = tmp_path / "brokers" / broker.broker.store.directory / hosted.store.path.split("/", 1)[1]
        (segment,) = (folder / "records").glob("*.log")
        size = segment.stat().st_size
        disk.fails(write)
        assert await produce(world, broker, topic, b"x" * 5000) == "COMMIT_UNKNOWN"
        if write == "EIO":
            assert segment.stat().st_size > size, "nobody knows what is there"
        disk.fails("")
        await ended(broker)
        world.coordinator.fence(broker.id)
        back = await a_broker(world, disk)
        await eventually(lambda: world.primary(topic.id) is back, "it leads again")
        assert back.broker.partitions.replicas[topic.id, 0].store.recovery.log_state == "ok"
        assert await produce(world, back, topic, b"new") == ""
        assert await read_all(await world.client(back.url), topic) == [b"kept", b"new"]
