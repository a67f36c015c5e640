"""Pages, conditions and definitions over the coordinator's REST."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ferryline.protocol.access import Grant, KeyMeta, PrincipalMeta
from ferryline_coordinator.app import Coordinator
from ferryline_coordinator.config import CoordinatorConfig
from ferryline_coordinator.definitions import Definitions, exported, planned
from ferryline_service.node import NodeConnection
from ferryline_service.paging import cursor_behind
from unit.test_coordinator_app import Eventually, Here


@pytest.fixture
def brokers() -> list[NodeConnection]:
    """Sessions of those that are registered."""
    return []


@pytest.fixture
async def here(tmp_path: Path, brokers: list[NodeConnection]) -> AsyncIterator[Here]:
    coordinator = Coordinator(CoordinatorConfig(data_dir=tmp_path / "c", port=0, join_tokens=4))
    await coordinator.start()
    async with aiohttp.ClientSession() as http:
        made = Here(coordinator, http, tmp_path)
        brokers.append(await made.broker("s-1"))
        yield made
        await brokers[0].close()
    await coordinator.stop()


async def topic(here: Here, name: str, **config: Any) -> Any:
    body = {"name": name, "config": {"replication": 1, "partitions": 1, **config}}
    status, made = await here.rest("POST", "/v1/topics", body)
    assert status == 201, made
    return made


async def tag(here: Here, path: str) -> str:
    async with here.http.get(here.url + path, ssl=here.trust) as response:
        return response.headers["ETag"]


# -- pages ------------------------------------------------------------------------------------------


async def test_pages_show_each_name_once_whatever_is_made_meanwhile(here: Here) -> None:
    for name in ("b", "d", "f", "h"):
        await topic(here, name)
    status, first = await here.rest("GET", "/v1/topics?limit=2")
    assert [one["name"] for one in first["topics"]] == ["b", "d"]
    await topic(here, "a")
    await topic(here, "e")
    status, second = await here.rest("GET", f"/v1/topics?limit=2&cursor={first['next_cursor']}")
    assert [one["name"] for one in second["topics"]] == ["e", "f"]
    await here.rest("DELETE", "/v1/topics/f")
    status, third = await here.rest("GET", f"/v1/topics?limit=2&cursor={second['next_cursor']}")
    assert ([one["name"] for one in third["topics"]], third["next_cursor"]) == (["h"], None)
    assert status == 200
    assert len((await here.rest("GET", "/v1/topics"))[1]["topics"]) == 5


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "limit=-1", "limit=1&cursor=x", "cursor=%2e%2e", "cursor=W10", "cursor="],
)
async def test_cursors_and_limits_that_make_no_sense_are_refused(here: Here, query: str) -> None:
    for what in ("topics", "exchanges"):
        for asked in (query, "cursor=" + "A" * 600, f"cursor={cursor_behind('groups', 'a')}"):
            status, body = await here.rest("GET", f"/v1/{what}?{asked}")
            assert (status, body["code"]) == (400, "INVALID_ARGUMENT")


# -- conditions -------------------------------------------------------------------------------------


async def test_a_config_is_changed_only_as_it_was_seen(here: Here) -> None:
    await topic(here, "t")
    seen = await tag(here, "/v1/topics/t")
    change = {"config": {"retention_ms": 60_000}}
    status, body = await here.rest("PATCH", "/v1/topics/t", change, headers={"If-Match": seen})
    assert (status, body["version"]) == (200, 2)
    for method, path, asked in (
        ("PATCH", "/v1/topics/t", {"config": {"retention_ms": 70_000}}),
        ("POST", "/v1/topics/t/partitions", {"partitions": 2, "keys_move": True}),
        ("DELETE", "/v1/topics/t", None),
    ):
        status, body = await here.rest(method, path, asked, headers={"If-Match": seen})
        assert (status, body["code"]) == (412, "PRECONDITION_FAILED"), method
    assert (await here.rest("GET", "/v1/topics/t"))[1]["config"]["retention_ms"] == 60_000
    status, _ = await here.rest(
        "DELETE", "/v1/topics/t", headers={"If-Match": f'"other", {await tag(here, "/v1/topics/t")}'}
    )
    assert status == 200
    await topic(here, "t")
    status, _ = await here.rest("DELETE", "/v1/topics/t", headers={"If-Match": seen})
    assert status == 412, "one made again under its name is another one"
    assert (await here.rest("DELETE", "/v1/topics/t", headers={"If-Match": "*"}))[0] == 200


async def test_health_that_changes_is_shown_and_is_no_conflict(
    here: Here, brokers: list[NodeConnection], eventually: Eventually
) -> None:
    await topic(here, "t")
    seen = await tag(here, "/v1/topics/t")
    assert (await here.rest("GET", "/v1/topics/t", headers={"If-None-Match": seen}))[0] == 304
    await brokers[0].close()

    async def offline() -> bool:
        status, body = await here.rest("GET", "/v1/topics/t", headers={"If-None-Match": seen})
        return status == 200 and body["offline"] == 1

    await eventually(offline, within_s=20)
    status, _ = await here.rest("PATCH", "/v1/topics/t", {"config": {"min_isr": 1}}, headers={"If-Match": seen})
    assert status == 200


async def test_an_exchange_is_changed_only_as_it_was_seen(here: Here) -> None:
    await topic(here, "t")
    await here.rest("POST", "/v1/exchanges", {"name": "e", "type": "fanout"})
    seen = await tag(here, "/v1/exchanges/e")
    assert (await here.rest("GET", "/v1/exchanges/e", headers={"If-None-Match": seen}))[0] == 304
    status, bound = await here.rest("POST", "/v1/exchanges/e/bindings", {"topic": "t"}, headers={"If-Match": seen})
    assert status == 201
    path = f"/v1/exchanges/e/bindings/{bound['bound']}"
    for method, target, body in (
        ("POST", "/v1/exchanges/e/bindings", {"topic": "t"}),
        ("DELETE", path, None),
        ("DELETE", "/v1/exchanges/e", None),
    ):
        assert (await here.rest(method, target, body, headers={"If-Match": seen}))[0] == 412, target
    assert (await here.rest("DELETE", path, headers={"If-Match": await tag(here, "/v1/exchanges/e")}))[0] == 200


@pytest.mark.parametrize("given", ["x", '"a', '"a" "b"', "W/", '"' + "a" * 300 + '"', ",".join(['"a"'] * 101)])
async def test_tags_that_are_none_are_refused(here: Here, given: str) -> None:
    await topic(here, "t")
    status, body = await here.rest("DELETE", "/v1/topics/t", headers={"If-Match": given})
    assert (status, body["code"]) == (400, "INVALID_ARGUMENT")
    weak = f"W/{await tag(here, '/v1/topics/t')}"
    assert (await here.rest("DELETE", "/v1/topics/t", headers={"If-Match": weak}))[0] == 412


# -- definitions ------------------------------------------------------------------------------------

WANTED: dict[str, Any] = {
    "topics": [{"name": "orders", "config": {"replication": 1, "partitions": 2, "retry": {"attempts": 7}}}],
    "exchanges": [
        {"name": "events", "type": "topic", "alternate": "rest", "bindings": [{"topic": "orders", "routing_key": "#"}]},
        {"name": "rest", "type": "fanout", "bindings": []},
    ],
}
APP = {"name": "app", "grants": [{"resource": "topic", "pattern": "orders", "actions": ["write"]}]}


async def test_definitions_make_what_they_name_once_and_come_out_as_they_went_in(here: Here) -> None:
    status, plan = await here.rest("PUT", "/v1/definitions?dry_run=true", WANTED)
    assert (status, plan["changed"]) == (200, 4)
    assert (await here.rest("GET", "/v1/topics"))[1]["topics"] == [], "a dry run changes nothing"
    status, done = await here.rest("PUT", "/v1/definitions", WANTED)
    assert (status, done["changed"], done["failed"]) == (200, 4, 0)
    assert [one["action"] for one in done["results"]] == ["create", "create", "create", "bind"]
    assert [one["name"] for one in done["results"][1:3]] == ["rest", "events"], "an alternate is made first"
    _, shown = await here.rest("GET", "/v1/definitions")
    assert shown["topics"][0]["config"]["retry"]["attempts"] == 7
    status, again = await here.rest("PUT", "/v1/definitions", shown)
    assert (status, again["changed"]) == (200, 0)
    for name, body in (("events", "exchanges"), ("rest", "exchanges"), ("orders", "topics")):
        await here.rest("DELETE", f"/v1/{body}/{name}")
    status, back = await here.rest("PUT", "/v1/definitions", shown)
    assert (status, back["failed"]) == (200, 0)
    _, restored = await here.rest("GET", "/v1/definitions")
    assert restored == shown


async def test_what_cannot_be_done_is_told_by_item_and_the_rest_is_done(here: Here) -> None:
    await topic(here, "orders", partitions=4)
    await here.rest("POST", "/v1/exchanges", {"name": "events", "type": "direct"})
    wanted = {
        "topics": [
            {"name": "orders", "config": {"partitions": 2, "replication": 2, "retention_ms": 60_000}},
            {"name": "new", "config": {"replication": 1}},
        ],
        "exchanges": [{"name": "events", "type": "topic", "bindings": [{"topic": "nowhere", "routing_key": "a"}]}],
    }
    status, body = await here.rest("PUT", "/v1/definitions", wanted)
    assert status == 207
    found = [(one["name"], one["action"], one.get("error", {}).get("code")) for one in body["results"]]
    assert found == [
        ("orders", "conflict", "CONFLICT"),
        ("orders", "conflict", "CONFLICT"),
        ("orders", "alter", None),
        ("new", "create", None),
        ("events", "conflict", "CONFLICT"),
        ("events -> topic nowhere", "bind", "UNKNOWN_TOPIC"),
    ]
    assert (await here.rest("GET", "/v1/topics/orders"))[1]["config"]["retention_ms"] == 60_000
    more = {"topics": [{"name": "orders", "config": {"partitions": 6}}]}
    assert (await here.rest("PUT", "/v1/definitions", more))[0] == 207, "keys move: that is said, not done"
    assert (await here.rest("PUT", "/v1/definitions?keys_move=true", more))[0] == 200
    assert (await here.rest("GET", "/v1/topics/orders"))[1]["config"]["partitions"] == 6


async def test_principals_are_made_without_keys_and_changed_where_they_differ(here: Here) -> None:
    state = here.coordinator.driver.state
    wanted = Definitions.model_validate({"principals": [APP]})
    (step,) = planned(state, wanted)
    assert (step.kind, step.action) == ("principal", "create")
    made = PrincipalMeta("app", (Grant("topic", "orders", ("write",)),), keys=(KeyMeta("k", b"digest"),))
    state.principals["app"] = made
    assert [one.action for one in planned(state, wanted)] == ["unchanged"]
    shown = exported(state, [], [], [made])["principals"]
    assert "digest" not in str(shown)
    assert "keys" not in shown[0]
    shown[0]["disabled"] = True
    (step,) = planned(state, Definitions.model_validate({"principals": shown}))
    assert (step.action, step.settings) == ("alter", {"name": "app", "disabled": True})
    del state.principals["app"]
    status, body = await here.rest("PUT", "/v1/definitions", {"principals": [APP]})
    assert (status, body["results"][0]["error"]["code"]) == (207, "CONFLICT"), "access is off"


@pytest.mark.parametrize(
    "body",
    [
        {"version": 2},
        {"topic": []},
        {"topics": [{"name": 5}]},
        {"topics": [{"name": "__secret"}]},
        {"topics": [{"name": "a"}, {"name": "b", "config": {"partitions": 0}}]},
        {"topics": [{"name": "a", "config": {"min_isr": 3, "replication": 2}}]},
        {"exchanges": [{"name": "x"}]},
        {"exchanges": [{"name": "x", "type": "ring"}]},
        {"exchanges": [{"name": "x", "type": "fanout", "alternate": "a b"}]},
        {"exchanges": [{"name": "x", "type": "fanout", "bindings": [{"topic": "t", "routing_key": "a"}]}]},
        {"exchanges": [{"name": "x", "type": "fanout", "bindings": [{}]}]},
        {"principals": [{"name": "a b"}]},
        {"principals": [{"name": "a", "grants": [{"resource": "sea", "actions": ["read"]}]}]},
        {"principals": [{"name": "a", "quota": {"records": -1}}]},
        [],
        {"topics": {}},
    ],
)
async def test_a_document_that_fits_no_cluster_is_refused_whole(here: Here, body: Any) -> None:
    for query in ("", "?dry_run=true"):
        assert (await here.rest("PUT", f"/v1/definitions{query}", body))[0] == 400
    assert (await here.rest("GET", "/v1/topics"))[1]["topics"] == []


async def test_flags_are_true_or_false_and_filters_are_names(here: Here) -> None:
    assert (await here.rest("PUT", "/v1/definitions?dry_run=perhaps", {}))[0] == 400
    assert (await here.rest("GET", "/v1/partitions?topic="))[0] == 400
    assert (await here.rest("POST", "/v1/restore", {"records": {"a": "\u00e4"}}))[0] == 400
