"""FETCH, OFFSETS and METADATA at the broker: parked until there is something, bounded in bytes, fair, never a byte that
is not committed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.messages import (
    Fetch,
    FetchAnswer,
    FetchEntry,
    Offsets,
    OffsetsAnswer,
    OffsetsEntry,
    Produce,
    ProduceEntry,
)
from ferryline.protocol.metadata import ClusterMetadata, MetadataAnswer, MetadataRequest, TopicMeta
from ferryline.protocol.records import encode_batch, split_batches
from unit.broker_world import BrokerWorld, RawClient, RunningBroker, eventually


def high_watermark(broker: RunningBroker, topic: TopicMeta, partition: int = 0) -> int:
    return broker.broker.partitions.replicas[topic.id, partition].core.high_watermark[0]


async def fetched(client: RawClient, correlation: int) -> tuple[FetchAnswer, memoryview]:
    frame = await client.answer(correlation)
    return decode_header(frame.header, FetchAnswer), frame.payload


async def test_a_fetch_parks_until_a_record_is_committed(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        reader, writer = await world.client(broker.url), await world.client(broker.url)
        start = high_watermark(broker, topic)
        asked = reader.send(Kind.FETCH, Fetch(30_000, 2**20, [FetchEntry(topic.id, 0, start)]))
        await eventually(lambda: broker.broker.metrics.parked_fetches == 1, "parked")
        await writer.produce(topic, 0, [b"a"])
        answer, payload = await fetched(reader, asked)
        assert [header.base_offset for _, header in split_batches(payload)] == [start]
        assert answer.results[0].high_watermark == start + 1
        assert broker.broker.metrics.parked_fetches == 0


async def test_a_fetch_that_waits_in_vain_says_where_the_partition_stands(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,), (broker.id,)])
        client = await world.client(broker.url)
        start = high_watermark(broker, topic)
        answer, payload = await client.fetch([FetchEntry(topic.id, number, start) for number in (0, 1)], wait_ms=30)
        assert not payload
        assert [(r.partition, r.size, r.high_watermark, r.error) for r in answer.results] == [
            (0, 0, start, None),
            (1, 0, start, None),
        ]


async def test_what_is_not_committed_is_not_read(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        start = high_watermark(first, topic)
        await second.crash()
        client = await world.client(first.url)
        data = bytes(encode_batch([(None, b"x", [])]))
        written = client.send(Kind.PRODUCE, Produce(20_000, [ProduceEntry(topic.id, 0, 1, len(data))]), [data])
        log = first.broker.partitions.replicas[topic.id, 0].logs[0]
        await eventually(lambda: log.flushed_end == start + 1, "appended and flushed at the primary")
        answer, payload = await client.fetch([FetchEntry(topic.id, 0, start)], wait_ms=50)
        assert (answer.results[0].size, answer.results[0].high_watermark, bytes(payload)) == (0, start, b"")
        world.coordinator.fence(second.id)
        await client.answer(written)
        answer, _ = await client.fetch([FetchEntry(topic.id, 0, start)])
        assert answer.results[0].size == len(data)


async def test_an_answer_keeps_its_size_but_holds_at_least_one_batch(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        start = high_watermark(broker, topic)
        for _ in range(4):
            await client.produce(topic, 0, [b"x" * 10_000])
        _, one = await client.fetch([FetchEntry(topic.id, 0, start, bytes_max=1)])
        assert len(split_batches(one)) == 1
        _, two = await client.fetch([FetchEntry(topic.id, 0, start)], bytes_max=25_000)
        assert len(split_batches(two)) == 2
        _, rest = await client.fetch([FetchEntry(topic.id, 0, start)])
        assert len(split_batches(rest)) == 4


async def test_a_partition_with_much_to_read_does_not_starve_the_others(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)] * 3)
        client = await world.client(broker.url)
        starts = [high_watermark(broker, topic, number) for number in range(3)]
        for number in range(3):
            for _ in range(5):
                await client.produce(topic, number, [b"x" * 50_000])
        served: list[int] = []
        for _ in range(3):
            entries = [FetchEntry(topic.id, number, starts[number]) for number in range(3)]
            answer, _ = await client.fetch(entries, bytes_max=60_000)
            served += [result.partition for result in answer.results]
        assert sorted(served) == [0, 1, 2]


async def test_a_reader_that_does_not_read_costs_the_broker_no_memory(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        reader = await world.client(broker.url)
        session = next(session for session in broker.broker.endpoint.sessions if session.role == "client")
        writer = await world.client(broker.url)
        start = high_watermark(broker, topic)
        for _ in range(8):
            await writer.produce(topic, 0, [b"x" * 900_000])
        reader._task.cancel()
        for _ in range(40):
            reader.send(Kind.FETCH, Fetch(0, 2**23, [FetchEntry(topic.id, 0, start, bytes_max=2**23)]))
        await eventually(lambda: not session.writable, "the socket is full")
        await asyncio.sleep(0.2)
        assert session._out_bytes + session._transport.get_write_buffer_size() < 40 * 2**20
        assert (await writer.produce(topic, 0, [b"still served"])).error is None


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({"topic_id": "f" * 32}, "UNKNOWN_TOPIC"),
        ({"partition": 5}, "UNKNOWN_PARTITION"),
        ({"offset": 10**9}, "OFFSET_OUT_OF_RANGE"),
        ({"offset": 1, "offset_epoch": 10**6}, "NOT_PRIMARY"),
    ],
)
async def test_an_entry_that_cannot_be_read_gets_its_own_error_at_once(
    tmp_path: Path, entry: dict[str, object], code: str
) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        fields = {"topic_id": topic.id, "partition": 0, "offset": 0, **entry}
        answer, _ = await client.fetch([FetchEntry(**fields)], wait_ms=20_000)  # type: ignore[arg-type]
        assert answer.results[0].error is not None
        assert answer.results[0].error.code == code


async def test_a_reader_without_an_epoch_hears_of_the_end_only_from_a_primary_that_can_commit(tmp_path: Path) -> None:
    """Its offset may come from a later primary, whose log is longer; a deposed one would have it give up."""
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        await second.crash()  # nobody has said so yet: the first broker may be the one that is cut off
        reader = await world.client(first.url)
        asked = [reader.send(Kind.FETCH, Fetch(wait, 2**20, [FetchEntry(topic.id, 0, 9)])) for wait in (0, 30)]
        start, _ = await fetched(reader, reader.send(Kind.FETCH, Fetch(100, 2**20, [FetchEntry(topic.id, 0, 1)])))
        assert start.results[0].error is None
        assert not any(reader.arrived(number) for number in asked), "nobody can say yet, and their time is over"
        world.coordinator.fence(second.id)  # alone, it commits
        for number in asked:
            answer, _ = await fetched(reader, number)
            assert answer.results[0].error is not None
            assert answer.results[0].error.code == "OFFSET_OUT_OF_RANGE"


async def test_a_deposed_primary_sends_a_reader_on_instead_of_calling_its_offset_wrong(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        await second.crash()
        reader = await world.client(first.url)
        asked = reader.send(Kind.FETCH, Fetch(30, 2**20, [FetchEntry(topic.id, 0, 9)]))
        await eventually(lambda: first.broker.partitions.replicas[topic.id, 0].core.log_end[1] > 1, "a barrier")
        world.coordinator.lead((topic.id, 0), second.id, (second.id,))
        answer, _ = await fetched(reader, asked)
        assert answer.results[0].error is not None
        assert answer.results[0].error.code in ("NOT_PRIMARY", "NOT_READY")


@pytest.mark.parametrize(
    ("wait_ms", "bytes_max", "entry"),
    [
        (-1, 1, {}),
        (10**9, 1, {}),
        (0, 0, {}),
        (0, 1, {"offset": -1}),
        (0, 1, {"bytes_max": 0}),
        (0, 1, {"offset": 2**63 - 1}),
    ],
)
async def test_absurd_numbers_are_refused(tmp_path: Path, wait_ms: int, bytes_max: int, entry: dict[str, int]) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        ask = FetchEntry(**{"topic_id": topic.id, "partition": 0, "offset": 0, **entry})  # type: ignore[arg-type]
        with pytest.raises(FerrylineError) as raised:
            await client.fetch([ask], wait_ms=wait_ms, bytes_max=bytes_max)
        assert raised.value.code == "INVALID_ARGUMENT"


async def test_a_secondary_serves_committed_reads_only_when_asked_to(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        writer, reader = await world.client(first.url), await world.client(second.url)
        result = await writer.produce(topic, 0, [b"a"])
        await eventually(lambda: high_watermark(second, topic) > result.base_offset, "the watermark arrives")
        entry = FetchEntry(topic.id, 0, result.base_offset)
        refused, _ = await reader.fetch([entry])
        assert refused.results[0].error is not None
        assert refused.results[0].error.details["primary"] == first.id
        answer, _ = await reader.fetch([entry], secondary=True)
        assert answer.results[0].error is None
        assert answer.results[0].size > 0


async def test_a_parked_fetch_hears_that_the_primary_changed(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        asked = client.send(Kind.FETCH, Fetch(30_000, 2**20, [FetchEntry(topic.id, 0, high_watermark(first, topic))]))
        await eventually(lambda: first.broker.metrics.parked_fetches == 1, "parked")
        world.coordinator.lead((topic.id, 0), second.id, (first.id, second.id))
        answer, _ = await fetched(client, asked)
        assert answer.results[0].error is not None
        assert answer.results[0].error.code == "NOT_PRIMARY"
        assert answer.results[0].error.details["primary"] == second.id


async def test_a_stop_answers_everybody_who_waits(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        fetch = client.send(Kind.FETCH, Fetch(60_000, 2**20, [FetchEntry(topic.id, 0, high_watermark(broker, topic))]))
        revision = broker.broker.node.metadata.revision
        poll = client.send(Kind.METADATA, MetadataRequest(coord_epoch=1, revision=revision + 1000, wait_ms=60_000))
        await eventually(lambda: broker.broker.metrics.parked_fetches == 1, "parked")
        began = asyncio.get_running_loop().time()
        assert await broker.stop() == 0
        answer, _ = await fetched(client, fetch)
        assert answer.results[0].error is not None, "the partition was given up"
        assert (await client.answer(poll)).is_error
        assert asyncio.get_running_loop().time() - began < 30, "they asked to wait for a minute"


async def test_offsets_are_found_by_place_and_by_time(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        start = high_watermark(broker, topic)
        for second in range(1, 6):
            data = bytes(encode_batch([(None, b"x", [])] * 3, timestamp_ms=second * 1000))
            await client.produce_raw([(ProduceEntry(topic.id, 0, 1, len(data)), data)])

        async def offset(at: str, timestamp_ms: int = 0) -> int:
            ask = Offsets([OffsetsEntry(topic.id, 0, at, timestamp_ms)])
            result = (await client.call(Kind.OFFSETS, ask, OffsetsAnswer)).results[0]
            assert result.error is None, result.error
            return int(result.offset)

        assert await offset("start") == 0
        assert await offset("end") == start + 15
        assert await offset("latest") == start + 15
        assert await offset("time", 3000) == start + 6
        assert await offset("time", 2500) == start + 6
        assert await offset("time", 9000) == start + 15


async def test_metadata_is_served_from_the_copy_and_polled_by_revision(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        client = await world.client(broker.url)
        known = ClusterMetadata()
        known.apply(await client.call(Kind.METADATA, MetadataRequest(), MetadataAnswer))
        assert known.cluster_id == world.coordinator.cluster_id
        poll = client.send(Kind.METADATA, known.request(30_000))
        await world.topic("orders", [(broker.id,)])
        known.apply(decode_header((await client.answer(poll)).header, MetadataAnswer))
        assert known.topic("orders") is not None
        nothing = await client.call(Kind.METADATA, known.request(20), MetadataAnswer)
        assert not known.apply(nothing)


async def test_metadata_is_served_while_no_coordinator_answers(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        await world.coordinator.stop()
        client = await world.client(broker.url)
        answer = await client.call(Kind.METADATA, MetadataRequest(), MetadataAnswer)
        assert [found.name for found in answer.topics] == ["orders"]
        assert (await client.produce(topic, 0, [b"a"])).error is None
