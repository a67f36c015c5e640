"""The broker's REST: what a person with curl sees."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ferryline_service.tls import node_client_context
from tests.rest_contract import Contract
from unit.broker_world import BrokerWorld, RunningBroker, eventually


class Curl:
    def __init__(self, world: BrokerWorld, broker: RunningBroker) -> None:
        self._http = world.http
        self._ssl = node_client_context(world.coordinator.tls.ca)
        self._url = broker.url
        self._contract: Contract | None = None

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self._http.get(self._url + path, ssl=self._ssl, headers=headers) as response:
            return response.status, await self._body(response)

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        raw = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        headers = {"Content-Type": "application/json"}
        async with self._http.post(self._url + path, ssl=self._ssl, data=raw, headers=headers) as response:
            return response.status, await self._body(response)

    async def _body(self, response: aiohttp.ClientResponse) -> Any:
        """The answer, once it was held against the document."""
        if self._contract is None:
            async with self._http.get(self._url + "/openapi.json", ssl=self._ssl) as told:
                self._contract = Contract(await told.json())
        path = response.url.raw_path
        self._contract.check(response.method, path, response.status, response.headers, await response.read())
        return (
            await response.json()
            if "json" in response.content_type and "nd" not in response.content_type
            else (await response.text())
        )


async def test_what_is_posted_can_be_got_text_and_bytes(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        await world.topic("orders", [(broker.id,)])
        curl = Curl(world, broker)
        records = [
            {"key": "k", "value": "grüße", "headers": {"h": "v"}},
            {"value": {"base64": "/wD/"}},
            {"key": "k", "value": None},
        ]
        status, body = await curl.post("/v1/topics/orders/records", {"records": records})
        assert status == 200
        offsets = [result["offset"] for result in body["results"]]
        assert offsets == [offsets[0], offsets[0] + 1, offsets[0] + 2]
        status, body = await curl.get("/v1/topics/orders/partitions/0/records?offset=0")
        assert status == 200
        assert [(r["key"], r["value"], r["headers"]) for r in body["records"]] == [
            ("k", "grüße", {"h": "v"}),
            (None, {"base64": "/wD/"}, {}),
            ("k", None, {}),
        ]
        assert body["next_offset"] == body["high_watermark"]
        status, text = await curl.get("/v1/topics/orders/partitions/0/records?limit=1", Accept="application/x-ndjson")
        assert (status, text.count("\n")) == (200, 1)


async def test_a_long_poll_ends_with_the_record_or_with_its_time(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        curl, core = Curl(world, broker), broker.broker.partitions.replicas[topic.id, 0].core
        path = f"/v1/topics/orders/partitions/0/records?offset={core.high_watermark[0]}"
        status, body = await curl.get(path + "&wait_ms=50")
        assert (status, body["records"]) == (200, [])
        waiting = asyncio.ensure_future(curl.get(path + "&wait_ms=20000"))
        await eventually(lambda: broker.broker.partitions.replicas[topic.id, 0].readers, "parked")
        await curl.post("/v1/topics/orders/records", {"records": [{"value": "now"}]})
        status, body = await waiting
        assert [record["value"] for record in body["records"]] == ["now"]


async def test_a_broker_that_is_not_the_primary_forwards_what_is_posted_and_names_it_to_readers(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        await eventually(lambda: second.broker.view.metadata.topic("orders"), "the metadata arrives")
        curl = Curl(world, second)
        status, body = await curl.post("/v1/topics/orders/records", {"records": [{"value": "x"}, {"value": "y"}]})
        assert (status, [result["partition"] for result in body["results"]]) == (200, [0, 0])
        core = first.broker.partitions.replicas[topic.id, 0].core
        assert [result["offset"] for result in body["results"]] == [core.log_end[0] - 2, core.log_end[0] - 1]
        status, body = await curl.get("/v1/topics/orders/partitions/0/records")
        assert (status, body["code"], body["details"]["primary_url"]) == (421, "NOT_PRIMARY", first.url)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "MALFORMED_REQUEST"),
        (b"[" * 100_000, 400, "MALFORMED_REQUEST"),
        (b'{"records": [{"value": NaN}]}', 400, "MALFORMED_REQUEST"),
        ({}, 400, "INVALID_ARGUMENT"),
        ({"records": []}, 400, "INVALID_ARGUMENT"),
        ({"records": [{"value": 5}]}, 400, "INVALID_ARGUMENT"),
        ({"records": [{"value": "x", "nonsense": 1}]}, 400, "INVALID_ARGUMENT"),
        ({"records": [{"value": {"base64": "!"}}]}, 400, "INVALID_ARGUMENT"),
        ({"records": [{"value": {"hex": "00"}}]}, 400, "INVALID_ARGUMENT"),
        ({"records": [{"value": "x", "partition": 9}]}, 400, "INVALID_ARGUMENT"),
        ({"records": [{"value": "x", "partition": -1}]}, 400, "INVALID_ARGUMENT"),
        ({"records": [{"value": "x" * 1_048_577}]}, 413, "RECORD_TOO_LARGE"),
    ],
)
async def test_nonsense_gets_its_documented_error(tmp_path: Path, body: Any, status: int, code: str) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        curl = Curl(world, broker)
        end = broker.broker.partitions.replicas[topic.id, 0].core.log_end[0]
        got, problem = await curl.post("/v1/topics/orders/records", body)
        assert (got, problem["code"]) == (status, code)
        assert broker.broker.partitions.replicas[topic.id, 0].core.log_end[0] == end, "nothing was appended"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/topics/none/partitions/0/records", 404),
        ("/v1/topics/orders/partitions/9/records", 400),
        ("/v1/topics/orders/partitions/x/records", 400),
        ("/v1/topics/orders/partitions/0/records?offset=-1", 400),
        ("/v1/topics/orders/partitions/0/records?offset=99999", 404),
        ("/v1/topics/orders/partitions/0/records?offset=1e3", 400),
        ("/v1/topics/orders/partitions/0/records?wait_ms=99999999", 400),
        ("/v1/nothing", 404),
    ],
)
async def test_bad_paths_and_numbers_are_refused(tmp_path: Path, path: str, status: int) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        await world.topic("orders", [(broker.id,)])
        got, problem = await Curl(world, broker).get(path)
        assert (got, problem["status"]) == (status, status)


async def test_health_metadata_and_metrics_tell_what_is_going_on(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        curl = Curl(world, first)
        assert (await curl.get("/readyz"))[0] == 200
        status, health = await curl.get("/healthz")
        assert (status, health["broker_id"], health["fenced"]) == (200, first.id, False)
        client = await world.client(first.url)
        await client.produce(topic, 0, [b"a", b"b"])
        status, body = await curl.get("/v1/metadata")
        assert [found["name"] for found in body["topics"]] == ["orders"]
        _, text = await curl.get("/metrics")
        lines = set(text.splitlines())
        assert 'ferryline_records_in_total{topic="orders"} 2.0' in lines
        assert 'ferryline_partition_replicas{role="primary"} 1.0' in lines
        assert 'ferryline_in_sync_replicas{partition="0",topic="orders"} 2.0' in lines
        assert "ferryline_under_replicated_partitions 0.0" in lines
        assert 'ferryline_secondary_lag_records{broker="2",partition="0",topic="orders"} 0.0' in lines
        assert "ferryline_produce_seconds_count 1.0" in lines
        for name in ("ferryline_flush_seconds_count", "ferryline_disk_free_bytes", "ferryline_queued_records"):
            assert any(line.startswith(name) for line in lines), name
