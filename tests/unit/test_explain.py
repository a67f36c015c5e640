"""`ferryline explain`: each reason for which nobody gets a record is made on a cluster, and must be named."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.explain import explain, explain_id, sentence
from ferryline.cli.failures import NOT_FOUND, UNAVAILABLE, Failed

TOPIC, GROUP = "orders", "g"
MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"


class Scene:
    """One topic of one partition, one queue group, and what was done to them."""

    def __init__(self, cluster: fl.testing.Cluster, client: fl.Client, stack: AsyncExitStack) -> None:
        self.cluster, self.client, self._stack = cluster, client, stack
        self.queue = client.queue(TOPIC, GROUP)

    async def made(self, **config: Any) -> Scene:
        await self.client.admin.create_topic(TOPIC, partitions=1, **config)
        await self.cluster.healthy()
        return self

    async def send(self, *keys: str | None, **options: Any) -> list[int]:
        """Offsets of new records."""
        async with self.client.producer() as producer:
            return [(await producer.send(TOPIC, b"v", key=key, **options)).offset for key in keys]

    async def receiver(self, **options: Any) -> fl.Receiver[Any]:
        """It stays until the end of the test."""
        made: fl.Receiver[Any] = self.client.receiver(TOPIC, group=GROUP, **options)
        return await self._stack.enter_async_context(made)

    async def take(self, count: int = 1, **options: Any) -> list[fl.QueueMessage[Any]]:
        receiver = await self.receiver(prefetch=count, **options)
        found = await receiver.receive(count, 10)
        assert len(found) == count
        return found

    async def visit(self) -> None:
        """A receiver of the group comes by and leaves."""
        async with self.client.receiver(TOPIC, group=GROUP) as receiver:
            for message in await receiver.receive(1, 0.3):
                await message.release()

    async def told(self, offset: int) -> dict[str, Any]:
        return await explain(self.client, TOPIC, 0, offset, None)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with fl.testing.Cluster(brokers=2) as cluster, cluster.client() as client, AsyncExitStack() as stack:
        yield Scene(cluster, client, stack)


# Each makes its case and returns the offset that is asked for; then (what it is, what must be said of it).
Case = Callable[[Scene], Awaitable[int]]
CASES: list[tuple[Case, str, str]] = []


def case(state: str, because: str) -> Callable[[Case], Case]:
    """``because``: a pattern that the sentence about the group must match as a whole."""

    def add(act: Case) -> Case:
        CASES.append((act, state, because))
        return act

    return add


@case("available", "no receiver asks for records")
async def no_receiver(scene: Scene) -> int:
    await (await scene.made()).visit()
    [offset] = await scene.send("a")
    await scene.visit()
    return offset


@case("available", "no receiver asks for records: 1 have 1 that are not settled, and no room for more")
async def no_room(scene: Scene) -> int:
    await scene.made()
    offsets = await scene.send(None, None)
    await scene.take(prefetch_bytes=1024)
    return offsets[1]


@case("available", "the queue is paused(, no receiver asks for records)?")
async def paused(scene: Scene) -> int:
    await (await scene.made()).visit()
    await scene.queue.pause()
    [offset] = await scene.send("a")
    await scene.visit()
    return offset


@case("leased", r"attempt 1, with \S+ for \S+, lease ends in \S+")
async def leased(scene: Scene) -> int:
    await scene.made()
    [offset] = await scene.send("a")
    await scene.take()
    return offset


@case("leased", r"attempt 2, with \S+ for \S+, lease ends in \S+, attempt 1 ended with no paper")
async def leased_again(scene: Scene) -> int:
    await scene.made()
    [offset] = await scene.send("a")
    receiver = await scene.receiver()
    [message] = await receiver.receive(1, 10)
    await message.nack(0, "no paper")
    assert await receiver.receive(1, 10)
    return offset


@case("waiting", r"behind offset \d+ of its key, which is leased")
async def behind_a_lease(scene: Scene) -> int:
    await scene.made()
    offsets = await scene.send("a", "a")
    await scene.take()
    return offsets[1]


@case("waiting", r"behind offset \d+ of its key, which is parked")
async def behind_a_parked_one(scene: Scene) -> int:
    await scene.made(retry=fl.Retry(on_dead="park"))
    offsets = await scene.send("a", "a")
    [message] = await scene.take()
    await message.reject("poison")
    return offsets[1]


@case("waiting", r"behind offset \d+ of its key, which backs off")
async def behind_a_retry(scene: Scene) -> int:
    await scene.made()
    offsets = await scene.send("a", "a")
    [message] = await scene.take()
    await message.nack(600)
    return offsets[1]


@case("delayed", r"attempt 1, due in \d+ms, attempt 1 ended with no paper")
async def backing_off(scene: Scene) -> int:
    await scene.made()
    [offset] = await scene.send("a")
    [message] = await scene.take()
    await message.nack(600, "no paper")
    return offset


@case("delayed", r"due in \d+ms")
async def sent_for_later(scene: Scene) -> int:
    await scene.made()
    [offset] = await scene.send("a", delay=3600)
    await scene.visit()
    return offset


@case("parked", "attempt 1, attempt 1 ended with poison")
async def parked(scene: Scene) -> int:
    await scene.made(retry=fl.Retry(on_dead="park"))
    [offset] = await scene.send("a")
    [message] = await scene.take()
    await message.reject("poison")
    return offset


@case("settled", "")
async def done(scene: Scene) -> int:
    await scene.made()
    [offset] = await scene.send("a")
    [message] = await scene.take()
    await message.ack()
    return offset


@case("not in window", r"\d+ records before it are available and 0 wait behind others")
async def beyond_the_window(scene: Scene) -> int:
    await scene.made()
    async with scene.client.producer() as producer:
        stored = await producer.send_many(TOPIC, [bytes(100)] * 40_000)
    await scene.take()
    last = stored[-1]
    assert isinstance(last, fl.RecordMetadata)
    return last.offset


@pytest.mark.parametrize(("act", "state", "because"), CASES, ids=[act.__name__ for act, _, _ in CASES])
async def test_what_a_record_waits_for_is_named(scene: Scene, act: Case, state: str, because: str) -> None:
    offset = await act(scene)
    await scene.cluster.advance(seconds=1)
    told = (await scene.told(offset))["groups"][GROUP]
    assert told["state"] == state, told
    assert re.fullmatch(because, sentence(told)), sentence(told)


def test_a_broker_of_an_older_release_says_less_of_what_is_in_front() -> None:
    assert sentence({"state": "waiting", "attempts": 0, "behind": 3}) == "behind offset 3 of its key"


def test_the_table_is_as_long_as_promised() -> None:
    assert len(CASES) >= 12


async def test_what_died_is_found_among_the_dead_letters(scene: Scene) -> None:
    await scene.made()
    [offset] = await scene.send("a")
    [message] = await scene.take()
    await message.reject("poison")
    await scene.cluster.advance(seconds=10)
    told = await scene.told(offset)
    assert re.fullmatch(rf"{TOPIC}\.dlq/0/\d+, given up by {GROUP}: poison", told["dead_letter"])


async def test_what_cannot_be_copied_yet_is_dying(scene: Scene) -> None:
    await scene.made()
    [offset] = await scene.send("a")
    [message] = await scene.take()
    scene.cluster.kill("coordinator")  # nobody can make the topic of dead letters
    await message.reject("poison")
    told = (await scene.told(offset))["groups"][GROUP]
    assert (told["state"], sentence(told)) == ("dying", "attempt 1, attempt 1 ended with poison")


async def test_what_queues_pass_over_says_what_its_sender_asked_for(scene: Scene) -> None:
    await scene.made()
    offsets = await scene.send("a", "b", id="order-17")
    [expiring] = await scene.send("c", ttl=1)
    await scene.cluster.advance(seconds=2)
    [message] = await scene.take()
    await message.ack()
    await scene.cluster.advance(seconds=2)
    assert [part.unsettled for part in await scene.queue.stats()] == [0]
    first, second, third = [await scene.told(offset) for offset in (*offsets, expiring)]
    assert "repeats" not in first
    assert "expired" not in first
    assert second["repeats"].startswith(f"{TOPIC}/0/{offsets[0]}, which has the same id")
    assert re.fullmatch(MOMENT + ": queues deliver it no more", third["expired"])
    assert [one["groups"][GROUP]["state"] for one in (first, second, third)] == ["settled"] * 3


@pytest.mark.parametrize("text", ["", "soon", "-1", "\u00b2", "9" * 16])
async def test_an_end_of_time_that_is_no_number_is_none(scene: Scene, text: str) -> None:
    await scene.made()
    async with scene.client.producer() as producer:
        stored = await producer.send(TOPIC, b"a", headers={"fl-expires-at": text.encode()})
    assert "expired" not in await scene.told(stored.offset)


async def test_consumer_groups_are_asked_too(scene: Scene) -> None:
    await scene.made()
    offsets = await scene.send("a", "b")
    async with scene.client.consumer(TOPIC, group="readers") as consumer:
        async for message in consumer:
            await consumer.commit(message)
            break
    first, second = [(await scene.told(offset))["groups"]["readers"] for offset in offsets]
    assert (first["state"], second["state"]) == ("committed past it", "not yet")


async def test_places_without_a_record_say_why(scene: Scene) -> None:
    await scene.made()
    [offset] = await scene.send("a")
    told = await scene.told(offset + 5)
    assert told["record"] == f"not there: the committed end is {offset + 1}"
    assert told["groups"] == {}, "nobody has received from it"
    assert (await scene.told(offset - 1))["record"] == "not a record: a mark of the broker's own"
    with pytest.raises(Failed, match=r"partitions 0\.\.0"):
        await explain(scene.client, TOPIC, 1, 0, None)


async def test_what_retention_took_says_since_when_the_log_is_whole(scene: Scene) -> None:
    await scene.made(retention_ms=60_000, segment_ms=60_000)
    [offset] = await scene.send("a", id="order-1")
    for _ in range(4):
        await scene.cluster.advance(minutes=2)
        await scene.send("b")
    told = await scene.told(offset)
    assert re.fullmatch(rf"not in the retained log since {MOMENT}: it begins at offset \d+", told["record"])
    for topics in ([TOPIC], []):
        with pytest.raises(Failed, match=f"not in the retained log since {MOMENT}") as refused:
            await explain_id(scene.client, "order-1", topics, 0, None)
        assert refused.value.status == NOT_FOUND


async def test_a_partition_without_primary_is_named_at_once(scene: Scene) -> None:
    await scene.made(replication=1)
    [offset] = await scene.send("a")
    primary = scene.cluster.primary(TOPIC)
    scene.cluster.kill(primary)
    await scene.cluster.advance(seconds=10)
    told = await scene.told(offset)
    assert told["record"] == f"not known: the partition has no primary; what is committed is on broker {primary}"
    with pytest.raises(Failed, match=rf"not read, as it has no primary: {TOPIC}/0") as refused:
        await asyncio.wait_for(explain_id(scene.client, "order-1", [], 0, None), 5)
    assert refused.value.status == UNAVAILABLE


async def test_a_record_is_found_by_the_id_of_its_sender(scene: Scene) -> None:
    await scene.made()
    began = scene.cluster.now()
    [offset] = await scene.send("a", id="invoice/2026-17")
    await scene.take()
    [told] = await explain_id(scene.client, "invoice/2026-17", [], 0, None)
    assert (told["place"], told["groups"][GROUP]["state"]) == (f"{TOPIC}/0/{offset}", "leased")
    with pytest.raises(Failed, match="'nobody' is not in the retained log since the beginning of topic orders"):
        await explain_id(scene.client, "nobody", [], 0, None)
    later = int(began.timestamp() * 1000) + 3_600_000
    with pytest.raises(Failed, match=rf"since {MOMENT} of topic"):
        await explain_id(scene.client, "invoice/2026-17", [TOPIC], later, None)
    with pytest.raises(fl.errors.UnknownTopic):
        await explain_id(scene.client, "invoice/2026-17", ["gone"], 0, None)
