"""Receivers of a queue on a real cluster while brokers die: nothing acknowledged comes again, keys keep their order."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.drill import healed, partitions_of
from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.errors import LeaseLost
from tests.polling import poll

pytestmark = pytest.mark.process

TOPIC, GROUP = "jobs", "workers"
PARTITIONS = 6


class Journal:
    """What receivers did, in order: each line is (monotonic seconds, what, key, number)."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str, str, int]] = []
        self.acked: set[tuple[str, int]] = set()

    def note(self, what: str, message: fl.QueueMessage[Any]) -> None:
        key, number = (message.key or b"").decode(), int(message.raw or b"")
        self.lines.append((time.monotonic(), what, key, number))
        if what == "acked":
            self.acked.add((key, number))

    def account(self) -> list[str]:
        """What no receiver may see. Empty: every promise was kept."""
        wrong: list[str] = []
        acked: set[tuple[str, int]] = set()
        last: dict[str, int] = defaultdict(lambda: -1)
        for at, what, key, number in self.lines:
            if what == "got" and (key, number) in acked:
                wrong.append(f"{at:.3f}: {key}/{number} was delivered after its ack had returned")
            elif what == "got" and number > last[key] + 1:
                wrong.append(f"{at:.3f}: {key}/{number} was delivered before {key}/{last[key] + 1} was done")
            elif what == "acking":  # the next one may be leased before this ack has returned
                last[key] = max(last[key], number)
            elif what == "acked":
                if (key, number) in acked:
                    wrong.append(f"{at:.3f}: {key}/{number} was acknowledged twice")
                acked.add((key, number))
        return wrong


