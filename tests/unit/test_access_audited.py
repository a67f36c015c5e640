"""A coordinator with access on: its first key, and what its audit log says of changes and refusals. Real sockets."""

from __future__ import annotations

import json
import ssl
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import ValidationError

from ferryline_broker import access_rules as broker_rules
from ferryline_coordinator import access_rules as coordinator_rules
from ferryline_coordinator.app import Coordinator
from ferryline_coordinator.bootstrap import ADMIN, EVERYTHING
from ferryline_coordinator.config import CoordinatorConfig
from ferryline_coordinator.core import events as ev
from ferryline_service.access.audited import changes
from ferryline_service.access.keys import ID_BYTES, SECRET_BYTES, make_key

Record = dict[str, Any]


class Here:
    """A running coordinator and the first key."""

    def __init__(self, coordinator: Coordinator, http: aiohttp.ClientSession, folder: Path) -> None:
        self.coordinator, self.http, self.folder = coordinator, http, folder
        self.trust = ssl.create_default_context(cafile=str(coordinator.authority.ca_path))

    @property
    def key(self) -> str:
        return (self.folder / "keys" / "admin").read_text().strip()

    async def rest(self, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
        headers = {} if token == "" else {"Authorization": f"Bearer {token or self.key}"}
        async with self.http.request(
            method, self.coordinator.url + path, json=body, headers=headers, ssl=self.trust
        ) as response:
            return response.status, await response.json(content_type=None)

    async def audit(self, **query: Any) -> list[Record]:
        text = "&".join(f"{name}={value}" for name, value in query.items())
        status, page = await self.rest("GET", f"/v1/audit?{text}")
        assert status == 200, page
        records: list[Record] = page["records"]
        return records

    async def principal(self, name: str, *grants: dict[str, Any]) -> str:
        """Make one, and return a key of it."""
        assert (await self.rest("POST", "/v1/principals", {"name": name, "grants": list(grants)}))[0] == 201
        status, made = await self.rest("POST", f"/v1/principals/{name}/keys", {})
        assert status == 201, made
        return str(made["key"])


@asynccontextmanager
async def running(folder: Path, access: str = "") -> AsyncIterator[Here]:
    file = folder / "access.toml"
    file.write_text(access)
    config = CoordinatorConfig(
        data_dir=folder / "data", port=0, access=file, bootstrap_admin=folder / "keys" / "admin", join_tokens=1
    )
    coordinator = Coordinator(config)
    try:
        await coordinator.start()
        async with aiohttp.ClientSession() as http:
            yield Here(coordinator, http, folder)
    finally:
        await coordinator.stop()


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    async with running(tmp_path) as made:
        yield made


def told(record: Record) -> tuple[str, ...]:
    return tuple(record[name] for name in ("principal", "action", "resource", "name", "outcome", "code"))


# -- the first key ----------------------------------------------------------------------------------


async def test_the_first_start_makes_one_principal_whose_key_only_its_owner_can_read(here: Here) -> None:
    assert stat.S_IMODE((here.folder / "keys" / "admin").stat().st_mode) == 0o600
    status, me = await here.rest("GET", "/v1/whoami")
    assert (status, me["principal"]) == (200, ADMIN)
    assert {(grant["resource"], *grant["actions"]) for grant in me["grants"]} == {
        (resource, "manage") for resource in ("topic", "group", "exchange", "cluster")
    }
    assert (await here.rest("GET", "/v1/principals", token=""))[0] == 401


async def test_the_next_start_makes_no_other_key_even_if_the_file_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as first:
        key = first.key
    (tmp_path / "keys" / "admin").unlink()
    async with running(tmp_path) as second:
        assert not (tmp_path / "keys" / "admin").exists(), "who took the key away wants no other one to lie there"
        assert (await second.rest("GET", "/v1/whoami", token=key))[0] == 200


async def test_an_admin_that_was_deleted_does_not_come_back_while_there_are_others(tmp_path: Path) -> None:
    async with running(tmp_path) as first:
        key = await first.principal("boss", {"resource": "cluster", "actions": ["manage"]})
        assert (await first.rest("DELETE", f"/v1/principals/{ADMIN}", token=key))[0] == 200
    async with running(tmp_path) as second:
        assert (await second.rest("GET", "/v1/whoami"))[0] == 401
        assert (await second.rest("GET", "/v1/whoami", token=key))[0] == 200


async def test_a_key_that_lies_there_already_is_taken(tmp_path: Path) -> None:
    """From whoever deploys, or from a start that ended between writing the file and storing the principal."""
    key, _, _ = make_key(bytes(range(ID_BYTES + SECRET_BYTES)))
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "admin").write_text(key + "\n")
    async with running(tmp_path) as here:
        assert here.key == key
        assert (await here.rest("GET", "/v1/whoami"))[1]["principal"] == ADMIN


