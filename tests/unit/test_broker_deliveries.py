"""The bytes of a delivery: batches as they stand in the log where they are leased as a whole, others made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.messages import RECORDS, ProduceEntry
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import HEADER_PRIORITY, NACK, Delivery, Receive, ReceiveAnswer
from ferryline.protocol.records import decode_batch, encode_batch, read_header, split_batches
from ferryline_broker.queue_records import QueueRecords, _are, _Batch
from unit.broker_world import BrokerWorld, RawClient
from unit.test_broker_queue import Receiver


async def produce(
    client: RawClient, topic: TopicMeta, *keys: str, codec: str = "none", priority: str = "", times: int = 2_000
) -> None:
    """One batch. A value is its key so many times."""
    headers = [(HEADER_PRIORITY, priority.encode())] if priority else []
    rows: list[Any] = [(key.encode(), key.encode() * times, headers) for key in keys]
    data = bytes(encode_batch(rows, codec=codec))
    entry = ProduceEntry(topic.id, 0, topic.config.partitions, len(data))
    assert (await client.produce_raw([(entry, data)]))[0].error is None


async def receive(client: RawClient, topic: TopicMeta, records_max: int, **fields: Any) -> tuple[Delivery, memoryview]:
    ask = Receive("g", "m", [(topic.id, 0)], records_max, wait_ms=5_000, **{"batches": True, **fields})
    frame = await client.ask(Kind.RECEIVE, ask)
    (delivery,) = decode_header(frame.header, ReceiveAnswer).deliveries
    assert delivery.error is None
    assert delivery.size == len(frame.payload)
    return delivery, memoryview(frame.payload)


def pieces(payload: memoryview) -> list[bytes]:
    """The batches of a delivery. Each says where in it it stands."""
    found, place = [], 0
    for at, header in split_batches(payload):
        assert header.base_offset == place
        place += header.record_count
        found.append(bytes(payload[at : at + header.size]))
    return found


def keys(payload: memoryview) -> list[str]:
    return [(record.key or b"").decode() for one in pieces(payload) for record in decode_batch(one)]


def but_for_offset_and_epoch(batch: bytes) -> bytes:
    return batch[8:12] + batch[16:]


async def test_a_batch_that_is_leased_as_a_whole_is_handed_on_as_it_was_sent(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,)])
        client = await world.client(broker.url)
        for batch in ("abc", "d", "efgh"):
            await produce(client, topic, *batch)
        delivery, payload = await receive(client, topic, 6)
        assert delivery.offsets == [1, 2, 3, 4, 5, 6], "at offset 0 an epoch begins"
        assert keys(payload) == list("abcdef")
        hosted = broker.broker.partitions.replicas[topic.id, 0]
        log = hosted.logs[RECORDS].read(1, 1 << 20, 9)
        sent = [bytes(log[at : at + header.size]) for at, header in split_batches(log)]
        whole = [but_for_offset_and_epoch(one) for one in sent]
        assert [but_for_offset_and_epoch(one) in whole for one in pieces(payload)] == [True, True, False]
        delivery, payload = await receive(client, topic, 6)
        assert (delivery.offsets, keys(payload)) == ([7, 8], ["g", "h"])
        assert len(pieces(payload)) == 1


async def test_small_batches_are_put_together(tmp_path: Path) -> None:
    """Each would cost its header, and the receiver a round of its decoder."""
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,)])
        client = await world.client(broker.url)
        for number in range(20):
            await produce(client, topic, *[f"{number}-{at}" for at in range(3)], times=12)
        _, payload = await receive(client, topic, 100)
        assert keys(payload) == [f"{number}-{at}" for number in range(20) for at in range(3)]
        assert len(pieces(payload)) == 1


@pytest.mark.parametrize("codec", ["none", "gzip", "lz4"])
def test_the_cache_counts_what_batches_take_unpacked(codec: str) -> None:
    cache = QueueRecords(4 * 1024 * 1024)
    value = b"the same again and again, " * 40_000
    for base in range(30):
        data = memoryview(bytes(encode_batch([(b"k", value, [])], base_offset=base, codec=codec)))
        header = read_header(data)
        cache._keep(("topic", 0), _Batch(header, list(decode_batch(data, header)), data))
    held = sum(len(one.data) + sum(len(r.value or b"") for r in one.records) for one in cache._batches.values())
    assert held <= 4 * 1024 * 1024
    assert held >= 2 * 1024 * 1024


def test_records_in_any_order_are_found_without_looking_at_whole_batches_again_and_again() -> None:
    """Linear: what is compared is bounded by what is delivered."""
    looked = 0

    class Counted(list[int]):
        def __getitem__(self, at: Any) -> Any:
            nonlocal looked
            found = super().__getitem__(at)
            looked += len(found) if isinstance(at, slice) else 1
            return found

    count = 2_000
    offsets = Counted(o for pair in zip(range(count), range(count, 2 * count), strict=True) for o in pair)
    for at, offset in enumerate(list(offsets)):
        base = 0 if offset < count else count
        assert not _are(offsets, at, base, base + count)
    assert looked < 10 * count
    assert _are([4, 5, 6, 7, 9], 1, 5, 8)
    assert not _are([4, 5, 6, 7, 9], 1, 5, 10)
    assert not _are([4, 5, 7, 6, 8], 1, 5, 9)
    assert not _are([4, 5, 6], 1, 5, 9)


async def test_whoever_did_not_ask_for_several_gets_one_batch(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,)])
        client = await world.client(broker.url)
        for batch in ("abc", "d", "efgh"):
            await produce(client, topic, *batch)
        _, payload = await receive(client, topic, 100, batches=False)
        assert len(pieces(payload)) == 1
        assert keys(payload) == list("abcdefgh")


@pytest.mark.parametrize("codec", ["gzip", "lz4", "zstd"])
async def test_what_was_compressed_is_delivered_unpacked(tmp_path: Path, codec: str) -> None:
    """``bytes_max`` bounds what a receiver has to hold."""
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, *"ab")
        await produce(client, topic, *[f"key {number}" for number in range(50)], codec=codec)
        await produce(client, topic, *"cd")
        _, payload = await receive(client, topic, 100)
        assert keys(payload) == ["a", "b", *[f"key {number}" for number in range(50)], "c", "d"]
        assert {header.codec for _, header in split_batches(payload)} == {"none"}


async def test_batches_are_made_anew_where_records_come_in_another_order(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, *"abc")
        delivery, payload = await receive(client, topic, 2)
        await produce(client, topic, *"hi", priority="9")
        receiver = Receiver(client, topic)
        await receiver.settle(delivery, NACK, 1, delay_ms=0)
        delivery, payload = await receive(client, topic, 100)
        assert (delivery.offsets, keys(payload)) == ([4, 5, 1, 3], ["h", "i", "a", "c"])
        assert delivery.attempts == [1, 1, 2, 1]


async def test_a_delivery_that_is_too_much_for_an_answer_is_cut(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, *[f"{number:05}" for number in range(300)])
        await receive(client, topic, 1)
        delivery, payload = await receive(client, topic, 300, bytes_max=80_000)
        assert len(payload) <= 80_000 + 12_000
        assert keys(payload) == [f"{offset - 1:05}" for offset in delivery.offsets]
        seen = list(delivery.offsets)
        while len(seen) < 299:
            delivery, payload = await receive(client, topic, 300, bytes_max=80_000)
            assert set(delivery.attempts) == {1}
            seen += delivery.offsets
        assert sorted(seen) == list(range(2, 301))


async def test_a_lease_that_retention_has_taken_away_is_answered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver asks again, instead of waiting for records that may come much later."""
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("t", [(broker.id,)])
        client = await world.client(broker.url)
        await produce(client, topic, *"ab")
        records = broker.broker.frames.records
        with monkeypatch.context() as patched:
            patched.setattr(records, "delivery", lambda hosted, offsets: (bytearray(), []))
            ask = Receive("g", "m", [(topic.id, 0)], 10, wait_ms=60_000, batches=True)
            answer = decode_header((await client.ask(Kind.RECEIVE, ask)).header, ReceiveAnswer)
            assert answer.deliveries == []
