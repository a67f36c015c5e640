"""The coordinator as others see it: TLS, joining, sessions and REST over real sockets on loopback."""

from __future__ import annotations

import asyncio
import io
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from ferryline.protocol.dead_letters import EnsureTopic, EnsureTopicOk
from ferryline.protocol.errors import (
    ClusterMismatch,
    ConnectionFailed,
    FerrylineError,
    Forbidden,
    MalformedRequest,
    StaleBrokerEpoch,
    UnknownKind,
    UnknownTopic,
)
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import (
    AlterIsr,
    AlterIsrs,
    AlterIsrsAnswer,
    Done,
    GroupAssignment,
    GroupHeartbeat,
    Heartbeat,
    HeartbeatOk,
    Hello,
    Register,
    RegisterOk,
)
from ferryline.protocol.metadata import MetadataAnswer, MetadataRequest, TopicConfig
from ferryline.protocol.partitioner import partition_of
from ferryline_coordinator.app import Coordinator
from ferryline_coordinator.authority import Authority
from ferryline_coordinator.config import CoordinatorConfig
from ferryline_coordinator.rotation import TRUST, pem_of, trusted
from ferryline_service.node import NodeConnection
from ferryline_service.tls import node_client_context, node_identity
from tests.rest_contract import Contract
from unit.test_coordinator_standby import DictVault

Eventually = Callable[..., Awaitable[Any]]


JSON = {"Content-Type": "application/json"}


class Here:
    """A running coordinator, and what a client and a broker need to reach it."""

    def __init__(self, coordinator: Coordinator, http: aiohttp.ClientSession, folder: Path) -> None:
        self.coordinator, self.http, self.folder = coordinator, http, folder
        self.url = coordinator.url
        self._contract: Contract | None = None
        self.trust = ssl.create_default_context(cafile=str(coordinator.authority.ca_path))
        self.cluster_id = coordinator.driver.state.cluster.cluster_id  # type: ignore[union-attr]

    async def rest(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        data: Any = None if body is None else io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        options["headers"] = {**JSON, **options.get("headers", {})}
        async with self.http.request(method, self.url + path, data=data, ssl=self.trust, **options) as response:
            raw = await response.read()
        if self._contract is None:
            async with self.http.get(self.url + "/openapi.json", ssl=self.trust) as told:
                self._contract = Contract(await told.json())
        self._contract.check(method, response.url.raw_path, response.status, response.headers, raw)
        return response.status, json.loads(raw) if raw else None

    def token(self) -> str:
        return next(path for path in sorted(self.coordinator.authority.tokens.iterdir())).read_text()

    async def join(self, storage_id: str, **wrong: Any) -> tuple[int, Any]:
        body = {
            "token": wrong.pop("token", None) or self.token(),
            "csr": wrong.pop("csr", None)
            or signing_request(ec.generate_private_key(ec.SECP256R1()), ["broker.example"]),
            "storage_id": storage_id,
            "internal_url": "https://127.0.0.1:1",
            "external_url": "https://127.0.0.1:1",
            **wrong,
        }
        return await self.rest("POST", "/v1/join", body)

    async def broker(self, name: str) -> NodeConnection:
        """Join as a new broker, connect with its certificate, register and be unfenced."""
        key = ec.generate_private_key(ec.SECP256R1())
        status, joined = await self.join(name, csr=signing_request(key, []))
        assert status == 200, joined
        context = self.identity(key, joined["cert"], name)
        broker_id = joined["broker_id"]
        hello = Hello(role="broker", cluster_id=self.cluster_id, broker_id=broker_id)
        connection = await NodeConnection.connect(self.http, self.url, hello=hello, tls=context, expect="coordinator")
        register = Register(broker_id, name, 1, "clean", "https://127.0.0.1:1", "https://127.0.0.1:1", 0)
        ok = await connection.call(Kind.REGISTER, register, RegisterOk, timeout_s=30)
        beat = Heartbeat(broker_id, ok.broker_epoch, 1, "run", ok.coord_epoch, ok.revision)
        assert not (await connection.call(Kind.HEARTBEAT, beat, HeartbeatOk, timeout_s=30)).fenced
        return connection

    def identity(self, key: ec.EllipticCurvePrivateKey, cert: str, name: str) -> ssl.SSLContext:
        key_path, cert_path = self.folder / f"{name}.key", self.folder / f"{name}.crt"
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        cert_path.write_text(cert)
        return node_client_context(self.coordinator.authority.ca_path, cert_path, key_path)

    async def client(self) -> NodeConnection:
        context = node_client_context(self.coordinator.authority.ca_path)
        return await NodeConnection.connect(self.http, self.url, hello=Hello(), tls=context)


P256 = ec.generate_private_key(ec.SECP256R1())


def signing_request(key: Any, names: list[str]) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anything")])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
async def here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Here]:
    coordinator = Coordinator(CoordinatorConfig(data_dir=tmp_path / "c", port=0, join_tokens=4))
    await coordinator.start()
    async with aiohttp.ClientSession() as http:
        yield Here(coordinator, http, tmp_path)
    await coordinator.stop()


