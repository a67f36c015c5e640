"""What a broker does beside its traffic: retention, scrubbing, checkpoints, deletion of replicas, changed settings."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from ferryline.protocol.frames import decode_header
from ferryline.protocol.messages import FetchEntry, Report
from ferryline.protocol.metadata import TopicMeta
from ferryline_broker.background import Background
from unit.broker_world import BrokerWorld, RawClient, RunningBroker, eventually
from unit.test_broker_path import read_all

MIB = 1024 * 1024


async def fill(client: RawClient, topic: TopicMeta, batches: int) -> None:
    for _ in range(batches):
        assert (await client.produce(topic, 0, [b"x" * 300_000])).error is None


def log_start(broker: RunningBroker, topic: TopicMeta) -> int:
    return broker.broker.partitions.replicas[topic.id, 0].logs[0].log_start


async def test_retention_deletes_old_segments_here_and_at_the_secondary(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(retention_ms=50), await world.broker(retention_ms=50)
        topic = await world.topic("orders", [(first.id, second.id)], segment_bytes=MIB, retention_bytes=2 * MIB)
        client = await world.client(first.url)
        await fill(client, topic, 16)
        await eventually(lambda: log_start(first, topic) > 0, "the primary deletes")
        await fill(client, topic, 1)
        await eventually(lambda: log_start(second, topic) > 0, "the secondary follows")
        hosted = first.broker.partitions.replicas[topic.id, 0]
        await eventually(lambda: hosted.logs[0].size_bytes < 4 * MIB, "the size is kept")
        answer, _ = await client.fetch([FetchEntry(topic.id, 0, 0)])
        assert answer.results[0].error is not None
        assert answer.results[0].error.code == "OFFSET_OUT_OF_RANGE"
        assert answer.results[0].error.details["log_start"] == log_start(first, topic)


async def test_settings_that_change_reach_the_running_log(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker(retention_ms=50)
        topic = await world.topic("orders", [(broker.id,)], segment_bytes=MIB)
        client = await world.client(broker.url)
        await fill(client, topic, 12)
        assert log_start(broker, topic) == 0
        changed = msgspec.structs.replace(topic.config, retention_bytes=MIB)
        world.coordinator.topics[topic.id] = msgspec.structs.replace(topic, config=changed, version=topic.version + 100)
        world.coordinator.publish()
        await eventually(lambda: log_start(broker, topic) > 0, "the new limit holds")


async def test_a_rotten_segment_is_found_reported_and_not_served(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first = await world.broker(scrub_bytes_per_s=64 * MIB, retention_ms=50)
        second = await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)], segment_bytes=MIB)
        client = await world.client(first.url)
        await fill(client, topic, 8)
        hosted = first.broker.partitions.replicas[topic.id, 0]
        folder = tmp_path / "brokers" / first.broker.store.directory / hosted.store.path.split("/", 1)[1]
        sealed = sorted((folder / "records").glob("*.log"))[0]
        with sealed.open("r+b") as file:
            file.seek(400_000)
            file.write(b"rot")
        await eventually(lambda: hosted.core.role == "stopped", "the scrubber finds it")
        await eventually(lambda: world.coordinator.reports, "and the coordinator hears of it")
        reports = [decode_header(frame.header, Report) for frame in world.coordinator.reports]
        assert reports[0].replicas[0].log_state == "damaged"
        answer, _ = await client.fetch([FetchEntry(topic.id, 0, 0)])
        assert answer.results[0].error is not None
        world.coordinator.lead((topic.id, 0), second.id, (second.id,))
        await eventually(lambda: world.primary(topic.id) is second, "the other copy leads")
        assert len(await read_all(await world.client(second.url), topic)) == 8


async def test_checkpoints_follow_the_log_within_a_second_or_so(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        result = await client.produce(topic, 0, [b"a", b"b"])
        hosted = broker.broker.partitions.replicas[topic.id, 0]

        def written() -> bool:
            records = hosted.store._meta.checkpoints[0]
            return bool(records.offset == records.hw == result.base_offset + 2)

        await eventually(written, "offset and high watermark are on disk", within_s=10)


async def test_a_replica_goes_only_when_the_coordinator_takes_it_away(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        assert (await client.produce(topic, 0, [b"a"])).error is None
        folder = tmp_path / "brokers" / second.broker.store.directory / "partitions"
        assert [path.name for path in folder.iterdir()] == [f"{topic.id}-0"]
        world.coordinator.change((topic.id, 0), replicas=(first.id,), isr=(first.id,))
        await eventually(lambda: (topic.id, 0) not in second.broker.partitions.replicas, "it is closed")
        await eventually(lambda: not list(folder.iterdir()), "and its files are gone")
        assert (await client.produce(topic, 0, [b"b"])).error is None


async def test_a_damaged_copy_is_set_aside_and_fetched_again(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        for value in range(5):
            assert (await client.produce(topic, 0, [b"%d" % value])).error is None
        directory = second.broker.store.directory
        await second.stop()
        world.coordinator.fence(second.id)
        folder = tmp_path / "brokers" / directory / "partitions" / f"{topic.id}-0"
        log = sorted((folder / "records").glob("*.log"))[0]
        data = bytearray(log.read_bytes())
        data[100] ^= 1
        log.write_bytes(data[: len(data) // 2])
        back = await world.broker()
        assert back.id == second.id
        assert world.coordinator.registered[-1].replicas[0].log_state == "damaged"
        await eventually(lambda: back.id in world.coordinator.partitions[topic.id, 0].isr, "whole again", within_s=15)
        assert (folder / "damaged-1").is_dir(), "what was found stays for an operator"
        world.coordinator.lead((topic.id, 0), back.id, (first.id, back.id))
        await eventually(lambda: world.primary(topic.id) is back, "it may lead")
        assert await read_all(await world.client(back.url), topic) == [b"%d" % value for value in range(5)]


class Counting(Background):
    turns = 0

    async def _run(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)


async def test_what_goes_on_beside_the_traffic_ends_when_it_is_closed() -> None:
    work = Counting()
    work.close()
    assert work.turns == 0, "closed before it began: nothing to end"
    work.start()
    await eventually(lambda: work.turns > 3, "it goes on by itself")
    with pytest.raises(AssertionError, match="Counting is running"):
        work.start()
    work.close()
    work.close()
    seen = work.turns
    for _ in range(10):
        await asyncio.sleep(0)
    assert work.turns <= seen + 1


async def test_a_broker_that_is_stopped_leaves_none_of_its_tasks_behind(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        tasks = [work._task for work in broker.broker.background()]
        assert len(tasks) == 3
        assert all(task is not None and not task.done() for task in tasks)
        await broker.stop()
        assert all(task is not None and task.cancelled() for task in tasks)
