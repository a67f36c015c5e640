"""PRODUCE at the broker: each bad batch gets its own refusal, the others go on, and memory stays bounded."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ferryline.protocol.errors import CorruptBatch, FerrylineError, InvalidArgument, MalformedRequest, RecordTooLarge
from ferryline.protocol.limits import BATCH_BYTES_MAX
from ferryline.protocol.messages import ProduceEntry
from ferryline.protocol.metadata import TopicConfig, TopicMeta
from ferryline.protocol.records import encode_batch, epoch_start_batch
from ferryline_broker.produce import check_batch
from unit.broker_world import BrokerWorld, eventually

TOPIC = TopicMeta("0" * 32, "orders", TopicConfig(max_record_bytes=1000))


def batch(*sizes: int, producer: tuple[int, int, int] = (-1, -1, -1), codec: str = "none") -> bytearray:
    return encode_batch([(b"k", bytes(size), [("h", b"v")]) for size in sizes], producer=producer, codec=codec)


def with_field(data: bytearray, form: str, at: int, value: int) -> bytearray:
    struct.pack_into(form, data, at, value)
    return data


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", CorruptBatch),
        (b"\0" * 60, CorruptBatch),
        (batch(5)[:-1], CorruptBatch),
        (batch(5) + b"\0", CorruptBatch),
        (batch(5) + batch(5), CorruptBatch),
        (with_field(batch(5), ">b", 16, 1), CorruptBatch),
        (with_field(batch(5), ">I", 17, 7), CorruptBatch),
        (with_field(batch(5), ">i", 57, 9), CorruptBatch),
        (epoch_start_batch(0, 1, 1), InvalidArgument),
        (batch(5, producer=(-2, 0, 0)), InvalidArgument),
        (batch(5, producer=(7, -1, 0)), InvalidArgument),
        (batch(5, producer=(7, 0, -1)), InvalidArgument),
        (batch(998), RecordTooLarge),
        (batch(5, 5, 998, 5), RecordTooLarge),
        (bytes(BATCH_BYTES_MAX + 1), RecordTooLarge),
    ],
)
def test_a_bad_batch_gets_its_own_definite_error(data: bytes, error: type[FerrylineError]) -> None:
    with pytest.raises(error) as raised:
        check_batch(memoryview(data), TOPIC)
    assert raised.value.definite


@pytest.mark.parametrize("data", [batch(997), batch(500, 500, 500), batch(50_000, 50_000, codec="gzip")])
def test_the_record_limit_counts_key_value_and_headers_and_nothing_else(data: bytearray) -> None:
    assert check_batch(memoryview(data), TOPIC).size == len(data)


async def test_one_bad_entry_does_not_spoil_the_others(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,), (broker.id,)])
        client = await world.client(broker.url)
        good = bytes(batch(5))
        torn = bytes(with_field(batch(5), ">I", 17, 7))
        sent = [
            (ProduceEntry(topic.id, 0, 2, len(good)), good),
            (ProduceEntry(topic.id, 0, 2, len(torn)), torn),
            (ProduceEntry(topic.id, 1, 3, len(good)), good),
            (ProduceEntry("f" * 32, 0, 2, len(good)), good),
            (ProduceEntry(topic.id, 9, 2, len(good)), good),
            (ProduceEntry(topic.id, 1, 2, len(good)), good),
        ]
        results = await client.produce_raw(sent)
        codes = [result.error.code if result.error else "" for result in results]
        assert codes == ["", "CORRUPT_BATCH", "STALE_PARTITIONING", "UNKNOWN_TOPIC", "UNKNOWN_PARTITION", ""]
        assert broker.broker.metrics.produce_bytes_in_flight == 0


async def test_a_secondary_names_the_primary(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        await eventually(lambda: (topic.id, 0) in second.broker.partitions.replicas, "the secondary holds it")
        result = await (await world.client(second.url)).produce(topic, 0, [b"a"])
        assert result.error is not None
        assert result.error.code == "NOT_PRIMARY"
        assert result.error.details["primary"] == first.id


async def test_sizes_that_do_not_add_up_are_refused_whole(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        good = bytes(batch(5))
        for sizes in ([len(good) + 1], [len(good), -1, 1], []):
            entries = [(ProduceEntry(topic.id, 0, 1, size), b"") for size in sizes]
            with pytest.raises(MalformedRequest):
                await client.produce_raw([*entries[:-1], *[(entry, good) for entry, _ in entries[-1:]]])
        assert (await client.produce(topic, 0, [b"a"])).error is None


async def test_a_client_that_leaves_cancels_nothing(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        before = broker.broker.partitions.replicas[topic.id, 0].core.log_end[0]
        data = bytes(batch(5))
        from ferryline.protocol.frames import Kind
        from ferryline.protocol.messages import Produce

        client.send(Kind.PRODUCE, Produce(5000, [ProduceEntry(topic.id, 0, 1, len(data))]), [data])
        await client._sending
        await client.close()
        core = broker.broker.partitions.replicas[topic.id, 0].core
        await eventually(lambda: core.high_watermark[0] == before + 1, "the batch is committed all the same")
        await eventually(lambda: broker.broker.metrics.produce_bytes_in_flight == 0, "its bytes are given back")


async def test_a_producer_over_its_budget_is_held_back_and_loses_nothing(tmp_path: Path) -> None:
    """The secondary is away, so nothing commits; what is sent meanwhile waits in TCP or is refused definitely."""
    async with BrokerWorld(tmp_path) as world:
        settings = {"session_produce_bytes_max": 2**20, "produce_bytes_max": 2**20}
        first, second = await world.broker(**settings), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        await second.crash()
        client = await world.client(first.url)
        from ferryline.protocol.frames import Kind, decode_header
        from ferryline.protocol.messages import Produce, ProduceAnswer

        data = bytes(batch(200_000))
        ask = Produce(60_000, [ProduceEntry(topic.id, 0, 1, len(data))])
        sent = []
        for _ in range(12):
            sent.append(client.send(Kind.PRODUCE, ask, [data]))
            await client._sending
        metrics = first.broker.metrics
        await eventually(lambda: metrics.produce_bytes_in_flight > 2**19, "batches are in flight")
        session = next(session for session in first.broker.endpoint.sessions if session.role == "client")
        assert session.held
        assert metrics.produce_bytes_in_flight <= 2**20
        world.coordinator.fence(second.id)  # alone now: everything commits
        outcomes = []
        for correlation in sent:
            frame = await client.answer(correlation)
            outcomes.append(
                "THROTTLED" if frame.is_error else decode_header(frame.header, ProduceAnswer).results[0].error
            )
        assert outcomes.count(None) >= 3
        assert set(outcomes) <= {None, "THROTTLED"}
        assert metrics.produce_bytes_in_flight == 0
