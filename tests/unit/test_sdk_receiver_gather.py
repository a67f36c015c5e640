"""Receivers whose acknowledgements are gathered for a moment, and whose prefetch changes on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

import ferryline as fl
from ferryline.core.receiving import SURPLUS_MS
from ferryline.core.receiving_events import GiveBack, PrefetchChanged, SendReceive, TimePassed
from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.queue_messages import ACK
from tests.polling import SOON_S, poll
from unit.sdk_fake_cluster import FakeCluster
from unit.sdk_receiver_story import A, story

LONG_S = 0.5


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(1) as cluster:
        cluster.create("one", 1)
        yield cluster


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        async with client.producer() as producer:
            await producer.send_many("one", [b"%d" % number for number in range(20)])
        yield client


async def take(receiver: fl.Receiver[bytes], count: int) -> list[fl.QueueMessage[bytes]]:
    return [await asyncio.wait_for(anext(receiver), SOON_S) for _ in range(count)]


async def test_acks_that_follow_others_leave_together_and_a_lone_one_at_once(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.receiver("one", group="g", gather=LONG_S) as receiver:
        batch = await take(receiver, 11)
        await batch[0].ack()
        frames = len(cluster.queues.settles)
        futures = []
        for message in batch[1:]:
            futures.append(message.ack_nowait())
            await asyncio.sleep(0)  # a pass of the loop each: without `gather` each would leave by itself
        await asyncio.gather(*futures)
        offsets = [entry.offsets for _, settle in cluster.queues.settles[frames:] for entry in settle.entries]
        assert sorted(offset for some in offsets for offset in some) == [*range(1, 11)]
        assert len(cluster.queues.settles) - frames < 10


async def test_an_ack_leaves_at_once_when_nothing_else_is_here_that_could_come_meanwhile(
    cluster: FakeCluster, client: fl.Client
) -> None:
    """Records of one key come one after the other, each when the one before it is acknowledged."""
    async with client.receiver("one", group="g", gather=LONG_S, prefetch=2) as receiver:
        first, second = await take(receiver, 2)
        await first.ack()
        await poll(lambda: receiver.unsettled == 2)
        (third,) = await take(receiver, 1)
        assert receiver._leasing is not None
        settlements = receiver._leasing.settlements
        receiver.set_prefetch(1)  # no more come
        futures = [second.ack_nowait()]
        await asyncio.sleep(0)
        assert settlements.gathered == 1, "the third is still here"
        futures.append(third.ack_nowait())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not settlements.gathered
        await asyncio.gather(*futures)


async def test_a_nack_waits_for_nobody_and_takes_gathered_acks_along(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.receiver("one", group="g", gather=LONG_S) as receiver:
        first, second, third = await take(receiver, 3)
        await first.ack()
        acked = second.ack_nowait()
        nacked = asyncio.create_task(third.nack(60))
        for _ in range(3):
            await asyncio.sleep(0)
        assert receiver._leasing is not None
        assert not receiver._leasing.settlements.gathered, "sent within a pass or two of the loop"
        await nacked
        assert acked.done()


async def test_what_is_gathered_is_sent_when_the_receiver_closes(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.receiver("one", group="g", gather=LONG_S) as receiver:
        batch = await take(receiver, 5)
        await batch[0].ack()
        futures = [message.ack_nowait() for message in batch[1:]]
    assert all(future.done() and future.exception() is None for future in futures)


async def test_absurd_waits_and_numbers_are_refused(client: fl.Client) -> None:
    for wrong in (-0.1, 0.6, float("nan")):
        with pytest.raises(InvalidArgument, match="gather"):
            client.receiver("one", group="g", gather=wrong)
    async with client.receiver("one", group="g") as receiver:
        for records in (0, 100_001):
            with pytest.raises(InvalidArgument, match="prefetch"):
                receiver.set_prefetch(records)


async def test_a_receiver_may_take_more_and_fewer_on_the_way(client: fl.Client) -> None:
    async with client.receiver("one", group="g", prefetch=2) as receiver:
        held = await take(receiver, 2)
        receiver.set_prefetch(12)
        await poll(lambda: receiver.unsettled == 12)
        receiver.set_prefetch(2)
        await poll(lambda: receiver.unsettled == 2, what="what waits is given back")
        assert await receiver.ack_many(held) == [None, None]


def test_more_room_is_asked_for_and_less_gives_back_what_waits() -> None:
    here = story(prefetch=2)
    (lease,) = here.receive(here.one(SendReceive), here.delivery(A, 1, [0, 1]))
    assert not here.pick(SendReceive)
    here.do(PrefetchChanged(10))
    ask = here.one(SendReceive)
    assert ask.records_max == 8
    here.receive(ask, here.delivery(A, 2, [2, 3, 4, 5]))
    here.hand_out(lease)
    here.do(PrefetchChanged(2))
    assert not here.pick(GiveBack), "it may be worked off in a moment"
    here.do(TimePassed(), SURPLUS_MS + 2)
    assert here.one(GiveBack).count == 4
    here.settle(lease, ACK, 0, 1)
