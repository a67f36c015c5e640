"""The gate of a coordinator over TLS: who gets in, what they may do, and what becomes of open sessions."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ferryline.client import connect
from ferryline.protocol.access import GROUP, READ, TOPIC, AccessPolicy, Grant
from ferryline.protocol.errors import BadCredentials, ConnectionLost, FerrylineError, Forbidden, NotReady, UnknownTopic
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import GroupAssignment, GroupHeartbeat
from ferryline.protocol.metadata import MetadataAnswer, MetadataRequest
from ferryline.transport import Connector, Session
from ferryline_coordinator.app import Coordinator
from ferryline_coordinator.config import CoordinatorConfig
from ferryline_service.access.caller import NOBODY, Caller
from ferryline_service.access.gate import Gate
from ferryline_service.access.keys import ID_BYTES, SECRET_BYTES, make_key, split_key
from ferryline_service.access.rules import PUBLIC, RuleMissing, check_frames

Eventually = Callable[..., Awaitable[Any]]
ROOT_KEY, ROOT_ID, ROOT_DIGEST = make_key(bytes(range(ID_BYTES + SECRET_BYTES)))
OLD_KEY, OLD_ID, OLD_DIGEST = make_key(bytes(range(1, 1 + ID_BYTES + SECRET_BYTES)))
GONE_KEY, GONE_ID, GONE_DIGEST = make_key(bytes(range(2, 2 + ID_BYTES + SECRET_BYTES)))
STRANGE_KEY, _, _ = make_key(bytes(range(3, 3 + ID_BYTES + SECRET_BYTES)))
FILE = f"""
[[principals]]
name = "root"
grants = [
    {{ resource = "topic", actions = ["manage"] }}, {{ resource = "group", actions = ["manage"] }},
    {{ resource = "exchange", actions = ["manage"] }}, {{ resource = "cluster", actions = ["manage"] }},
]
keys = [
    {{ id = "{ROOT_ID}", sha256 = "{ROOT_DIGEST.hex()}" }},
    {{ id = "{OLD_ID}", sha256 = "{OLD_DIGEST.hex()}", expires_ms = 1 }},
]

