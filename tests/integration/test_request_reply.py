"""Request and reply on a real cluster: whose answer it is, and what becomes of it when somebody is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

import ferryline as fl
from ferryline import sync
from ferryline.cli.processes import LocalCluster
from ferryline.message import Message
from ferryline.protocol.errors import (
    ClientClosed,
    InvalidArgument,
    RequestTimedOut,
    SerializationFailed,
    UnknownExchange,
    UnknownTopic,
    Unroutable,
)
from tests.polling import poll

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    made = LocalCluster(tmp_path_factory.mktemp("requests"), brokers=2)
    made.start()
    yield made
    made.kill_all()


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic("double", partitions=2, exist_ok=True)
        yield client


@asynccontextmanager
async def doubling(cluster: LocalCluster, group: str) -> AsyncIterator[list[Message[int]]]:
    """A replier of its own: it answers each number with its double. Yields what it was asked."""
    asked: list[Message[int]] = []
    async with (
        fl.connect(cluster.urls, ca=cluster.ca) as client,
        client.consumer("double", group=group, start="end", value=int) as consumer,
    ):
        await poll(lambda: len(consumer.assignment) == 2)

        async def serve() -> None:
            async for message in consumer:
                asked.append(message)
                assert await client.reply(message, 2 * message.value)

        serving = asyncio.create_task(serve())
        yield asked
        serving.cancel()
        await asyncio.wait([serving])


def replies(client: fl.Client) -> list[str]:
    return [name for name in client.routing.cluster.topic_ids if name.startswith("reply.")]


async def test_each_request_gets_the_reply_to_it(cluster: LocalCluster, client: fl.Client) -> None:
    async with doubling(cluster, "each") as asked, fl.connect(cluster.urls, ca=cluster.ca) as other:
        numbers = range(50)
        mine = [client.request("double", number, reply=int, key=f"k{number}") for number in numbers]
        theirs = [other.request("double", 100 + number, reply=int) for number in numbers]
        answers = await asyncio.gather(*mine, *theirs)
        assert answers == [2 * number for number in numbers] + [2 * (100 + number) for number in numbers]
        assert len(asked) == 100
        assert len(replies(client)) == 2, "one topic for each client"
    await poll(lambda: len(replies(client)) == 1)


async def test_without_a_reply_in_time_the_request_has_timed_out(client: fl.Client) -> None:
    await client.admin.create_topic("slow", partitions=1)
    with pytest.raises(RequestTimedOut, match="slow: no reply within 3 s") as late:
        await client.request("slow", 1, timeout=3)  # time to make the topic of replies, too
    assert not late.value.definite, "somebody may have worked on it"
    async with client.consumer("slow", start="start") as consumer:
        async with asyncio.timeout(30):
            message = await anext(consumer)
        assert await client.reply(message, b"too late") is True
    with pytest.raises(RequestTimedOut):  # the late reply is nobody else's
        await client.request("slow", 2, timeout=0.5)


async def test_what_cannot_be_asked_is_told_at_once(client: fl.Client) -> None:
    with pytest.raises(UnknownTopic):
        await client.request("nowhere", b"")
    with pytest.raises(UnknownExchange):
        await client.request("nowhere", b"", routing_key="")
    await client.admin.create_exchange("empty", "fanout", exist_ok=True)
    with pytest.raises(Unroutable):
        await client.request("empty", b"", routing_key="")
    with pytest.raises(InvalidArgument, match="timeout"):
        await client.request("double", b"", timeout=0)
    with pytest.raises(SerializationFailed):
        await client.request("double", object())


async def test_a_request_through_an_exchange_is_answered(cluster: LocalCluster, client: fl.Client) -> None:
    await client.admin.create_exchange("numbers", "topic", exist_ok=True)
    await client.admin.bind("numbers", topic="double", routing_key="double.#")
    async with doubling(cluster, "through") as asked:
        assert await client.request("numbers", 21, reply=int, routing_key="double.this") == 42
        assert asked[0].routing_key == "double.this"
        with pytest.raises(SerializationFailed):
            await client.request("numbers", 21, reply=list[int], routing_key="double.this")


async def test_workers_of_a_queue_answer_too(cluster: LocalCluster, client: fl.Client) -> None:
    await client.admin.create_topic("half", partitions=2, exist_ok=True)

    async def work(receiver: fl.Receiver[int], worker: fl.Client) -> None:
        async for message in receiver:
            assert await worker.reply(message, message.value // 2)
            await message.ack()

    async with (
        fl.connect(cluster.urls, ca=cluster.ca) as one,
        fl.connect(cluster.urls, ca=cluster.ca) as two,
        one.receiver("half", group="workers", value=int) as first,
        two.receiver("half", group="workers", value=int) as second,
    ):
        working = [asyncio.create_task(work(first, one)), asyncio.create_task(work(second, two))]
        requests = (client.request("half", 2 * number, reply=int) for number in range(30))
        assert await asyncio.gather(*requests) == list(range(30))
        for task in working:
            task.cancel()
        await asyncio.wait(working)


async def test_who_answers_learns_that_the_asker_is_gone_or_never_asked(
    cluster: LocalCluster, client: fl.Client
) -> None:
    async with client.consumer("double", start="end") as consumer:
        async with fl.connect(cluster.urls, ca=cluster.ca) as asker:
            waiting = asyncio.create_task(asker.request("double", 1))
            async with asyncio.timeout(30):
                message = await anext(consumer)
        with pytest.raises(ClientClosed):
            await waiting
        await poll(lambda: client.routing.topic(message.headers.text("fl-reply-to")) is None)
        assert await client.reply(message, b"") is False
        async with client.producer() as producer:
            await producer.send("double", b"no question")
        async with asyncio.timeout(30):
            message = await anext(consumer)
        with pytest.raises(InvalidArgument, match="asks for no reply"):
            await client.reply(message, b"")


async def test_a_topic_of_replies_that_somebody_deleted_is_made_again(cluster: LocalCluster, client: fl.Client) -> None:
    async with doubling(cluster, "again"):
        assert await client.request("double", 1, reply=int) == 2
        before = replies(client)
        await client.admin.create_topic("unanswered", partitions=1, exist_ok=True)
        waiting = asyncio.create_task(client.request("unanswered", b""))
        await poll(lambda: client._requester is not None and len(client._requester._waiting) == 1)
        for name in before:
            await client.admin.delete_topic(name)

        with pytest.raises(UnknownTopic):
            await waiting
        assert await client.request("double", 2, reply=int) == 4
        assert not set(replies(client)) & set(before)


def test_requests_without_await(cluster: LocalCluster) -> None:
    with sync.connect(cluster.urls, ca=str(cluster.ca)) as client:
        client.admin.create_topic("double", partitions=2, exist_ok=True)
        with pytest.raises(RequestTimedOut):
            client.request("double", 1, timeout=0.3)