async def test_a_start_that_ended_between_principal_and_key_is_gone_on_with(tmp_path: Path) -> None:
    async with running(tmp_path) as first:
        key_id = first.key.split("_")[1]
        await first.rest("DELETE", f"/v1/principals/{ADMIN}")
        ask = first.coordinator.driver.ask
        await ask(lambda reply: ev.PrincipalCreated(reply, ADMIN, EVERYTHING))  # what such a start leaves behind
    async with running(tmp_path) as second:
        _, principal = await second.rest("GET", "/v1/principals")
        assert [one["keys"][0]["id"] for one in principal["principals"]] == [key_id]


async def test_what_is_no_key_stops_the_start_instead_of_locking_everybody_out(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "admin").write_text("hunter2")
    with pytest.raises(OSError, match="API key"):
        async with running(tmp_path):
            pass


async def test_a_first_key_without_access_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="bootstrap_admin"):
        CoordinatorConfig(data_dir=tmp_path, bootstrap_admin=tmp_path / "k")


# -- the audit log ----------------------------------------------------------------------------------


async def test_every_change_is_a_line_that_names_what_was_changed_and_how(here: Here) -> None:
    await here.principal("shop", {"resource": "topic", "pattern": "o*", "actions": ["write"]})
    await here.rest("PATCH", "/v1/principals/shop", {"disabled": True})
    await here.rest("POST", "/v1/exchanges", {"name": "events", "type": "topic"})
    await here.rest("DELETE", "/v1/exchanges/events")
    await here.rest("DELETE", "/v1/principals/shop")
    first, *records = await here.audit()
    assert told(first) == ("operator", "bootstrap_admin", "principal", "admin", "done", "")
    assert [told(record)[1:] for record in records] == [
        ("create_principal", "principal", "shop", "done", ""),
        ("add_key", "principal", "shop", "done", ""),
        ("alter_principal", "principal", "shop", "done", ""),
        ("create_exchange", "exchange", "events", "done", ""),
        ("delete_exchange", "exchange", "events", "done", ""),
        ("delete_principal", "principal", "shop", "done", ""),
    ]
    assert {record["principal"] for record in records} == {ADMIN}
    assert {record["remote"] for record in records} == {"127.0.0.1"}
    assert records[2]["details"] == {"body": '{"disabled":true}'}


def test_no_route_changes_anything_in_silence() -> None:
    """Whoever adds a route that only uses what is there, and is no GET, says so here."""
    uses = {
        ("POST", "/v1/groups/{group}/heartbeat"),
        ("POST", "/v1/renew"),  # a node's
        ("POST", "/v1/topics/{topic}/records"),
        ("POST", "/v1/exchanges/{exchange}/publish"),
        *(("POST", f"/v1/queues/{{topic}}/{{group}}/{verb}") for verb in ("receive", "settle", "keep")),
    }
    rules = {**coordinator_rules.ROUTES, **broker_rules.ROUTES}
    silent = {route for route, rule in rules.items() if route[0] != "GET" and not changes(route[0], rule)}
    assert silent == uses
    assert not [route for route, rule in rules.items() if route[0] == "GET" and changes(route[0], rule)]


async def test_a_request_that_changes_several_things_is_a_line_for_each(here: Here) -> None:
    exchanges = [{"name": name, "type": "topic", "bindings": []} for name in ("mine", "yours")]
    document = {"version": 1, "topics": [], "exchanges": exchanges, "principals": []}
    key = await here.principal("shop", {"resource": "exchange", "pattern": "mine", "actions": ["manage"]})
    assert (await here.rest("PUT", "/v1/definitions?dry_run=true", document, token=key))[0] == 207
    assert (await here.rest("PUT", "/v1/definitions", document, token=key))[0] == 207
    assert [told(record)[1:] for record in await here.audit(principal="shop")] == [
        ("definitions_create", "exchange", "mine", "done", ""),
        ("definitions_create", "exchange", "yours", "refused", "FORBIDDEN"),
    ]


async def test_a_change_that_was_allowed_and_did_not_work_says_why(here: Here) -> None:
    await here.rest("POST", "/v1/exchanges", {"name": "events", "type": "topic"})
    await here.rest("POST", "/v1/exchanges", {"name": "events", "type": "fanout"})
    await here.rest("POST", "/v1/exchanges", {"name": "x", "type": 7})
    await here.rest("POST", "/v1/brokers/9/drain")
    failed = await here.audit(outcome="failed")
    assert [told(record)[1:] for record in failed] == [
        ("create_exchange", "exchange", "events", "failed", "EXCHANGE_EXISTS"),
        ("create_exchange", "exchange", "", "failed", "INVALID_ARGUMENT"),
        ("drain_broker", "broker", "9", "failed", "UNKNOWN_BROKER"),
    ]


