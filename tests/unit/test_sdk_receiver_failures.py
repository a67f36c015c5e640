"""Receivers when brokers go away, answers are lost, handlers block and programs end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import ferryline as fl
from ferryline import heartbeats
from ferryline.protocol.errors import DeadlineExceeded, LeaseLost, NotPrimary, OutcomeUnknown
from tests.polling import SOON_S, poll
from unit.sdk_fake_cluster import FakeCluster
from unit.sdk_fake_queue import FakeQueue


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


async def fill(client: fl.Client, topic: str, count: int, first: int = 0) -> None:
    async with client.producer(linger=0) as producer:
        for number in range(first, first + count):
            producer.send_nowait(topic, b"%d" % number, f"k{number}")
        await producer.flush()


async def take(receiver: fl.Receiver[Any], count: int) -> list[fl.QueueMessage[Any]]:
    found: list[fl.QueueMessage[Any]] = []
    async with asyncio.timeout(SOON_S):
        while len(found) < count:
            found += await receiver.receive(max_records=count - len(found), max_wait=0.2)
    return found


def leases(cluster: FakeCluster, topic: str) -> int:
    """How many records were leased, all together."""
    meta = cluster.topics[topic]
    found = (cluster.queues.queues.get(((meta.id, number), "g")) for number in range(meta.config.partitions))
    return sum(len(offsets) for q in found if q is not None for _, action, offsets in q.story if action == "lease")


# -- fail-over -----------------------------------------------------------------------------------------


async def test_after_a_fail_over_what_is_held_stays_and_what_never_arrived_comes_again(
    cluster: FakeCluster, client: fl.Client
) -> None:
    # 1. four records are here; the lease of the fifth is committed, and its delivery never arrives
    # 2. another broker becomes primary: it hears what is held, so that the fifth is free, and only that
    await fill(client, "one", 4)
    key = (cluster.topics["one"].id, 0)
    async with client.receiver("one", group="g", lease=30) as receiver:
        batch = await take(receiver, 4)
        lost = queue(cluster).lease(receiver.member, 1, [4], 30, asyncio.get_running_loop().time())
        await fill(client, "one", 1, first=4)
        cluster.move(key, 2)
        (message,) = await take(receiver, 1)
        assert (message.offset, message.delivery_count) == (4, 1)
        broker, keep = cluster.queues.keeps[-1]
        assert broker == 2
        assert lost[1] not in keep.entries[0].leases
        assert await receiver.ack_many([*batch, message]) == [None] * 5
        assert queue(cluster).settled == set(range(5))
        assert leases(cluster, "one") == 6


async def test_acks_on_their_way_when_the_primary_dies_are_settled_by_the_next_one(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", 20)
    key = (cluster.topics["one"].id, 0)
    async with client.receiver("one", group="g") as receiver:
        batch = await take(receiver, 20)
        cluster.queues.lose_answers = 1
        acks = asyncio.create_task(receiver.ack_many(batch))
        await poll(lambda: cluster.queues.settles)
        await cluster.brokers[1].stop()
        cluster.move(key, 2)
        assert await asyncio.wait_for(acks, SOON_S) == [None] * 20
        assert [broker for broker, _ in cluster.queues.settles] == [1, 2]
        assert queue(cluster).settled == set(range(20))


async def test_a_lost_answer_is_asked_for_again(
    cluster: FakeCluster, client: fl.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferryline.queues.frames.ANSWER_S", 0.2)
    await fill(client, "one", 2)
    async with client.receiver("one", group="g") as receiver:
        first, second = await take(receiver, 2)
        cluster.queues.lose_answers = 1
        await asyncio.wait_for(first.ack(), SOON_S)
        cluster.queues.lose_answers = 1
        await asyncio.wait_for(second.nack(delay=0), SOON_S)
        assert (await asyncio.wait_for(anext(receiver), SOON_S)).delivery_count == 2


async def test_a_settlement_without_any_broker_ends_at_its_deadline(
    cluster: FakeCluster, client: fl.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferryline.core.receiving.SETTLE_MS_MIN", 300)
    await fill(client, "one", 2)
    async with client.receiver("one", group="g", lease=3.0, close_timeout=0) as receiver:
        first, second = await take(receiver, 2)
        cluster.brokers[1].silent = True
        with pytest.raises(OutcomeUnknown):
            await asyncio.wait_for(first.ack(), SOON_S)
        assert not first.is_held
        await cluster.brokers[1].stop()
        with pytest.raises((DeadlineExceeded, OutcomeUnknown)):
            await asyncio.wait_for(second.ack(), SOON_S)


async def test_a_receiver_goes_on_within_two_seconds_of_the_clusters_return(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "jobs", 20)
    async with client.receiver("jobs", group="g", prefetch=4) as receiver:
        held = await take(receiver, 4)
        nodes = [cluster.coordinator, *cluster.brokers.values()]
        took: list[float] = []
        while not took or (took[-1] >= 2 and len(took) < 3):  # a busy machine may be slow once
            for node in nodes:
                await node.stop()
            acks = asyncio.create_task(receiver.ack_many(held))
            await asyncio.sleep(3)
            for node in nodes:
                await node.start()
            started = time.monotonic()
            assert await asyncio.wait_for(acks, SOON_S) == [None] * 4
            batch = await take(receiver, 4)
            took.append(time.monotonic() - started)
            assert not {(m.partition, m.offset) for m in held} & {(m.partition, m.offset) for m in batch}
            held = batch
        assert min(took) < 2


async def test_a_refusal_that_names_the_primary_is_followed_without_metadata(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, "one", 1)
    meta = cluster.topics["one"]
    async with client.receiver("one", group="g") as receiver:
        message = await anext(receiver)
        cluster.primaries[meta.id, 0] = 2
        cluster.epochs[meta.id, 0] += 1  # and the metadata says nothing of it
        await asyncio.wait_for(message.ack(), SOON_S)
        assert queue(cluster).settled == {0}


async def test_one_partition_that_is_not_ready_holds_nobody_up(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "jobs", 40)
    refusing = True

    def refuse(node: Any, request: Any) -> None:
        if refusing and node.id == 1:
            raise NotPrimary("not here, and who knows where")

    cluster.queues.on_receive = refuse
    async with client.receiver("jobs", group="g", prefetch=100) as receiver:
        found = await take(receiver, 15)
        assert {message.partition % 2 for message in found} == {1}
        refusing = False
        assert len(await take(receiver, 25)) == 25


# -- leases and handlers that block --------------------------------------------------------------------


async def test_a_handler_that_blocks_the_loop_for_longer_than_the_lease_loses_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "STUCK_AFTER_S", 0.8)
    # The cluster must go on while the application's loop does not.
    async with ClusterThread() as runner, fl.connect(runner.url, timeout=15) as client:
        await fill(client, "one", 3)
        async with client.receiver("one", group="g", lease=3.0) as receiver:
            batch = await take(receiver, 3)
            with caplog.at_level(logging.WARNING, logger="ferryline.heartbeats"):
                time.sleep(5.0)  # noqa: ASYNC251
            assert await receiver.ack_many(batch) == [None] * 3
        found = runner.cluster.queues.of((runner.cluster.topics["one"].id, 0), "g")
        assert found.attempts == {0: 1, 1: 1, 2: 1}
        assert any(action == "extend" for _, action, _ in found.story)
    assert "test_sdk_receiver_failures.py" in caplog.text


async def test_a_record_that_is_worked_on_for_too_long_is_given_up(
    cluster: FakeCluster, client: fl.Client, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(client, "one", 2)
    async with client.receiver("one", group="g", lease=3.0, prefetch=1, max_processing=0.5) as receiver:
        stuck = await anext(receiver)
        other = await asyncio.wait_for(anext(receiver), SOON_S)
        assert stuck.offset != other.offset or other.delivery_count == 2
        with pytest.raises(LeaseLost):
            await stuck.ack()
    assert "in processing for over 0.5 s" in caplog.text


async def test_what_an_application_does_not_take_goes_back(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", 5)
    async with client.receiver("one", group="g", lease=3.0, max_processing=0.5, prefetch=5) as receiver:
        await poll(lambda: receiver.unsettled == 5)
        await poll(lambda: any(entry[1] == "release" for entry in queue(cluster).story))
        assert set(queue(cluster).attempts.values()) <= {0, 1}, "it was not worked on, so it does not count"


async def test_what_was_lost_meanwhile_is_not_handed_out(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", 3)
    async with client.receiver("one", group="g", lease=3.0) as receiver:
        first = await anext(receiver)
        queue(cluster).last[1] = (9, 9)  # somebody else has the second
        await poll(lambda: receiver.unsettled == 2, what="a renewal has found out")
        assert (await anext(receiver)).offset == 2
        await first.ack()


async def test_a_lease_that_ended_here_is_not_handed_out(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", 2)
    async with client.receiver("one", group="g") as receiver:
        await poll(lambda: receiver.unsettled == 2)
        leasing = receiver._leasing
        assert leasing is not None
        (lease,) = leasing.table.held.values()
        lease.deadline_ms = leasing.now_ms()
        batch = await take(receiver, 2)
        assert [message.delivery_count for message in batch] == [1, 1]
        assert [entry[1] for entry in queue(cluster).story] == ["lease", "release", "lease"]


async def test_a_receiver_whose_core_fails_says_so_and_nobody_waits(
    cluster: FakeCluster, client: fl.Client, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(client, "one", 4)
    async with client.receiver("one", group="g") as receiver:
        *batch, third, fourth = await take(receiver, 4)
        leasing = receiver._leasing
        assert leasing is not None
        leasing.table.end_all = lambda *_: _fail("a rule is broken")  # type: ignore[method-assign, assignment]
        outcomes = await asyncio.wait_for(receiver.ack_many(batch), SOON_S)
        assert [type(outcome) for outcome in outcomes] == [fl.errors.InternalError] * 2
        with pytest.raises(fl.errors.InternalError, match="a rule is broken"):
            await asyncio.wait_for(anext(receiver), SOON_S)
        for late in (third.ack, fourth.nack):
            with pytest.raises(fl.errors.InternalError, match="a rule is broken"):
                await asyncio.wait_for(late(), SOON_S)
    assert "the receiver stops" in caplog.text


def _fail(text: str) -> None:
    raise AssertionError(text)


async def test_work_on_the_heartbeat_thread_ends_when_it_is_told_and_does_not_fail_in_silence(
    client: fl.Client, caplog: pytest.LogCaptureFixture
) -> None:
    threads: list[str] = []
    ended = threading.Event()

    async def work(connector: Any) -> None:
        threads.append(threading.current_thread().name)
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def fail(connector: Any) -> None:
        raise ZeroDivisionError("on the other side")

    thread = heartbeats.thread_of(client)
    hosted = await thread.host(work)
    await poll(lambda: threads == ["ferryline-heartbeats"])
    hosted.stop()
    await poll(ended.is_set)
    await thread.host(fail)
    await poll(lambda: "on the other side" in caplog.text)
    ended.clear()
    await thread.host(work)
    await poll(lambda: len(threads) == 2)
    await client.close()
    assert ended.is_set(), "the end of the thread ends what it hosts"


# -- the end -------------------------------------------------------------------------------------------


async def test_a_close_gives_back_at_once_what_is_unsettled(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", 10)
    async with client.receiver("one", group="g", prefetch=6) as receiver:
        first, _ = await take(receiver, 2)
        await first.ack()
        await poll(lambda: receiver.unsettled == 6)
    assert queue(cluster).leases == {}
    assert queue(cluster).settled == {0}
    async with client.receiver("one", group="g", prefetch=20) as receiver:
        batch = await take(receiver, 9)
        assert {message.delivery_count for message in batch} == {1}, "given back, these attempts do not count"


async def test_a_close_waits_for_work_in_hand_and_settles_it(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", 1)
    receiver = client.receiver("one", group="g")
    await receiver.start()
    message = await anext(receiver)

    async def work() -> None:
        async with message.processing():
            await asyncio.sleep(0.5)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    started = time.monotonic()
    await receiver.close()
    assert 0.4 < time.monotonic() - started < SOON_S
    assert queue(cluster).settled == {0}
    await task


async def test_a_close_does_not_wait_for_ever(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", 1)
    receiver = client.receiver("one", group="g")
    await receiver.start()
    message = await anext(receiver)

    async def work() -> None:
        async with message.processing():
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    started = time.monotonic()
    await receiver.close(timeout=0.3)
    assert time.monotonic() - started < SOON_S
    assert queue(cluster).leases == {}, "others can have it"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_close_without_a_cluster_is_bounded_and_nobody_hangs(
    cluster: FakeCluster, client: fl.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferryline.queues.leasing.CLOSE_SETTLE_S", 0.5)
    monkeypatch.setattr("ferryline.queues.leasing.CLOSE_PART_S", 0.5)
    await fill(client, "one", 3)
    receiver = client.receiver("one", group="g")
    await receiver.start()
    batch = await take(receiver, 3)
    waiting = asyncio.create_task(anext(receiver))
    for node in cluster.brokers.values():
        await node.stop()
    acks = [message.ack_nowait() for message in batch]
    started = time.monotonic()
    await receiver.close()
    assert time.monotonic() - started < SOON_S
    with pytest.raises(StopAsyncIteration):
        await waiting
    assert all(isinstance(ack.exception(), fl.FerrylineError) for ack in acks)


async def test_a_close_that_is_cancelled_still_ends(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, "one", 1)
    receiver = client.receiver("one", group="g")
    await receiver.start()
    message = await anext(receiver)
    async with message.processing():
        closing = asyncio.create_task(receiver.close())
        await asyncio.sleep(0.05)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    assert receiver not in client.closables
    assert [m async for m in receiver] == []


async def test_a_client_that_closes_closes_its_receivers(cluster: FakeCluster) -> None:
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        await fill(client, "one", 2)
        receiver = client.receiver("one", group="g")
        await receiver.start()
        await take(receiver, 2)
    assert queue(cluster).leases == {}


class ClusterThread:
    """A fake cluster on a loop and thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="fake cluster")
        self.cluster: FakeCluster

    @property
    def url(self) -> str:
        return self.cluster.coordinator.url

    async def __aenter__(self) -> ClusterThread:
        self.thread.start()

        async def make() -> FakeCluster:
            cluster = FakeCluster(1)
            await cluster.__aenter__()
            cluster.create("one", 1)
            return cluster

        self.cluster = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(make(), self.loop))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.cluster.__aexit__(), self.loop))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()
