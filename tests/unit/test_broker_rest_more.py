"""Committed offsets, publishing to exchanges and streams over the broker's REST."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ferryline.protocol.exchanges import ExchangeMeta, binding_to
from ferryline_broker import rest_read
from ferryline_broker.rest_read import ReadApi
from unit.broker_world import BrokerWorld, RunningBroker, eventually
from unit.test_broker_rest import Curl as _Curl


class Curl(_Curl):
    """Asks one broker, and decodes what it says."""

    def __init__(self, world: BrokerWorld, broker: RunningBroker) -> None:
        super().__init__(world, broker)
        self.ssl = self._ssl

    async def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        async with self._http.request(method, self._url + path, ssl=self.ssl, json=body, headers=headers) as response:
            return response.status, await self._body(response)


async def two_brokers(world: BrokerWorld, *, alone: bool = False) -> tuple[RunningBroker, RunningBroker]:
    """Each leads one partition of ``orders``; both know it. ``alone``: without a copy at the other one."""
    first, second = await world.broker(), await world.broker()
    replicas = [(first.id,), (second.id,)] if alone else [(first.id, second.id), (second.id, first.id)]
    await world.topic("orders", replicas)
    for broker in (first, second):
        await eventually(lambda b=broker: b.broker.view.metadata.topic("orders"), "the metadata arrives")
    return first, second


async def filled(curl: Curl, count: int = 3) -> None:
    records = [{"value": str(n), "partition": p} for p in (0, 1) for n in range(count)]
    status, body = await curl("POST", "/v1/topics/orders/records", {"records": records})
    assert status == 200, body


# -- offsets ----------------------------------------------------------------------------------------


async def test_a_group_is_moved_and_looked_at_through_any_broker(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await two_brokers(world)
        curl = Curl(world, first)
        await filled(curl)
        assert (await curl("GET", "/v1/groups/billing/offsets"))[0] == 404
        ends = [
            broker.broker.partitions.replicas[key].core.high_watermark[0]
            for broker, key in zip((first, second), sorted(first.broker.partitions.replicas), strict=True)
        ]
        asked = [{"topic": "orders", "partition": 0, "offset": "end"}, {"topic": "orders", "partition": 1, "offset": 1}]
        status, body = await curl("PUT", "/v1/groups/billing/offsets", {"offsets": asked, "dry_run": True})
        assert (status, [one["offset"] for one in body["results"]]) == (200, [ends[0], 1])
        assert (await curl("GET", "/v1/groups/billing/offsets"))[0] == 404, "a dry run changes nothing"
        status, body = await curl("PUT", "/v1/groups/billing/offsets", {"offsets": asked})
        assert (status, [one["before"] for one in body["results"]]) == (200, [None, None])
        status, body = await Curl(world, second)("GET", "/v1/groups/billing/offsets?topic=orders")
        assert status == 200
        assert [(one["partition"], one["offset"], one["lag"]) for one in body["offsets"]] == [
            (0, ends[0], 0),
            (1, 1, ends[1] - 1),
        ]
        back = [{"topic": "orders", "partition": 0, "offset": "start"}]
        status, body = await Curl(world, second)("PUT", "/v1/groups/billing/offsets", {"offsets": back})
        assert (status, body["results"][0]) == (
            200,
            {"topic": "orders", "partition": 0, "before": ends[0], "offset": 0},
        )


async def test_a_group_with_members_is_not_moved(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, _ = await two_brokers(world)
        world.coordinator.members["billing"] = ["m-1"]
        asked = {"offsets": [{"topic": "orders", "partition": 0, "offset": 0}]}
        status, body = await Curl(world, first)("PUT", "/v1/groups/billing/offsets", asked)
        assert (status, body["code"], body["details"]["members"]) == (409, "CONFLICT", 1)


async def test_what_cannot_be_moved_is_told_by_partition(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, _ = await two_brokers(world)
        asked = {
            "offsets": [
                {"topic": "orders", "partition": 0, "offset": 999},
                {"topic": "orders", "partition": 1, "offset": "start"},
            ]
        }
        status, body = await Curl(world, first)("PUT", "/v1/groups/g/offsets", asked)
        assert (status, body["results"][0]["error"]["code"]) == (207, "OFFSET_OUT_OF_RANGE")
        assert body["results"][1]["offset"] == 0


@pytest.mark.parametrize(
    ("offset", "status"),
    [
        ({"topic": "orders", "partition": 7, "offset": 0}, 400),
        ({"topic": "none", "partition": 0, "offset": 0}, 404),
        ({"topic": "orders", "partition": 0, "offset": -1}, 400),
        ({"topic": "orders", "partition": 0, "offset": "middle"}, 400),
        ({"topic": "orders", "partition": 0}, 400),
    ],
)
async def test_offsets_that_make_no_sense_are_refused(tmp_path: Path, offset: Any, status: int) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, _ = await two_brokers(world)
        assert (await Curl(world, first)("PUT", "/v1/groups/g/offsets", {"offsets": [offset]}))[0] == status


# -- exchanges --------------------------------------------------------------------------------------


async def test_a_record_is_published_to_every_topic_that_its_exchange_names(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await two_brokers(world)
        bound = (binding_to(topic="orders", routing_key="eu.#"),)
        for broker in (first, second):
            broker.broker.view.metadata.exchanges = {"events": ExchangeMeta("events", "topic", "", bound)}
        curl = Curl(world, second)
        records = [
            {"routing_key": "eu.made", "key": "k", "value": "v", "headers": {"fl-exchange": "forged"}},
            {"routing_key": "us.made", "value": "w"},
        ]
        status, body = await curl("POST", "/v1/exchanges/events/publish", {"records": records})
        assert (status, body["results"][1]) == (200, {"topics": {}})
        placed = body["results"][0]["topics"]["orders"]
        leader = Curl(world, (first, second)[placed["partition"]])
        path = f"/v1/topics/orders/partitions/{placed['partition']}/records?offset={placed['offset']}"
        status, body = await leader("GET", path)
        assert body["records"][0]["headers"] == {"fl-exchange": "events", "fl-routing-key": "eu.made"}
        asked = {"records": records, "mandatory": True}
        status, body = await curl("POST", "/v1/exchanges/events/publish", asked)
        assert (status, body["code"]) == (404, "UNROUTABLE")
        status, body = await curl("POST", "/v1/exchanges/none/publish", {"records": records})
        assert (status, body["code"]) == (404, "UNKNOWN_EXCHANGE")


async def test_what_is_forwarded_to_a_broker_that_is_gone_is_told_and_not_sent_again(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await two_brokers(world, alone=True)
        await second.crash()
        records = [{"value": "x", "partition": 0}, {"value": "y", "partition": 1}]
        status, body = await Curl(world, first)("POST", "/v1/topics/orders/records", {"records": records})
        assert status == 207, body
        assert body["results"][1]["error"]["code"] in ("CONNECTION_FAILED", "CONNECTION_LOST", "PRIMARY_NOT_AVAILABLE")


# -- streams ----------------------------------------------------------------------------------------


async def events(response: aiohttp.ClientResponse, count: int) -> list[dict[str, str]]:
    """The next events of a stream; comments are left out."""
    found: list[dict[str, str]] = []
    event: dict[str, str] = {}
    async with asyncio.timeout(10):
        while len(found) < count:
            line = (await response.content.readline()).decode().rstrip("\n")
            if not line and event:
                found.append(event)
                event = {}
            elif line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                event[name] = value
    return found


async def test_a_stream_of_events_goes_on_and_is_resumed_after_the_last_one_seen(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, _ = await two_brokers(world)
        curl = Curl(world, first)
        url = f"{first.url}/v1/topics/orders/partitions/0/records?offset=end"
        async with world.http.get(url, ssl=curl.ssl, headers={"Accept": "text/event-stream"}) as response:
            assert (response.status, response.content_type) == (200, "text/event-stream")
            await filled(curl)
            seen = await events(response, 3)
        assert [json.loads(event["data"])["value"] for event in seen] == ["0", "1", "2"]
        headers = {"Accept": "text/event-stream", "Last-Event-ID": seen[0]["id"]}
        async with world.http.get(url, ssl=curl.ssl, headers=headers) as response:
            assert [event["id"] for event in await events(response, 2)] == [event["id"] for event in seen[1:]]
        await eventually(lambda: first.broker.rest_read.streams == 0, "streams end with their readers")


async def test_an_idle_stream_shows_signs_of_life_and_says_why_it_ends(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, _ = await two_brokers(world)
        api: ReadApi = first.broker.rest_read
        api._heartbeat_ms = 20
        curl = Curl(world, first)
        url = f"{first.url}/v1/topics/orders/partitions/0/records"
        async with world.http.get(f"{url}?offset=end&follow=true", ssl=curl.ssl) as response:
            assert response.content_type == "application/x-ndjson"
            assert await response.content.readline() == b"\n"
            first.broker.rest_read.close()
            last = b"\n"
            async with asyncio.timeout(10):
                while last == b"\n":
                    last = await response.content.readline()
            assert json.loads(last)["end"]["code"] == "SHUTTING_DOWN"
        for wrong in ("offset=middle", "follow=perhaps"):
            assert (await curl("GET", f"/v1/topics/orders/partitions/0/records?{wrong}"))[0] == 400


async def test_a_reader_that_takes_nothing_is_cut_off_and_holds_little_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_read, "_SLOW_S", 0.5)
    async with BrokerWorld(tmp_path) as world:
        first, _ = await two_brokers(world, alone=True)
        curl = Curl(world, first)
        records = [{"value": "x" * 900_000, "partition": 0}]
        for _ in range(40):
            status, body = await curl("POST", "/v1/topics/orders/records", {"records": records})
            assert status == 200, body
        url = f"{first.url}/v1/topics/orders/partitions/0/records?follow=true"
        async with world.http.get(url, ssl=curl.ssl) as response:
            assert first.broker.rest_read.streams == 1
            await eventually(lambda: first.broker.rest_read.streams == 0, "36 MB that nobody takes end the stream")
            with pytest.raises(aiohttp.ClientError):
                await response.read()


async def test_there_are_so_many_streams_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_read, "STREAMS_MAX", 1)
    async with BrokerWorld(tmp_path) as world:
        first, _ = await two_brokers(world, alone=True)
        curl = Curl(world, first)
        path = "/v1/topics/orders/partitions/0/records?offset=end&follow=true"
        async with world.http.get(first.url + path, ssl=curl.ssl) as response:
            assert response.status == 200
            status, body = await curl("GET", path)
            assert (status, body["code"]) == (429, "THROTTLED")


async def test_what_is_wrong_is_refused_although_something_else_makes_it_count_for_nothing(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, _ = await two_brokers(world, alone=True)
        curl, topic = Curl(world, first), first.broker.view.topic_named("orders")
        replica = f"/v1/replicas/{topic.id}/0"
        for path in (replica, f"{replica}/digests", f"{replica}/digests?producer=7"):
            assert (await curl("GET", path))[0] == 200  # and the answer is as documented
        records = "/v1/topics/orders/partitions/0/records"
        for path, headers in (
            (f"{replica}/digests?producer={2**63}", {}),  # looked at with batches=1 only
            (f"{records}?offset=-5", {"Last-Event-ID": "0"}),  # begins behind the event
            (f"{records}?secondary=perhaps", {}),
        ):
            assert (await curl("GET", path, **headers))[0] == 400, path
        settled = {"entries": [{"receipt": "none", "action": "ack"}]}
        status, body = await curl("POST", "/v1/queues/orders/a%20b/settle", settled)
        assert (status, body["code"]) == (400, "INVALID_NAME")
