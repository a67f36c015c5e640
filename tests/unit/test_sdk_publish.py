"""Publishing to exchanges, and what a sender asks of queues: on real sockets, brokers misbehave on order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import ferryline as fl
from ferryline.delivery import delivery_headers
from ferryline.message import Message
from ferryline.protocol.errors import (
    ClientClosed,
    FerrylineError,
    InvalidArgument,
    InvalidName,
    PartlyPublished,
    RecordTooLarge,
    SerializationFailed,
    UnknownExchange,
    Unroutable,
)
from ferryline.protocol.exchanges import DIRECT, FANOUT, HEADERS, TOPIC, binding_to
from tests.polling import SOON_S
from unit.sdk_fake_cluster import FakeCluster, Key, Node

YEAR_S = 365 * 86_400


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(2) as cluster:
        for name in ("a", "b", "rest"):
            cluster.create(name, 2)
        cluster.exchange(
            "events",
            TOPIC,
            binding_to(topic="a", routing_key="eu.#"),
            binding_to(topic="b", routing_key="*.order.*"),
        )
        yield cluster


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        yield client


def stored(cluster: FakeCluster, topic: str) -> list[bytes | None]:
    return [value for _, part in sorted(cluster.records(topic).items()) for _, value in part]


async def read(client: fl.Client, topic: str, count: int, **options: Any) -> list[Message[Any]]:
    async with client.consumer(topic, start="start", **options) as consumer:
        found: list[Message[Any]] = []
        async with asyncio.timeout(SOON_S):
            async for message in consumer:
                found.append(message)
                if len(found) == count:
                    break
        return found


# -- where it goes ----------------------------------------------------------------------------------


async def test_a_record_is_stored_in_every_topic_that_the_exchange_names(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.producer(linger=0) as producer:
        both = await producer.publish("events", {"n": 1}, "eu.order.created", key="k")
        assert {topic: (meta.topic, meta.offset) for topic, meta in both.items()} == {"a": ("a", 0), "b": ("b", 0)}
        one = await producer.publish("events", {"n": 2}, routing_key="eu.user", key="k")
        assert list(one) == ["a"]
        assert producer.unroutable == {}
    assert stored(cluster, "a") == [b'{"n":1}', b'{"n":2}']
    assert stored(cluster, "b") == [b'{"n":1}']


async def test_the_reader_sees_the_way_a_record_came(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(linger=0) as producer:
        await producer.publish("events", {"n": 1}, "eu.user", {"src": "web"}, key="k", priority=7, id="m-1")
        first = (await read(client, "a", 1, value=dict))[0]
        assert (first.exchange, first.routing_key, first.priority, first.id) == ("events", "eu.user", 7, "m-1")
        assert (first.value, first.key, first.headers.text("src")) == ({"n": 1}, b"k", "web")
        assert first.headers.getall("content-type") == [b"application/json"]
        # Published again as it was read, it says where it came from last.
        await producer.publish("events", first.raw, "eu.again", first.headers)
        again = (await read(client, "a", 2))[-1]
        found = next(m for m in [again, *(await read(client, "a", 2))] if m.routing_key == "eu.again")
        assert found.headers.getall("fl-routing-key") == [b"eu.again"]
        await producer.send("a", b"direct", key="k")
        assert {m.exchange for m in await read(client, "a", 3)} == {"events", ""}


async def test_headers_route_too_and_no_value_is_a_value(cluster: FakeCluster, client: fl.Client) -> None:
    cluster.exchange(
        "h",
        HEADERS,
        binding_to(topic="a", headers={"format": "pdf"}),
        binding_to(topic="b", headers={"content-type": "application/json"}),
    )
    async with client.producer(linger=0) as producer:
        assert list(await producer.publish("h", None, headers={"format": "pdf"})) == ["a"]
        assert list(await producer.publish("h", {"n": 1}, headers={"format": b"pdf"})) == ["a", "b"]
        assert await producer.publish("h", b"x", headers={"format": "zip"}) == {}
    assert None in stored(cluster, "a")


async def test_a_new_binding_counts_as_soon_as_the_metadata_says_so(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(linger=0) as producer:
        assert await producer.publish("events", b"1", "us.user") == {}
        before = client.watch.change()
        cluster.exchange("events", FANOUT, binding_to(topic="rest"))
        assert await client.watch.wait_for(before, SOON_S)
        assert list(await producer.publish("events", b"2", "us.user")) == ["rest"]


async def test_what_reaches_no_topic_is_counted_or_refused(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(linger=0) as producer:
        assert await producer.publish("events", b"1", "us.user") == {}
        assert await producer.publish("events", b"2") == {}
        assert producer.unroutable == {"events": 2}
        with pytest.raises(Unroutable) as refused:
            await producer.publish("events", b"3", "us.user", mandatory=True)
        assert refused.value.definite
        assert not refused.value.retriable
        assert refused.value.details == {"exchange": "events", "routing_key": "us.user"}
        assert producer.unroutable == {"events": 2}
        assert await producer.publish("events", b"4", "eu.user", mandatory=True)
        cluster.exchange("last", FANOUT, binding_to(topic="rest"))
        cluster.exchange("events", DIRECT, alternate="last")
        await client.watch.ask(timeout=SOON_S)
        assert list(await producer.publish("events", b"5", "us.user", mandatory=True)) == ["rest"]
    assert stored(cluster, "rest") == [b"5"]


async def test_before_a_mandatory_record_is_refused_the_cluster_is_asked_again(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.producer(linger=0) as producer:
        await client.watch.close()  # from here on this client hears nothing by itself
        cluster.exchange("events", FANOUT, binding_to(topic="rest"))
        cluster.exchange("new", FANOUT, binding_to(topic="a"))
        assert list(await producer.publish("events", b"1", "us.user", mandatory=True)) == ["rest"]
        cluster.exchange("newer", FANOUT, binding_to(topic="b"))
        assert list(await producer.publish("newer", b"2")) == ["b"]


# -- what fails -------------------------------------------------------------------------------------

REFUSALS: list[tuple[dict[str, Any], type[FerrylineError], str]] = [
    ({"exchange": "nowhere"}, UnknownExchange, "exchange"),
    ({"exchange": "a/b"}, InvalidName, "exchange"),
    ({"exchange": ""}, InvalidName, "exchange"),
    ({"routing_key": "k" * 256}, InvalidArgument, "routing_key"),
    ({"routing_key": b"eu.x"}, InvalidArgument, "routing_key"),
    ({"routing_key": None}, InvalidArgument, "routing_key"),
    ({"headers": {"": b""}}, InvalidArgument, "headers"),
    ({"value": object()}, SerializationFailed, "value"),
    ({"value": object(), "routing_key": "us.nobody"}, SerializationFailed, "value"),
    ({"priority": 10}, InvalidArgument, "priority"),
    ({"key": 7}, InvalidArgument, "key"),
    ({"value": b"x" * (1024 * 1024), "routing_key": "eu.x"}, RecordTooLarge, "value"),
]


@pytest.mark.parametrize(("wrong", "error", "field"), REFUSALS, ids=[str(row[2]) for row in REFUSALS])
async def test_what_is_wrong_is_told_before_anything_is_sent(
    cluster: FakeCluster, client: fl.Client, wrong: dict[str, Any], error: type[FerrylineError], field: str
) -> None:
    async with client.producer(linger=0) as producer:
        with pytest.raises(error) as refused:
            await producer.publish(**{"exchange": "events", "value": b"", "routing_key": "eu.user", **wrong})
        assert refused.value.details["field"] == field
        assert refused.value.definite
        assert producer.unroutable == {}
        assert stored(cluster, "a") == stored(cluster, "b") == []
        await producer.publish("events", b"good", "eu.user")


async def test_a_closed_producer_publishes_nothing(client: fl.Client) -> None:
    producer = client.producer()
    async with producer:
        pass
    with pytest.raises(ClientClosed):
        await producer.publish("events", b"", "us.nobody")


async def test_of_a_partial_failure_each_topic_is_told(cluster: FakeCluster, client: fl.Client) -> None:
    cluster.create("small", 1, max_record_bytes=10)
    cluster.exchange("both", FANOUT, binding_to(topic="a"), binding_to(topic="small"))
    await client.watch.ask(timeout=SOON_S)
    async with client.producer(linger=0) as producer:
        with pytest.raises(PartlyPublished) as partly:
            await producer.publish("both", b"x" * 11, key="k")
        error = partly.value
        assert isinstance(error.results["small"], RecordTooLarge)
        assert isinstance(error.results["a"], fl.RecordMetadata)
        assert error.details == {"failed": {"small": "RECORD_TOO_LARGE"}}
        assert "1 of 2 topics" in error.message
        assert not error.definite
        assert stored(cluster, "a") == [b"x" * 11]
        # What failed can be sent to by itself; what succeeded is not doubled.
        await producer.send("small", b"x" * 8, key="k")


async def test_the_error_of_a_single_topic_is_its_own(cluster: FakeCluster, client: fl.Client) -> None:
    def refuse(node: Node, key: Key, data: bytearray) -> None:
        raise InvalidArgument("no", field="record")

    cluster.on_produce = refuse
    async with client.producer(linger=0) as producer:
        with pytest.raises(InvalidArgument):
            await producer.publish("events", b"", "eu.user")


async def test_a_repetition_by_the_producer_itself_stores_nothing_twice(
    cluster: FakeCluster, client: fl.Client
) -> None:
    """The answer is lost after the append, for both topics: the producer asks again by the same sequence."""
    lost: set[Key] = set()

    def lose(node: Node, key: Key, data: bytearray) -> None:
        if key not in lost:
            lost.add(key)
            cluster.append(node.id, key, bytearray(data))
            for session in list(node.endpoint.sessions):
                session.abort("the answer is lost")

    cluster.on_produce = lose
    async with client.producer(linger=0) as producer:
        results = await producer.publish("events", b"once", "eu.order.x", key="k")
    assert set(results) == {"a", "b"}
    assert lost
    assert stored(cluster, "a") == stored(cluster, "b") == [b"once"]


# -- priority, delay, ttl, id -----------------------------------------------------------------------


async def test_what_is_asked_of_queues_becomes_headers(cluster: FakeCluster, client: fl.Client) -> None:
    before = time.time_ns() // 1_000_000
    async with client.producer(linger=0) as producer:
        await producer.send("a", b"", headers={"h": "1"}, priority=9, delay=30, ttl=3600.5, id="dedupe-1")
        await producer.send("a", b"", headers={"h": "2"})
    after = time.time_ns() // 1_000_000
    by_header = {m.headers.text("h"): m for m in await read(client, "a", 2)}
    asked = by_header["1"]
    assert (asked.priority, asked.id) == (9, "dedupe-1")
    assert before + 30_000 <= int(asked.headers.text("fl-deliver-at")) <= after + 30_000
    assert before + 3_600_500 <= int(asked.headers.text("fl-expires-at")) <= after + 3_600_500
    assert list(by_header["2"].headers) == ["h"]
    assert by_header["2"].priority == 4


GOOD: list[dict[str, Any]] = [
    {"priority": 0},
    {"priority": 9},
    {"delay": 0},
    {"delay": YEAR_S},
    {"ttl": 0.001},
    {"ttl": YEAR_S},
    {"delay": 5, "ttl": 5.001},
    {"id": "x"},
    {"id": "ß" * 127},
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"priority": -1}, "priority: -1 is not in 0..9"),
    ({"priority": 10}, "priority: 10 is not in 0..9"),
    ({"priority": 4.0}, "priority: 4.0"),
    ({"priority": True}, "priority: True"),
    ({"priority": "high"}, "priority: 'high'"),
    ({"delay": -1}, "delay: -1 is not a number of seconds in 0..31536000 (a year)"),
    ({"delay": YEAR_S + 1}, "delay: 31536001"),
    ({"delay": float("nan")}, "delay: nan"),
    ({"delay": "5"}, "delay: '5'"),
    ({"delay": True}, "delay: True"),
    ({"ttl": 0}, "ttl: 0 is not a number of seconds in 0.001..31536000"),
    ({"ttl": YEAR_S + 1}, "ttl: 31536001"),
    ({"ttl": float("inf")}, "ttl: inf"),
    ({"ttl": 5, "delay": 5}, "ttl: 5 s end before the delay of 5 s"),
    ({"ttl": 5, "delay": 60}, "ttl: 5 s end before the delay of 60 s"),
    ({"id": ""}, "id: ''"),
    ({"id": 7}, "id: 7"),
    ({"id": "ß" * 128}, "id: 'ßß"),
    ({"id": "half \ud800"}, "id: 'half"),
    ({"priority": 1, "headers": {"fl-priority": "2"}}, "headers: fl-priority stands there"),
]


@pytest.mark.parametrize("options", GOOD, ids=str)
async def test_the_limits_themselves_are_allowed(options: dict[str, Any]) -> None:
    assert len(delivery_headers(**options)) == len(options)


@pytest.mark.parametrize(("options", "says"), BAD, ids=[row[1] for row in BAD])
async def test_what_no_queue_could_do_is_refused(
    cluster: FakeCluster, client: fl.Client, options: dict[str, Any], says: str
) -> None:
    async with client.producer(linger=0) as producer:
        for call in (producer.send("a", b"", **options), producer.publish("events", b"", "eu.x", **options)):
            with pytest.raises(InvalidArgument) as refused:
                await call
            assert says in refused.value.message
            assert refused.value.details["field"] in says
        assert producer.buffered_bytes == 0
    assert stored(cluster, "a") == []


async def test_headers_of_delivery_go_with_many_and_with_nowait(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.producer(linger=0) as producer:
        await producer.send_many("a", [b"1"], headers=delivery_headers(priority=8))
        await producer.send_nowait("a", b"2", headers=delivery_headers(priority=8))
    assert [m.priority for m in await read(client, "a", 2)] == [8, 8]