# -- TLS and joining --------------------------------------------------------------------------------


async def test_clients_verify_the_ca_and_the_host_name(here: Here) -> None:
    assert (await here.rest("GET", "/healthz"))[0] == 200
    stranger = ssl.create_default_context()
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await here.http.get(here.url + "/healthz", ssl=stranger)
    old = ssl.create_default_context(cafile=str(here.coordinator.authority.ca_path))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(aiohttp.ClientError):
        await here.http.get(here.url + "/healthz", ssl=old)


async def test_a_coordinator_that_learns_of_a_new_ca_from_a_join_shows_at_once_that_it_trusts_it(here: Here) -> None:
    """Whoever changes the CA waits until each coordinator shows the step."""
    authority, vault = here.coordinator.authority, DictVault()
    authority.rotate(TRUST)  # as another one would, with whom the vault is shared
    folder = authority.directory
    vault.things["ca"] = b"".join((folder / name).read_bytes() for name in ("ca.key", "ca-next.key", "ca.crt"))
    authority.ca_pem = pem_of(trusted(folder)[:1]).decode()
    authority._vault = vault
    assert (await here.join("s-1"))[1]["ca"].count("BEGIN CERTIFICATE") == 2
    shown = (await here.rest("GET", "/healthz"))[1]["certificates"]
    assert len(shown["authorities"]) == 2


