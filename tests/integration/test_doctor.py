"""`ferryline doctor` on a cluster into which everything is planted that it should find: each is found, named, and comes
with something to do about it; and where nothing is wrong, it says nothing."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import resource
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import ferryline as fl
from ferryline.backup.calls import BackupCalls
from ferryline.cli import diagnosis, tlsinfo
from ferryline.cli.diagnosis import OK, Finding
from ferryline.cli.doctor import examine
from ferryline.cli.driver import ProcessCluster
from ferryline.cli.settings import Settings
from ferryline.protocol import messages
from ferryline.protocol.access import CLUSTER, READ, TOPIC, Grant
from ferryline_coordinator.authority import Authority
from tests.polling import poll

pytestmark = pytest.mark.process
OLDER = Path(__file__).with_name("older_broker")
FAULTS = {"FERRYLINE_ALLOW_SABOTAGE": "1", "FERRYLINE_TEST_FAULTS": "faults.json"}
WITHIN_S = 40.0
CLOSED = "https://127.0.0.1:1"


class Doctor:
    """Runs it as the command does, and keeps what was found."""

    def __init__(self, settings: Settings, root: Path) -> None:
        self.settings, self.root = settings, root
        self.seen: set[str] = set()

    async def look(self, **changes: object) -> list[Finding]:
        """All that is not in order; each has something to do about it."""
        settings = Settings(
            **{"url": self.settings.url, "ca": self.settings.ca, "token": self.settings.token, **changes}
        )
        found, _ = await asyncio.to_thread(examine, settings, self.root)
        wrong = [finding for finding in found if finding.level != OK]
        assert all(finding.remedy for finding in wrong), wrong
        return wrong

    async def finds(self, *wanted: tuple[str, str], **changes: object) -> None:
        """Until all of ``wanted``, (what, part of the detail), are among the findings."""

        async def found() -> bool:
            wrong = await self.look(**changes)
            missing = [
                (what, text) for what, text in wanted if not any(what in f.what and text in f.detail for f in wrong)
            ]
            assert not missing, f"{missing} of {wrong}"
            return True

        await poll(found, within_s=WITHIN_S, what=f"doctor finds {wanted}")
        self.seen |= {text for _, text in wanted}

    async def is_content(self) -> None:
        async def nothing() -> bool:
            wrong = await self.look()
            assert not wrong
            return True

        await poll(nothing, within_s=WITHIN_S, what="doctor finds nothing")


def switch(cluster: ProcessCluster, name: str, **switches: object) -> None:
    path = cluster.local.services[name].folder / "faults.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(switches))
    temporary.replace(path)


def spawn_older(cluster: ProcessCluster, name: str) -> None:
    paths = [str(OLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, **FAULTS, "PYTHONPATH": os.pathsep.join(paths)}
    cluster.local.services[name].spawn(env, signal.SIGKILL)


@contextlib.asynccontextmanager
async def service_with(tls: Path, folder: Path, *, days: float, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """Something that serves with a certificate of the cluster's CA, valid for ``days`` from now, for ``host``."""
    key = serialization.load_pem_private_key((tls / "ca.key").read_bytes(), None)
    authority = x509.load_pem_x509_certificate((tls / "ca.crt").read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    own, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
    alternatives = x509.SubjectAlternativeName([x509.DNSName(host), x509.DNSName("localhost")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(authority.subject).public_key(own.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=90))
    builder = builder.not_valid_after(now + datetime.timedelta(days=days)).add_extension(alternatives, critical=False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    secret = own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "somebody.pem"
    path.touch(mode=0o600)
    path.write_bytes(secret + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}"


def prepared(root: Path) -> ProcessCluster:
    args = ["--replacement-ms", "3600000"]
    return ProcessCluster(root / "cluster", brokers=3, env=FAULTS, coordinator_args=args)


async def start(cluster: ProcessCluster) -> None:
    """A cluster that the release before has made, with one broker that still runs it."""
    cluster.local.prepare()
    spawn_older(cluster, "coordinator")
    await poll(lambda: cluster.local.is_ready("coordinator"), within_s=WITHIN_S)
    spawn_older(cluster, "broker-3")
    await cluster.start()


async def guard(cluster: ProcessCluster, root: Path) -> str:
    """From now on nobody does anything without a token; returns the operator's."""
    access, key = root / "access.toml", root / "admin.key"
    access.write_text("open_metrics = false\n")
    cluster.local.coordinator.args += ["--access", str(access), "--bootstrap-admin", str(key)]
    await cluster.terminate("coordinator")
    await cluster.restart("coordinator")
    return key.read_text().strip()


async def test_everything_that_is_planted_is_found_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = prepared(tmp_path)
    try:
        await start(cluster)
        doctor = Doctor(Settings(url=(cluster.url,), ca=cluster.ca), tmp_path / "cluster")
        await releases(doctor, cluster)
        await doctor.is_content()
        token = await guard(cluster, tmp_path)
        doctor.settings = Settings(url=(cluster.url,), ca=cluster.ca, token=token)
        async with fl.connect(cluster.urls, ca=cluster.ca, token=token) as client:
            await doctor.is_content()
            await settings_and_servers(doctor, cluster, tmp_path, monkeypatch)
            await tokens(doctor, client)
            await machines(doctor, cluster)
            await traffic(doctor, client)
            await doctor.is_content()
            await brokers(doctor, cluster, client)
    finally:
        await cluster.kill_all()
    assert len(doctor.seen) >= 25, sorted(doctor.seen)


async def releases(doctor: Doctor, cluster: ProcessCluster) -> None:
    older = cluster.broker_id("broker-3")
    await doctor.finds(("release", f"brokers {older} run an older one"))
    await cluster.terminate("broker-3")
    await cluster.restart("broker-3")
    await doctor.finds(("release", "runs at feature level 1, and could run at 2"))
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await BackupCalls(client, WITHIN_S).coordinator("POST", "/v1/upgrade/finish", {})


async def settings_and_servers(
    doctor: Doctor, cluster: ProcessCluster, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Authority(root / "other")
    await doctor.finds((cluster.url, "which"), ca=other.ca_path)
    await doctor.finds(("CA", "No such file"), ca=root / "missing.crt")
    await doctor.finds(
        (CLOSED, "nothing listens"), ("context", "nothing of 'old' answers"), url=(CLOSED,), context="old"
    )
    plain = cluster.url.replace("https", "http")
    await doctor.finds((plain, "does not answer HTTP"), url=(plain,))
    monkeypatch.setattr(diagnosis, "TIMEOUT_S", 1.5)  # of what does not answer at all
    monkeypatch.setattr(tlsinfo, "TIMEOUT_S", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        await doctor.finds((f"port {port}", f"process {os.getpid()}"), url=(f"https://127.0.0.1:{port}",))
    tls = cluster.ca.parent
    for days, host, text in ((-1.0, "localhost", "expired"), (5.0, "localhost", "expires in"), (5.0, "a.b", "not for")):
        async with service_with(tls, root, days=days, host=host) as url:
            where = url.replace("localhost", "127.0.0.1") if text == "not for" else url
            await doctor.finds((where, text), url=(where,), timeout=1.0)  # it is no cluster
    with monkeypatch.context() as patched:
        patched.setattr(messages, "FEATURE_LEVEL", 1)  # this client is of the release before
        await doctor.finds(("version", "this client at 1"))
    (tls / "ca.key").chmod(0o644)
    await doctor.finds(("keys", "can be read by others"))
    (tls / "ca.key").chmod(0o600)


async def tokens(doctor: Doctor, client: fl.Client) -> None:
    await doctor.finds(("token", "none is given"), token="")
    await doctor.finds(("token", "it is refused"), token="fl_0123456789abcdef_" + "0" * 64)
    await client.admin.create_principal("reader", [Grant(TOPIC, "*", (READ,)), Grant(CLUSTER, "*", (READ,))])
    short = await client.admin.create_key("reader", expires=86_400.0)
    await doctor.finds(("token", "ends in"), token=short.key)
    await client.admin.create_principal("stranger", [Grant(TOPIC, "*", (READ,))])
    stranger = await client.admin.create_key("stranger")
    await doctor.finds(("access", "may not read the cluster"), token=stranger.key)


async def machines(doctor: Doctor, cluster: ProcessCluster) -> None:
    names = {name: f"broker {cluster.broker_id(name)}" for name in cluster.brokers}
    total = os.statvfs(cluster.local.root).f_frsize * os.statvfs(cluster.local.root).f_blocks
    switch(cluster, "broker-1", wall_ms=3_600_000)
    switch(cluster, "broker-2", write="ENOSPC", path="no such file")
    switch(cluster, "broker-3", free_bytes=total * 7 // 100)
    process = cluster.local.services["broker-1"].pid
    limits = resource.prlimit(
        process, resource.RLIMIT_NOFILE, (600, resource.prlimit(process, resource.RLIMIT_NOFILE)[1])
    )
    await doctor.finds(
        (cluster.url_of("broker-1"), "its clock is"),
        (names["broker-1"], "may open only 600"),
        (names["broker-2"], "its disk is full"),
        (names["broker-3"], "its disk is nearly full"),
    )
    for name in cluster.brokers:
        switch(cluster, name)
    resource.prlimit(process, resource.RLIMIT_NOFILE, limits)


async def traffic(doctor: Doctor, client: fl.Client) -> None:
    await client.admin.create_topic("orders", partitions=1)
    await client.admin.create_topic("jobs", partitions=1)
    await client.admin.create_topic("strict", partitions=1, retry=fl.Retry(1, on_dead="park"))
    async with client.producer() as producer:
        for topic in ("orders", "jobs", "strict"):
            await producer.send_many(topic, [b"v"] * 10)
    async with client.consumer("orders", group="billing") as consumer:
        await consumer.pull(5, WITHIN_S)
        await consumer.commit()
    for topic in ("jobs", "strict"):
        async with client.receiver(topic, group="packing", prefetch=1) as receiver:
            await (await receiver.__anext__()).reject("planted")
    await doctor.finds(
        ("group billing", "has no members"),
        ("queue strict/packing", "parked"),
        ("topic jobs.dlq", "dead letters"),
    )
    for topic in ("orders", "jobs", "strict", "jobs.dlq"):
        await client.admin.delete_topic(topic)


async def brokers(doctor: Doctor, cluster: ProcessCluster, client: fl.Client) -> None:
    slow, lost = cluster.local.add_broker(), cluster.local.add_broker()
    switch(cluster, slow, sync_ms=150)
    cluster.local.services[lost].args += ["--advertise-external", "https://127.0.0.1:2"]
    await cluster.restart(slow)
    await client.admin.create_topic("pairs", partitions=3)
    await client.admin.create_topic("strong", partitions=3, min_isr=2)
    await client.admin.create_topic("single", partitions=6, replication=1)
    async with client.producer() as producer:
        for number in range(20):  # one after the other, to whatever broker: a flush for each
            await producer.send("single", b"v", key=f"k{number}")
    await doctor.finds((f"broker {cluster.broker_id(slow)}", "for a flush"))
    switch(cluster, slow)
    await cluster.restart(lost)
    drained, killed = (cluster.broker_id(name) for name in ("broker-1", "broker-2"))
    await client.admin.drain_broker(drained)
    await cluster.kill("broker-2")
    await doctor.finds(
        (f"broker {cluster.broker_id(lost)}", "advertises https://127.0.0.1:2"),
        (f"broker {drained}", "draining"),
        (f"broker {killed}", "fenced"),
        ("partitions", "without a primary: single"),
        ("partitions", "below min_isr, refusing records: strong"),
        ("partitions", "under-replicated: pairs"),
    )
    await cluster.pause("coordinator")
    port = cluster.local.coordinator.port
    await doctor.finds((f"port {port}", "is stopped"))
    await cluster.resume("coordinator")
    await cluster.kill("coordinator")
    urls = (cluster.url, cluster.url_of("broker-3"))
    await doctor.finds((cluster.url, "refused"), url=urls)
