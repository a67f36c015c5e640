"""Dead letters on a real cluster: given up, looked at, sent back; and brokers killed at every step of the way."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.cli.explain import explain
from ferryline.dead_letters import DeadLetter, Redrive
from ferryline.queue_admin import groups_of
from polling import poll
from tests.integration.dead_letter_campaign import run_campaign

pytestmark = pytest.mark.process


async def fill(client: fl.Client, topic: str, numbers: range, keys: int = 4) -> None:
    async with client.producer() as producer:
        for number in numbers:
            await producer.send(topic, {"n": number}, key=f"key-{number % keys}", headers={"trace": f"t{number}"})


async def work(client: fl.Client, topic: str, group: str, bad: Any, count: int) -> Counter[int]:
    """Receive ``count`` records; reject those that are ``bad``, acknowledge the others. Returns how often each came."""
    seen: Counter[int] = Counter()
    async with client.receiver(topic, group=group, value=dict) as receiver:
        async for message in receiver:
            number = message.value["n"]
            seen[number] += 1
            if bad(number):
                await message.reject("odd" if number % 2 else "even", f"Traceback\nValueError: {number}")
            else:
                await message.ack()
            if seen.total() >= count:
                return seen
    raise AssertionError("the receiver ended")


async def letters_of(client: fl.Client, topic: str, **choice: Any) -> list[DeadLetter]:
    return [letter async for letter in client.dead_letters(topic).browse(**choice)]


async def arrived(client: fl.Client, topic: str, count: int) -> list[DeadLetter]:
    async def all_there() -> list[DeadLetter]:
        try:
            found = await letters_of(client, topic)
        except fl.errors.UnknownTopic:
            return []
        return found if len(found) >= count else []

    found: list[DeadLetter] = await poll(all_there, what=f"{count} dead letters of {topic}")
    assert len(found) == count
    return found


async def test_what_a_group_gives_up_is_found_explained_and_sent_back_once(cluster: ProcessCluster) -> None:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic("jobs", partitions=3)
        await fill(client, "jobs", range(40))
        await work(client, "jobs", "media", lambda n: n % 10 < 2, 40)
        found = await arrived(client, "jobs", 8)
        info = await client.admin.describe_topic("jobs.dlq")
        assert (info.config.partitions, info.config.replication, info.config.retry.on_dead) == (3, 2, "park")
        one = next(letter for letter in found if letter.record.value == b'{"n":11}')
        assert (one.group, one.reason, one.attempts, one.origin_topic) == ("media", "odd", 1, "jobs")
        assert one.exception == "Traceback\nValueError: 11"
        assert one.record.key == b"key-3"
        assert one.record.headers["trace"] == b"t11"
        assert one.record.partition == one.origin_partition

        told = await explain(client, "jobs", one.origin_partition, one.origin_offset, None)
        assert told["groups"]["media"]["state"] == "settled"
        assert told["dead_letter"].startswith(f"jobs.dlq/{one.record.partition}/{one.record.offset}, given up by media")

        letters = client.dead_letters("jobs")
        trial = await letters.redrive(reason="odd", dry_run=True)
        assert (trial.redriven, trial.left, trial.origins) == (4, 4, {"jobs": 4})
        assert len(await letters_of(client, "jobs")) == 8, "a dry run changes nothing"
        steps: list[int] = []
        done = await letters.redrive(reason="odd", progress=lambda so_far: steps.append(so_far.redriven))
        assert (done.redriven, done.left, done.refused, done.origins) == (4, 4, [], {"jobs": 4})
        assert steps[-1] == 4
        assert {letter.reason for letter in await letters_of(client, "jobs")} == {"even"}
        assert (await letters.redrive(reason="odd")).redriven == 0
        again = await work(client, "jobs", "media", lambda _: False, 4)
        assert again == Counter([1, 11, 21, 31])
        assert (await letters.redrive(key="key-0", group="media")).redriven == 2  # 0 and 20
        assert (await letters.redrive(group="nobody")).redriven == 0
        assert (await letters.redrive(count=1)).redriven == 1
        assert len(await letters_of(client, "jobs")) == 1


async def test_a_redrive_keeps_to_its_rate_and_refuses_what_cannot_go_back(cluster: ProcessCluster) -> None:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic("jobs", partitions=1)
        await fill(client, "jobs", range(12))
        await work(client, "jobs", "media", lambda _: True, 12)
        await arrived(client, "jobs", 12)
        async with client.producer() as producer:
            await producer.send("jobs.dlq", b"by hand")
            await producer.send("jobs.dlq", b"x", headers={"fl-origin-topic": "gone"})
        loop = asyncio.get_running_loop()
        began = loop.time()
        done = await client.dead_letters("jobs.dlq").redrive(rate=8)
        assert done.redriven == 12
        assert loop.time() - began > 0.9
        why = sorted(reason for _, reason in done.refused)
        assert "UNKNOWN_TOPIC" in why[0]
        assert "where it came from" in why[1]
        assert len(await letters_of(client, "jobs")) == 2, "what is refused stays"


async def test_a_redrive_goes_on_through_the_end_of_the_primary(cluster: ProcessCluster) -> None:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic("jobs", partitions=2)
        await fill(client, "jobs", range(60))
        await work(client, "jobs", "media", lambda _: True, 60)
        await arrived(client, "jobs", 60)
        info = await client.admin.describe_topic("jobs.dlq")
        victim = cluster.name_of(info.partitions[0].primary)
        killed = asyncio.Event()

        def watch(done: Redrive) -> None:
            if done.redriven >= 10 and not killed.is_set():
                killed.set()
                cluster.local.kill(victim)

        done = await client.dead_letters("jobs").redrive(rate=20, progress=watch)
        assert killed.is_set()
        assert done.redriven == 60
        seen = await work(client, "jobs", "media", lambda _: False, 60)
        assert seen == Counter(range(60)), "each came again, and once"


async def test_a_parked_record_stops_its_key_until_it_is_redriven_in_place(cluster: ProcessCluster) -> None:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        retry = fl.Retry(attempts=2, backoff=fl.exponential(0, 0), on_dead="park")
        await client.admin.create_topic("jobs", partitions=1, retry=retry)
        await fill(client, "jobs", range(8), keys=2)
        seen: list[int] = []
        async with client.receiver("jobs", group="media", value=dict) as receiver:
            async for message in receiver:
                seen.append(message.value["n"])
                if message.value["n"] == 2:
                    await message.nack(reason="not yet")
                else:
                    await message.ack()
                if len(seen) == 7:
                    break
        assert sorted(seen) == [0, 1, 2, 2, 3, 5, 7]
        queue = client.queue("jobs", "media")
        [part] = await queue.stats()
        assert (part.parked, part.waiting, part.unsettled) == (1, 2, 3)
        trial = await queue.redrive(dry_run=True, key="key-0")
        assert trial.count == 1
        [offset] = trial.offsets[0]
        told = await queue.explain(0, offset)
        assert (told["state"], told["attempts"], told["history"][-1]["reason"]) == ("parked", 2, "not yet")
        assert (await queue.redrive(key="key-1")).count == 0
        assert (await queue.redrive(reason="other")).count == 0
        assert (await queue.redrive(reason="not yet")).offsets == {0: [offset]}
        rest: list[int] = []
        async with client.receiver("jobs", group="media", value=dict) as receiver:
            async for message in receiver:
                rest.append(message.value["n"])
                await message.ack()
                if len(rest) == 3:
                    break
        assert rest == [2, 4, 6], "the order of the key holds"
        assert "jobs.dlq" not in [topic.name for topic in await client.admin.list_topics()]


async def test_a_queue_is_looked_at_paused_purged_and_forgotten(cluster: ProcessCluster) -> None:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic("jobs", partitions=2)
        queue = client.queue("jobs", "media")
        for call in (queue.stats, queue.peek, queue.pause, queue.purge, queue.delete):
            with pytest.raises(fl.errors.UnknownGroup):
                await call()
        assert await groups_of(client, "jobs") == {}
        await fill(client, "jobs", range(20))
        await work(client, "jobs", "media", lambda _: False, 5)
        assert list(await groups_of(client, "jobs")) == ["media"]
        assert sum(part.unsettled for part in await queue.stats()) == 15
        first = await queue.peek(100)
        assert len(first) == 15
        assert all(record.headers["trace"].startswith(b"t") for record in first if record.headers["trace"])
        some = await queue.peek(2, partition=first[0].partition, offset=first[0].offset + 1)
        assert [record.offset for record in some] == [
            record.offset for record in first if record.partition == first[0].partition
        ][1:3]
        await queue.pause()
        assert all(part.paused for part in await queue.stats())
        async with client.receiver("jobs", group="media") as receiver:
            assert await receiver.receive(10, 0.5) == []
            await queue.resume()
            assert await receiver.receive(1, 5.0) != []
        assert await queue.purge(dry_run=True) == 15
        assert await queue.purge() == 15
        assert sum(part.unsettled for part in await queue.stats()) == 0
        await queue.delete()
        with pytest.raises(fl.errors.UnknownGroup):
            await queue.stats()
        seen = await work(client, "jobs", "media", lambda _: False, 20)
        assert len(seen) == 20, "a group that was forgotten begins anew"


async def test_a_group_that_was_deleted_and_comes_back_gives_up_records_anew(cluster: ProcessCluster) -> None:
    """Its copies must not be taken for repetitions of those that the former group made."""
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic("jobs", partitions=1)
        await fill(client, "jobs", range(4))
        await work(client, "jobs", "media", lambda n: n in (0, 1), 4)
        await arrived(client, "jobs", 2)
        await client.queue("jobs", "media").delete()
        await work(client, "jobs", "media", lambda n: n in (2, 3), 4)
        found = await arrived(client, "jobs", 4)
        assert sorted(letter.record.value or b"" for letter in found) == [b'{"n":%d}' % n for n in range(4)]


@pytest.mark.slow
async def test_brokers_that_die_at_every_step_leave_one_copy_of_each() -> None:
    account = await run_campaign(1)
    assert account.good, account.line()
