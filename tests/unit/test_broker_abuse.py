"""What a principal with a few grants tries at a broker, to have it hold more than it can. Real sockets."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from ferryline.protocol.access import AccessPolicy, KeyMeta, PrincipalMeta, Quota
from ferryline.protocol.errors import MalformedRequest, Throttled
from ferryline.protocol.exchanges import ExchangeMeta, binding_to
from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.messages import RECORDS, STATE, Fetch, FetchEntry, Hello, ProduceEntry
from ferryline.protocol.metadata import MetadataRequest, RetryPolicy
from ferryline.protocol.queue_messages import (
    REJECT,
    QueueAnswer,
    QueueAsk,
    Receive,
    ReceiveAnswer,
    Settle,
    SettleAnswer,
    SettleEntry,
)
from ferryline.protocol.records import encode_batch, split_batches
from ferryline_broker import fetch, metadata, queue_frames, rest, rest_read
from ferryline_broker.core import groups
from ferryline_broker.queue_requests import BYTES_MAX
from ferryline_service.access.keys import make_key
from ferryline_service.node import raise_error
from ferryline_service.tls import node_client_context
from unit.broker_world import BrokerWorld, RawClient, RunningBroker, eventually


async def ask(world: BrokerWorld, broker: RunningBroker, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    context = node_client_context(world.coordinator.tls.ca)
    async with world.http.request(method, broker.url + path, ssl=context, json=body) as response:
        return response.status, await response.json()


async def test_one_session_has_no_more_receivers_waiting_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_frames, "_PARKED_OF_ONE_MAX", 3)
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client, other = await world.client(broker.url), await world.client(broker.url)
        queues = broker.broker.frames.queues

        def ask(member: int, wait_ms: int = 60_000) -> Receive:
            return Receive("g", f"m{member}", [(topic.id, 0)], 1, wait_ms=wait_ms)

        waiting = [client.send(Kind.RECEIVE, ask(member)) for member in range(3)]
        await eventually(lambda: queues._parked_count == 3, "three wait")
        with pytest.raises(Throttled):
            raise_error(await client.ask(Kind.RECEIVE, ask(3)))
        again = client.send(Kind.RECEIVE, ask(0))  # takes the place of its own
        assert not (await client.call(Kind.RECEIVE, ask(1, wait_ms=0), ReceiveAnswer)).deliveries
        assert not (await other.call(Kind.RECEIVE, ask(3, wait_ms=0), ReceiveAnswer)).deliveries
        await eventually(lambda: queues._parked_count == 2, "two are answered")
        await client.close()
        await eventually(lambda: queues._parked_count == 0, "nobody waits")
        assert waiting
        assert again


async def test_one_session_has_no_more_fetches_open_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_OF_ONE_MAX", 3)
    monkeypatch.setattr(fetch, "_ENTRIES_OF_ONE_MAX", 4)
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client, other = await world.client(broker.url), await world.client(broker.url)
        entry = FetchEntry(topic.id, 0, broker.broker.partitions.replicas[topic.id, 0].core.high_watermark[RECORDS])
        metrics = broker.broker.metrics

        def waits(count: int, wait_ms: int = 60_000) -> Fetch:
            return Fetch(wait_ms, 2**20, [entry] * count)

        short = client.send(Kind.FETCH, waits(3, 2_000))
        client.send(Kind.FETCH, waits(1))
        await eventually(lambda: metrics.parked_fetches == 2, "two wait")
        with pytest.raises(Throttled):
            raise_error(await client.ask(Kind.FETCH, waits(1)))
        other.send(Kind.FETCH, waits(1))
        await eventually(lambda: metrics.parked_fetches == 3, "another session may")
        raise_error(await client.answer(short))
        for _ in range(2):
            client.send(Kind.FETCH, waits(1))
        await eventually(lambda: metrics.parked_fetches == 4, "its place is free again")
        with pytest.raises(Throttled):
            raise_error(await client.ask(Kind.FETCH, waits(1, 0)))


async def test_one_session_takes_no_places_of_others_that_wait_for_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "_OF_ONE_MAX", 3)
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        client, other = await world.client(broker.url), await world.client(broker.url)
        known = broker.broker.view.metadata
        handler = broker.broker.frames.metadata

        def waits() -> MetadataRequest:
            return MetadataRequest("", known.coord_epoch, known.revision, 60_000)

        for _ in range(3):
            client.send(Kind.METADATA, waits())
        await eventually(lambda: len(handler._parked) == 3, "three wait")
        with pytest.raises(Throttled):
            raise_error(await client.ask(Kind.METADATA, waits()))
        other.send(Kind.METADATA, waits())
        await eventually(lambda: len(handler._parked) == 4, "another session may")
        await client.close()
        await eventually(lambda: len(handler._parked) == 1, "who has left waits for nothing")


async def test_a_partition_is_looked_at_once_in_a_frame_and_all_of_them_share_an_answer(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)] * 4, max_record_bytes=2**20)
        client = await world.client(broker.url)
        value = bytes(2**20 - 200)
        for partition in range(4):
            for _ in range(6):
                data = bytes(encode_batch([(None, value, [])]))
                entry = ProduceEntry(topic.id, partition, topic.config.partitions, len(data))
                assert (await client.produce_raw([(entry, data)]))[0].error is None
        keys = [(topic.id, partition) for partition in range(4)]
        await client.call(Kind.RECEIVE, Receive("g", "m", keys, 1, wait_ms=0), ReceiveAnswer)
        frame = await client.ask(Kind.QUEUE, QueueAsk("g", "peek", keys, 0, 100))
        results = decode_header(frame.header, QueueAnswer).results
        assert [result.error for result in results] == [None] * 4
        assert all(result.details["offsets"] for result in results)
        assert len(frame.payload) <= BYTES_MAX + 4 * 2**20
        for kind, message in (
            (Kind.QUEUE, QueueAsk("g", "stats", keys[:1] * 2)),
            (Kind.RECEIVE, Receive("g", "m", keys[:1] * 2, 1, wait_ms=0)),
        ):
            with pytest.raises(MalformedRequest):
                raise_error(await client.ask(kind, message))


@pytest.mark.parametrize(("limit", "most"), [("COPIES_MAX", 8), ("COPIED_BYTES_MAX", 8 * 30)])
async def test_a_request_to_an_exchange_makes_no_more_copies_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(rest, limit, most)
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        for name in ("a", "b"):
            await world.topic(name, [(broker.id,)])
        bound = tuple(binding_to(topic=name) for name in ("a", "b"))
        broker.broker.view.metadata.exchanges = {"all": ExchangeMeta("all", "fanout", "", bound)}
        path = "/v1/exchanges/all/publish"
        status, answer = await ask(world, broker, "POST", path, {"records": [{"value": "x"}] * 4})
        assert status == 200, answer
        status, answer = await ask(world, broker, "POST", path, {"records": [{"value": "x"}] * 5})
        assert (status, answer["code"], answer["details"]) == (400, "INVALID_ARGUMENT", {"field": "records"})


async def test_what_is_packed_a_thousandfold_comes_in_several_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_read, "_SHOWN_BYTES", 2**20)
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("packed", [(broker.id,)])
        client = await world.client(broker.url)
        values = [random.Random(number).randbytes(2**10) + bytes(2**19 - 2**10) for number in range(6)]
        data = bytes(encode_batch([(None, value, []) for value in values], codec="zstd"))
        assert len(data) < 2**13
        entry = ProduceEntry(topic.id, 0, topic.config.partitions, len(data))
        assert (await client.produce_raw([(entry, data)]))[0].error is None
        offset, found = 0, []
        for _ in range(3):
            path = f"/v1/topics/packed/partitions/0/records?offset={offset}"
            status, answer = await ask(world, broker, "GET", path)
            assert status == 200
            found.append(len(answer["records"]))
            offset = answer["next_offset"]
        assert found == [2, 2, 2]


async def test_a_certificate_of_a_broker_that_was_forgotten_is_that_of_a_client(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker, other = await world.broker(), await world.broker()
        await eventually(lambda: other.id in broker.broker.view.metadata.brokers, "they know of each other")
        key, key_id, digest = make_key(bytes(range(40)))
        broker.broker.access.gate.cluster_id = world.coordinator.cluster_id
        broker.broker.access.take(AccessPolicy(1, True, (PrincipalMeta("p", (), Quota(), (KeyMeta(key_id, digest),)),)))
        shown = other.broker.tls.client
        shown.check_hostname = False

        async def status() -> int:
            async with world.http.get(f"{broker.url}/v1/certificates", ssl=shown) as response:
                return response.status

        assert await status() == 200
        del broker.broker.view.metadata.brokers[other.id]
        assert await status() == 401
        headers = {"Authorization": f"Bearer {key}"}
        known = set(broker.broker.endpoint.sessions)
        async with world.http.ws_connect(f"{broker.url}/v1/session", ssl=shown, headers=headers) as ws:
            client = RawClient(ws)
            raise_error(await client.ask(Kind.HELLO, Hello(client="test")))
            (session,) = set(broker.broker.endpoint.sessions) - known
            assert (session.identity, session.caller.name) == (None, "p")
            await client.close()


async def test_a_stream_that_is_asked_for_by_head_has_no_body(tmp_path: Path) -> None:
    """Whoever shares the connection would take records for the answer to the next request."""
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        assert (await client.produce(topic, 0, [b"HTTP/1.1 200 OK"])).error is None
        context, port = node_client_context(world.coordinator.tls.ca), int(broker.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        path = "/v1/topics/orders/partitions/0/records?follow=true"
        writer.write(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        writer.write(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(10):
            answered = await reader.read()
        writer.close()
        assert answered.count(b"HTTP/1.1 200 OK\r\n") == answered.count(b"\r\n\r\n") == 2
        assert answered.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("on_dead", ["park", "skip"])
async def test_long_reasons_for_many_records_end_no_partition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_dead: str
) -> None:
    """One frame makes an entry for each record that it rejects, and each repeats the reason."""
    monkeypatch.setattr(groups, "ENTRIES_BYTES_MAX", 64 * 1024)
    async with BrokerWorld(tmp_path) as world:
        broker, other = await world.broker(), await world.broker()
        placed = [(broker.id, other.id)]
        topic = await world.topic("jobs", placed, retry=RetryPolicy(on_dead=on_dead))
        client = await world.client(broker.url)
        hosted = broker.broker.partitions.replicas[topic.id, 0]
        for _ in range(2):
            assert (await client.produce(topic, 0, [b"x"] * 400)).error is None
            ask = Receive("g", "m", [(topic.id, 0)], 400, wait_ms=5_000)
            answer = await client.call(Kind.RECEIVE, ask, ReceiveAnswer)
            for one in answer.deliveries:
                said = (REJECT, one.offsets, -1, "r", "d" * 4_000)
                entry = SettleEntry(topic.id, 0, one.epoch, one.lease, one.receipt, *said)
                settled = await client.call(Kind.SETTLE, Settle("g", "m", [entry]), SettleAnswer)
                assert [result.error for result in settled.results] == [None]
        core = hosted.core
        end = core.log_end[STATE]
        await eventually(lambda: core.high_watermark[STATE] >= end, "the other has it, too")
        assert hosted.broken == ""
        data = hosted.logs[STATE].read(hosted.logs[STATE].log_start, 2**30, core.high_watermark[STATE])
        assert max(header.size for _, header in split_batches(data)) < 2 * 64 * 1024
        assert core.primary is not None
        assert core.primary.snapshot_bytes > 0, "there was a snapshot, however much there is to tell"
        world.coordinator.lead((topic.id, 0), other.id, placed[0])
        await eventually(lambda: world.primary(topic.id) is other, "the other leads with what it has")
        (table,) = other.broker.partitions.replicas[topic.id, 0].core.primary.groups.queues.values()
        assert len(table.stories) + sum(end - first for first, end in table.settled) + table.start >= 800
