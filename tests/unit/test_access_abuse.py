"""What a principal with few grants tries at a coordinator, beyond asking for what it may not do. Real sockets."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ferryline.protocol.access import GRANTS_MAX, GROUP, MANAGE, READ, TOPIC, WRITE, Grant
from ferryline.protocol.errors import Forbidden, Throttled
from ferryline.protocol.frames import Kind
from ferryline.protocol.metadata import MetadataAnswer, MetadataRequest, RetryPolicy, TopicConfig, TopicMeta
from ferryline.transport import Connector
from ferryline_broker.join import signing_request
from ferryline_coordinator import sessions
from ferryline_coordinator.access_rules import check_dead_letters
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.state import CoordinatorState
from ferryline_service.access.audited import FAILED_MAX
from ferryline_service.access.caller import Caller
from unit.broker_world import eventually
from unit.coordinator_bench import Bench
from unit.test_access_audited import running

MINE = {"resource": "topic", "pattern": "mine*", "actions": ["manage"]}
URL = "https://127.0.0.1:1"
TO_YOURS = {"retry": {"dead_letters": "yours"}}


# -- dead letters -----------------------------------------------------------------------------------


async def test_nobody_has_dead_letters_sent_to_a_topic_that_they_may_not_send_to(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        key = await here.principal("p", MINE)
        document = {"topics": [{"name": "mine", "config": TO_YOURS}, {"name": "mine2", "config": {}}]}
        for method, path, body in (
            ("POST", "/v1/topics", {"name": "mine", "config": TO_YOURS}),
            ("PATCH", "/v1/topics/mine", {"config": TO_YOURS}),
        ):
            status, problem = await here.rest(method, path, body, token=key)
            assert (status, problem["code"], problem["details"]["name"]) == (403, "FORBIDDEN", "yours")
        _, answer = await here.rest("PUT", "/v1/definitions?dry_run=true", document, token=key)
        assert [one.get("error", {}).get("code") for one in answer["results"]] == ["FORBIDDEN", None]
        body = {"name": "mine", "config": {"retry": {"dead_letters": "mine.dead"}}}
        status, problem = await here.rest("POST", "/v1/topics", body, token=key)
        assert (status, problem["code"]) == (503, "NOT_ENOUGH_REPLICAS"), "allowed; there are no brokers"


@pytest.mark.parametrize(
    ("grant", "wanted", "allowed"),
    [
        (Grant(TOPIC, "yours", (READ,)), "yours", False),
        (Grant(TOPIC, "yours", (WRITE,)), "yours", True),
        (Grant(TOPIC, "new", (WRITE,)), "new", False),  # the broker would make it
        (Grant(TOPIC, "new", (MANAGE,)), "new", True),
        (Grant(GROUP, "*", (MANAGE,)), "there", True),  # as it is already, whoever made it so
        (Grant(GROUP, "*", (MANAGE,)), "", True),
    ],
)
def test_dead_letters_go_where_whoever_says_so_may_send(grant: Grant, wanted: str, allowed: bool) -> None:
    state, caller = CoordinatorState(10), Caller("p", (grant,))
    for number, name in enumerate(("mine", "yours", "there")):
        retry = RetryPolicy(dead_letters="there" if name == "mine" else "")
        state.topics[str(number)] = TopicMeta(str(number), name, TopicConfig(retry=retry), 1)
        state.topic_ids[name] = str(number)
    settings: dict[str, Any] = {"retry": {"dead_letters": wanted}}
    if allowed:
        check_dead_letters(caller, state, "mine", settings)
    else:
        with pytest.raises(Forbidden):
            check_dead_letters(caller, state, "mine", settings)


# -- definitions ------------------------------------------------------------------------------------


async def test_definitions_tell_nobody_which_principals_there_are(tmp_path: Path) -> None:
    """One item that is allowed makes the answer a 207 with all of them in it."""
    async with running(tmp_path) as here:
        key = await here.principal("p", {"resource": "exchange", "pattern": "mine", "actions": ["manage"]})
        secret = {"name": "secret", "grants": [MINE]}
        assert (await here.rest("POST", "/v1/principals", secret))[0] == 201
        guesses = [secret, {**secret, "grants": []}, {**secret, "name": "nobody"}]
        document = {"exchanges": [{"name": "mine", "type": "topic"}], "principals": guesses}
        status, answer = await here.rest("PUT", "/v1/definitions?dry_run=true", document, token=key)
        assert status == 207
        told = [{name: one[name] for name in ("action", "detail")} for one in answer["results"][1:]]
        assert told == [{"action": "conflict", "detail": ""}] * len(guesses)


async def test_no_change_is_too_late_in_a_document_for_the_audit_log(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        exchanges = [{"name": f"x{number}", "type": "topic"} for number in range(999)]
        principals = [{"name": f"late{number}", "grants": []} for number in range(3)]
        document = {"exchanges": exchanges, "principals": principals}
        status, answer = await here.rest("PUT", "/v1/definitions", document)
        assert (status, answer["changed"]) == (200, 1_002)
        names = [record["name"] for record in await here.audit(limit=1_000)]
        assert names[-3:] == ["late0", "late1", "late2"]


async def test_failures_in_a_document_rotate_no_change_of_others_away(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        other = [{"name": f"t{number}"} for number in range(FAILED_MAX + 50)]  # there are no brokers to make them
        status, answer = await here.rest("PUT", "/v1/definitions", {"topics": other})
        assert (status, answer["failed"]) == (207, len(other))
        lines = [record for record in await here.audit(limit=1_000) if record["outcome"] == "failed"]
        assert len(lines) == FAILED_MAX + 1
        assert lines[-1]["details"] == {"failures": 50}


# -- names ------------------------------------------------------------------------------------------


def test_names_that_nobody_can_have_are_not_remembered() -> None:
    """Ten thousand answers are; with a frame's worth of text each they would fill the memory."""
    caller = Caller("p", [Grant(TOPIC, f"t{number}", (READ,)) for number in range(GRANTS_MAX)])
    for number in range(100):
        assert not caller.may(READ, GROUP, f"{number}" * 1_000)
        assert caller.may(READ, TOPIC, f"t{number}")
    assert sum(len(name) for _, _, name in caller._answers) < 2_000


