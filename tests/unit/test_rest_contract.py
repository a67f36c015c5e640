"""The documents of both services are valid, say everything about every route, and requests are held to them."""

from __future__ import annotations

import gzip
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from openapi_spec_validator import OpenAPIV31SpecValidator

from ferryline_broker import openapi as broker_api
from ferryline_coordinator import openapi as coordinator_api
from ferryline_coordinator.app import Coordinator
from ferryline_coordinator.config import CoordinatorConfig
from ferryline_service.operations import Operations
from unit.broker_world import BrokerWorld
from unit.test_broker_rest import Curl
from unit.test_coordinator_app import Here


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    coordinator = Coordinator(CoordinatorConfig(data_dir=tmp_path / "c", port=0, join_tokens=4))
    await coordinator.start()
    async with aiohttp.ClientSession() as http:
        yield Here(coordinator, http, tmp_path)
    await coordinator.stop()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[BrokerWorld]:
    async with BrokerWorld(tmp_path) as made:
        yield made


def served(router: web.UrlDispatcher) -> set[tuple[str, str]]:
    return {
        (route.method, route.resource.canonical)
        for route in router.routes()
        if route.resource is not None and route.method != "HEAD"
    }


def check_document(document: dict[str, Any], operations: Operations) -> None:
    """Valid, and nothing in it is vague: every parameter has limits or a pattern, every refusal is a problem."""
    OpenAPIV31SpecValidator(document).validate()
    described = [(m.upper(), path) for path, methods in document["paths"].items() for m in methods]
    assert set(described) == set(operations)
    ids = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(ids) == len(set(ids))
    for methods in document["paths"].values():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and not (operation["operationId"] == "readyz" and status == "503"):
                    assert list(response["content"]) == ["application/problem+json"], (operation["operationId"], status)
            for parameter in operation["parameters"]:
                assert parameter["schema"] != {"type": "string"} or parameter["in"] == "query", parameter
            assert operation["summary"], operation["operationId"]


async def test_a_coordinator_describes_what_it_serves_and_serves_what_it_describes(here: Here) -> None:
    assert here.coordinator._runner is not None
    assert served(here.coordinator._runner.app.router) == set(coordinator_api.OPERATIONS)
    check_document((await here.rest("GET", "/openapi.json"))[1], coordinator_api.OPERATIONS)


async def test_a_broker_describes_what_it_serves_and_serves_what_it_describes(world: BrokerWorld) -> None:
    broker = await world.broker()
    kept_no_audit = {("GET", "/v1/audit")}
    assert served(broker.broker.runner.app.router) | kept_no_audit == set(broker_api.OPERATIONS)
    described = {key: one for key, one in broker_api.OPERATIONS.items() if key not in kept_no_audit}
    check_document((await Curl(world, broker).get("/openapi.json"))[1], described)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/v1/topics?limits=3", "there are cursor, limit"),
        ("/v1/topics?limit=3&limit=4", "given 2 times"),
        ("/v1/cluster?x", "no such query parameter"),
        ("/v1/topics?cursor=" + "a" * 5_000, "over 4096 bytes"),
        ("/v1/exchanges/e/route?" + "&".join(f"header=a{n}" for n in range(201)), "200 parameters"),
    ],
)
async def test_queries_that_nobody_described_are_refused(here: Here, path: str, why: str) -> None:
    status, body = await here.rest("GET", path)
    assert (status, body["code"]) == (400, "INVALID_ARGUMENT")
    assert why in body["detail"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
async def test_a_body_of_another_type_is_refused_and_changes_nothing(here: Here, kind: str) -> None:
    body = {"name": "e", "type": "fanout"}
    status, problem = await here.rest("POST", "/v1/exchanges", body, headers={"Content-Type": kind})
    assert (status, problem["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert (await here.rest("GET", "/v1/exchanges"))[1]["exchanges"] == []
    status, _ = await here.rest(
        "POST", "/v1/exchanges", body, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert status == 201


async def test_other_methods_are_told_what_the_address_takes_and_head_is_get_without_a_body(here: Here) -> None:
    for method in ("PUT", "TRACE", "DELETE"):
        async with here.http.request(method, here.url + "/v1/topics", ssl=here.trust) as response:
            assert (response.status, response.headers["Allow"]) == (405, "GET,HEAD,POST")
            assert (await response.json(content_type="application/problem+json"))["code"] == "METHOD_NOT_ALLOWED"
    async with here.http.head(here.url + "/v1/topics", ssl=here.trust) as response:
        assert (response.status, await response.read()) == (200, b"")
        assert int(response.headers["Content-Length"]) > 0
    status, body = await here.rest("GET", "/v1/nothing")
    assert (status, body["code"]) == (404, "NOT_FOUND")
    assert re.fullmatch(r"[0-9a-f]{32}", body["request_id"])


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "nonsense"])
async def test_a_packed_body_gets_the_code_of_one_of_another_type(here: Here, encoding: str) -> None:
    body = gzip.compress(b'{"name": "e", "type": "fanout"}')
    status, problem = await here.rest("POST", "/v1/exchanges", body, headers={"Content-Encoding": encoding})
    assert (status, problem["code"], problem["details"]) == (
        415, "UNSUPPORTED_MEDIA_TYPE", {"field": "Content-Encoding"},
    )  # fmt: skip
    assert "Content-Encoding" in problem["remedy"]
    assert (await here.rest("GET", "/v1/exchanges"))[1]["exchanges"] == []