[[principals]]
name = "gone"
disabled = true
keys = [{{ id = "{GONE_ID}", sha256 = "{GONE_DIGEST.hex()}" }}]
"""
READ_T = {"resource": "topic", "pattern": "t", "actions": ["read"]}
READ_GROUP_G = [READ_T, {"resource": "group", "pattern": "g", "actions": ["read"]}]


def secret_of(key: str) -> str:
    return split_key(key)[1]


class Here:
    """A running coordinator with access on, without brokers."""

    def __init__(self, coordinator: Coordinator, http: aiohttp.ClientSession, file: Path) -> None:
        self.coordinator, self.http, self.file = coordinator, http, file
        self.url, self.ca = coordinator.url, str(coordinator.authority.ca_path)
        self.trust = ssl.create_default_context(cafile=self.ca)
        self.connectors: list[Connector] = []

    async def rest(
        self, method: str, path: str, body: Any = None, key: str | None = ROOT_KEY, **options: Any
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        options = {"headers": headers, "json": body, "ssl": self.trust, **options}
        async with self.http.request(method, self.url + path, **options) as response:
            return response.status, await response.json(content_type=None)

    async def principal(self, name: str, grants: list[dict[str, Any]], **more: Any) -> str:
        """Made, with one key: which is returned."""
        status, _ = await self.rest("POST", "/v1/principals", {"name": name, "grants": grants, **more})
        assert status == 201
        return await self.key(name)

    async def key(self, name: str, expires_ms: int = 0) -> str:
        status, made = await self.rest("POST", f"/v1/principals/{name}/keys", {"expires_ms": expires_ms})
        assert status == 201, made
        return str(made["key"])

    async def session(self, key: str | None) -> Session:
        connector = Connector(ca=self.ca, token=key, client="test")
        self.connectors.append(connector)
        return await connector.open(self.url)


@pytest.fixture
async def here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Here]:
    file = tmp_path / "access.toml"
    file.write_text(FILE)
    coordinator = Coordinator(CoordinatorConfig(data_dir=tmp_path / "c", port=0, join_tokens=1, access=file))
    await coordinator.start()
    try:
        async with aiohttp.ClientSession() as http:
            here = Here(coordinator, http, file)
            yield here
            for connector in here.connectors:
                await connector.close()
    finally:
        await coordinator.stop()


async def beat(session: Session, group: str, topic: str = "t") -> str:
    """What a heartbeat of the group is refused with: the code of an error, or nothing."""
    try:
        message = GroupHeartbeat(group, "m", [topic])
        await session.request(Kind.GROUP_HEARTBEAT, message, GroupAssignment, timeout=10)
    except UnknownTopic:  # there are no brokers, hence no topics: this was looked at, and not refused
        return ""
    except FerrylineError as error:
        return error.code
    return ""


# -- credentials ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", f"Basic {ROOT_KEY}")],
        [("Authorization", ROOT_KEY)],
        [("Authorization", f"Bearer {ROOT_KEY}"), ("Authorization", f"Bearer {ROOT_KEY}")],
        [("Authorization", f"Bearer {ROOT_KEY[:-1]}")],
        [("Authorization", f"Bearer {ROOT_KEY}x")],
        [("Authorization", f"Bearer {ROOT_KEY.upper()}")],
        [("Authorization", f"Bearer {STRANGE_KEY}")],
        [("Authorization", f"Bearer fl_{ROOT_ID}_{STRANGE_KEY.split('_', 2)[2]}")],
        [("Authorization", f"Bearer {OLD_KEY}")],
        [("Authorization", f"Bearer {GONE_KEY}")],
        [("Authorization", "Bearer aaa.bbb.ccc")],
        [("Authorization", f"Bearer fl_{ROOT_ID}_")],
        [("Authorization", f"Bearer fl_{ROOT_ID}_{ROOT_DIGEST.hex()}")],
    ],
)
async def test_bad_credentials_are_refused_and_not_repeated(here: Here, headers: list[tuple[str, str]]) -> None:
    async with here.http.get(f"{here.url}/v1/whoami", headers=headers, ssl=here.trust) as response:
        text = await response.text()
        assert (response.status, response.headers["WWW-Authenticate"]) == (401, 'Bearer realm="ferryline"')
    assert '"BAD_CREDENTIALS"' in text
    for secret in (ROOT_KEY, STRANGE_KEY, OLD_KEY, GONE_KEY):
        assert secret_of(secret) not in text


async def test_whoever_shows_a_key_learns_who_they_are(here: Here) -> None:
    status, root = await here.rest("GET", "/v1/whoami")
    assert (status, root["principal"], root["by"], root["key"], root["access"]) == (200, "root", "key", ROOT_ID, True)
    key = await here.principal("p", READ_GROUP_G, quota={"records": 7})
    _, shown = await here.rest("GET", "/v1/whoami", key=key)
    assert (shown["principal"], shown["grants"], shown["quota"]["records"]) == ("p", READ_GROUP_G, 7)
    assert shown["revision"] > 0


async def test_a_key_is_shown_once_and_its_digest_never(here: Here) -> None:
    key = await here.principal("p", [])
    _, shown = await here.rest("GET", "/v1/principals/p")
    _, listed = await here.rest("GET", "/v1/principals")
    assert shown in listed["principals"]
    assert shown["keys"][0]["id"] in key
    assert [one["name"] for one in listed["principals"] if one["declared"]] == ["gone", "root"]
    for text in (str(shown), str(listed), (here.file.parent / "c" / "audit").joinpath("audit.jsonl").read_text()):
        assert secret_of(key) not in text
    assert set(shown["keys"][0]) == {"id", "created_ms", "expires_ms"}


async def test_what_is_open_is_open_without_a_token(here: Here) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert (await here.rest("GET", path, key=None))[0] == 200
    async with here.http.get(f"{here.url}/metrics", ssl=here.trust) as response:
        assert response.status == 401
    here.file.write_text("open_metrics = true\n" + FILE)
    here.coordinator.reload_access()
    await here.coordinator.driver.settled()
    async with here.http.get(f"{here.url}/metrics", ssl=here.trust) as response:
        assert response.status == 200


async def test_a_path_that_nobody_serves_is_not_found_whoever_asks(here: Here) -> None:
    assert (await here.rest("GET", "/v1/nothing", key=None))[0] == 404
    assert (await here.rest("PUT", "/v1/topics", key=None))[0] == 405


# -- grants -----------------------------------------------------------------------------------------


async def test_lists_show_what_may_be_read_and_the_rest_is_forbidden(here: Here) -> None:
    for name in ("a.1", "a.2", "b.1"):
        assert (await here.rest("POST", "/v1/exchanges", {"name": name, "type": "topic"}))[0] == 201
    key = await here.principal("p", [{"resource": "exchange", "pattern": "a.*", "actions": ["read"]}])
    _, listed = await here.rest("GET", "/v1/exchanges", key=key)
    assert [exchange["name"] for exchange in listed["exchanges"]] == ["a.1", "a.2"]
    assert (await here.rest("GET", "/v1/exchanges/a.2", key=key))[0] == 200
    status, problem = await here.rest("GET", "/v1/exchanges/b.1", key=key)
    told = {"principal": "p", "action": "read", "resource": "exchange", "name": "b.1"}
    assert (status, problem["code"], problem["details"]) == (403, "FORBIDDEN", told)
    assert (await here.rest("DELETE", "/v1/exchanges/a.1", key=key))[0] == 403
    assert (await here.rest("GET", "/v1/principals", key=key))[0] == 403


async def test_a_name_in_a_body_is_decided_before_the_handler_sees_it(here: Here) -> None:
    key = await here.principal("p", [{"resource": "exchange", "pattern": "a.*", "actions": ["manage"]}])
    assert (await here.rest("POST", "/v1/exchanges", {"name": "a.1", "type": "topic"}, key))[0] == 201
    assert (await here.rest("POST", "/v1/exchanges", {"name": "b.1", "type": "topic"}, key))[0] == 403
    for body in ([], {}, {"name": 3}, {"name": ["a.1"]}, "a.1"):
        assert (await here.rest("POST", "/v1/exchanges", body, key))[0] == 400
    raw = '{"name": "a.9", "name": "b.9", "type": "topic"}'  # both readers take the last one
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    status, _ = await here.rest("POST", "/v1/exchanges", None, key, headers=headers, json=None, data=raw)
    assert status == 403


async def test_a_principal_is_changed_by_version(here: Here) -> None:
    await here.principal("p", READ_GROUP_G)
    status, changed = await here.rest("PATCH", "/v1/principals/p", {"comment": "c", "version": 2})
    assert (status, changed["version"], changed["comment"], changed["grants"]) == (200, 3, "c", READ_GROUP_G)
    status, problem = await here.rest("PATCH", "/v1/principals/p", {"comment": "d", "version": 2})
    assert (status, problem["code"], problem["details"]["version"]) == (409, "VERSION_CONFLICT", 3)
    assert (await here.rest("DELETE", "/v1/principals/p?version=2"))[0] == 409
    assert (await here.rest("DELETE", "/v1/principals/p?version=x"))[0] == 400
    assert (await here.rest("DELETE", "/v1/principals/p?version=3"))[0] == 200
    assert (await here.rest("GET", "/v1/principals/p"))[0] == 404
    assert (await here.rest("PATCH", "/v1/principals/root", {"comment": "x"}))[0] == 409


async def test_a_principal_is_changed_only_as_it_was_seen(here: Here) -> None:
    await here.principal("p", READ_GROUP_G)
    path, auth = "/v1/principals/p", {"Authorization": f"Bearer {ROOT_KEY}"}
    async with here.http.get(here.url + path, ssl=here.trust, headers=auth) as response:
        seen = response.headers["ETag"]
    known = {"headers": {**auth, "If-None-Match": seen}}
    async with here.http.get(here.url + path, ssl=here.trust, **known) as response:
        assert response.status == 304
    asked = {"headers": {**auth, "If-Match": seen}}
    assert (await here.rest("PATCH", path, {"comment": "c"}, **asked))[0] == 200
    for method, target, body in (
        ("PATCH", path, {"comment": "d"}),
        ("POST", f"{path}/keys", {"expires_ms": 0}),
        ("DELETE", path, None),
    ):
        status, problem = await here.rest(method, target, body, **asked)
        assert (status, problem["code"]) == (412, "PRECONDITION_FAILED"), method
    assert (await here.rest("GET", path))[1]["comment"] == "c"
    await here.rest("DELETE", path)
    await here.principal("p", READ_GROUP_G)
    assert (await here.rest("DELETE", path, **asked))[0] == 412, "one made again under its name is another one"


# -- sessions ---------------------------------------------------------------------------------------


async def test_a_session_needs_a_token_and_its_frames_need_grants(here: Here) -> None:
    for key in (None, STRANGE_KEY):
        with pytest.raises(BadCredentials):
            await here.session(key)
    session = await here.session(await here.principal("p", READ_GROUP_G))
    assert await beat(session, "g") == ""
    assert await beat(session, "h") == "FORBIDDEN"
    assert await beat(session, "g", "u") == "FORBIDDEN"
    assert (await session.request(Kind.METADATA, MetadataRequest(), MetadataAnswer, timeout=10))[0].cluster_id


async def test_an_open_session_gets_what_is_granted_now(here: Here) -> None:
    session = await here.session(await here.principal("p", READ_GROUP_G))
    other = [READ_T, {"resource": "group", "pattern": "h", "actions": ["read"]}]
    assert (await here.rest("PATCH", "/v1/principals/p", {"grants": other}))[0] == 200
    assert (await beat(session, "g"), await beat(session, "h")) == ("FORBIDDEN", "")


@pytest.mark.parametrize("how", ["key removed", "disabled", "deleted", "declared otherwise"])
async def test_a_session_ends_with_what_it_was_opened_with(here: Here, how: str, eventually: Eventually) -> None:
    key = await here.principal("p", READ_GROUP_G)
    session, other = await here.session(key), await here.session(await here.principal("q", READ_GROUP_G))
    match how:
        case "key removed":
            await here.rest("DELETE", f"/v1/principals/p/keys/{key.split('_')[1]}")
        case "disabled":
            await here.rest("PATCH", "/v1/principals/p", {"disabled": True})
        case "deleted":
            await here.rest("DELETE", "/v1/principals/p")
        case _:
            here.file.write_text(FILE + '\n[[principals]]\nname = "p"\n')  # it covers the record, keys and all
            here.coordinator.reload_access()
    await eventually(lambda: not session.is_open, within_s=30)
    assert isinstance(session.error, ConnectionLost)
    with pytest.raises(BadCredentials):
        await here.session(key)
    assert (other.is_open, await beat(other, "g")) == (True, "")


async def test_a_session_ends_when_its_key_expires(here: Here, eventually: Eventually) -> None:
    await here.principal("p", READ_GROUP_G)
    session = await here.session(await here.key("p", time.time_ns() // 1_000_000 + 1_500))
    await eventually(lambda: not session.is_open, within_s=30)
    assert isinstance(session.error, ConnectionLost)


async def test_a_session_ends_when_the_file_says_that_its_key_has_expired(here: Here, eventually: Eventually) -> None:
    session = await here.session(ROOT_KEY)
    line = f'id = "{ROOT_ID}", sha256 = "{ROOT_DIGEST.hex()}"'
    assert line in FILE
    later_ms = time.time_ns() // 1_000_000 + 1_000
    here.file.write_text(FILE.replace(line, f"{line}, expires_ms = {later_ms}"))
    here.coordinator.reload_access()
    await eventually(lambda: not session.is_open, within_s=30)


async def test_the_sdk_says_what_is_wrong_with_a_token(here: Here) -> None:
    for key in ("", STRANGE_KEY):
        with pytest.raises(BadCredentials):
            async with connect(here.url, ca=here.ca, token=key, timeout=10):
                pass


async def test_principals_and_keys_outlive_a_restart(here: Here) -> None:
    key = await here.principal("p", READ_GROUP_G)
    await here.coordinator.stop()
    again = Coordinator(here.coordinator.config)
    await again.start()
    try:
        trust = ssl.create_default_context(cafile=str(again.authority.ca_path))
        headers = {"Authorization": f"Bearer {key}"}
        async with here.http.get(f"{again.url}/v1/whoami", headers=headers, ssl=trust) as response:
            assert (await response.json())["principal"] == "p"
    finally:
        await again.stop()


# -- what the gate refuses to start with, and before it knows ----------------------------------------


async def test_a_route_or_a_kind_without_a_rule_fails_the_start() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response()

    app, gate = web.Application(), Gate("test")
    app.router.add_get("/known", handler)
    gate.guard(app.router, {("GET", "/known"): PUBLIC})
    app.router.add_post("/v1/forgotten/{name}", handler)
    with pytest.raises(RuleMissing, match=r"POST /v1/forgotten/\{name\}"):
        gate.guard(app.router, {("GET", "/known"): PUBLIC})
    check_frames([Kind.METADATA], {Kind.METADATA: PUBLIC}, "test")
    with pytest.raises(RuleMissing, match="16"):
        check_frames([Kind.METADATA], {}, "test")


async def test_nobody_is_served_before_the_policy_is_known(here: Here, eventually: Eventually) -> None:
    gate, session = here.coordinator.access.gate, await here.session(ROOT_KEY)
    policy = gate.policy
    assert policy is not None
    gate.forget()
    status, problem = await here.rest("GET", "/v1/topics")
    assert (status, problem["retriable"]) == (503, True)
    early = await here.session(None)  # nobody asks for its token yet, and it gets nothing
    assert await beat(early, "g") == NotReady.code
    gate.take(policy, registered=True)
    await eventually(lambda: not early.is_open, within_s=30)
    assert (session.is_open, await beat(session, "g")) == (True, "")


async def test_an_older_policy_changes_nothing_unless_it_comes_with_a_registration() -> None:
    gate = Gate("test")
    gate.take(AccessPolicy(5, True))
    gate.take(AccessPolicy(4, False))
    assert gate.policy == AccessPolicy(5, True)
    gate.take(AccessPolicy(4, False), registered=True)
    assert gate.policy == AccessPolicy(4, False)
    await asyncio.sleep(0)


def test_a_refusal_names_who_what_and_on_what() -> None:
    caller = Caller("p", (Grant(TOPIC, "a", (READ,)),))
    caller.check(READ, TOPIC, "a")
    with pytest.raises(Forbidden, match="p may not read group a"):
        caller.check(READ, GROUP, "a")
    with pytest.raises(Forbidden, match="nobody may not read topic a"):
        NOBODY.check(READ, TOPIC, "a")
