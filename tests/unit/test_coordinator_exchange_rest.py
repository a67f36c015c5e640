"""Exchanges over REST: their life, every refusal, the document, and SQLite under all of it."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ferryline.protocol.exchanges import binding_to
from ferryline_coordinator.app import Coordinator
from ferryline_coordinator.config import CoordinatorConfig


class Here:
    """A running coordinator without brokers, hence without topics, and a way to ask it."""

    def __init__(self, coordinator: Coordinator, http: aiohttp.ClientSession) -> None:
        self._url, self._http = coordinator.url, http
        self._trust = ssl.create_default_context(cafile=str(coordinator.authority.ca_path))

    async def rest(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else None
        text = None if body is None or data is not None else body
        headers = {"Content-Type": "application/json"}
        async with self._http.request(
            method, self._url + path, data=data, json=text, ssl=self._trust, headers=headers
        ) as response:
            return response.status, await response.json(content_type=None)


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Here]:
    coordinator = Coordinator(CoordinatorConfig(data_dir=folder, port=0, join_tokens=1))
    await coordinator.start()
    try:
        async with aiohttp.ClientSession() as http:
            yield Here(coordinator, http)
    finally:
        await coordinator.stop()


@pytest.fixture
async def here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Here]:
    async with running(tmp_path / "c") as here:
        yield here


async def test_the_life_of_an_exchange_over_rest(here: Here) -> None:
    status, made = await here.rest("POST", "/v1/exchanges", {"name": "rest", "type": "fanout"})
    assert (status, made["type"], made["alternate"], made["bindings"]) == (201, "fanout", None, [])
    status, made = await here.rest("POST", "/v1/exchanges", {"name": "x.1", "type": "topic", "alternate": "rest"})
    assert (status, made["alternate"], made["version"]) == (201, "rest", 1)
    status, problem = await here.rest("POST", "/v1/exchanges", {"name": "x.1", "type": "direct"})
    assert (status, problem["code"], problem["details"]["type"]) == (409, "EXCHANGE_EXISTS", "topic")
    body = {"exchange": "rest", "routing_key": "eu.#"}
    status, bound = await here.rest("POST", "/v1/exchanges/x.1/bindings", body)
    binding = binding_to(exchange="rest", routing_key="eu.#")
    assert (status, bound["bound"], bound["version"]) == (201, binding.id, 2)
    shown = {"id": binding.id, "topic": None, "exchange": "rest", "routing_key": "eu.#", "headers": {}, "match": "all"}
    assert bound["bindings"] == [shown]
    assert (await here.rest("POST", "/v1/exchanges/x.1/bindings", body))[1]["version"] == 2
    _, listed = await here.rest("GET", "/v1/exchanges")
    assert [exchange["name"] for exchange in listed["exchanges"]] == ["rest", "x.1"]
    assert (await here.rest("GET", "/v1/exchanges/x.1"))[1]["bindings"] == [shown]
    assert (await here.rest("GET", "/v1/cluster"))[1]["exchanges"] == 2
    _, metadata = await here.rest("GET", "/v1/metadata")
    assert [exchange["name"] for exchange in metadata["exchanges"]] == ["rest", "x.1"]
    status, left = await here.rest("DELETE", f"/v1/exchanges/x.1/bindings/{binding.id}")
    assert (status, left["bindings"]) == (200, [])
    assert (await here.rest("DELETE", f"/v1/exchanges/x.1/bindings/{binding.id}"))[0] == 404
    assert (await here.rest("DELETE", "/v1/exchanges/x.1"))[0] == 200
    assert (await here.rest("GET", "/v1/exchanges/x.1"))[1]["code"] == "UNKNOWN_EXCHANGE"


async def test_a_route_is_told_without_sending_anything(here: Here) -> None:
    for name, kind in (("h", "headers"), ("unused", "fanout")):
        await here.rest("POST", "/v1/exchanges", {"name": name, "type": kind})
    body = {"exchange": "unused", "headers": {"format": "pdf", "kind": None}}
    assert (await here.rest("POST", "/v1/exchanges/h/bindings", body))[0] == 201
    asked = "/v1/exchanges/h/route?routing_key=a.b&header=format=pdf&header=kind"
    status, route = await here.rest("GET", asked)
    assert (status, route) == (200, {"exchange": "h", "routing_key": "a.b", "topics": []})


async def test_exchanges_outlive_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(tmp_path / "c") as here:
        for name in ("a", "b", "gone"):
            await here.rest("POST", "/v1/exchanges", {"name": name, "type": "headers"})
        body = {"exchange": "b", "headers": {"ß": "1", "any": None}, "match": "any"}
        await here.rest("POST", "/v1/exchanges/a/bindings", body)
        await here.rest("DELETE", "/v1/exchanges/gone")
        _, before = await here.rest("GET", "/v1/exchanges")
    async with running(tmp_path / "c") as here:
        _, after = await here.rest("GET", "/v1/exchanges")
    assert after == before
    assert [exchange["name"] for exchange in after["exchanges"]] == ["a", "b"]


BAD_REQUESTS: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/v1/exchanges", b"{", 400, "MALFORMED_REQUEST"),
    ("POST", "/v1/exchanges", {}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges", {"name": "x"}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges", {"name": "x", "type": "odd"}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges", {"name": "x", "type": 5}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges", {"name": "../x", "type": "topic"}, 400, "INVALID_NAME"),
    ("POST", "/v1/exchanges", {"name": "x", "type": "topic", "durable": True}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges", {"name": "x", "type": "topic", "alternate": "none"}, 404, "UNKNOWN_EXCHANGE"),
    ("GET", "/v1/exchanges/none", None, 404, "UNKNOWN_EXCHANGE"),
    ("GET", "/v1/exchanges/a%2Fb", None, 400, "INVALID_NAME"),
    ("DELETE", "/v1/exchanges/none", None, 404, "UNKNOWN_EXCHANGE"),
    ("POST", "/v1/exchanges/none/bindings", {"topic": "t"}, 404, "UNKNOWN_EXCHANGE"),
    ("POST", "/v1/exchanges/here/bindings", {"topic": "none"}, 404, "UNKNOWN_TOPIC"),
    ("POST", "/v1/exchanges/here/bindings", {}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges/here/bindings", {"topic": "t", "exchange": "x"}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges/here/bindings", {"topic": "t", "headers": {"a": 1}}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges/here/bindings", {"topic": "t", "headers": ["a"]}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges/here/bindings", {"topic": "t", "match": "some"}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges/here/bindings", {"topic": "t", "routing_key": "k" * 256}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges/here/bindings", b'{"topic": "t", "routing_key": "\\ud800"}', 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/exchanges/here/bindings", {"exchange": "here"}, 409, "CONFLICT"),
    ("DELETE", "/v1/exchanges/here/bindings/0000", None, 404, "NOT_FOUND"),
    ("GET", "/v1/exchanges/none/route", None, 404, "UNKNOWN_EXCHANGE"),
    ("GET", "/v1/exchanges/here/route?routing_key=" + "k" * 256, None, 400, "INVALID_ARGUMENT"),
    ("GET", "/v1/exchanges/here/route?" + "header=a&" * 101, None, 400, "INVALID_ARGUMENT"),
]


async def test_bad_requests_get_their_documented_error_and_change_nothing(here: Here) -> None:
    await here.rest("POST", "/v1/exchanges", {"name": "here", "type": "topic"})
    _, before = await here.rest("GET", "/v1/exchanges")
    for method, path, body, status, code in BAD_REQUESTS:
        got, problem = await here.rest(method, path, body)
        assert (got, problem["code"]) == (status, code), (method, path, problem)
        assert problem["definite"] is True
    assert (await here.rest("GET", "/v1/exchanges"))[1] == before


async def test_the_document_describes_exchanges(here: Here) -> None:
    _, api = await here.rest("GET", "/openapi.json")
    paths = api["paths"]
    assert set(paths["/v1/exchanges"]) == {"get", "post"}
    assert set(paths["/v1/exchanges/{exchange}"]) == {"get", "delete"}
    body = paths["/v1/exchanges/{exchange}/bindings"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/Bind")
    assert {"topic", "exchange", "routing_key", "headers", "match"} == set(
        api["components"]["schemas"]["Bind"]["properties"]
    )
    queries = {p["name"] for p in paths["/v1/exchanges/{exchange}/route"]["get"]["parameters"] if p["in"] == "query"}
    assert queries == {"routing_key", "header"}