async def test_a_join_token_gives_an_id_and_a_certificate_that_names_the_role(here: Here) -> None:
    status, joined = await here.join("s-1")
    assert status == 200
    assert joined["broker_id"] == 1
    assert joined["cluster_id"] == here.cluster_id
    certificate = x509.load_pem_x509_certificate(joined["cert"].encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert f"broker-1.{here.cluster_id}" in names.get_values_for_type(x509.DNSName)
    assert {"localhost", "broker.example"} <= set(names.get_values_for_type(x509.DNSName))
    status, second = await here.join("s-2")
    assert (status, second["broker_id"]) == (200, 2)


async def test_a_join_whose_answer_was_lost_can_be_repeated_by_the_same_storage_only(here: Here) -> None:
    token = here.token()
    first = (await here.join("s-1", token=token))[1]
    again = (await here.join("s-1", token=token))[1]
    assert first["broker_id"] == again["broker_id"]
    status, refused = await here.join("s-2", token=token)
    assert (status, refused["code"]) == (403, "FORBIDDEN")
    assert "used already" in refused["detail"]


async def test_used_tokens_are_replaced(here: Here, eventually: Eventually) -> None:
    tokens = here.coordinator.authority.tokens
    before = {path.name for path in tokens.iterdir()}
    assert len(before) == 4
    await here.join("s-1")
    await eventually(lambda: len(list(tokens.iterdir())) == 4)
    assert {path.name for path in tokens.iterdir()} != before


BAD_JOINS: list[tuple[dict[str, Any], int, str]] = [
    ({"token": "x"}, 403, "not a join token"),
    ({"token": "fl1." + "0" * 32 + "." + "0" * 64}, 403, "not a join token"),
    ({"token": "x" * 300}, 400, "token"),
    ({"csr": "no"}, 400, "csr"),
    ({"csr": "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"}, 400, "csr"),
    ({"csr": signing_request(rsa.generate_private_key(65537, 2048), [])}, 400, "P-256"),
    ({"csr": signing_request(P256, ["a b"])}, 400, "name"),
    ({"internal_url": "ftp://x"}, 400, "internal"),
    ({"external_url": 5}, 400, "external_url"),
    ({"storage_id": "../../etc"}, 400, "storage_id"),
    ({"surprise": 1}, 400, "surprise"),
]


@pytest.mark.parametrize(("wrong", "status", "message"), BAD_JOINS, ids=[str(case[2]) for case in BAD_JOINS])
async def test_a_bad_join_is_refused_and_the_next_good_one_works(
    here: Here, wrong: dict[str, Any], status: int, message: str
) -> None:
    storage = wrong.pop("storage_id", "s-1")
    got, problem = await here.join(storage, **wrong)
    assert got == status
    assert message in problem["detail"]
    assert (await here.join("s-good"))[0] == 200


async def test_a_request_cannot_ask_for_a_role(here: Here) -> None:
    for name in (
        f"coordinator.{here.cluster_id}",
        f"broker-9.{here.cluster_id}",
        f"BROKER-9.{here.cluster_id.upper()}",
    ):
        status, problem = await here.join("s-1", csr=signing_request(P256, [name]))
        assert (status, problem["code"]) == (400, "INVALID_ARGUMENT"), name


async def test_only_the_certificate_of_a_broker_speaks_for_it(here: Here) -> None:
    await here.broker("s-1")
    key = ec.generate_private_key(ec.SECP256R1())
    _, joined = await here.join("s-2", csr=signing_request(key, []))
    context = here.identity(key, joined["cert"], "two")
    for claimed in (1, 0, 7):
        hello = Hello(role="broker", cluster_id=here.cluster_id, broker_id=claimed)
        with pytest.raises(Forbidden):
            await NodeConnection.connect(here.http, here.url, hello=hello, tls=context)
    hello = Hello(role="broker", cluster_id=here.cluster_id, broker_id=2)
    anonymous = node_client_context(here.coordinator.authority.ca_path)
    with pytest.raises(Forbidden):
        await NodeConnection.connect(here.http, here.url, hello=hello, tls=anonymous)
    connection = await NodeConnection.connect(here.http, here.url, hello=hello, tls=context, expect="coordinator")
    with pytest.raises(Forbidden):
        await connection.call(Kind.HEARTBEAT, Heartbeat(1, 1, 1), HeartbeatOk, timeout_s=30)
    await connection.close()
    with pytest.raises(ConnectionFailed, match="expected broker-1"):
        await NodeConnection.connect(here.http, here.url, hello=hello, tls=context, expect="broker-1")


async def test_the_certificate_of_a_broker_that_was_forgotten_is_listed_where_it_says(here: Here) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    _, joined = await here.join("s-1", csr=signing_request(key, []))
    certificate = x509.load_pem_x509_certificate(joined["cert"].encode())
    (place,) = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    assert place.full_name is not None
    tls = node_client_context(here.coordinator.authority.ca_path)

    async def listed() -> set[int]:
        async with here.http.get(place.full_name[0].value, ssl=tls) as response:  # type: ignore[index]
            assert (response.status, response.content_type) == (200, "application/pkix-crl")
            return {revoked.serial_number for revoked in x509.load_der_x509_crl(await response.read())}

    assert await listed() == set()
    status, _ = await here.rest("DELETE", f"/v1/brokers/{joined['broker_id']}")
    assert status == 200
    assert await listed() == {certificate.serial_number}


async def test_a_certificate_of_another_ca_is_refused(here: Here, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    key = ec.generate_private_key(ec.SECP256R1())
    cert = other.sign_broker(signing_request(key, []), 1, here.cluster_id)
    context = here.identity(key, cert, "forged")
    hello = Hello(role="broker", cluster_id=here.cluster_id, broker_id=1)
    with pytest.raises(ConnectionFailed):
        await NodeConnection.connect(here.http, here.url, hello=hello, tls=context)


async def test_a_broker_renews_its_certificate_with_the_one_it_has(here: Here) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    _, joined = await here.join("s-1", csr=signing_request(key, []))
    context = here.identity(key, joined["cert"], "one")
    body = json.dumps({"csr": signing_request(key, ["elsewhere.example"])})
    async with here.http.post(here.url + "/v1/renew", data=body, ssl=context, headers=JSON) as response:
        renewed = await response.json()
    names = x509.load_pem_x509_certificate(renewed["cert"].encode()).extensions
    found = names.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    assert f"broker-1.{here.cluster_id}" in found
    assert (await here.rest("POST", "/v1/renew", {"csr": signing_request(key, [])}))[0] == 403


def test_identities_are_read_from_the_right_names_only() -> None:
    def cert(*names: str) -> dict[str, Any]:
        return {"subjectAltName": tuple(("DNS", name) for name in names)}

    assert node_identity(cert("localhost", "broker-12.c1"), "c1") == "broker-12"
    assert node_identity(cert("coordinator.c1"), "c1") == "coordinator"
    for name in ("broker-12.c2", "broker-0.c1", "broker-x.c1", "broker-1.c1.evil", "x.broker-1.c1", "c1", ".c1"):
        assert node_identity(cert(name), "c1") is None, name
    assert node_identity({"subjectAltName": (("IP Address", "broker-1.c1"),)}, "c1") is None
    assert node_identity(None, "c1") is None
    assert node_identity(cert("broker-1."), "") is None


# -- sessions ---------------------------------------------------------------------------------------


async def test_a_client_follows_metadata_and_heartbeats_for_a_group_on_one_session(here: Here) -> None:
    broker = await here.broker("s-1")
    client = await here.client()
    full = await client.call(Kind.METADATA, MetadataRequest(), MetadataAnswer, timeout_s=30)
    assert (full.full, len(full.brokers), full.coordinators) == (True, 1, [here.url])
    parked = asyncio.create_task(
        client.call(
            Kind.METADATA,
            MetadataRequest(full.cluster_id, full.coord_epoch, full.revision, 30_000),
            MetadataAnswer,
            timeout_s=40,
        )
    )
    status, topic = await here.rest("POST", "/v1/topics", {"name": "t", "config": {"replication": 1, "partitions": 2}})
    assert status == 201
    delta = await parked
    assert ([t.name for t in delta.topics], delta.full) == (["t"], False)
    assigned = await client.call(Kind.GROUP_HEARTBEAT, GroupHeartbeat("g", "m", ["t"]), GroupAssignment, timeout_s=30)
    assert len(assigned.assigned) == 2
    with pytest.raises(UnknownTopic):
        await client.call(Kind.GROUP_HEARTBEAT, GroupHeartbeat("g", "n", ["none"]), GroupAssignment, timeout_s=30)
    with pytest.raises(ClusterMismatch):
        await client.call(Kind.METADATA, MetadataRequest("other"), MetadataAnswer, timeout_s=30)
    assert topic["id"] == delta.topics[0].id
    await client.close()
    await broker.close()


@pytest.mark.parametrize(
    ("kind", "header", "error"),
    [
        (Kind.PRODUCE, Done(), UnknownKind),
        (Kind.FETCH, Done(), UnknownKind),
        (199, Done(), UnknownKind),
        (Kind.METADATA, Done(7), MalformedRequest),
        (Kind.GROUP_HEARTBEAT, Done(), MalformedRequest),
        (Kind.REGISTER, Heartbeat(1, 1, 1), MalformedRequest),
        (Kind.HEARTBEAT, Heartbeat(1, 1, 1), Forbidden),
        (Kind.REGISTER, Register(1, "s", 1, "clean", "https://x", "https://x", 0), Forbidden),
        (Kind.ALTER_ISR, AlterIsrs([AlterIsr("t", 0, 1, 1, 1, 1, 1, 1, [])]), Forbidden),
        (Kind.ENSURE_TOPIC, EnsureTopic(1, 1, "t.dlq", TopicConfig()), Forbidden),
        (Kind.ENSURE_TOPIC, Done(), MalformedRequest),
    ],
)
async def test_what_a_client_may_not_say_is_refused_and_the_session_goes_on(
    here: Here, kind: int, header: Any, error: type[FerrylineError]
) -> None:
    client = await here.client()
    with pytest.raises(error):
        await client.request(kind, header, timeout_s=30)
    await client.call(Kind.METADATA, MetadataRequest(), MetadataAnswer, timeout_s=30)
    await client.close()


async def test_a_broker_whose_session_ends_and_port_is_closed_is_fenced_at_once(
    here: Here, eventually: Eventually
) -> None:
    broker = await here.broker("s-1")
    state = here.coordinator.driver.state
    assert not state.brokers[1].meta.fenced
    started = asyncio.get_running_loop().time()
    await broker.close()
    await eventually(lambda: here.coordinator.driver.state.brokers[1].meta.fenced)
    assert asyncio.get_running_loop().time() - started < 2.9, "silence alone would take three seconds"


async def test_a_coordinator_that_stops_doubts_nobody(here: Here) -> None:
    broker = await here.broker("s-1")
    await here.coordinator.stop()
    assert broker.closed
    assert not here.coordinator.driver.state.brokers[1].meta.fenced
    assert here.coordinator.metrics.notes["fenced"] == 0


async def test_an_in_sync_set_is_changed_over_a_session_and_an_old_life_is_refused(here: Here) -> None:
    one, two = await here.broker("s-1"), await here.broker("s-2")
    await here.rest("POST", "/v1/topics", {"name": "t", "config": {"partitions": 1}})
    _, shown = await here.rest("GET", "/v1/topics/t")
    part = shown["partitions"][0]
    connection = one if part["primary"] == 1 else two
    epoch = here.coordinator.driver.state.brokers[part["primary"]].meta.broker_epoch
    proposal = AlterIsr(
        shown["id"], 0, part["primary"], epoch, here.coordinator.driver.core.coord_epoch, part["epoch"],
        part["version"], 1, [],
    )  # fmt: skip
    answer = await connection.call(Kind.ALTER_ISR, AlterIsrs([proposal]), AlterIsrsAnswer, timeout_s=30)
    assert (answer.results[0].accepted, answer.results[0].error) == (False, "INVALID_ARGUMENT")
    with pytest.raises(StaleBrokerEpoch):
        await one.call(Kind.HEARTBEAT, Heartbeat(1, 99, 1), HeartbeatOk, timeout_s=30)
    await one.close()
    await two.close()


async def test_a_broker_gets_the_topic_it_needs_and_may_not_ask_in_another_ones_name(here: Here) -> None:
    broker = await here.broker("s-1")
    epoch = here.coordinator.driver.state.brokers[1].meta.broker_epoch
    asked = EnsureTopic(1, epoch, "t.dlq", TopicConfig(2, 1))
    first, second = [(await broker.call(Kind.ENSURE_TOPIC, asked, EnsureTopicOk, timeout_s=30)).topic for _ in range(2)]
    assert first == second
    assert here.coordinator.driver.state.topic("t.dlq") == first
    with pytest.raises(Forbidden):
        await broker.request(Kind.ENSURE_TOPIC, EnsureTopic(2, epoch, "u.dlq", TopicConfig(2, 1)), timeout_s=30)
    assert here.coordinator.driver.state.topic("u.dlq") is None
    await broker.close()


# -- REST -------------------------------------------------------------------------------------------


async def test_retry_settings_travel_as_an_object_and_are_changed_field_by_field(here: Here) -> None:
    broker = await here.broker("s-1")
    config = {"replication": 1, "retry": {"attempts": 8, "on_dead": "park"}}
    status, made = await here.rest("POST", "/v1/topics", {"name": "t", "config": config})
    default = {"attempts": 5, "backoff_ms": 1_000, "backoff_max_ms": 60_000, "on_dead": "skip", "dead_letters": ""}
    assert (status, made["config"]["retry"]) == (201, {**default, "attempts": 8, "on_dead": "park"})
    await here.rest("PATCH", "/v1/topics/t", {"config": {"retry": {"on_dead": "skip", "dead_letters": "graveyard"}}})
    _, shown = await here.rest("GET", "/v1/topics/t")
    assert shown["config"]["retry"] == {**default, "attempts": 8, "dead_letters": "graveyard"}
    for wrong, field in (({"attempts": 0}, "retry.attempts"), ({"dead_letters": "t"}, "retry.dead_letters")):
        status, problem = await here.rest("PATCH", "/v1/topics/t", {"config": {"retry": wrong}})
        assert (status, problem["code"], problem["details"]["field"]) == (400, "INVALID_ARGUMENT", field)
    for odd in ({"tries": 3}, {"attempts": "3"}, 5):
        status, problem = await here.rest("PATCH", "/v1/topics/t", {"config": {"retry": odd}})
        assert (status, problem["code"]) == (400, "INVALID_ARGUMENT")
    await broker.close()


async def test_the_life_of_a_topic_over_rest(here: Here) -> None:
    brokers = [await here.broker(f"s-{n}") for n in range(2)]
    assert (await here.rest("POST", "/v1/topics", {"name": "t", "config": {"partitions": 4}}))[0] == 201
    assert (await here.rest("POST", "/v1/topics", {"name": "t"}))[1]["code"] == "TOPIC_EXISTS"
    _, listed = await here.rest("GET", "/v1/topics")
    assert [t["name"] for t in listed["topics"]] == ["t"]
    _, route = await here.rest("GET", "/v1/topics/t/route?key=%C3%A9-1")
    assert route["partition"] == partition_of("é-1".encode(), 4)
    assert route["url"] == "https://127.0.0.1:1"
    _, altered = await here.rest("PATCH", "/v1/topics/t", {"config": {"retention_ms": 60_000}})
    assert altered["config"]["retention_ms"] == 60_000
    status, problem = await here.rest("POST", "/v1/topics/t/partitions", {"partitions": 6})
    assert (status, problem["details"]["field"]) == (409, "keys_move")
    _, more = await here.rest("POST", "/v1/topics/t/partitions", {"partitions": 6, "keys_move": True})
    assert more["config"]["partitions"] == 6
    _, parts = await here.rest("GET", "/v1/partitions?topic=t")
    assert len(parts["partitions"]) == 6
    _, cluster = await here.rest("GET", "/v1/cluster")
    assert (cluster["healthy"], cluster["partitions"]["total"], cluster["brokers"]["running"]) == (True, 6, 2)
    _, beat = await here.rest("POST", "/v1/groups/g/heartbeat", {"member": "m", "topics": ["t"]})
    assert len(beat["assigned"]) == 6
    _, shown = await here.rest("GET", "/v1/groups/g")
    assert {p["member"] for p in shown["partitions"]} == {"m"}
    assert (await here.rest("DELETE", "/v1/groups/g"))[0] == 409
    await here.rest("POST", "/v1/groups/g/heartbeat", {"member": "m", "leave": True})
    assert (await here.rest("DELETE", "/v1/groups/g"))[0] == 200
    _, drained = await here.rest("POST", "/v1/brokers/1/drain")
    assert drained["draining"]
    _, back = await here.rest("POST", "/v1/brokers/1/undrain")
    assert not back["draining"]
    assert (await here.rest("DELETE", "/v1/topics/t"))[0] == 200
    assert (await here.rest("GET", "/v1/topics/t"))[0] == 404
    for broker in brokers:
        await broker.close()


BAD_REQUESTS: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/v1/topics", b"{", 400, "MALFORMED_REQUEST"),
    ("POST", "/v1/topics", b"", 400, "MALFORMED_REQUEST"),
    ("POST", "/v1/topics", b"\xff\xfe", 400, "MALFORMED_REQUEST"),
    ("POST", "/v1/topics", b'{"name": NaN}', 400, "MALFORMED_REQUEST"),
    ("POST", "/v1/topics", b"[" * 100_000, 400, "MALFORMED_REQUEST"),
    ("POST", "/v1/topics", [], 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/topics", {}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/topics", {"name": 5}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/topics", {"name": "t", "colour": "red"}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/topics", {"name": "../t"}, 400, "INVALID_NAME"),
    ("POST", "/v1/topics", {"name": "__t"}, 400, "INVALID_NAME"),
    ("POST", "/v1/topics", {"name": "t", "config": {"partitions": 10**30}}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/topics", {"name": "t", "config": {"partitions": "3"}}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/topics", {"name": "t", "config": {"min_isr": 3}}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/topics", {"name": "t"}, 503, "NOT_ENOUGH_REPLICAS"),
    ("POST", "/v1/topics", b"x" * (9 << 20), 413, "MALFORMED_REQUEST"),
    ("GET", "/v1/topics/none", None, 404, "UNKNOWN_TOPIC"),
    ("GET", "/v1/topics/a%2Fb", None, 400, "INVALID_NAME"),
    ("GET", "/v1/topics/%00", None, 400, "INVALID_NAME"),
    ("GET", "/v1/topics/none/route", None, 404, "UNKNOWN_TOPIC"),
    ("PATCH", "/v1/topics/none", {"config": {}}, 404, "UNKNOWN_TOPIC"),
    ("DELETE", "/v1/topics/none", None, 404, "UNKNOWN_TOPIC"),
    ("POST", "/v1/topics/none/partitions", {"partitions": 3}, 404, "UNKNOWN_TOPIC"),
    ("PUT", "/v1/topics", {}, 405, "METHOD_NOT_ALLOWED"),
    ("GET", "/v2/topics", None, 404, "NOT_FOUND"),
    ("POST", "/v1/brokers/7/drain", None, 404, "UNKNOWN_BROKER"),
    ("POST", "/v1/brokers/x/drain", None, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/brokers/99999999999/drain", None, 400, "INVALID_ARGUMENT"),
    ("DELETE", "/v1/brokers/7", None, 404, "UNKNOWN_BROKER"),
    ("GET", "/v1/partitions?state=odd", None, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/partitions/recover", {"topic": "none", "partition": 0}, 404, "UNKNOWN_TOPIC"),
    ("POST", "/v1/partitions/recover", {"topic": "t"}, 400, "INVALID_ARGUMENT"),
    ("GET", "/v1/groups/none", None, 404, "UNKNOWN_GROUP"),
    ("DELETE", "/v1/groups/none", None, 404, "UNKNOWN_GROUP"),
    ("POST", "/v1/groups/g/heartbeat", {"member": "m", "topics": ["none"]}, 404, "UNKNOWN_TOPIC"),
    ("POST", "/v1/groups/g%20/heartbeat", {"member": "m", "topics": ["t"]}, 400, "INVALID_NAME"),
    ("POST", "/v1/groups/g/heartbeat", {"member": "m", "topics": "t"}, 400, "INVALID_ARGUMENT"),
    ("POST", "/v1/groups/g/heartbeat", {"member": "m", "topics": ["t"], "sequence": -1}, 400, "INVALID_ARGUMENT"),
    ("GET", "/v1/metadata?since=-2", None, 400, "INVALID_ARGUMENT"),
    ("GET", "/v1/metadata?wait_ms=60001", None, 400, "INVALID_ARGUMENT"),
    ("GET", "/v1/metadata?wait_ms=%D9%A1", None, 400, "INVALID_ARGUMENT"),
    ("GET", "/v1/metadata?cluster_id=other", None, 409, "CLUSTER_MISMATCH"),
    ("GET", "/v1/session", None, 400, "MALFORMED_REQUEST"),
]


async def test_bad_requests_get_their_documented_error_and_disturb_nobody(here: Here) -> None:
    for method, path, body, status, code in BAD_REQUESTS:
        got, problem = await here.rest(method, path, body)
        assert (got, problem["code"]) == (status, code), (method, path, problem)
        assert problem["status"] == status
        assert problem["definite"] is True
        assert isinstance(problem["detail"], str)
        assert problem["request_id"]
    assert (await here.rest("GET", "/readyz"))[0] == 200
    _, cluster = await here.rest("GET", "/v1/cluster")
    assert cluster["topics"] == 0


async def test_the_served_openapi_document_names_every_route_and_resolves(here: Here) -> None:
    _, api = await here.rest("GET", "/openapi.json")
    assert api["openapi"].startswith("3.1")
    served = {
        (route.method.lower(), route.resource.canonical)
        for route in here.coordinator._runner.app.router.routes()  # type: ignore[union-attr]
        if route.resource is not None and route.method != "HEAD"
    }
    assert served == {(method, path) for path, methods in api["paths"].items() for method in methods}
    assert {("post", "/v1/topics"), ("get", "/v1/metadata"), ("post", "/v1/join")} <= served
    text = json.dumps(api)
    for name in set(re.findall(r"#/components/schemas/(\w+)", text)):
        assert name in api["components"]["schemas"], name
    ids = [operation["operationId"] for methods in api["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


async def test_a_request_id_is_kept_if_it_is_sane_and_made_otherwise(here: Here) -> None:
    for given, kept in (("abc-1", True), ("a b", False), ("x" * 65, False)):
        async with here.http.get(here.url + "/v1/nope", ssl=here.trust, headers={"X-Request-Id": given}) as response:
            assert (response.headers["X-Request-Id"] == given) is kept
            assert (await response.json(content_type=None))["request_id"] == response.headers["X-Request-Id"]


async def test_metrics_name_what_the_issue_asks_for(here: Here) -> None:
    broker = await here.broker("s-1")
    await here.rest("POST", "/v1/topics", {"name": "t", "config": {"replication": 1}})
    await here.rest("GET", "/v1/nope")
    async with here.http.get(here.url + "/metrics", ssl=here.trust) as response:
        text = await response.text()
    for line in (
        "ferryline_brokers_registered 1.0",
        "ferryline_brokers_running 1.0",
        'ferryline_primaries{broker="1"} 3.0',
        "ferryline_partitions_in_sync 3.0",
        "ferryline_partitions_under_replicated 0.0",
        "ferryline_partitions_offline 0.0",
        "ferryline_elections_total 0.0",
        "ferryline_fencings_total 0.0",
        "ferryline_consumers 0.0",
        "ferryline_metadata_revision",
        'ferryline_errors_total{code="NOT_FOUND",service="coordinator"} 1.0',
        'ferryline_requests_total{kind="REGISTER",service="coordinator"} 1.0',
    ):
        assert line in text, line
    await broker.close()