@asynccontextmanager
async def client_of(cluster: ProcessCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic(TOPIC, partitions=PARTITIONS, replication=2, exist_ok=True)
        assert await healed(client, TOPIC, PARTITIONS, 2, 60.0)
        yield client


async def work(receiver: fl.Receiver[bytes], journal: Journal, chance: random.Random) -> None:
    """Take records one at a time; fail some of the first attempts; acknowledge the rest."""
    async for message in receiver:
        journal.note("got", message)
        await asyncio.sleep(chance.random() * 0.005)
        try:
            if message.delivery_count == 1 and chance.random() < 0.05:
                await message.nack(delay=chance.random() * 0.2, reason="not yet")
            else:
                journal.note("acking", message)
                await message.ack()
                journal.note("acked", message)
        except LeaseLost:
            journal.note("lost", message)


async def fill(client: fl.Client, keys: int, each: int, rate: float = 0.0) -> None:
    async with client.producer(linger=0.002) as producer:
        for number in range(each):
            for key in range(keys):
                producer.send_nowait(TOPIC, b"%d" % number, f"k{key}")
            if rate:
                await asyncio.sleep(keys / rate)
        await producer.flush()


@asynccontextmanager
async def receivers(
    cluster: ProcessCluster, journal: Journal, clients: int, each: int, tasks: int = 1, **options: Any
) -> AsyncIterator[list[fl.Receiver[bytes]]]:
    """``clients`` clients with ``each`` receivers and ``tasks`` tasks at every one of them."""
    chance = random.Random(7)
    async with AsyncExitStack() as stack:
        made: list[fl.Receiver[bytes]] = []
        for _ in range(clients):
            client = await stack.enter_async_context(fl.connect(cluster.urls, ca=cluster.ca))
            for _ in range(each):
                made.append(await stack.enter_async_context(client.receiver(TOPIC, group=GROUP, **options)))
        running = [asyncio.create_task(work(receiver, journal, chance)) for receiver in made for _ in range(tasks)]
        try:
            yield made
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def all_done(journal: Journal, count: int, within_s: float) -> None:
    await poll(lambda: len(journal.acked) == count, within_s=within_s, what=f"{count} records are acknowledged")


@pytest.mark.parametrize("fault", ["kill", "terminate", "pause"])
async def test_a_primary_that_goes_costs_no_ack_and_no_order(cluster: ProcessCluster, fault: str) -> None:
    """1. twelve receivers share six partitions  2. the primary of one is killed with -9 (is told to end, is stopped)
    3. everything is acknowledged once, key by key in order.
    """
    journal = Journal()
    keys, each = 40, 60
    async with (
        client_of(cluster) as client,
        receivers(cluster, journal, clients=3, each=4, tasks=2, prefetch=8, lease=5.0),
    ):
        filling = asyncio.create_task(fill(client, keys, each, rate=600))
        await poll(lambda: len(journal.acked) > keys * each // 4, within_s=30)
        victim = cluster.name_of(partitions_of(client, TOPIC)[0].primary)
        await {"kill": cluster.kill, "terminate": cluster.terminate, "pause": cluster.pause}[fault](victim)
        await filling
        await all_done(journal, keys * each, 60)
        if fault == "pause":
            await cluster.resume(victim)
    assert journal.account() == []


async def test_everything_dies_and_receivers_go_on_by_themselves(cluster: ProcessCluster) -> None:
    journal = Journal()
    keys, each = 20, 40
    async with client_of(cluster) as client:
        await fill(client, keys, each)
        async with receivers(cluster, journal, clients=2, each=3, prefetch=4, lease=30.0):
            await poll(lambda: len(journal.acked) > 100, within_s=30)
            await cluster.kill_all()
            await asyncio.sleep(1.0)
            await asyncio.gather(*(cluster.restart(name) for name in (*cluster.coordinators, *cluster.brokers)))
            back = time.monotonic()
            await poll(lambda: any(at > back and what == "acked" for at, what, _, _ in journal.lines), within_s=30)
            first = min(at for at, what, _, _ in journal.lines if at > back and what == "acked")
            assert await healed(client, TOPIC, PARTITIONS, 2, 60.0)
            await all_done(journal, keys * each, 60)
    assert first - back < 20.0, "leases of half a minute are not waited for"
    assert journal.account() == []


async def test_a_blocked_handler_loses_nothing_over_a_fail_over(cluster: ProcessCluster) -> None:
    """The loop of the application stands still for longer than a lease, and its primary dies meanwhile."""
    async with client_of(cluster) as client:
        await fill(client, 8, 1)
        async with client.receiver(TOPIC, group=GROUP, lease=2.0) as receiver, client_of(cluster) as second:
            held: list[fl.QueueMessage[bytes]] = []
            while len(held) < 8:
                held += await receiver.receive(max_wait=5)
            victim = cluster.name_of(partitions_of(client, TOPIC)[held[0].partition].primary)
            await cluster.kill(victim)
            time.sleep(7.0)  # noqa: ASYNC251
            async with second.receiver(TOPIC, group=GROUP) as other:
                assert await other.receive(max_wait=1.0) == []
            assert await receiver.ack_many(held) == [None] * 8


async def test_what_a_receiver_leaves_is_with_others_long_before_its_leases_end(cluster: ProcessCluster) -> None:
    async with client_of(cluster) as client:
        await fill(client, 30, 1)
        leaving = client.receiver(TOPIC, group=GROUP, prefetch=100, lease=60.0)
        await leaving.start()
        await poll(lambda: leaving.unsettled == 30)
        async with client.receiver(TOPIC, group=GROUP, prefetch=100) as other:
            assert await other.receive(max_wait=0.5) == []  # it waits at every broker now
            started = time.monotonic()
            await leaving.close()
            back: list[fl.QueueMessage[Any]] = []
            while len(back) < 30:
                back += await other.receive(max_wait=1)
                assert time.monotonic() - started < 20, f"{len(back)} of 30"
            assert {message.delivery_count for message in back} == {1}


def out_of_order(lines: list[tuple[str, int]]) -> list[int]:
    """Offsets of one partition that were handed out before everything below them was at least asked to be settled."""
    offsets = sorted({offset for _, offset in lines})
    asked: set[int] = set()
    first, wrong = 0, []  # offsets[:first] have all been asked for
    for what, offset in lines:
        if what == "acking":
            asked.add(offset)
            while first < len(offsets) and offsets[first] in asked:
                first += 1
        elif what == "got" and first < len(offsets) and offset > offsets[first]:
            wrong.append(offset)
    return wrong


async def test_order_of_a_partition_holds_with_several_receivers_over_a_kill(cluster: ProcessCluster) -> None:
    """Runs of the whole partition, handed back and forth: nothing is worked on before what stands below it is done."""
    lines: dict[int, list[tuple[str, int]]] = defaultdict(list)
    acked: list[tuple[int, int]] = []

    async def work_on_runs(receiver: fl.Receiver[bytes]) -> None:
        async for message in receiver:
            story, offset = lines[message.partition], message.offset
            story.append(("got", offset))
            try:
                if message.delivery_count == 1 and offset % 17 == 0:
                    await message.nack(delay=0.05)
                else:
                    story.append(("acking", offset))
                    await message.ack()
                    acked.append((message.partition, offset))
            except LeaseLost:
                pass

    async with client_of(cluster) as client:
        await fill(client, 30, 40)
        async with AsyncExitStack() as stack:
            tasks = []
            for _ in range(4):
                receiver = await stack.enter_async_context(
                    client.receiver(TOPIC, group="runs", ordering="partition", prefetch=16, lease=5.0)
                )
                tasks.append(asyncio.create_task(work_on_runs(receiver)))
            await poll(lambda: len(acked) > 300, within_s=30)
            await cluster.kill(cluster.name_of(partitions_of(client, TOPIC)[1].primary))
            await poll(lambda: len(acked) >= 1_200, within_s=60)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    assert len(acked) == len(set(acked)) == 1_200, "each once"
    assert {partition: out_of_order(story) for partition, story in lines.items() if out_of_order(story)} == {}


async def test_what_does_not_parse_is_dead_with_its_error_and_the_rest_goes_on(cluster: ProcessCluster) -> None:
    async with client_of(cluster) as client:
        async with client.producer(linger=0) as producer:
            await producer.send(TOPIC, b"not json", "a")
            await producer.send(TOPIC, {"n": 1}, "a")
        async with client.receiver(TOPIC, group="parsing", value=dict) as receiver:
            seen: list[Any] = []
            async for message in receiver:
                async with message.processing():
                    seen.append(message.value)
                if seen:
                    break
            await receiver.flush()
            assert seen == [{"n": 1}]
