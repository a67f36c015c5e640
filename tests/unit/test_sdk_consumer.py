"""Consumers on real sockets: order, positions, and what happens when brokers go away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import ferryline as fl
from ferryline.message import Message
from ferryline.protocol.errors import (
    ClientClosed,
    DeadlineExceeded,
    FerrylineError,
    InvalidArgument,
    InvalidName,
    LogTruncated,
    OffsetOutOfRange,
    RequestTimedOut,
    UnknownPartition,
    UnknownTopic,
)
from ferryline.protocol.records import encode_batch
from tests.polling import SOON_S, poll
from unit.sdk_fake_cluster import FakeCluster, raise_code

PARKED_S = 4.0  # sooner than a fetch that nothing wakes


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(2) as cluster:
        cluster.create("orders", 4)
        yield cluster


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        yield client


async def test_an_answer_without_a_partition_is_no_failure_of_that_partition(
    cluster: FakeCluster, client: fl.Client
) -> None:
    """A broker names only partitions that have something; the others are asked for again at once. Taking them for lost
    made them wait for their back-off, and asked for the metadata each time."""
    asked: list[int] = []
    async with client.consumer("orders") as consumer:
        fetcher = consumer._fetcher
        assert fetcher is not None
        fetcher.refresh = lambda: asked.append(1)  # type: ignore[method-assign]
        for number in range(5):
            await fill(client, 1, partition=0)
            assert len(await read(consumer, 1)) == 1, number
            await poll(lambda: all(partition.ticket for partition in fetcher.partitions.values()))
            assert [partition.failures for partition in fetcher.partitions.values()] == [0, 0, 0, 0]


async def fill(client: fl.Client, count: int, *, topic: str = "orders", partition: int | None = None) -> None:
    async with client.producer(linger=0, batch_bytes=2048) as producer:
        for number in range(count):
            key = None if partition is not None else f"k{number}"
            producer.send_nowait(topic, b"%d" % number, key, partition=partition)
        await producer.flush()


async def read(consumer: fl.Consumer[Any], count: int) -> list[Message[Any]]:
    found: list[Message[Any]] = []
    async with asyncio.timeout(SOON_S):
        while len(found) < count:
            found += await consumer.pull(max_records=count - len(found), max_wait=0.2)
    return found


# -- refused before anything is sent -------------------------------------------------------------------


async def test_what_was_waited_for_is_handed_out_before_more_is_asked_for_and_what_was_at_hand_after(
    client: fl.Client,
) -> None:
    async with client.consumer("orders") as consumer:
        fetcher = consumer._fetcher
        assert fetcher is not None
        batches = aiter(consumer.batches(max_records=5, max_wait=0.0))
        pulled: list[Any] = []

        async def first() -> tuple[int, bool]:
            return len(await anext(batches)), fetcher.due

        async def pull() -> tuple[int, bool]:
            pulled.extend(await consumer.pull(max_records=5, max_wait=SOON_S))
            return len(pulled), fetcher.due

        for read_some in (first, pull):
            reading = asyncio.create_task(read_some())
            await poll(lambda: all(partition.ticket for partition in fetcher.partitions.values()))
            await fill(client, 1, partition=0)
            assert await reading == (1, True), "the next fetch is not written yet"
        await fill(client, 7, partition=0)
        await poll(lambda: any(partition.buffered for partition in fetcher.partitions.values()))
        fetcher.schedule()
        assert len(await anext(batches)) > 0
        assert not fetcher.due, "brokers read ahead while the application works on what was at hand"


@pytest.mark.parametrize(
    ("topics", "options", "error", "field"),
    [
        ([], {}, InvalidArgument, "topics"),
        ("a b", {}, InvalidName, "topic"),
        (["orders", ".."], {}, InvalidName, "topic"),
        ("orders", {"group": "__g"}, InvalidName, "group"),
        ("orders", {"group": ""}, InvalidName, "group"),
        ("orders", {"start": "middle"}, InvalidArgument, "start"),
        ("orders", {"start": -1}, InvalidArgument, "start"),
        ("orders", {"start": True}, InvalidArgument, "start"),
        (["a", "b"], {"partitions": [0]}, InvalidArgument, "partitions"),
        ("orders", {"auto_commit_interval": 0}, InvalidArgument, "auto_commit_interval"),
        ("orders", {"session_timeout": 0.5}, InvalidArgument, "session_timeout"),
        ("orders", {"max_processing": 0}, InvalidArgument, "max_processing"),
        ("orders", {"instance_id": "a/b"}, InvalidName, "instance_id"),
        ("orders", {"partition_bytes": 1}, InvalidArgument, "partition_bytes"),
        ("orders", {"partition_bytes": 2048, "buffer_bytes": 1024}, InvalidArgument, "buffer_bytes"),
    ],
    ids=str,
)
async def test_bad_options_are_refused_and_named(
    client: fl.Client, topics: Any, options: dict[str, Any], error: type[FerrylineError], field: str
) -> None:
    with pytest.raises(error) as caught:
        client.consumer(topics, **options)
    assert caught.value.details["field"] == field


async def test_what_does_not_exist_is_refused_at_the_start(client: fl.Client) -> None:
    with pytest.raises(UnknownTopic):
        await client.consumer("nowhere").start()
    with pytest.raises(UnknownPartition, match=r"0\.\.3"):
        await client.consumer("orders", partitions=[4]).start()


async def test_bad_calls_are_refused_and_named(client: fl.Client) -> None:
    consumer = client.consumer("orders", partitions=[0])
    with pytest.raises(ClientClosed, match="not started"):
        await consumer.pull()
    async with consumer:
        with pytest.raises(InvalidArgument, match="max_records"):
            await consumer.pull(max_records=0)
        with pytest.raises(InvalidArgument, match="not read here"):
            consumer.position(("orders", 1))
        with pytest.raises(UnknownPartition):
            consumer.pause(("orders", 9))
        with pytest.raises(UnknownTopic):
            await consumer.seek(("nowhere", 0), 0)
        with pytest.raises(InvalidArgument, match="where"):
            await consumer.seek(("orders", 0), "middle")
        with pytest.raises(InvalidArgument, match="group"):
            await consumer.commit()
        with pytest.raises(InvalidArgument, match="group"):
            await consumer.committed(("orders", 0))
    with pytest.raises(ClientClosed):
        await consumer.pull()


# -- reading -----------------------------------------------------------------------------------------


async def test_every_record_is_read_once_and_in_order_of_its_partition(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 2_000)
    async with client.consumer("orders") as consumer:
        seen: dict[int, list[int]] = {}
        async for message in consumer:
            seen.setdefault(message.partition, []).append(message.offset)
            if sum(map(len, seen.values())) == 2_000:
                break
        assert all(offsets == list(range(len(offsets))) for offsets in seen.values())
        assert set((await consumer.lag()).values()) == {0}


async def test_batches_are_full_or_what_came_in_time(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 250, partition=0)
    async with client.consumer("orders") as consumer:
        sizes = []
        async for batch in consumer.batches(max_records=100, max_wait=0.1):
            sizes.append(len(batch))
            if sum(sizes) == 250:
                break
        assert sizes == [100, 100, 50]


async def test_a_pull_returns_at_once_when_there_is_something_and_empty_at_its_deadline(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.consumer("orders") as consumer, client.producer(linger=0) as producer:
        started = time.monotonic()
        assert await consumer.pull(max_wait=0.2) == []
        assert 0.15 < time.monotonic() - started < PARKED_S
        pulling = asyncio.create_task(consumer.pull(max_wait=30))
        await asyncio.sleep(0.05)
        await producer.send("orders", b"now")
        started = time.monotonic()
        assert [message.value for message in await pulling] == [b"now"]
        assert time.monotonic() - started < PARKED_S


async def test_records_of_a_batch_that_was_given_up_half_gathered_are_handed_out_again(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 30, partition=0)
    async with client.consumer("orders", partitions=[0]) as consumer:
        gathering = consumer.batches(max_records=100, max_wait=30)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(gathering), 0.3)
        assert [message.offset for message in await read(consumer, 30)] == list(range(30))


async def test_what_stands_before_a_damaged_batch_is_handed_out_before_the_error(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 100, partition=0)
    log = cluster.logs[cluster.topics["orders"].id, 0]
    async with client.producer(linger=0) as producer:
        await producer.send("orders", b"last", partition=0)
    log.batches[-1] = log.batches[-1][:-3] + b"!" + log.batches[-1][-2:]
    async with client.consumer("orders", partitions=[0]) as consumer:
        offsets = [message.offset for message in await read(consumer, 100)]
        assert offsets == list(range(100))
        with pytest.raises(fl.errors.CorruptBatch, match="orders/0"):
            await read(consumer, 1)


async def test_control_records_are_stepped_over_and_lag_tells_the_truth(
    cluster: FakeCluster, client: fl.Client
) -> None:
    log = cluster.logs[cluster.topics["orders"].id, 0]
    for control in (True, False, True):
        log.batches.append(bytes(encode_batch([(b"k", b"v", [])], base_offset=log.end, control=control)))
        log.end += 1
    async with client.consumer("orders", partitions=[0]) as consumer:
        assert [message.offset for message in await read(consumer, 1)] == [1]
        await poll(lambda: consumer.position(("orders", 0)) == 3)
        assert await consumer.lag() == {("orders", 0): 0}


@pytest.mark.parametrize(("counts", "lag"), [(True, 2), (False, 4)])
async def test_lag_is_that_of_records_where_the_broker_says_it_and_of_offsets_where_it_is_older(
    cluster: FakeCluster, client: fl.Client, counts: bool, lag: int
) -> None:
    cluster.counts_records = counts
    log = cluster.logs[cluster.topics["orders"].id, 0]
    for control in (True, False, False, True):
        log.batches.append(bytes(encode_batch([(b"k", b"v", [])], base_offset=log.end, control=control)))
        log.end += 1
    async with client.consumer("orders", partitions=[0]) as consumer:
        consumer.pause()
        assert await consumer.lag() == {("orders", 0): lag}
        await consumer.seek(("orders", 0), 3)
        assert await consumer.lag() == {("orders", 0): 0 if counts else 1}


async def test_seek_goes_to_offsets_ends_and_moments(cluster: FakeCluster, client: fl.Client) -> None:
    first = datetime(2024, 5, 1, tzinfo=UTC)
    async with client.producer(linger=0) as producer:
        for number in range(10):
            moment = int((first + timedelta(hours=number)).timestamp() * 1000)
            await producer.send("orders", b"%d" % number, partition=2, timestamp_ms=moment)
    async with client.consumer("orders", partitions=[2]) as consumer:
        here = ("orders", 2)
        await read(consumer, 10)
        for where, expected in [
            (3, b"3"),
            ("start", b"0"),
            (fl.at(first + timedelta(hours=6, minutes=30)), b"7"),
            (first + timedelta(hours=2), b"2"),
        ]:
            await consumer.seek(here, where)
            assert (await read(consumer, 1))[0].value == expected
        assert await consumer.seek(here, "end") == 10
        assert await consumer.pull(max_wait=0.1) == []


async def test_a_seek_in_the_middle_of_a_batch_drops_what_was_fetched(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 100, partition=0)
    async with client.consumer("orders", partitions=[0]) as consumer:
        seen = []
        async for message in consumer:
            seen.append(message.offset)
            if len(seen) == 3:
                await consumer.seek(("orders", 0), 50)
            if len(seen) == 5:
                break
        assert seen == [0, 1, 2, 50, 51]


async def test_a_paused_partition_hands_nothing_out_until_it_is_resumed(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 10, partition=0)
    await fill(client, 10, partition=1)
    async with client.consumer("orders", partitions=[0, 1]) as consumer:
        consumer.pause(("orders", 0))
        assert {message.partition for message in await read(consumer, 10)} == {1}
        assert await consumer.pull(max_wait=0.1) == []
        consumer.resume(("orders", 0))
        assert {message.partition for message in await read(consumer, 10)} == {0}


async def test_a_start_may_be_an_end_or_a_moment(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(linger=0) as producer:
        for number in range(4):
            await producer.send("orders", b"%d" % number, partition=0, timestamp_ms=1_000 * number)
        async with client.consumer("orders", start="end", partitions=[0]) as consumer:
            await producer.send("orders", b"new", partition=0)
            assert (await read(consumer, 1))[0].value == b"new"
        async with client.consumer("orders", start=fl.At(2_000), group="late") as consumer:
            assert (await read(consumer, 1))[0].value == b"2"


async def test_added_partitions_are_read_from_their_start(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.consumer("orders") as consumer, client.producer(linger=0) as producer:
        cluster.grow("orders", 6)
        await poll(lambda: len(consumer.assignment) == 6)
        await producer.send("orders", b"there", partition=5)
        assert [message.partition for message in await read(consumer, 1)] == [5]


async def test_a_subscription_calls_its_handler_in_order_until_it_is_stopped(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 50, partition=0)
    seen: list[int] = []

    async def handle(message: Message[Any]) -> None:
        await asyncio.sleep(0)
        seen.append(message.offset)

    async with client.consumer("orders", group="push") as consumer:
        subscription = consumer.subscribe(handle)
        await poll(lambda: len(seen) == 50)
        await subscription.stop()
        assert seen == list(range(50))


async def test_stopping_in_the_middle_of_a_record_waits_for_it_and_counts_it(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 5, partition=0)
    begun = asyncio.Event()

    async def handle(message: Message[Any]) -> None:
        begun.set()
        await asyncio.sleep(0.1)

    async with client.consumer("orders", group="push") as consumer:
        subscription = consumer.subscribe(handle)
        await begun.wait()
        await subscription.stop()
    assert cluster.logs[cluster.topics["orders"].id, 0].committed["push"] == (1, "")


async def test_what_a_handler_raises_ends_the_subscription_and_is_not_committed(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 5, partition=0)

    def handle(message: Message[Any]) -> None:
        if message.offset == 3:
            raise ValueError("three")

    async with client.consumer("orders", group="push") as consumer:
        with pytest.raises(ValueError, match="three"):
            await consumer.subscribe(handle)
    async with client.consumer("orders", group="push") as consumer:
        assert [message.offset for message in await read(consumer, 2)] == [3, 4]


# -- errors of the log ---------------------------------------------------------------------------------


async def test_a_truncated_log_is_told_and_seeking_goes_on(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 10, partition=0)
    truncated = True

    def on_fetch(key: Any, offset: int) -> None:
        if truncated and offset == 10:
            raise_code("LOG_TRUNCATED", safe_offset=4)

    cluster.on_fetch = on_fetch
    async with client.consumer("orders", partitions=[0]) as consumer:
        await read(consumer, 10)
        with pytest.raises(LogTruncated) as caught:
            await consumer.pull(max_wait=2)
        assert caught.value.details["safe_offset"] == 4
        assert (caught.value.details["topic"], caught.value.details["partition"]) == ("orders", 0)
        truncated = False
        await consumer.seek(("orders", 0), 4)
        assert (await read(consumer, 1))[0].offset == 4


async def test_an_existing_group_is_told_that_its_offset_is_gone_and_a_new_one_begins_at_the_start(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 100, partition=0)
    log = cluster.logs[cluster.topics["orders"].id, 0]
    log.committed["old"] = (3, "")
    log.start = 50
    async with client.consumer("orders", group="old") as consumer:
        with pytest.raises(OffsetOutOfRange, match="orders/0 at offset 3"):
            await read(consumer, 1)
    async with client.consumer("orders", group="new") as consumer:
        assert (await read(consumer, 1))[0].offset >= 50


async def test_retention_that_overtakes_the_start_position_of_a_new_reader_is_no_error(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 100, partition=0)
    log = cluster.logs[cluster.topics["orders"].id, 0]

    def on_fetch(key: Any, offset: int) -> None:
        if offset == 0:
            log.start = 60

    cluster.on_fetch = on_fetch
    async with client.consumer("orders", partitions=[0]) as consumer:
        assert (await read(consumer, 1))[0].offset >= 60


async def test_a_deleted_topic_ends_in_an_error(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.consumer("orders") as consumer:
        cluster.delete("orders")
        with pytest.raises(UnknownTopic):
            await consumer.pull(max_wait=5)


async def test_a_damaged_batch_is_told_and_fetched_again(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 10, partition=0)
    log = cluster.logs[cluster.topics["orders"].id, 0]
    good = log.batches[0]
    log.batches[0] = good[:-3] + b"!" + good[-2:]
    async with client.consumer("orders", partitions=[0]) as consumer:
        with pytest.raises(fl.errors.CorruptBatch, match="orders/0"):
            await read(consumer, 10)
        log.batches[0] = good
        assert len(await read(consumer, 10)) == 10


# -- when brokers go away ------------------------------------------------------------------------------


async def test_reading_goes_on_at_the_new_primary(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 20, partition=0)
    key = (cluster.topics["orders"].id, 0)
    async with client.consumer("orders", partitions=[0]) as consumer:
        await read(consumer, 20)
        await cluster.brokers[1].stop()
        cluster.move(key, 2)
        await fill(client, 20, partition=0)
        assert [message.offset for message in await read(consumer, 20)] == list(range(20, 40))


async def test_a_silent_primary_does_not_hold_its_readers(
    cluster: FakeCluster, client: fl.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferryline.fetcher.ANSWER_S", 60.0)  # it is not this that lets them go
    key = (cluster.topics["orders"].id, 0)
    async with client.consumer("orders", partitions=[0]) as consumer:
        assert await consumer.pull(max_wait=0.1) == []  # a fetch is parked there now
        cluster.brokers[1].silent = True
        cluster.move(key, 2)
        await fill(client, 1, partition=0)
        assert len(await read(consumer, 1)) == 1


async def test_reading_goes_on_within_two_seconds_of_the_return_of_the_cluster(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 10, partition=0)
    async with client.consumer("orders", partitions=[0]) as consumer:
        await read(consumer, 10)
        took: list[float] = []
        while not took or (took[-1] >= 2 and len(took) < 3):  # a busy machine may be slow once
            for node in [cluster.coordinator, *cluster.brokers.values()]:
                await node.stop()
            assert await consumer.pull(max_wait=1.5) == []
            for node in [cluster.coordinator, *cluster.brokers.values()]:
                await node.start()
            started = time.monotonic()
            await fill(client, 1, partition=0)
            assert len(await read(consumer, 1)) == 1
            took.append(time.monotonic() - started)
        assert min(took) < 2


async def test_every_call_against_a_dead_cluster_ends_by_its_deadline(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 10, partition=0)
    async with client.consumer("orders", group="g", auto_commit=False) as consumer:
        await read(consumer, 10)
        for node in [cluster.coordinator, *cluster.brokers.values()]:
            await node.stop()
        here = ("orders", 0)
        for call in (
            lambda: consumer.commit(timeout=0.3),
            lambda: consumer.committed(here, timeout=0.3),
            lambda: consumer.lag(timeout=0.3),
            lambda: consumer.seek(here, "end", timeout=0.3),
            lambda: client.admin.create_topic("more", timeout=0.3),
            lambda: client.admin.list_groups(timeout=0.3),
        ):
            started = time.monotonic()
            with pytest.raises(FerrylineError):
                await call()
            assert time.monotonic() - started < SOON_S
        started = time.monotonic()
    assert time.monotonic() - started < 3 * SOON_S, "closing waits too long for a dead cluster"


async def test_every_call_against_silent_brokers_ends_by_its_deadline(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 10, partition=0)
    async with client.consumer("orders", group="g", auto_commit=False) as consumer:
        await read(consumer, 10)
        for node in cluster.brokers.values():
            node.silent = True
        for call in (
            lambda: consumer.commit(timeout=0.3),
            lambda: consumer.committed(("orders", 0), timeout=0.3),
            lambda: consumer.lag(timeout=0.3),
        ):
            started = time.monotonic()
            with pytest.raises((RequestTimedOut, DeadlineExceeded)):
                await call()
            assert time.monotonic() - started < SOON_S
