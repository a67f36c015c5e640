"""Exchanges on a real cluster: the topologies that RabbitMQ's tutorials teach, and what becomes of them in failures."""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import ferryline as fl
from ferryline import sync
from ferryline.cli.driver import COORDINATOR, ProcessCluster
from ferryline.cli.processes import LocalCluster
from ferryline.protocol.errors import Conflict, ExchangeExists, NotFound, UnknownExchange, UnknownTopic, Unroutable
from tests.integration.conftest import Start
from tests.polling import poll

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A coordinator and two brokers for the tests that kill nothing; each uses names of its own."""
    made = LocalCluster(tmp_path_factory.mktemp("routing"), brokers=2)
    made.start()
    yield made
    made.kill_all()


@pytest.fixture
async def client(shared: LocalCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(shared.urls, ca=shared.ca) as client:
        yield client


async def topics(client: fl.Client, *names: str, **settings: Any) -> None:
    for name in names:
        await client.admin.create_topic(name, **{"partitions": 2, **settings})


async def values(client: fl.Client, topic: str) -> list[str]:
    """Everything that is in a topic, sorted."""
    async with client.consumer(topic, start="start", value=str) as consumer:
        found: list[str] = []
        async with asyncio.timeout(20):
            while any((await consumer.lag()).values()):
                found += [message.value for message in await consumer.pull(max_wait=0.2)]
        return sorted(found)


async def test_publish_and_subscribe(client: fl.Client) -> None:
    await topics(client, "ps.one", "ps.two")
    await client.admin.create_exchange("ps", "fanout")
    for topic in ("ps.one", "ps.two"):
        await client.admin.bind("ps", topic=topic)
    async with client.producer() as producer:
        for number in range(20):
            results = await producer.publish("ps", f"{number:02}", key=f"k{number}")
            assert set(results) == {"ps.one", "ps.two"}
    expected = [f"{number:02}" for number in range(20)]
    assert await values(client, "ps.one") == expected
    assert await values(client, "ps.two") == expected


async def test_routing_by_equal_key(client: fl.Client) -> None:
    await topics(client, "dir.errors", "dir.all")
    await client.admin.create_exchange("dir", "direct")
    await client.admin.bind("dir", topic="dir.errors", routing_key="error")
    for severity in ("info", "warning", "error"):
        await client.admin.bind("dir", topic="dir.all", routing_key=severity)
    async with client.producer() as producer:
        for severity in ("info", "warning", "error", "debug"):
            await producer.publish("dir", severity, severity)
        assert producer.unroutable == {"dir": 1}
    assert await values(client, "dir.errors") == ["error"]
    assert await values(client, "dir.all") == ["error", "info", "warning"]


async def test_topics_by_pattern(client: fl.Client) -> None:
    await topics(client, "pat.q1", "pat.q2")
    await client.admin.create_exchange("pat", "topic")
    await client.admin.bind("pat", topic="pat.q1", routing_key="*.orange.*")
    await client.admin.bind("pat", topic="pat.q2", routing_key="*.*.rabbit")
    await client.admin.bind("pat", topic="pat.q2", routing_key="lazy.#")
    expected = {
        "quick.orange.rabbit": {"pat.q1", "pat.q2"},
        "lazy.orange.elephant": {"pat.q1", "pat.q2"},
        "quick.orange.fox": {"pat.q1"},
        "lazy.brown.fox": {"pat.q2"},
        "lazy.pink.rabbit": {"pat.q2"},  # two patterns match; it gets the record once
        "quick.brown.fox": set(),
        "orange": set(),
        "quick.orange.new.rabbit": set(),
        "lazy.orange.new.rabbit": {"pat.q2"},
    }
    async with client.producer() as producer:
        for key, reached in expected.items():
            assert set(await producer.publish("pat", key, routing_key=key)) == reached, key
    for topic in ("pat.q1", "pat.q2"):
        assert await values(client, topic) == sorted(key for key, reached in expected.items() if topic in reached)


async def test_headers_all_and_any(client: fl.Client) -> None:
    await topics(client, "hdr.all", "hdr.any")
    await client.admin.create_exchange("hdr", "headers")
    wanted = {"format": "pdf", "kind": "report"}
    await client.admin.bind("hdr", topic="hdr.all", headers=wanted)
    await client.admin.bind("hdr", topic="hdr.any", headers=wanted, match="any")
    async with client.producer() as producer:
        await producer.publish("hdr", "both", headers=wanted)
        await producer.publish("hdr", "one", headers={"format": "pdf"})
        await producer.publish("hdr", "none", headers={"format": "zip"})
    assert await values(client, "hdr.all") == ["both"]
    assert await values(client, "hdr.any") == ["both", "one"]


async def test_exchange_to_exchange(client: fl.Client) -> None:
    await topics(client, "e2e.audit", "e2e.eu")
    for name, kind in (("e2e.in", "fanout"), ("e2e.geo", "topic")):
        await client.admin.create_exchange(name, kind)
    await client.admin.bind("e2e.in", topic="e2e.audit")
    await client.admin.bind("e2e.in", to_exchange="e2e.geo")
    await client.admin.bind("e2e.geo", topic="e2e.eu", routing_key="eu.#")
    await client.admin.bind("e2e.geo", topic="e2e.audit", routing_key="#")
    with pytest.raises(Conflict, match=r"e2e.geo -> e2e.in -> e2e.geo"):
        await client.admin.bind("e2e.geo", to_exchange="e2e.in", routing_key="x")
    async with client.producer() as producer:
        for key in ("eu.a", "us.a"):
            await producer.publish("e2e.in", key, routing_key=key)
    assert await values(client, "e2e.audit") == ["eu.a", "us.a"], "once, though two ways lead there"
    assert await values(client, "e2e.eu") == ["eu.a"]


async def test_alternate_and_mandatory(client: fl.Client) -> None:
    await topics(client, "alt.known", "alt.strays")
    await client.admin.create_exchange("alt.last", "fanout")
    await client.admin.create_exchange("alt", "direct", alternate="alt.last")
    await client.admin.bind("alt", topic="alt.known", routing_key="known")
    async with client.producer() as producer:
        assert await producer.publish("alt", "counted", "odd") == {}
        with pytest.raises(Unroutable):
            await producer.publish("alt", "refused", "odd", mandatory=True)
        await client.admin.bind("alt.last", topic="alt.strays")
        assert set(await producer.publish("alt", "stray", "odd", mandatory=True)) == {"alt.strays"}
        assert set(await producer.publish("alt", "known", "known", mandatory=True)) == {"alt.known"}
        assert producer.unroutable == {"alt": 1}
        with pytest.raises(UnknownExchange):
            await producer.publish("alt.none", "x")
    assert await values(client, "alt.strays") == ["stray"]
    assert await values(client, "alt.known") == ["known"]


def test_exchanges_without_await(shared: LocalCluster) -> None:
    with sync.connect(shared.urls, ca=str(shared.ca)) as client, client.producer() as producer:
        client.admin.create_topic("syn.t", partitions=1)
        client.admin.create_exchange("syn", "topic")
        client.admin.bind("syn", topic="syn.t", routing_key="a.*")
        assert producer.publish("syn", b"1", "a.b", priority=7)["syn.t"].topic == "syn.t"
        assert producer.publish("syn", b"2", "b") == {}
        assert producer.unroutable == {"syn": 1}
        with pytest.raises(Unroutable):
            producer.publish("syn", b"3", "b", mandatory=True)
        assert client.admin.topics_reached("syn", "a.x") == ["syn.t"]
        with client.consumer("syn.t", start="start") as consumer:
            message = next(consumer)
            assert (message.exchange, message.routing_key, message.priority) == ("syn", "a.b", 7)


async def test_administration_tells_what_is_wrong_and_shows_what_is_there(client: fl.Client) -> None:
    admin = client.admin
    made = await admin.create_exchange("adm", "topic")
    assert (made.name, made.type, made.bindings) == ("adm", "topic", ())
    with pytest.raises(ExchangeExists):
        await admin.create_exchange("adm", "topic")
    assert await admin.create_exchange("adm", "topic", exist_ok=True) == made
    with pytest.raises(ExchangeExists, match="of type topic"):
        await admin.create_exchange("adm", "fanout", exist_ok=True)
    with pytest.raises(UnknownTopic):
        await admin.bind("adm", topic="adm.none", routing_key="#")
    with pytest.raises(UnknownExchange):
        await admin.bind("adm.none", topic="adm.none")
    await topics(client, "adm.t")
    bound = await admin.bind("adm", topic="adm.t", routing_key="a.#")
    assert await admin.bind("adm", topic="adm.t", routing_key="a.#") == bound
    assert await admin.topics_reached("adm", "a.b") == ["adm.t"]
    assert await admin.topics_reached("adm", "b") == []
    assert "adm" in [exchange.name for exchange in await admin.list_exchanges()]
    with pytest.raises(NotFound):
        await admin.unbind("adm", topic="adm.t", routing_key="b.#")
    assert (await admin.unbind("adm", topic="adm.t", routing_key="a.#")).bindings == ()
    await admin.delete_exchange("adm")
    with pytest.raises(UnknownExchange):
        await admin.describe_exchange("adm")
    with pytest.raises(UnknownExchange):
        await admin.topics_reached("adm")


async def test_other_clients_follow_bindings_and_deletions(shared: LocalCluster, client: fl.Client) -> None:
    await topics(client, "fol.a", "fol.b")
    await client.admin.create_exchange("fol", "fanout")
    async with fl.connect(shared.urls, ca=shared.ca) as other, other.producer() as producer:
        with pytest.raises(Unroutable):
            await producer.publish("fol", "1", mandatory=True)
        for topic in ("fol.a", "fol.b"):
            await client.admin.bind("fol", topic=topic)
        # At once, because a mandatory record asks again before it is refused.
        assert await producer.publish("fol", "2", mandatory=True)
        await poll(lambda: len(other.routing.cluster.exchanges["fol"].bindings) == 2)
        assert set(await producer.publish("fol", "3")) == {"fol.a", "fol.b"}
        await client.admin.delete_topic("fol.a")
        await poll(lambda: other.routing.topic("fol.a") is None)
        assert set(await producer.publish("fol", "4")) == {"fol.b"}, "the binding went with its topic"
        await client.admin.create_topic("fol.a", partitions=1)
        assert await client.admin.topics_reached("fol") == ["fol.b"]
        await client.admin.delete_exchange("fol")
        await poll(lambda: "fol" not in other.routing.cluster.exchanges)
        with pytest.raises(UnknownExchange):
            await producer.publish("fol", "5")


async def test_routes_outlive_the_coordinator_and_serve_while_it_is_away(start_cluster: Start) -> None:
    """1. exchanges are bound  2. the coordinator is killed  3. a client that knows only brokers publishes and is told
    what is unroutable  4. the coordinator returns: all bindings are there, and can be changed.
    """
    cluster = await start_cluster(brokers=2)
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await topics(client, "a", "b")
        await client.admin.create_exchange("x", "topic")
        await client.admin.bind("x", topic="a", routing_key="#.a")
        bound = await client.admin.bind("x", topic="b", routing_key="#")
        await poll(lambda: all(_knows(cluster, name) for name in cluster.brokers))
    await cluster.kill(COORDINATOR)
    urls = [cluster.url_of(name) for name in cluster.brokers]
    async with fl.connect(urls, ca=cluster.ca) as client, client.producer() as producer:
        assert set(await producer.publish("x", "1", "x.a", mandatory=True)) == {"a", "b"}
        with pytest.raises(UnknownExchange):
            await producer.publish("y", "1")
        await cluster.restart(COORDINATOR)
        assert await client.admin.describe_exchange("x") == bound
        await client.admin.unbind("x", topic="b", routing_key="#")
        assert set(await producer.publish("x", "2", "x.a")) == {"a"}
        assert await values(client, "b") == ["1"]


def _knows(cluster: ProcessCluster, name: str) -> bool:
    """Whether a broker's own copy of the metadata has the exchange with both bindings."""
    context = ssl.create_default_context(cafile=str(cluster.ca))
    with urllib.request.urlopen(f"{cluster.url_of(name)}/v1/metadata", context=context, timeout=5) as response:
        exchanges = json.load(response)["exchanges"]
    return [len(exchange["bindings"]) for exchange in exchanges if exchange["name"] == "x"] == [2]


async def test_a_broker_that_dies_loses_and_doubles_nothing_of_what_was_published(start_cluster: Start) -> None:
    """Every acknowledged record is in every topic of its exchange, once, though a broker was killed half way."""
    cluster = await start_cluster(brokers=3)
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        names = ["one", "two", "three"]
        await topics(client, *names, partitions=3)
        await client.admin.create_exchange("all", "fanout")
        for name in names:
            await client.admin.bind("all", topic=name)
        acknowledged: list[str] = []

        async def publish(number: int, producer: fl.Producer) -> None:
            results = await producer.publish("all", f"{number:04}", key=f"k{number % 17}")
            assert set(results) == set(names)
            acknowledged.append(f"{number:04}")

        async with client.producer() as producer, asyncio.timeout(60):
            for start in range(0, 600, 50):
                if start == 300:
                    await cluster.kill(cluster.brokers[0])
                await asyncio.gather(*(publish(number, producer) for number in range(start, start + 50)))
        assert len(acknowledged) == 600
        for name in names:
            assert await values(client, name) == sorted(acknowledged), name
