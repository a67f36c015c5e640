"""Deliveries of records that differ much in size: an answer stays below a frame, and nothing is left out."""

from __future__ import annotations

from pathlib import Path

from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.limits import FRAME_BYTES_MAX
from ferryline.protocol.messages import ProduceEntry
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import (
    ACK,
    QueueAnswer,
    QueueAsk,
    Receive,
    ReceiveAnswer,
    Settle,
    SettleAnswer,
    SettleEntry,
)
from ferryline.protocol.records import encode_batch
from ferryline_broker.queue_requests import BYTES_MAX
from unit.broker_world import BrokerWorld, RawClient, eventually

LARGE = 4 * 1024 * 1024


async def produce(client: RawClient, topic: TopicMeta, partition: int, *values: bytes) -> None:
    data = bytes(encode_batch([(None, value, []) for value in values]))
    entry = ProduceEntry(topic.id, partition, topic.config.partitions, len(data))
    assert (await client.produce_raw([(entry, data)]))[0].error is None


async def receive(client: RawClient, topic: TopicMeta, records_max: int) -> ReceiveAnswer:
    entries = [(topic.id, number) for number in range(topic.config.partitions)]
    frame = await client.ask(Kind.RECEIVE, Receive("g", "m", entries, records_max, wait_ms=2_000))
    answer = decode_header(frame.header, ReceiveAnswer)
    assert sum(delivery.size for delivery in answer.deliveries) == len(frame.payload)
    assert len(frame.payload) < BYTES_MAX + LARGE < FRAME_BYTES_MAX
    return answer


async def test_large_records_before_many_small_ones_come_in_several_answers(tmp_path: Path) -> None:
    """The average of what was looked at is small, and the large ones are leased first."""
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("mixed", [(broker.id,), (broker.id,)], max_record_bytes=2 * LARGE)
        client = await world.client(broker.url)
        for partition in range(2):
            for _ in range(5):
                await produce(client, topic, partition, bytes(LARGE))
            for _ in range(20):
                await produce(client, topic, partition, *[bytes(800)] * 100)
        await receive(client, topic, 1)
        cores = [broker.broker.partitions.replicas[topic.id, number].core for number in range(2)]
        await eventually(lambda: all(core.queue_ready("g") > 1_900 for core in cores), "the windows are full")
        seen = 0
        while seen < 4_009:
            answer = await receive(client, topic, 3_000)
            for delivery in answer.deliveries:
                assert delivery.error is None
                assert set(delivery.attempts) == {1}, "what was given back does not count"
                seen += len(delivery.offsets)
                entry = SettleEntry(
                    *(delivery.topic_id, delivery.partition, delivery.epoch, delivery.lease, delivery.receipt),
                    ACK,
                    delivery.offsets,
                )
                settled = await client.call(Kind.SETTLE, Settle("g", "m", [entry]), SettleAnswer)
                assert settled.results[0].stale == []
        asked = QueueAsk("g", "stats", [(topic.id, 0), (topic.id, 1)])
        stats = (await client.call(Kind.QUEUE, asked, QueueAnswer)).results
        assert sum(one.details["leased"] for one in stats) == 1, "only the very first one is still out"


async def test_a_receiver_that_asks_for_few_bytes_still_gets_a_record(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("mixed", [(broker.id,)], max_record_bytes=2 * LARGE)
        client = await world.client(broker.url)
        await produce(client, topic, 0, bytes(LARGE))
        ask = Receive("g", "m", [(topic.id, 0)], 10, bytes_max=1, wait_ms=2_000)
        [delivery] = (await client.call(Kind.RECEIVE, ask, ReceiveAnswer)).deliveries
        assert len(delivery.offsets) == 1