# -- nodes ------------------------------------------------------------------------------------------


async def test_a_certificate_of_a_broker_that_was_forgotten_opens_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        token = next((tmp_path / "data" / "join-tokens").iterdir()).read_text()
        key = ec.generate_private_key(ec.SECP256R1())
        csr = signing_request(key, [])
        body = {"token": token, "csr": csr, "storage_id": "s", "internal_url": URL, "external_url": URL}
        status, joined = await here.rest("POST", "/v1/join", body, token="")
        assert status == 200, joined
        cert, key_file = tmp_path / "node.crt", tmp_path / "node.key"
        cert.write_text(joined["cert"])
        encoded = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        key_file.write_bytes(encoded)
        stranger = ssl.create_default_context(cafile=str(here.coordinator.authority.ca_path))
        stranger.load_cert_chain(cert, key_file)

        async def as_node(path: str) -> int:
            async with here.http.get(here.coordinator.url + path, ssl=stranger) as response:
                return response.status

        assert await as_node("/v1/principals") == 200
        assert (await here.rest("DELETE", f"/v1/brokers/{joined['broker_id']}"))[0] == 200
        for path in ("/v1/principals", "/v1/backup", "/v1/session", "/v1/whoami"):
            assert await as_node(path) == 401


# -- waiting ----------------------------------------------------------------------------------------


async def test_one_session_takes_no_places_of_others_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "WAITING_MAX", 3)
    async with running(tmp_path) as here:
        key = await here.principal("p")
        connector = Connector(ca=str(here.coordinator.authority.ca_path), token=key, client="test")
        session = await connector.open(here.coordinator.url)
        core = here.coordinator.driver.core
        ask = MetadataRequest("", core.coord_epoch, core.state.revision, 60_000)
        waiting = [
            asyncio.create_task(session.request(Kind.METADATA, ask, MetadataAnswer, timeout=60)) for _ in range(3)
        ]
        await eventually(lambda: core.polls.parked == 3, "three wait")
        with pytest.raises(Throttled):
            await session.request(Kind.METADATA, ask, MetadataAnswer, timeout=10)
        await connector.close()
        await asyncio.gather(*waiting, return_exceptions=True)
        await eventually(lambda: core.polls.parked == 0, "who has left waits for nothing")


def test_clients_that_wait_for_metadata_keep_no_broker_from_it() -> None:
    bench = Bench(1, CoreConfig(parked_max=1))
    ask = MetadataRequest("", bench.core.coord_epoch, bench.core.state.revision, 60_000)
    assert bench.ask(ev.MetadataAsked, ask) is None
    with pytest.raises(Throttled):
        bench.ask(ev.MetadataAsked, ask)
    assert bench.ask(ev.MetadataAsked, ask, 1) is None
    assert bench.core.polls.parked == 2