async def test_every_refusal_is_a_line_and_looking_around_is_none(here: Here) -> None:
    key = await here.principal("shop", {"resource": "exchange", "pattern": "mine", "actions": ["read"]})
    assert (await here.rest("GET", "/v1/cluster", token=key))[0] == 403
    assert (await here.rest("DELETE", "/v1/exchanges/events", token=key))[0] == 403
    assert (await here.rest("POST", "/v1/exchanges", {"name": "new", "type": "topic"}, token=key))[0] == 403
    assert (await here.rest("GET", "/v1/audit", token=key))[0] == 403
    assert (await here.rest("GET", "/v1/topics", token=key))[0] == 200
    assert (await here.rest("GET", "/v1/topics", token="fl_0123456789abcdef_" + "A" * 43))[0] == 401
    assert (await here.rest("GET", "/v1/nowhere", token=key))[0] == 404
    refused = await here.audit(outcome="refused")
    assert [told(record) for record in refused] == [
        ("shop", "get_cluster", "cluster", "*", "refused", "FORBIDDEN"),
        ("shop", "delete_exchange", "exchange", "events", "refused", "FORBIDDEN"),
        ("shop", "create_exchange", "exchange", "new", "refused", "FORBIDDEN"),
        ("shop", "read_audit", "cluster", "*", "refused", "FORBIDDEN"),
        ("anonymous", "list_topics", "topic", "", "refused", "BAD_CREDENTIALS"),
    ]
    assert await here.audit(principal="shop", outcome="done") == []


async def test_no_secret_is_in_the_log_whatever_was_shown(here: Here) -> None:
    key = await here.principal("shop")
    secret = key.split("_", 2)[2]
    await here.rest("GET", "/v1/cluster", token=key)
    await here.rest("DELETE", f"/v1/exchanges/{key}", token=key)
    await here.rest("POST", "/v1/join", {"token": "j" * 40, "csr": "x", "storage_id": "s"}, token=key)
    for path in (here.folder / "data" / "audit").iterdir():
        text = path.read_text()
        assert secret not in text
        assert here.key not in text
        assert "j" * 40 not in text


async def test_a_request_id_leads_from_an_answer_to_its_line(here: Here) -> None:
    async with here.http.get(here.coordinator.url + "/v1/cluster", ssl=here.trust) as response:
        problem = await response.json(content_type=None)
    (record,) = await here.audit(outcome="refused")
    assert record["request_id"] == problem["request_id"] == response.headers["X-Request-Id"]


async def test_a_new_access_file_is_a_change_of_whoever_may_write_it(here: Here) -> None:
    (here.folder / "access.toml").write_text('open_metrics = true\n[[principals]]\nname = "ann"\n')
    here.coordinator.reload_access()
    record = (await here.audit())[-1]
    assert told(record) == ("operator", "reload_access", "cluster", str(here.folder / "access.toml"), "done", "")
    assert record["details"] == {"principals": 1, "issuers": 0, "rules": 0}


async def test_a_page_begins_after_its_cursor_and_bad_questions_are_refused(here: Here) -> None:
    for number in range(5):
        await here.rest("POST", "/v1/exchanges", {"name": f"x{number}", "type": "topic"})
    status, page = await here.rest("GET", "/v1/audit?after=1&limit=2")
    assert (status, [record["name"] for record in page["records"]], page["more"]) == (200, ["x0", "x1"], True)
    status, page = await here.rest("GET", f"/v1/audit?after={page['next']}&limit=1000")
    assert ([record["name"] for record in page["records"]], page["more"]) == (["x2", "x3", "x4"], False)
    for wrong in ("after=x", "after=-1", "limit=0", "limit=1001", "outcome=maybe", "after=" + "9" * 30):
        status, problem = await here.rest("GET", f"/v1/audit?{wrong}")
        assert (status, problem["code"]) == (400, "INVALID_ARGUMENT"), wrong


async def test_changes_are_told_while_access_is_off_too(tmp_path: Path) -> None:
    coordinator = Coordinator(CoordinatorConfig(data_dir=tmp_path / "data", port=0, join_tokens=1))
    await coordinator.start()
    try:
        trust = ssl.create_default_context(cafile=str(coordinator.authority.ca_path))
        async with aiohttp.ClientSession() as http:
            body = {"name": "events", "type": "topic"}
            async with http.post(coordinator.url + "/v1/exchanges", json=body, ssl=trust) as response:
                assert response.status == 201
    finally:
        await coordinator.stop()
    (line,) = (tmp_path / "data" / "audit" / "audit.jsonl").read_text().splitlines()
    assert told(json.loads(line)) == ("everybody", "create_exchange", "exchange", "events", "done", "")


async def test_a_disk_that_takes_no_audit_log_stops_no_change(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "audit").write_text("in the way")
    async with running(tmp_path) as here:
        assert (await here.rest("POST", "/v1/exchanges", {"name": "events", "type": "topic"}))[0] == 201
        status, problem = await here.rest("GET", "/v1/audit")
        assert (status, problem["code"]) == (500, "STORAGE_FAILED")
        headers = {"Authorization": f"Bearer {here.key}"}
        async with here.http.get(here.coordinator.url + "/metrics", headers=headers, ssl=here.trust) as response:
            assert 'ferryline_audit_lost_total{service="coordinator"} 2.0' in await response.text()
