"""Quotas at the broker: what is refused before anything is stored, and what waits instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ferryline.protocol.access import MANAGE, READ, TOPIC, WRITE, AccessPolicy, Grant, KeyMeta, PrincipalMeta, Quota
from ferryline.protocol.errors import QuotaExceeded
from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.messages import RECORDS, STATE, Fetch, FetchAnswer, FetchEntry, ProduceEntry
from ferryline.protocol.metadata import MetadataAnswer, MetadataRequest, TopicMeta
from ferryline.protocol.queue_messages import Receive, ReceiveAnswer
from ferryline.protocol.records import encode_batch, split_batches
from ferryline_service.access.caller import Caller
from ferryline_service.access.keys import make_key
from ferryline_service.node import raise_error
from ferryline_service.tls import node_client_context
from unit.broker_world import BrokerWorld, RawClient, RunningBroker, eventually

KEY, KEY_ID, DIGEST = make_key(bytes(range(40)))
GRANTS = (Grant(TOPIC, "*", (READ, WRITE)),)


async def limited_client(world: BrokerWorld, broker: RunningBroker, **limits: int) -> RawClient:
    """A session of a principal with these quotas."""
    known = set(broker.broker.endpoint.sessions)
    client = await world.client(broker.url)
    (session,) = set(broker.broker.endpoint.sessions) - known
    session.caller = Caller("billing", GRANTS, Quota(**limits))
    return client


def batch(topic: TopicMeta, partition: int, count: int) -> tuple[ProduceEntry, bytes]:
    data = bytes(encode_batch([(None, b"x" * 10, []) for _ in range(count)]))
    return ProduceEntry(topic.id, partition, topic.config.partitions, len(data)), data


def high_watermark(broker: RunningBroker, topic: TopicMeta, partition: int = 0) -> int:
    return broker.broker.partitions.replicas[topic.id, partition].core.high_watermark[RECORDS]


async def test_batches_over_the_quota_are_refused_one_by_one_and_none_after_the_first_gets_in(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,), (broker.id,)])
        ends = [high_watermark(broker, topic, number) for number in (0, 1)]
        client = await limited_client(world, broker, records=10)
        entries = [batch(topic, 0, 5), batch(topic, 1, 5_000), batch(topic, 0, 1), batch(topic, 1, 1)]
        first, second, *refused = await client.produce_raw(entries)
        assert first.error is None
        assert second.error is None  # larger than the bucket, and paid for by those after it
        for result in refused:
            assert result.error is not None
            assert result.error.code == "QUOTA_EXCEEDED"
            assert result.error.retriable
            assert result.error.definite
            assert 400_000 < result.error.details["retry_after_ms"] <= 502_000
        assert [high_watermark(broker, topic, number) for number in (0, 1)] == [ends[0] + 5, ends[1] + 5_000]


async def test_a_batch_that_the_partition_refuses_costs_nothing(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await limited_client(world, second, records=10)
        for _ in range(3):
            (result,) = await client.produce_raw([batch(topic, 0, 5_000)])
            assert result.error is not None
            assert result.error.code == "NOT_PRIMARY"
        assert second.broker.access.quotas.wait_ms(Caller("billing", GRANTS, Quota(records=10))) == 0


async def test_an_append_that_is_refused_costs_nothing(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker, other = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(broker.id, other.id)], min_isr=2)
        http = Http(world, broker, records=10)
        await other.crash()
        world.coordinator.lead((topic.id, 0), broker.id, (broker.id,))
        await eventually(lambda: len(broker.broker.partitions.replicas[topic.id, 0].core.part.isr) == 1, "one copy")
        for _ in range(2):
            status, answer = await http.append(topic, 500)
            assert (status, answer["code"]) == (503, "NOT_ENOUGH_REPLICAS")
        nobodys = await world.topic("nobodys", [(broker.id,)])
        world.coordinator.change((nobodys.id, 0), primary=0, epoch=2)
        await eventually(lambda: broker.broker.view.metadata.partition(nobodys.id, 0).primary == 0, "nobody leads")
        for _ in range(2):
            status, answer = await http.append(nobodys, 500)
            assert (status, answer["code"]) == (503, "PRIMARY_NOT_AVAILABLE")
        assert broker.broker.access.quotas.wait_ms(Caller("billing", GRANTS, Quota(records=10))) == 0


async def test_a_frame_over_the_quota_of_requests_is_refused_and_nodes_never_are(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        client, other = await limited_client(world, broker, requests=1), await world.client(broker.url)
        ask = MetadataRequest("", 0, -1, 0)
        for _ in range(2):  # a second of the rate, and the one that finds it empty
            await client.call(Kind.METADATA, ask, MetadataAnswer)
        frame = await client.ask(Kind.METADATA, ask)
        with pytest.raises(QuotaExceeded) as refused:
            raise_error(frame)
        assert refused.value.details["quota"] == "requests"
        for _ in range(5):
            await other.call(Kind.METADATA, ask, MetadataAnswer)


async def test_a_fetch_over_the_quota_waits_for_its_turn_and_is_refused_if_it_does_not_wait(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        start = high_watermark(broker, topic)
        writer, reader = await world.client(broker.url), await limited_client(world, broker, records=100)
        await writer.produce(topic, 0, [b"x"] * 250)
        entry = FetchEntry(topic.id, 0, start)
        _, payload = await reader.fetch([entry])
        assert sum(header.record_count for _, header in split_batches(payload)) == 250
        with pytest.raises(QuotaExceeded):  # 1.5 s beyond the burst
            await reader.fetch([entry])
        answer, payload = await reader.fetch([entry], wait_ms=50)  # shorter than it has to wait
        assert (len(payload), answer.results[0].error) == (0, None)
        asked = reader.send(Kind.FETCH, Fetch(60_000, 2**20, [entry]))
        await eventually(lambda: broker.broker.metrics.parked_fetches == 1, "it waits, although there is something")
        frame = await reader.answer(asked)
        assert decode_header(frame.header, FetchAnswer).results[0].size == len(frame.payload) > 0
        assert broker.broker.metrics.parked_fetches == 0


async def test_what_arrives_meanwhile_wakes_nobody_who_has_to_wait(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        start = high_watermark(broker, topic)
        writer, reader = await world.client(broker.url), await limited_client(world, broker, records=1)
        await writer.produce(topic, 0, [b"x"] * 1_000)
        await reader.fetch([FetchEntry(topic.id, 0, start)])
        asked = reader.send(Kind.FETCH, Fetch(500, 2**20, [FetchEntry(topic.id, 0, start + 1_000)]))
        await eventually(lambda: broker.broker.metrics.parked_fetches == 1, "it waits")
        await writer.produce(topic, 0, [b"x"])
        frame = await reader.answer(asked)
        assert not frame.payload
        result = decode_header(frame.header, FetchAnswer).results[0]
        assert result.high_watermark == start + 1_001  # answered when its time was over


async def test_a_receiver_over_its_quota_is_leased_nothing_before_its_turn(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        session_caller = Caller("billing", (*GRANTS, Grant("group", "*", (MANAGE,))), Quota(records=50))
        client = await limited_client(world, broker)
        for session in broker.broker.endpoint.sessions:
            session.caller = session_caller
        hosted = broker.broker.partitions.replicas[topic.id, 0]
        writer = await world.client(broker.url)
        await writer.produce(topic, 0, [b"x"] * 200)

        def ask(**fields: Any) -> Receive:
            return Receive("g", "m", [(topic.id, 0)], **{"records_max": 100, "wait_ms": 60_000, **fields})

        answer = await client.call(Kind.RECEIVE, ask(), ReceiveAnswer)
        assert sum(len(delivery.offsets) for delivery in answer.deliveries) == 100
        with pytest.raises(QuotaExceeded):
            await client.call(Kind.RECEIVE, ask(wait_ms=0), ReceiveAnswer)
        assert await _empty(client, ask(wait_ms=50))
        assert hosted.core.queue_ready("g") == 100  # nothing was leased in vain
        answer = await client.call(Kind.RECEIVE, ask(), ReceiveAnswer)
        assert sum(len(delivery.offsets) for delivery in answer.deliveries) == 100


async def _empty(client: RawClient, ask: Receive) -> bool:
    return not (await client.call(Kind.RECEIVE, ask, ReceiveAnswer)).deliveries


# -- REST -------------------------------------------------------------------------------------------


class Http:
    """A principal with an API key, at a broker with access on."""

    def __init__(self, world: BrokerWorld, broker: RunningBroker, **limits: int) -> None:
        self._world, self._broker = world, broker
        self._ssl = node_client_context(world.coordinator.tls.ca)
        principal = PrincipalMeta("billing", GRANTS, Quota(**limits), (KeyMeta(KEY_ID, DIGEST),))
        broker.broker.access.gate.cluster_id = world.coordinator.cluster_id
        broker.broker.access.gate.take(AccessPolicy(1, True, (principal,)))

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with self._world.http.request(
            method, self._broker.url + path, json=body, headers=headers, ssl=self._ssl
        ) as response:
            answer = await response.json()
            if response.status == 429:
                assert answer["code"] == "QUOTA_EXCEEDED"
                least = answer["details"]["retry_after_ms"] / 1_000
                assert least <= int(response.headers["Retry-After"]) <= least + 1
            return response.status, answer

    async def append(self, topic: TopicMeta, count: int, **record: Any) -> tuple[int, Any]:
        records = [{"value": "x", **record}] * count
        return await self.ask("POST", f"/v1/topics/{topic.name}/records", {"records": records})


async def test_a_request_that_is_forbidden_costs_as_much_as_one_that_is_not(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        http = Http(world, broker, requests=1)
        answers = [
            await http.ask("GET", "/v1/certificates") for _ in range(3)
        ]  # a second of the rate, one more, and none
        assert [answer["code"] for _, answer in answers] == ["FORBIDDEN", "FORBIDDEN", "QUOTA_EXCEEDED"]
        assert answers[-1][1]["details"]["quota"] == "requests"


async def test_an_append_over_the_quota_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        start = high_watermark(broker, topic)
        http = Http(world, broker, records=10)
        assert (await http.append(topic, 300))[0] == 200
        status, answer = await http.append(topic, 1)
        assert status == 429
        assert answer["details"]["quota"] == "records"
        assert high_watermark(broker, topic) == start + 300


async def test_what_is_forwarded_is_paid_for_once(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(second.id,)])
        http = Http(world, first, records=10)
        Http(world, second, records=10)
        assert (await http.append(topic, 300))[0] == 200
        assert (await http.append(topic, 1))[0] == 429
        caller = Caller("billing", GRANTS, Quota(records=10))
        assert first.broker.access.quotas.wait_ms(caller) > 20_000
        assert second.broker.access.quotas.wait_ms(caller) == 0


async def test_a_read_is_paid_for_afterwards_and_the_next_one_is_told_to_wait(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        await (await world.client(broker.url)).produce(topic, 0, [b"x"] * 50)
        http = Http(world, broker, records=1)
        path = "/v1/topics/orders/partitions/0/records"
        status, answer = await http.ask("GET", path)
        assert (status, len(answer["records"])) == (200, 50)
        status, answer = await http.ask("GET", path)
        assert status == 429
        assert 40_000 < answer["details"]["retry_after_ms"] <= 49_000


# -- stored bytes -----------------------------------------------------------------------------------


async def test_a_stream_is_a_connection_as_long_as_it_is_open(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        await world.topic("orders", [(broker.id,)])
        http = Http(world, broker, connections=1)
        path = "/v1/topics/orders/partitions/0/records?follow=true"
        context, headers = node_client_context(world.coordinator.tls.ca), {"Authorization": f"Bearer {KEY}"}
        async with world.http.get(broker.url + path, headers=headers, ssl=context) as stream:
            assert stream.status == 200
            status, answer = await http.ask("GET", path)
            assert (status, answer["details"]["quota"]) == (429, "connections")
        await eventually(lambda: broker.broker.rest_read.streams == 0, "its reader is gone")
        async with world.http.get(broker.url + path, headers=headers, ssl=context) as stream:
            assert stream.status == 200


async def test_what_a_broker_holds_of_an_owner_is_what_it_leads_both_logs(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id), (second.id, first.id)])
        await world.topic("nobodys", [(first.id, second.id)])
        owned = replace(topic, owner="billing", version=topic.version + 1)
        world.coordinator.topics[topic.id] = owned
        world.coordinator.publish()
        await eventually(lambda: all(one.broker.view.topic(topic.id) == owned for one in (first, second)), "told")
        await (await world.client(first.url)).produce(topic, 0, [b"x" * 1_000])
        logs = first.broker.partitions.replicas[topic.id, 0].logs
        assert first.broker.stored.held() == [("billing", logs[RECORDS].size_bytes + logs[STATE].size_bytes)]
        assert first.broker.stored.held()[0][1] > 1_000
        assert 0 < second.broker.stored.held()[0][1] < 1_000


async def test_a_refusal_of_the_quota_of_stored_bytes_leaves_reading_alone(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await limited_client(world, broker, stored_bytes=100)
        broker.broker.access.quotas.take(AccessPolicy(1, True, over=(("billing", 100),)))
        entry, data = batch(topic, 0, 1)
        (result,) = await client.produce_raw([(entry, data)])
        assert result.error is not None
        assert result.error.details["quota"] == "stored_bytes"
        await client.fetch([FetchEntry(topic.id, 0, 0)])
        broker.broker.access.quotas.take(AccessPolicy(2, True))
        (result,) = await client.produce_raw([(entry, data)])
        assert result.error is None
