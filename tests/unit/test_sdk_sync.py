"""Blocking twins and the three verbs: the same behaviour from threads without a loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from aiohttp import web

import ferryline as fl
from ferryline import _sync_stub, simple, sync
from ferryline._mirrored import ASYNC_CLASSES, public_members
from unit.sdk_fake_cluster import FakeCluster


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    """A fake cluster on a loop and thread of its own, with the one REST route that `simple` needs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fake cluster")
    thread.start()

    async def make() -> FakeCluster:
        cluster = FakeCluster(2)

        async def create(request: web.Request) -> web.Response:
            body = await request.json()
            cluster.create(body["name"], body["config"].get("partitions", 3))
            return web.json_response({})

        cluster.coordinator.routes.append(web.post("/v1/topics", create))
        await cluster.__aenter__()
        cluster.create("orders", 4)
        return cluster

    cluster = asyncio.run_coroutine_threadsafe(make(), loop).result(10)
    yield cluster
    asyncio.run_coroutine_threadsafe(cluster.__aexit__(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_produce_and_consume_without_await(cluster: FakeCluster) -> None:
    with sync.connect(cluster.coordinator.url) as client:
        with client.producer(linger=0) as producer:
            sent = producer.send("orders", {"n": 1}, key="k")
            assert isinstance(sent, fl.RecordMetadata)
            future = producer.send_nowait("orders", {"n": 2}, key="k")
            assert isinstance(future, Future)
            assert future.result(5).offset == sent.offset + 1
            assert len(producer.send_many("orders", [("k", {"n": 3}), ("k", {"n": 4})])) == 2
            with pytest.raises(fl.UnknownTopic):
                producer.send("nowhere", b"")
            with pytest.raises(fl.RecordTooLarge):
                producer.send_nowait("orders", b"x" * 2**21)
        with client.consumer("orders", group="g", value=dict) as consumer:
            numbers = []
            for message in consumer:
                numbers.append(message.value["n"])
                if len(numbers) == 2:
                    break
            consumer.commit(message)
            for batch in consumer.batches(max_records=10, max_wait=0.1):
                numbers += [message.value["n"] for message in batch]
                break
            assert numbers == [1, 2, 3, 4]
            here = fl.TopicPartition("orders", message.partition)
            assert here in consumer.assignment
            assert consumer.position(here) == 4
            assert consumer.committed(here) == 2
            assert consumer.lag()[here] == 0
            assert consumer.pull(max_wait=0.1) == []


def test_receive_and_settle_without_await(cluster: FakeCluster) -> None:
    with sync.connect(cluster.coordinator.url) as client:
        with client.producer(linger=0) as producer:
            for number in range(6):
                producer.send("orders", {"n": number}, key=f"k{number}")
        with client.receiver("orders", group="q", value=dict) as receiver:
            seen = []
            for message in receiver:
                assert isinstance(message, sync.QueueMessage)
                assert (message.topic, message.delivery_count) == ("orders", 1)
                with message.processing() as same:
                    assert same.offset == message.offset
                    seen.append(message.value["n"])
                    if len(seen) == 2:
                        raise ValueError("this one again")
                if len(seen) == 2:
                    break
            receiver.flush()
            rest = receiver.receive(max_records=4, max_wait=2)
            assert all(message.raw and message.key and message.is_held for message in rest)
            future = rest[0].ack_nowait()
            assert isinstance(future, Future)
            assert future.result(5) is None
            rest[1].ack()
            assert receiver.ack_many(rest[2:3]) == [None] * len(rest[2:3])
            assert receiver.ack_many(message for message in rest[3:]) == [None] * len(rest[3:])
            with pytest.raises(fl.InvalidArgument, match="settled before"):
                rest[1].reject("why")
            assert receiver.unsettled <= 6 - len(rest)
    assert sum(len(queue.settled) for queue in cluster.queues.queues.values()) >= 1 + len(rest)


def test_calls_may_come_from_many_threads(cluster: FakeCluster) -> None:
    with sync.connect(cluster.coordinator.url) as client, client.producer() as producer:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for index in range(20):
                    producer.send("orders", b"%d" % index, key=f"thread-{number}")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert not errors
    assert sum(map(len, cluster.records("orders").values())) == 160


def test_errors_keep_their_type_and_the_caller_sees_where_it_called(cluster: FakeCluster) -> None:
    with pytest.raises(fl.InvalidArgument, match="url"):
        sync.connect("ftp://x")
    with pytest.raises(fl.ConnectionFailed), sync.connect("http://127.0.0.1:1", timeout=1):
        pass


def test_every_public_name_of_an_asynchronous_class_has_its_twin() -> None:
    for cls in ASYNC_CLASSES:
        twin: Any = getattr(sync, cls.__name__)
        for name, member in public_members(cls):
            assert hasattr(twin, name)
            assert getattr(twin, name).__doc__ == member.__doc__


def test_the_types_of_the_twins_are_up_to_date() -> None:
    assert _sync_stub.STUB.read_text() == _sync_stub.render(), "run: python -m ferryline._sync_stub"


def test_push_pull_and_subscribe(cluster: FakeCluster) -> None:
    simple.close()
    simple.configure(cluster.coordinator.url)
    try:
        assert simple.push("a", {"n": 1}) == 0
        simple.push("b", "text")
        simple.push(None, b"bytes")
        found = [simple.pull(timeout=30) for _ in range(3)]
        assert sorted(found, key=repr) == sorted([("a", {"n": 1}), ("b", "text"), (None, b"bytes")], key=repr)
        assert simple.pull(timeout=0.1) is None

        arrived = threading.Event()
        heard: list[Any] = []

        def hear(key: str | None, value: Any) -> None:
            heard.append((key, value))
            arrived.set()

        stop = simple.subscribe(hear, topic="news")
        simple.push("c", [1, 2], topic="news")
        assert arrived.wait(5)
        stop()
        assert heard == [("c", [1, 2])]
    finally:
        simple.close()


def test_importing_ferryline_loads_nothing_heavy() -> None:
    """The services import ferryline.protocol, hence this package; a command line starts with it, too."""
    code = "import sys, ferryline, ferryline.protocol.errors; print(*sorted(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"aiohttp", "asyncio", "pydantic", "tenacity", "ferryline.client", "ferryline.transport"}


def test_every_name_in_the_export_list_is_there_and_documented() -> None:
    for name in fl.__all__:
        value = getattr(fl, name)
        assert value.__doc__, f"ferryline.{name} says nothing about itself"
    assert fl.UnknownTopic is fl.errors.UnknownTopic
    with pytest.raises(AttributeError):
        fl.no_such_name  # noqa: B018
