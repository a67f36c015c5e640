"""The whole path through real brokers: produce, replicate, acknowledge, fetch, fail over, come back."""

from __future__ import annotations

from pathlib import Path

from ferryline.protocol.messages import FetchEntry
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.records import decode_batch, split_batches
from unit.broker_world import BrokerWorld, RawClient, eventually


async def read_all(client: RawClient, topic: TopicMeta, partition: int = 0, offset: int = 0) -> list[bytes]:
    """Committed values from ``offset`` to the high watermark."""
    values: list[bytes] = []
    while True:
        answer, payload = await client.fetch([FetchEntry(topic.id, partition, offset)])
        result = answer.results[0]
        assert result.error is None, result.error
        if not result.size:
            return values
        for at, header in split_batches(payload):
            if not header.is_control:
                values += [record.value or b"" for record in decode_batch(payload[at : at + header.size], header)]
            offset = header.next_offset


async def test_an_acknowledged_record_is_on_both_brokers_and_can_be_read(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        result = await client.produce(topic, 0, [b"a", b"b"])
        assert result.error is None
        key = (topic.id, 0)
        for running in (first, second):
            log = running.broker.partitions.replicas[key].logs[0]
            assert log.flushed_end >= result.base_offset + 2
        assert await read_all(client, topic) == [b"a", b"b"]


async def test_after_a_crash_of_the_primary_nothing_acknowledged_is_missing(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        for value in (b"a", b"b"):
            assert (await client.produce(topic, 0, [value])).error is None
        await first.crash()
        world.coordinator.fence(first.id)
        await eventually(lambda: world.primary(topic.id) is second, "the secondary leads")
        client = await world.client(second.url)
        assert (await client.produce(topic, 0, [b"c"])).error is None
        back = await world.broker()
        assert back.id == first.id
        await eventually(lambda: first.id in world.coordinator.partitions[topic.id, 0].isr, "back in sync")
        assert (await client.produce(topic, 0, [b"d"])).error is None
        assert await read_all(client, topic) == [b"a", b"b", b"c", b"d"]
        logs = [running.broker.partitions.replicas[topic.id, 0].logs[0] for running in (back, second)]
        assert logs[0].log_end == logs[1].log_end


async def test_a_clean_stop_hands_over_and_says_so_at_the_next_start(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        assert (await client.produce(topic, 0, [b"a"])).error is None
        assert await first.stop() == 0
        assert world.coordinator.resigned, "the primaryship was not handed over"
        await eventually(lambda: world.primary(topic.id) is second, "the other leads")
        back = await world.broker()
        assert back.broker.store.restart_class == "clean"
        assert await read_all(await world.client(second.url), topic) == [b"a"]
