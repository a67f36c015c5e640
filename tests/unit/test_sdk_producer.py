"""The producer on real sockets: what is refused before sending, and what becomes of records when brokers misbehave."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pydantic
import pytest

import ferryline as fl
from ferryline.accumulator import RECORD_OVERHEAD
from ferryline.message import Message
from ferryline.protocol.errors import (
    BufferFull,
    ClientClosed,
    DeadlineExceeded,
    FerrylineError,
    InvalidArgument,
    InvalidName,
    NotEnoughReplicas,
    OutcomeUnknown,
    RecordTooLarge,
    SerializationFailed,
    UnknownPartition,
    UnknownTopic,
)
from ferryline.protocol.partitioner import partition_of
from ferryline.protocol.records import read_header
from tests.polling import SOON_S, poll
from unit.sdk_fake_cluster import FakeCluster, Key, Node


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(2) as cluster:
        cluster.create("orders", 4)
        yield cluster


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        yield client


# -- refused before anything is sent ------------------------------------------------------------------


class NotSerializable:
    pass


class BrokenSerializer:
    def encode(self, value: Any) -> Any:
        return "text", None

    def decode(self, data: bytes | None) -> Any:
        return data


REFUSALS: list[tuple[str, dict[str, Any], type[FerrylineError], str]] = [
    ("a value over the limit", {"value": b"x" * (1024 * 1024 + 1)}, RecordTooLarge, "value"),
    ("a key over the limit", {"value": b"", "key": "k" * (1024 * 1024 + 1)}, RecordTooLarge, "key"),
    ("headers over the limit", {"value": b"", "headers": {"h": b"x" * (1024 * 1024)}}, RecordTooLarge, "headers"),
    ("a key that is a number", {"value": b"", "key": 7}, InvalidArgument, "key"),
    ("a value without serializer", {"value": NotSerializable()}, SerializationFailed, "value"),
    ("a dict with such a value", {"value": {"a": NotSerializable()}}, SerializationFailed, "value"),
    ("a header name that is bytes", {"value": b"", "headers": [(b"a", b"b")]}, InvalidArgument, "headers"),
    ("an empty header name", {"value": b"", "headers": {"": b"b"}}, InvalidArgument, "headers"),
    ("a long header name", {"value": b"", "headers": {"h" * 256: b""}}, InvalidArgument, "headers"),
    ("a header value that is a number", {"value": b"", "headers": {"a": 1}}, InvalidArgument, "headers"),
    ("too many headers", {"value": b"", "headers": [("a", b"")] * 101}, InvalidArgument, "headers"),
    ("a partition too high", {"value": b"", "partition": 4}, UnknownPartition, "partition"),
    ("a partition below zero", {"value": b"", "partition": -1}, UnknownPartition, "partition"),
    ("a partition that is text", {"value": b"", "partition": "1"}, UnknownPartition, "partition"),
    ("a timestamp that is a float", {"value": b"", "timestamp_ms": 1.5}, InvalidArgument, "timestamp_ms"),
    ("a timestamp below zero", {"value": b"", "timestamp_ms": -1}, InvalidArgument, "timestamp_ms"),
    ("an unknown topic", {"topic": "nowhere", "value": b""}, UnknownTopic, "topic"),
    ("a topic name with a slash", {"topic": "a/b", "value": b""}, InvalidName, "topic"),
    ("a topic name that is empty", {"topic": "", "value": b""}, InvalidName, "topic"),
    ("a reserved topic name", {"topic": "__state", "value": b""}, InvalidName, "topic"),
    ("a topic name of 201 letters", {"topic": "t" * 201, "value": b""}, InvalidName, "topic"),
]


@pytest.mark.parametrize(("what", "record", "error", "field"), REFUSALS, ids=[row[0] for row in REFUSALS])
async def test_what_is_wrong_with_a_record_is_told_before_anything_is_sent(
    cluster: FakeCluster,
    client: fl.Client,
    what: str,
    record: dict[str, Any],
    error: type[FerrylineError],
    field: str,
) -> None:
    async with client.producer(linger=0) as producer:
        arguments = {"topic": "orders", **record}
        with pytest.raises(error) as at_once:
            producer.send_nowait(**arguments)
        with pytest.raises(error) as awaited:
            await producer.send(**arguments)
        for caught in (at_once.value, awaited.value):
            assert caught.details["field"] == field
            assert field in str(caught)
            assert caught.definite
        assert producer.buffered_bytes == 0
        await producer.send("orders", b"good", key="k")  # and the producer serves as before
    assert sum(len(found) for found in cluster.records("orders").values()) == 1


async def test_a_limit_is_named_with_the_field(cluster: FakeCluster, client: fl.Client) -> None:
    cluster.create("small", 1, max_record_bytes=100)
    await client.learn_topic("small")
    async with client.producer() as producer:
        with pytest.raises(RecordTooLarge) as caught:
            await producer.send("small", b"x" * 90, key="k" * 11)
        assert caught.value.details == {"field": "value", "limit": 100, "size": 101}
        await producer.send("small", b"x" * 90, key="k" * 10)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "brotli"},
        {"linger": -1},
        {"linger": "soon"},
        {"linger": 61},
        {"batch_bytes": 1023},
        {"batch_bytes": 2**31},
        {"batch_bytes": 1.5},
        {"buffer_bytes": 10},
        {"delivery_timeout": 0},
        {"request_timeout": 601},
    ],
    ids=str,
)
async def test_bad_options_are_refused_and_named(client: fl.Client, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        client.producer(**options)


@pytest.mark.parametrize(
    ("urls", "field"),
    [
        ("ftp://localhost", "url"),
        ("http://example.org", "url"),
        ("https://", "url"),
        ("localhost:8443", "url"),
        ([], "urls"),
        (" , ", "urls"),
    ],
)
def test_bad_urls_are_refused(urls: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        fl.connect(urls)
    assert caught.value.details["field"] == field


async def test_a_ca_that_cannot_be_read_is_named(tmp_path: Any) -> None:
    path = tmp_path / "ca.crt"
    with pytest.raises(InvalidArgument, match="ca"):
        fl.connect("https://localhost", ca=path)
    path.write_text("no certificate")
    with pytest.raises(InvalidArgument, match="ca"):
        fl.connect("https://localhost", ca=path)


async def test_a_full_buffer_refuses_send_nowait_and_holds_send_back(cluster: FakeCluster, client: fl.Client) -> None:
    cluster.ack_delay_s = 0.05
    async with client.producer(buffer_bytes=4096, batch_bytes=1024, linger=0) as producer:
        for _ in range(4096 // (200 + 1 + RECORD_OVERHEAD)):
            producer.send_nowait("orders", b"x" * 200, key="k")
        with pytest.raises(BufferFull) as caught:
            producer.send_nowait("orders", b"x" * 200, key="k")
        assert caught.value.details["limit"] == 4096
        results = await asyncio.gather(*(producer.send("orders", b"y" * 200, key="k") for _ in range(100)))
        offsets = [result.offset for result in results]
        assert offsets == sorted(offsets), "those who waited were let in out of order"
    assert producer.buffered_bytes == 0


async def test_a_record_that_never_fits_the_buffer_is_refused_at_once(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(buffer_bytes=4096, batch_bytes=1024) as producer:
        with pytest.raises(BufferFull):
            await producer.send("orders", b"x" * 5000)


async def test_a_wrong_serializer_is_told_as_such(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(serializer=BrokenSerializer()) as producer:
        with pytest.raises(SerializationFailed, match="returned str"):
            await producer.send("orders", object())


async def test_a_producer_that_was_not_started_or_is_closed_says_so(cluster: FakeCluster, client: fl.Client) -> None:
    producer = client.producer()
    with pytest.raises(ClientClosed, match="not started"):
        producer.send_nowait("orders", b"")
    await producer.start()
    producer.send_nowait("orders", b"")
    await producer.close()
    for _ in range(2):
        with pytest.raises(ClientClosed, match="closed"):
            producer.send_nowait("orders", b"")
        with pytest.raises(ClientClosed, match="closed"):
            await producer.send("orders", b"")
        await producer.close()


# -- sending -----------------------------------------------------------------------------------------


class Order(msgspec.Struct):
    id: int


@dataclasses.dataclass
class Point:
    x: int


class Model(pydantic.BaseModel):
    name: str


async def test_values_are_serialized_by_type_and_read_back_by_type(cluster: FakeCluster, client: fl.Client) -> None:
    values: list[tuple[Any, Any]] = [
        (b"raw", bytes),
        ("text", str),
        (Order(3), Order),
        (Point(4), Point),
        (Model(name="n"), Model),
        ({"a": [1, 2]}, dict),
        (None, Order),
    ]
    for value, kind in values:
        topic = f"typed-{type(value).__name__}-{kind.__name__}"
        cluster.create(topic)
        await client.learn_topic(topic)
        async with client.producer(linger=0) as producer, client.consumer(topic, value=kind) as consumer:
            await producer.send(topic, value, headers={"a": "1", "b": b"2"})
            (message,) = await consumer.pull()
            assert message.value == value
            assert message.headers["a"] == b"1"
            assert message.headers.getall("b") == [b"2"]


async def test_a_value_that_does_not_parse_says_where_it_stands(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(linger=0) as producer, client.consumer("orders", value=Order) as consumer:
        sent = await producer.send("orders", b"{not json")
        (message,) = await consumer.pull()
        with pytest.raises(SerializationFailed, match=f"orders/{sent.partition}/{sent.offset}"):
            message.value  # noqa: B018
        assert message.raw == b"{not json"


async def test_records_of_a_key_stay_in_order_in_the_partition_of_the_key(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.producer(batch_bytes=1024) as producer:
        futures = [producer.send_nowait("orders", b"%d" % number, key=f"key-{number % 20}") for number in range(2_000)]
        results = [await future for future in futures]
    for partition, records in cluster.records("orders").items():
        for key in {key for key, _ in records if key is not None}:
            assert partition_of(key, 4) == partition
            numbers = [int(value or b"") for found, value in records if found == key]
            assert numbers == sorted(numbers)
    for number, result in enumerate(results):
        assert cluster.records("orders")[result.partition][result.offset][1] == b"%d" % number


async def test_records_without_a_key_go_round_the_partitions_by_batch(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(batch_bytes=1024) as producer:
        for _ in range(200):
            producer.send_nowait("orders", b"x" * 100)
        await producer.flush()
    counts = {number: len(records) for number, records in cluster.records("orders").items()}
    assert sum(counts.values()) == 200
    assert max(counts.values()) - min(counts.values()) <= 10
    assert all(len(log.batches) < 30 for log in cluster.logs.values()), "one batch per record"


async def test_a_record_that_somebody_waits_for_does_not_linger_alone(client: fl.Client) -> None:
    async with client.producer(linger=60.0) as producer, asyncio.timeout(30):
        for _ in range(5):
            await producer.send("orders", b"", key="k")


async def test_linger_gathers_what_is_sent_apart_after_a_first_that_leaves_at_once(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.producer(linger=0.5) as producer:
        for _ in range(5):
            producer.send_nowait("orders", b"", key="k")
            await asyncio.sleep(0.001)
        await producer.flush()
    assert [len(log.batches) for log in cluster.logs.values() if log.batches] == [2]


async def test_send_many_gives_one_outcome_for_each_record_in_order(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer() as producer:
        outcomes = await producer.send_many("orders", [("k", b"a"), b"b", ("k", b"x" * 2**21), ("k", "c")])
    assert [type(outcome) for outcome in outcomes] == [
        fl.RecordMetadata,
        fl.RecordMetadata,
        RecordTooLarge,
        fl.RecordMetadata,
    ]


@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
async def test_compressed_batches_are_smaller_and_read_back(
    cluster: FakeCluster, client: fl.Client, compression: str
) -> None:
    async with client.producer(compression=compression) as producer:
        await producer.send_many("orders", [("k", b"x" * 500)] * 100)
    batches = [batch for log in cluster.logs.values() for batch in log.batches]
    assert read_header(batches[0]).codec == compression
    assert (sum(len(batch) for batch in batches) < 10_000) == (compression != "none")
    async with client.consumer("orders") as consumer:
        messages: list[Message[bytes]] = []
        while len(messages) < 100:
            messages += await consumer.pull(max_records=1_000)
        assert {message.value for message in messages} == {b"x" * 500}


async def test_a_future_that_the_application_gave_up_does_not_disturb_its_batch(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.producer(linger=0.01) as producer:
        futures = [producer.send_nowait("orders", b"", key="k") for _ in range(5)]
        futures[2].cancel()
        done = await asyncio.gather(*futures, return_exceptions=True)
        assert [isinstance(result, fl.RecordMetadata) for result in done] == [True, True, False, True, True]


async def test_flush_sends_what_lingers_and_waits_for_it(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(linger=30) as producer:
        futures = [producer.send_nowait("orders", b"", key=str(number)) for number in range(50)]
        await producer.flush()
        assert all(future.done() for future in futures)


async def test_flush_has_a_deadline(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(delivery_timeout=3) as producer:
        for node in cluster.brokers.values():
            node.silent = True
        future = producer.send_nowait("orders", b"")
        with pytest.raises(DeadlineExceeded, match="flush"):
            await producer.flush(timeout=0.2)
        assert not future.done(), "its own deadline is later"
        for node in cluster.brokers.values():
            node.silent = False
        with pytest.raises(OutcomeUnknown):
            await future


# -- when brokers misbehave ----------------------------------------------------------------------------


async def test_a_moved_primary_is_found_within_tens_of_ms_and_nothing_is_stored_twice(
    cluster: FakeCluster, client: fl.Client
) -> None:
    meta = cluster.topics["orders"]
    took: list[float] = []  # after each move
    async with client.producer(linger=0) as producer:
        for number in range(40):
            if number % 10 == 5:
                for partition in range(4):
                    key = (meta.id, partition)
                    cluster.move(key, 3 - cluster.primaries[key])
            started = time.monotonic()
            await producer.send("orders", b"%d" % number, key="k")
            if number % 10 == 5:
                took.append(time.monotonic() - started)
    assert min(took) < 0.5, (
        "the best of four: a busy machine may be slow now and then, waiting in vain is slow each time"
    )
    (records,) = [found for found in cluster.records("orders").values() if found]
    assert [value for _, value in records] == [b"%d" % number for number in range(40)]


async def test_a_killed_broker_is_left_as_soon_as_another_is_primary(cluster: FakeCluster, client: fl.Client) -> None:
    meta = cluster.topics["orders"]
    async with client.producer(linger=0) as producer:
        await producer.send("orders", b"before", partition=0)
        await cluster.brokers[1].stop()
        sending = asyncio.create_task(producer.send("orders", b"after", partition=0))
        await asyncio.sleep(0.1)
        assert not sending.done()
        cluster.move((meta.id, 0), 2)
        await asyncio.wait_for(sending, SOON_S)


async def test_a_silent_primary_is_left_as_soon_as_another_is_primary(cluster: FakeCluster, client: fl.Client) -> None:
    """Answers of a paused process never come; waiting for the request timeout would take half a minute."""
    meta = cluster.topics["orders"]
    async with client.producer(linger=0) as producer:
        await producer.send("orders", b"before", partition=0)
        cluster.brokers[1].silent = True
        sending = asyncio.create_task(producer.send("orders", b"after", partition=0))
        await asyncio.sleep(0.1)
        cluster.move((meta.id, 0), 2)
        await asyncio.wait_for(sending, SOON_S)


async def test_retriable_refusals_do_not_reach_the_application_or_change_the_order(
    cluster: FakeCluster, client: fl.Client
) -> None:
    turn = 0

    def refuse_some(node: Node, key: Key, data: bytearray) -> None:
        nonlocal turn
        turn += 1
        if turn % 3 == 0:
            raise NotEnoughReplicas("for now")

    cluster.on_produce = refuse_some
    async with client.producer(linger=0, batch_bytes=1024) as producer:
        futures = [producer.send_nowait("orders", b"%d" % number, key="k") for number in range(1_000)]
        await asyncio.gather(*futures)
    (records,) = [found for found in cluster.records("orders").values() if found]
    assert [int(value or b"") for _, value in records] == list(range(1_000))


async def test_a_definite_failure_of_one_batch_does_not_stop_those_behind_it(
    cluster: FakeCluster, client: fl.Client
) -> None:
    def refuse_poison(node: Node, key: Key, data: bytearray) -> None:
        if b"poison" in data:
            raise RecordTooLarge("no")

    cluster.on_produce = refuse_poison
    async with client.producer(linger=0, batch_bytes=1024) as producer:
        values = [b"%04d" % number if number != 50 else b"poison" for number in range(100)]
        futures = [producer.send_nowait("orders", value.ljust(300), key="k") for value in values]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert failed
    assert all(isinstance(outcome, RecordTooLarge) for outcome in failed)
    (records,) = [found for found in cluster.records("orders").values() if found]
    stored = [int(value or b"") for _, value in records]
    assert stored == sorted(stored)
    assert len(stored) == 100 - len(failed)


async def test_records_are_routed_anew_in_order_when_a_topic_gets_more_partitions(
    cluster: FakeCluster, client: fl.Client
) -> None:
    cluster.ack_delay_s = 0.005
    async with client.producer(linger=0.001, batch_bytes=1024) as producer:
        futures = []
        for number in range(3_000):
            if number == 1_500:
                cluster.grow("orders", 7)
            futures.append(producer.send_nowait("orders", b"%d" % number, key=f"k{number % 30}"))
            if number % 50 == 0:
                await asyncio.sleep(0.001)
        results = await asyncio.gather(*futures)
        assert producer.buffered_bytes == 0
    assert {result.partition for result in results[-30:]} & {4, 5, 6}
    seen: dict[bytes, list[int]] = {}
    for result, number in zip(results, range(3_000), strict=True):
        key, value = cluster.records_at("orders", result)
        assert int(value or b"") == number
        seen.setdefault(key or b"", []).append(number)
    assert sum(len(records) for records in cluster.records("orders").values()) == 3_000


async def test_a_deleted_topic_fails_what_waits_for_it(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(linger=30) as producer:
        future = producer.send_nowait("orders", b"")
        cluster.delete("orders")
        with pytest.raises(UnknownTopic):
            await asyncio.wait_for(future, SOON_S)
        with pytest.raises(UnknownTopic):
            producer.send_nowait("orders", b"")
        assert producer.buffered_bytes == 0


async def test_a_dead_cluster_ends_in_typed_errors_by_the_deadline(cluster: FakeCluster) -> None:
    async with (
        fl.connect(cluster.coordinator.url, timeout=5) as client,
        client.producer(linger=0, delivery_timeout=3) as producer,
    ):
        await producer.send("orders", b"")
        for node in [cluster.coordinator, *cluster.brokers.values()]:
            await node.stop()
        started = time.monotonic()
        with pytest.raises((DeadlineExceeded, OutcomeUnknown)):
            await producer.send("orders", b"")
        assert time.monotonic() - started < SOON_S
        assert producer.buffered_bytes == 0


async def test_connecting_to_nobody_fails_by_the_deadline_and_names_the_address(unused_tcp_port: int) -> None:
    started = time.monotonic()
    with pytest.raises(fl.errors.ConnectionFailed, match=str(unused_tcp_port)):
        async with fl.connect(f"https://127.0.0.1:{unused_tcp_port}", timeout=0.5):
            pass
    assert time.monotonic() - started < SOON_S


async def test_the_first_address_that_answers_is_enough(cluster: FakeCluster, unused_tcp_port: int) -> None:
    urls = [f"http://127.0.0.1:{unused_tcp_port}", cluster.brokers[2].url]
    await cluster.coordinator.stop()
    async with fl.connect(urls, timeout=15) as client, client.producer(linger=0) as producer:
        await producer.send("orders", b"through a broker")


async def test_a_coordinator_outage_stops_neither_old_nor_new_clients(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(linger=0) as producer:
        await producer.send("orders", b"1")
        await cluster.coordinator.stop()
        await producer.send("orders", b"2")
        urls = [cluster.coordinator.url, cluster.brokers[1].url]
        async with fl.connect(urls, timeout=15) as late, late.producer(linger=0) as other:
            await other.send("orders", b"3")


async def test_nothing_is_left_behind_by_a_closed_client(cluster: FakeCluster) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        async with fl.connect(cluster.coordinator.url) as client, client.producer() as producer:
            await producer.send("orders", b"")
    others = {task for task in asyncio.all_tasks() if "ferryline/" in str(task.get_coro())}
    assert not {task for task in others if "sdk/ferryline" in repr(task.get_stack())}
    await poll(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)


async def test_an_invariant_that_does_not_hold_ends_in_an_error_for_every_record_and_not_in_silence(
    cluster: FakeCluster, client: fl.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with client.producer(linger=0) as producer:
        await producer.send("orders", b"good", key="k")

        def broken(*_: Any) -> Any:
            raise AssertionError("ordinals went back\nlast events: ...")

        monkeypatch.setattr(producer._batching._sender._core, "handle", broken)
        futures = [producer.send_nowait("orders", b"", key=f"k{number}") for number in range(20)]
        for future in futures:
            with pytest.raises(fl.errors.InternalError, match="ordinals went back"):
                await asyncio.wait_for(future, SOON_S)
        with pytest.raises(fl.errors.InternalError):
            await producer.send("orders", b"")
        assert producer.buffered_bytes == 0
    assert "last events" in caplog.text
