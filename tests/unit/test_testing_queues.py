"""Queues on `ferryline.testing`: retries, delays, dead letters and leases in virtual time, and over a fail-over."""

from __future__ import annotations

import asyncio

import pytest

import ferryline as fl

RETRY = fl.Retry(3, backoff=fl.exponential(1, 60))
TOPICS = {"jobs": {"partitions": 1, "retry": RETRY}}
DAY_S = 86_400.0


async def test_a_record_is_tried_as_often_as_its_topic_says_and_then_dead() -> None:
    async with fl.testing.Cluster(topics=TOPICS) as cluster, cluster.client() as client, client.producer() as producer:
        broken = await producer.send("jobs", b"broken", key="a")
        await producer.send("jobs", b"good", key="a")
        tried: list[tuple[bytes, int]] = []
        async with client.receiver("jobs", group="g") as receiver:
            async for message in receiver:
                tried.append((message.value, message.delivery_count))
                if message.value == b"good":
                    await message.ack()
                    break
                await message.nack(reason="no stock")
        assert tried == [(b"broken", 1), (b"broken", 2), (b"broken", 3), (b"good", 1)]
        await cluster.advance(seconds=10)
        letters = [letter async for letter in client.dead_letters("jobs").browse()]
        assert [(letter.origin_offset, letter.reason, letter.attempts) for letter in letters] == [
            (broken.offset, "no stock", 3)
        ]


async def test_a_delay_of_days_is_kept_to_the_second_and_costs_nothing() -> None:
    async with fl.testing.Cluster(topics=TOPICS) as cluster, cluster.client() as client, client.producer() as producer:
        began = cluster.now()
        await producer.send("jobs", b"later", delay=3 * DAY_S)
        async with client.receiver("jobs", group="g") as receiver:
            message = await anext(aiter(receiver))
            assert 3 * DAY_S <= (cluster.now() - began).total_seconds() < 3 * DAY_S + 1
            began = cluster.now()
            await message.nack(delay=DAY_S)
            message = await anext(aiter(receiver))
            await message.ack()
        assert DAY_S <= (cluster.now() - began).total_seconds() < DAY_S + 1
        assert cluster._leaps.count > 0


@pytest.mark.parametrize("fault", ["kill", "power_cut", "pause"])
async def test_a_delay_is_kept_over_a_fail_over(fault: str) -> None:
    async with fl.testing.Cluster(topics=TOPICS) as cluster, cluster.client() as client, client.producer() as producer:
        began = cluster.now()
        await producer.send("jobs", b"later", delay=DAY_S)
        first = cluster.primary("jobs")
        getattr(cluster, fault)(first)
        async with client.receiver("jobs", group="g") as receiver:
            message = await anext(aiter(receiver))
            await message.ack()
        assert cluster.primary("jobs") != first
        assert DAY_S <= (cluster.now() - began).total_seconds() < DAY_S + 5


async def test_what_is_acknowledged_never_comes_back_and_what_is_not_does() -> None:
    async with fl.testing.Cluster(topics=TOPICS) as cluster, cluster.client() as client, client.producer() as producer:
        for number in range(10):
            await producer.send("jobs", b"%d" % number, key=f"k{number}")
        done: set[bytes] = set()
        async with client.receiver("jobs", group="g", prefetch=1) as receiver:
            for _ in range(5):
                message = await anext(aiter(receiver))
                await message.ack()
                done.add(message.value)
            cluster.kill(cluster.primary("jobs"))
            async with asyncio.timeout(120):
                for _ in range(5):
                    message = await anext(aiter(receiver))
                    assert message.value not in done
                    await message.ack()
                    done.add(message.value)
        assert len(done) == 10


@pytest.mark.parametrize(("lease_s", "work_s"), [(1, 30), (30, 300), (600, 1_300)])
async def test_a_lease_is_renewed_while_its_record_is_worked_on(lease_s: float, work_s: float) -> None:
    async with (
        fl.testing.Cluster(topics=TOPICS) as cluster,
        cluster.client() as client,
        client.producer() as producer,
        client.receiver("jobs", group="g", lease=lease_s) as receiver,
        client.receiver("jobs", group="g", lease=lease_s) as other,
    ):
        await producer.send("jobs", b"long")
        taken = await asyncio.gather(*(one.receive(1, max_wait=work_s) for one in (receiver, other)))
        (message,) = [message for batch in taken for message in batch]
        assert message.is_held
        await message.ack()


async def test_a_lease_of_a_client_that_is_gone_goes_to_another() -> None:
    async with fl.testing.Cluster(topics=TOPICS) as cluster, cluster.client() as client, client.producer() as producer:
        await producer.send("jobs", b"x")
        gone = cluster.client(name="gone")
        await gone.start()
        receiver = gone.receiver("jobs", group="g", lease=10)
        await receiver.start()
        assert (await anext(aiter(receiver))).delivery_count == 1
        cluster.isolate("gone")
        async with client.receiver("jobs", group="g") as other:
            began = cluster.now()
            (message,) = await other.receive(1, max_wait=60)
            assert message.delivery_count == 2
            assert (cluster.now() - began).total_seconds() < 12
            await message.ack()


async def test_headers_of_a_queue_that_make_no_sense_count_as_none() -> None:
    """What no client of ours would send, somebody's does: it must neither stop the queue nor hold it for a century."""
    written = [
        {"fl-priority": "99"},
        {"fl-priority": "high"},
        {"fl-deliver-at": "-5"},
        {"fl-deliver-at": "9" * 30},
        {"fl-deliver-at": "4000000000000"},  # in the year 2096
        {"fl-expires-at": "soon"},
        {"fl-id": ""},
    ]
    async with fl.testing.Cluster(topics=TOPICS) as cluster, cluster.client() as client, client.producer() as producer:
        for headers in written:
            await producer.send("jobs", b"x", headers=headers)
        async with client.receiver("jobs", group="g") as receiver:
            for _ in written:
                [message] = await receiver.receive(1, max_wait=5)
                await message.ack()
        assert [part.unsettled for part in await client.queue("jobs", "g").stats()] == [0]
