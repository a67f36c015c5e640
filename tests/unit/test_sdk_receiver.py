"""Receivers of queues on real sockets: who gets what, and how it is settled."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

import ferryline as fl
from ferryline.protocol.errors import (
    ClientClosed,
    CorruptBatch,
    FerrylineError,
    InvalidArgument,
    InvalidName,
    LeaseLost,
    SerializationFailed,
    UnknownTopic,
)
from tests.polling import SOON_S, poll
from unit.sdk_fake_cluster import FakeCluster
from unit.sdk_fake_queue import FakeQueue

PARKED_S = 4.0  # sooner than a RECEIVE that nothing wakes


class Job(msgspec.Struct):
    n: int


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(2) as cluster:
        cluster.create("jobs", 4)
        cluster.create("one", 1)
        yield cluster


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        yield client


def queue(cluster: FakeCluster, topic: str = "one", partition: int = 0, group: str = "g") -> FakeQueue:
    return cluster.queues.of((cluster.topics[topic].id, partition), group)


def settled(cluster: FakeCluster, topic: str = "jobs", group: str = "g") -> int:
    meta = cluster.topics[topic]
    found = (cluster.queues.queues.get(((meta.id, number), group)) for number in range(meta.config.partitions))
    return sum(len(queue.settled) for queue in found if queue is not None)


async def fill(client: fl.Client, topic: str, *values: Any, key: str | None = None) -> None:
    async with client.producer(linger=0) as producer:
        for number, value in enumerate(values):
            producer.send_nowait(topic, value, key if key is not None else f"k{number}")
        await producer.flush()


async def take(receiver: fl.Receiver[Any], count: int) -> list[fl.QueueMessage[Any]]:
    found: list[fl.QueueMessage[Any]] = []
    async with asyncio.timeout(SOON_S):
        while len(found) < count:
            found += await receiver.receive(max_records=count - len(found), max_wait=0.2)
    return found


# -- refused before anything is sent -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topic", "options", "error", "field"),
    [
        ("a b", {}, InvalidName, "topic"),
        ("jobs", {"group": "__g"}, InvalidName, "group"),
        ("jobs", {"group": ""}, InvalidName, "group"),
        ("jobs", {"lease": 0.9}, InvalidArgument, "lease"),
        ("jobs", {"lease": 43_201}, InvalidArgument, "lease"),
        ("jobs", {"lease": True}, InvalidArgument, "lease"),
        ("jobs", {"prefetch": 0}, InvalidArgument, "prefetch"),
        ("jobs", {"prefetch": 100_001}, InvalidArgument, "prefetch"),
        ("jobs", {"prefetch_bytes": 1}, InvalidArgument, "prefetch_bytes"),
        ("jobs", {"ordering": "chaos"}, InvalidArgument, "ordering"),
        ("jobs", {"start": 7}, InvalidArgument, "start"),
        ("jobs", {"max_processing": 0}, InvalidArgument, "max_processing"),
        ("jobs", {"close_timeout": -1}, InvalidArgument, "close_timeout"),
    ],
    ids=str,
)
async def test_bad_options_are_refused_and_named(
    client: fl.Client, topic: str, options: dict[str, Any], error: type[FerrylineError], field: str
) -> None:
    with pytest.raises(error) as caught:
        client.receiver(topic, **{"group": "g", **options})
    assert caught.value.details["field"] == field


async def test_bad_calls_are_refused_and_named(cluster: FakeCluster, client: fl.Client) -> None:
    with pytest.raises(UnknownTopic):
        await client.receiver("nowhere", group="g").start()
    receiver = client.receiver("one", group="g")
    with pytest.raises(ClientClosed, match="not started"):
        await receiver.receive()
    with pytest.raises(ClientClosed, match="not started"):
        await anext(receiver)
    await fill(client, "one", b"1", b"2")
    async with receiver:
        with pytest.raises(InvalidArgument, match="max_records"):
            await receiver.receive(max_records=0)
        with pytest.raises(InvalidArgument, match="max_wait: nan"):
            await receiver.receive(max_wait=math.nan)  # it would wait for ever, and every timer of the loop with it
        first, second = await take(receiver, 2)
        for delay in (-1, "soon", 366 * 86_400):
            with pytest.raises(InvalidArgument, match="delay"):
                await first.nack(delay=delay)  # type: ignore[arg-type]
        for seconds in (0.5, 43_201, True):
            with pytest.raises(InvalidArgument, match="seconds"):
                await first.extend(seconds)
        await first.ack()
        for again in (first.ack(), first.nack(), first.reject(), first.release(), first.extend(5)):
            with pytest.raises(InvalidArgument, match="settled before"):
                await again
    with pytest.raises(ClientClosed):
        await receiver.receive()
    with pytest.raises(ClientClosed):
        await second.ack()
    with pytest.raises(ClientClosed):
        await receiver.start()
    assert [message async for message in receiver] == []


# -- delivery ------------------------------------------------------------------------------------------


async def test_each_record_goes_to_one_receiver_and_what_is_acknowledged_stays_so(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "jobs", *(b"%d" % number for number in range(200)))
    seen: list[bytes] = []

    async def work(receiver: fl.Receiver[bytes]) -> None:
        async for message in receiver:
            seen.append(message.value)
            await message.ack()

    receivers = [client.receiver("jobs", group="g", prefetch=4) for _ in range(6)]  # more than partitions
    for receiver in receivers:
        await receiver.start()
    tasks = [asyncio.create_task(work(receiver)) for receiver in receivers]
    await poll(lambda: settled(cluster) == 200, within_s=10)
    for receiver in receivers:
        await receiver.close()
    await asyncio.gather(*tasks)
    assert sorted(seen, key=int) == [b"%d" % number for number in range(200)]


async def test_a_message_says_where_it_stands_and_how_often_it_was_leased(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.producer(linger=0) as producer:
        for number in range(3):
            await producer.send("one", Job(number), "key", headers={"src": "web", "fl-priority": "7", "fl-id": "x"})
    async with client.receiver("one", group="g", value=Job) as receiver:
        for number in range(3):
            message = await anext(receiver)
            assert (message.topic, message.partition, message.offset) == ("one", 0, number)
            assert (message.key, message.value, message.delivery_count) == (b"key", Job(number), 1)
            assert (message.headers.text("src"), message.priority, message.id) == ("web", 7, "x")
            assert message.is_held
            assert repr(message) == f"QueueMessage(one/0/{number} key=b'key' raw=b'{{\"n\":{number}}}')"
            await message.ack()
            assert not message.is_held


async def test_several_groups_see_everything(client: fl.Client) -> None:
    await fill(client, "one", b"1", b"2")
    async with client.receiver("one", group="a") as one, client.receiver("one", group="b") as two:
        assert [m.value for m in await take(one, 2)] == [m.value for m in await take(two, 2)]


async def test_what_comes_later_is_delivered_at_once(client: fl.Client) -> None:
    async with client.receiver("jobs", group="g") as receiver:
        assert await receiver.receive(max_wait=0.1) == []
        waiting = asyncio.create_task(anext(receiver))
        await asyncio.sleep(0)
        await fill(client, "jobs", b"now")
        assert (await asyncio.wait_for(waiting, PARKED_S)).value == b"now"


async def test_no_more_than_prefetch_is_here_unsettled(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", *(b"%d" % number for number in range(50)))
    async with client.receiver("one", group="g", prefetch=8) as receiver:
        batch = await take(receiver, 8)
        assert await receiver.receive(max_wait=0.2) == []
        assert receiver.unsettled == 8
        assert await receiver.ack_many(batch[:3]) == [None] * 3
        assert len(await take(receiver, 3)) == 3


async def test_several_tasks_may_read_from_one_receiver(cluster: FakeCluster, client: fl.Client) -> None:
    seen: list[bytes] = []

    async def work(receiver: fl.Receiver[bytes]) -> None:
        async for message in receiver:
            async with message.processing():
                seen.append(message.value)
                await asyncio.sleep(0)

    async with client.receiver("jobs", group="g") as receiver:
        tasks = [asyncio.create_task(work(receiver)) for _ in range(10)]
        await fill(client, "jobs", *(b"%d" % number for number in range(100)))
        await poll(lambda: settled(cluster) == 100)
    await asyncio.gather(*tasks)
    assert sorted(map(int, seen)) == list(range(100))


async def test_a_reader_that_is_cancelled_in_its_turn_leaves_it_to_another(client: fl.Client) -> None:
    async with client.receiver("one", group="g") as receiver:
        first, second = asyncio.create_task(anext(receiver)), asyncio.create_task(anext(receiver))
        await asyncio.sleep(0.05)
        leasing = receiver._leasing
        assert leasing is not None
        put = leasing.buffer.put

        def put_and_cancel(messages: Any) -> None:
            put(messages)
            first.cancel()  # it was woken for the record, and will not take it

        leasing.buffer.put = put_and_cancel  # type: ignore[method-assign]
        await fill(client, "one", b"1")
        assert (await asyncio.wait_for(second, SOON_S)).value == b"1"


async def test_more_than_prefetch_is_given_back_to_those_who_are_idle(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "jobs", *(b"%d" % number for number in range(40)))
    async with client.receiver("jobs", group="g", prefetch=1) as receiver:
        message = await anext(receiver)
        await poll(lambda: receiver.unsettled == 1, what="the record of the other broker is given back")
        await message.ack()
        await poll(lambda: receiver.unsettled >= 1)
    assert all(attempts <= 1 for q in cluster.queues.queues.values() for attempts in q.attempts.values())


async def test_partitions_that_are_added_are_read_too(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.receiver("one", group="g") as receiver:
        assert await receiver.receive(max_wait=0.1) == []
        cluster.grow("one", 3)
        await poll(lambda: client.routing.route((cluster.topics["one"].id, 2)).broker)
        async with client.producer(linger=0) as producer:
            await producer.send("one", b"new", partition=2)
        assert (await asyncio.wait_for(anext(receiver), SOON_S)).partition == 2


# -- settling ------------------------------------------------------------------------------------------


async def test_acks_of_one_pass_of_the_loop_leave_in_one_frame_for_each_broker(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "jobs", *(b"%d" % number for number in range(30)))
    async with client.receiver("jobs", group="g") as receiver:
        batch = await take(receiver, 30)
        futures = [message.ack_nowait() for message in batch]
        assert not any(future.done() for future in futures)
        await receiver.flush()
        assert all(future.done() and future.exception() is None for future in futures)
        assert sorted(broker for broker, _ in cluster.queues.settles) == [1, 2]
        assert settled(cluster) == 30


async def test_an_ack_returns_when_it_is_committed(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", b"1")
    async with client.receiver("one", group="g") as receiver:
        await (await anext(receiver)).ack()
        assert queue(cluster).settled == {0}


async def test_a_nack_brings_it_back_after_its_delay_with_the_reason_kept(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", b"1")
    async with client.receiver("one", group="g") as receiver:
        message = await anext(receiver)
        started = time.monotonic()
        await message.nack(delay=0.3, reason="x" * 300, detail="y" * 5_000)
        entry = cluster.queues.settles[-1][1].entries[0]
        assert (entry.delay_ms, len(entry.reason), len(entry.detail)) == (300, 256, 4_096)
        again = await asyncio.wait_for(anext(receiver), SOON_S)
        assert time.monotonic() - started > 0.28
        assert (again.value, again.delivery_count) == (b"1", 2)
        await again.nack()
        assert cluster.queues.settles[-1][1].entries[0].delay_ms == -1, "the topic's back-off"
        assert (await anext(receiver)).delivery_count == 3


async def test_a_rejected_record_is_dead_and_a_released_one_was_never_here(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", b"1", b"2")
    async with client.receiver("one", group="g") as receiver:
        first, second = await take(receiver, 2)
        await first.reject("no such job")
        await second.release()
        assert queue(cluster).dead == {0: ("no such job", "")}
        again = await anext(receiver)
        assert (again.value, again.delivery_count) == (b"2", 1)


async def test_a_stale_record_is_told_so_and_its_neighbours_are_settled(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", b"1", b"2", b"3")
    async with client.receiver("one", group="g") as receiver:
        first, second, third = await take(receiver, 3)
        queue(cluster).last[1] = (9, 9)  # somebody else has it
        outcomes = await receiver.ack_many([first, second, third])
        assert outcomes[0] is outcomes[2] is None
        assert isinstance(outcomes[1], LeaseLost)
        assert outcomes[1].details == {"topic": "one", "partition": 0, "offset": 1}
        with pytest.raises(LeaseLost, match="one/0/1"):
            await second.nack()


async def test_many_are_acknowledged_in_any_order_and_each_once(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", b"1", b"2", b"3", b"4", b"5")
    async with client.receiver("one", group="g") as receiver:
        first, second, third, fourth, fifth = await take(receiver, 5)
        await second.ack()
        outcomes = await receiver.ack_many([fifth, first, fifth, second, fourth])
        assert outcomes[0] is outcomes[1] is outcomes[4] is None
        for again in (outcomes[2], outcomes[3]):
            assert isinstance(again, fl.errors.InvalidArgument)
            assert "settled before" in again.message
        assert receiver.unsettled == 1
        assert third.is_held
        assert not fourth.is_held
        assert await receiver.ack_many([]) == []
        assert await receiver.ack_many([third]) == [None]


async def test_an_extension_is_the_brokers_and_a_lost_lease_is_told(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", b"1")
    async with client.receiver("one", group="g", lease=1.0) as receiver:
        message = await anext(receiver)
        await message.extend(60)
        (held,) = queue(cluster).leases.values()
        assert held.ends - asyncio.get_running_loop().time() > 55
        queue(cluster).last[0] = (9, 9)
        with pytest.raises(LeaseLost):
            await message.extend(60)
        assert not message.is_held


# -- processing ----------------------------------------------------------------------------------------


async def test_work_that_returns_is_acknowledged_and_work_that_raises_comes_again(
    cluster: FakeCluster, client: fl.Client, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(client, "one", b"1")
    async with client.receiver("one", group="g") as receiver:
        attempts = 0
        async for message in receiver:
            async with message.processing() as same:
                assert same is message
                attempts += 1
                if attempts < 3:
                    raise ValueError(f"attempt {attempts}\nand more")
            if attempts == 3:
                break
        await receiver.flush()
        entries = [entry for _, settle in cluster.queues.settles for entry in settle.entries]
        assert [(entry.action, entry.reason) for entry in entries] == [
            ("nack", "ValueError: attempt 1"),
            ("nack", "ValueError: attempt 2"),
            ("ack", ""),
        ]
        assert "test_sdk_receiver.py" in entries[0].detail
        assert "raise ValueError" in entries[0].detail
    assert "attempt 1" in caplog.text


async def test_a_value_that_does_not_parse_is_rejected_with_the_error(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", b'{"n": "many"}', b'{"n": 2}')
    async with client.receiver("one", group="g", value=Job) as receiver:
        seen = []
        async for message in receiver:
            async with message.processing():
                seen.append(message.value.n)
            if seen:
                break
        await receiver.flush()
        reason, detail = queue(cluster).dead[0]
        assert "one/0/0: value does not parse as Job" in reason
        assert "SerializationFailed" in detail
        assert (seen, queue(cluster).settled) == ([2], {1})
    async with client.receiver("one", group="h", value=Job) as receiver:
        with pytest.raises(SerializationFailed):
            _ = (await anext(receiver)).value


async def test_what_the_block_settled_itself_stays_so(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", b"1", b"2")
    async with client.receiver("one", group="g") as receiver:
        first, second = await take(receiver, 2)
        async with first.processing():
            await first.reject("bad")
        async with second.processing():
            second.ack_nowait()
            raise ValueError("too late")
        await receiver.flush()
        assert set(queue(cluster).dead) == {0}
        assert queue(cluster).settled == {1}


async def test_errors_are_raised_again_on_request(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", b"1")
    async with client.receiver("one", group="g") as receiver:
        message = await anext(receiver)
        with pytest.raises(ZeroDivisionError):
            async with message.processing(reraise=True):
                _ = 1 / 0
        await receiver.flush()
        assert queue(cluster).story[1][1] == "nack"


async def test_cancelled_work_is_released_and_its_attempt_does_not_count(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", b"1")
    async with client.receiver("one", group="g") as receiver:
        message = await anext(receiver)

        async def work() -> None:
            async with message.processing():
                await asyncio.sleep(60)

        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await asyncio.wait_for(anext(receiver), SOON_S)).delivery_count == 1


async def test_a_long_traceback_keeps_its_end(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", b"1")

    def deep(depth: int) -> None:
        if depth == 0:
            raise RuntimeError("ä" * 5_000)
        deep(depth - 1)

    async with client.receiver("one", group="g") as receiver:
        async with (await anext(receiver)).processing():
            deep(100)
        await receiver.flush()
        entry = cluster.queues.settles[-1][1].entries[0]
        assert len(entry.reason.encode()) <= 256
        assert len(entry.detail.encode()) <= 4_096
        assert entry.detail.startswith("...")


# -- order ---------------------------------------------------------------------------------------------


async def test_records_of_a_key_come_one_after_the_other_also_after_a_nack(client: fl.Client) -> None:
    await fill(client, "jobs", *(b"%d" % number for number in range(10)), key="same")
    async with client.receiver("jobs", group="g") as receiver:
        done: list[int] = []
        failed: set[int] = set()
        async for message in receiver:
            number = int(message.value)
            assert receiver.unsettled == 1, "the next one waits for this one"
            if number % 3 == 0 and number not in failed:
                failed.add(number)
                await message.nack(delay=0)
                continue
            done.append(number)
            await message.ack()
            if len(done) == 10:
                break
        assert done == list(range(10))


async def test_behind_a_record_that_failed_nothing_of_its_run_is_handed_out(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", *(b"%d" % number for number in range(10)))
    async with client.receiver("one", group="g", ordering="partition") as receiver:
        order: list[int] = []
        failed = False
        async for message in receiver:
            number = int(message.value)
            order.append(number)
            if number == 4 and not failed:
                failed = True
                await message.nack(delay=0)
            else:
                message.ack_nowait()
            if number == 9:
                break
        await receiver.flush()
        assert order == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
        assert queue(cluster).attempts[5] == 1, "what stood behind it was never worked on"


async def test_a_batch_behind_a_record_that_failed_is_told_so(client: fl.Client) -> None:
    await fill(client, "one", *(b"%d" % number for number in range(4)))
    async with client.receiver("one", group="g", ordering="partition") as receiver:
        first, second, third, _ = await take(receiver, 4)
        await first.ack()
        await second.nack(delay=60)
        assert not third.is_held
        with pytest.raises(LeaseLost):
            await third.ack()


# -- what the application must know --------------------------------------------------------------------


async def test_another_ordering_than_the_groups_is_raised_and_again_while_it_is_so(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", b"1")
    async with client.receiver("one", group="g") as first:
        await (await anext(first)).ack()
    async with client.receiver("one", group="g", ordering="none") as second:
        for _ in range(2):
            with pytest.raises(InvalidArgument, match="ordering"):
                await asyncio.wait_for(anext(second), SOON_S)


async def test_a_deleted_topic_is_raised_once_what_is_here_is_handed_out(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", b"1")
    async with client.receiver("one", group="g") as receiver:
        await poll(lambda: receiver.unsettled == 1)
        cluster.delete("one")
        await poll(lambda: client.routing.topic("one") is None)
        message = await anext(receiver)
        with pytest.raises(UnknownTopic):
            await asyncio.wait_for(anext(receiver), SOON_S)
        with pytest.raises(UnknownTopic):
            await message.ack()


async def test_a_delivery_that_is_not_what_was_leased_is_raised_and_counts_as_failed(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", b"1", b"2")
    cluster.queues.garble = True
    async with client.receiver("one", group="g") as receiver:
        with pytest.raises(CorruptBatch, match="one/0"):
            await asyncio.wait_for(anext(receiver), SOON_S)
        cluster.queues.garble = False
        assert all(message.delivery_count > 1 for message in await take(receiver, 2))
