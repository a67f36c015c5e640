"""A cluster for tests of the broker's shell: real brokers on real TLS sockets in this process, and a coordinator that
does what the test says.

`ScriptedCoordinator` speaks the real protocol on the real session code, but decides only the obvious: whoever
registers is alive, whoever proposes with the right epoch and version gets its in-sync set. The real coordinator is
tested with the real brokers in `tests/integration`.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ferryline.protocol.dead_letters import EnsureTopic, EnsureTopicOk
from ferryline.protocol.frames import (
    FLAG_MORE,
    Frame,
    Kind,
    decode_frame,
    decode_header,
    encode_frame_parts,
)
from ferryline.protocol.messages import (
    AlterIsrResult,
    AlterIsrs,
    AlterIsrsAnswer,
    Done,
    Fetch,
    FetchAnswer,
    FetchEntry,
    Heartbeat,
    HeartbeatOk,
    Hello,
    HelloOk,
    Produce,
    ProduceAnswer,
    ProduceEntry,
    ProduceResult,
    Register,
    RegisterOk,
    Resign,
)
from ferryline.protocol.metadata import (
    BrokerMeta,
    MetadataAnswer,
    MetadataRequest,
    PartitionMeta,
    TopicConfig,
    TopicMeta,
)
from ferryline.protocol.records import encode_batch
from ferryline_broker.app import Broker, bind
from ferryline_broker.config import BrokerConfig
from ferryline_broker.join import Joined, TlsFolder, certificate_names, signing_request
from ferryline_broker.log.files import FileStorage
from ferryline_broker.log.node_store import NodeStore
from ferryline_service.metrics import ServiceMetrics
from ferryline_service.node import raise_error
from ferryline_service.session import ServerSession, SessionEndpoint
from ferryline_service.tls import TlsFiles, identity_broker_id, node_client_context, node_identity, node_names

CLAIM_KEY = b"k" * 32
DEADLINE_S = 30.0


async def eventually(check: Callable[[], Any], what: str, *, within_s: float = DEADLINE_S) -> Any:
    """Poll until ``check`` returns something true, and return it."""
    loop = asyncio.get_running_loop()
    end = loop.time() + within_s
    while True:
        found = check()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        assert loop.time() < end, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)


class TestCa:
    """A private CA in a folder."""

    __test__ = False

    def __init__(self, folder: Path, cluster_id: str) -> None:
        self.folder, self.cluster_id = folder, cluster_id
        folder.mkdir(parents=True, exist_ok=True)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test ca")])
        self.cert = self._build(self.name, self.key.public_key(), [], ca=True)
        self.file = folder / "ca.crt"
        self.file.write_bytes(self.pem)

    @property
    def pem(self) -> bytes:
        return self.cert.public_bytes(serialization.Encoding.PEM)

    def _build(self, subject: x509.Name, key: Any, names: list[str], *, ca: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(days=400))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if ca:
            usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        if names:
            alternatives = x509.SubjectAlternativeName([_name(name) for name in names])
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def sign(self, csr_pem: str, broker_id: int | None) -> str:
        """A certificate for a request; the role name is added."""
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        try:
            asked = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            extra = [*asked.get_values_for_type(x509.DNSName), *map(str, asked.get_values_for_type(x509.IPAddress))]
        except x509.ExtensionNotFound:
            extra = ["127.0.0.1", "localhost"]
        names = [*dict.fromkeys([*extra, *node_names(self.cluster_id, broker_id)])]
        return self._build(csr.subject, csr.public_key(), names).public_bytes(serialization.Encoding.PEM).decode()

    def files(self, folder: Path, broker_id: int | None, names: Sequence[str] = ()) -> TlsFiles:
        tls = TlsFolder(folder)
        key = tls.private_key()
        csr = signing_request(key, names)
        tls.store(Joined(broker_id or 0, self.sign(csr, broker_id), self.pem.decode(), self.cluster_id))
        return tls.files()


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


class ScriptedCoordinator:
    """Answers brokers; the test changes ``partitions`` and calls `publish`."""

    def __init__(self, folder: Path) -> None:
        self.cluster_id = uuid.uuid4().hex
        self.ca = TestCa(folder / "ca", self.cluster_id)
        self.tls = self.ca.files(folder / "tls", None)
        self.coord_epoch = 1
        self.revision = 1
        self.brokers: dict[int, BrokerMeta] = {}
        self.topics: dict[str, TopicMeta] = {}
        self.partitions: dict[tuple[str, int], PartitionMeta] = {}
        self.registered: list[Register] = []
        self.resigned: list[Resign] = []
        self.reports: list[Any] = []
        self.proposals: list[Any] = []
        self.ensured: list[EnsureTopic] = []
        self.members: dict[str, list[str]] = {}  # of groups
        self.answer_alter_isr = True
        self.tokens = {"token-1", "token-2", "token-3", "token-4"}
        self.ids: dict[str, int] = {}
        self.epochs = 100
        self.sessions: dict[int, ServerSession] = {}
        self._polls: list[tuple[ServerSession, Frame, MetadataRequest]] = []
        self.endpoint = SessionEndpoint(
            server="coordinator",
            cluster_id=self.cluster_id,
            on_frame=self.on_frame,
            metrics=ServiceMetrics("coordinator"),
            on_open=self._opened,
        )
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        app = web.Application()
        app.router.add_routes(self.endpoint.routes())
        app.router.add_post("/v1/join", self.join)
        app.router.add_post("/v1/renew", self.renew)
        app.router.add_get("/v1/groups/{group}", self.group)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=self.tls.server)
        await site.start()
        self.port: int = self._runner.addresses[0][1]
        self.url = f"https://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        await self.endpoint.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def join(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["token"] not in self.tokens:
            return web.json_response({"code": "FORBIDDEN", "detail": "token"}, status=403)
        self.tokens.discard(body["token"])
        broker_id = self.ids.setdefault(body["storage_id"], len(self.ids) + 1)
        return web.json_response(
            {
                "broker_id": broker_id,
                "cert": self.ca.sign(body["csr"], broker_id),
                "ca": self.ca.pem.decode(),
                "cluster_id": self.cluster_id,
            }
        )

    async def group(self, request: web.Request) -> web.Response:
        members = self.members.get(request.match_info["group"])
        return web.json_response({"members": members}, status=404 if members is None else 200)

    async def renew(self, request: web.Request) -> web.Response:
        body = await request.json()
        broker_id = identity_broker_id(node_identity(request.get_extra_info("peercert"), self.cluster_id))
        assert broker_id, "renewal needs the certificate of a broker"
        cert = self.ca.sign(body["csr"], broker_id)
        return web.json_response(
            {"broker_id": broker_id, "cert": cert, "ca": self.ca.pem.decode(), "cluster_id": self.cluster_id}
        )

    def _opened(self, session: ServerSession) -> None:
        self.sessions[session.broker_id] = session

    # -- state --------------------------------------------------------------------------------------

    def create_topic(self, name: str, placement: list[tuple[int, ...]], **config: Any) -> TopicMeta:
        """``placement``: replicas of each partition, the primary first."""
        topic = TopicMeta(
            uuid.uuid4().hex, name, TopicConfig(len(placement), len(placement[0]), **config), self.revision + 1
        )
        self.topics[topic.id] = topic
        for number, replicas in enumerate(placement):
            part = PartitionMeta(
                topic.id, number, replicas, replicas[0], 1, 1, replicas, min_isr=topic.config.min_isr,
                flush=topic.config.flush,
            )  # fmt: skip
            self.partitions[part.key] = part
        self.publish()
        return topic

    def change(self, key: tuple[str, int], **fields: Any) -> PartitionMeta:
        part = self.partitions[key]
        part = msgspec.structs.replace(part, version=part.version + 1, **fields)
        self.partitions[key] = part
        self.publish()
        return part

    def lead(self, key: tuple[str, int], primary: int, isr: tuple[int, ...]) -> PartitionMeta:
        return self.change(key, primary=primary, isr=isr, epoch=self.partitions[key].epoch + 1)

    def fence(self, broker_id: int) -> None:
        """The broker is gone: take it out of every in-sync set, elect where it led."""
        self.brokers[broker_id] = msgspec.structs.replace(self.brokers[broker_id], fenced=True)
        for key, part in list(self.partitions.items()):
            if broker_id not in part.isr:
                continue
            isr = tuple(member for member in part.isr if member != broker_id)
            if not isr:
                self.partitions[key] = msgspec.structs.replace(
                    part, primary=0, isr=(), elr=(broker_id,), epoch=part.epoch + 1, version=part.version + 1
                )
            elif part.primary == broker_id:
                self.partitions[key] = msgspec.structs.replace(
                    part, primary=isr[0], isr=isr, epoch=part.epoch + 1, version=part.version + 1
                )
            else:
                self.partitions[key] = msgspec.structs.replace(part, isr=isr, version=part.version + 1)
        self.publish()

    def publish(self) -> None:
        """Something changed: answer the parked polls."""
        self.revision += 1
        polls, self._polls = self._polls, []
        for session, frame, _ in polls:
            session.answer(Kind.METADATA, frame.correlation, self.answer())

    def answer(self) -> MetadataAnswer:
        return MetadataAnswer(
            self.cluster_id, self.coord_epoch, self.revision, True, list(self.brokers.values()),
            list(self.topics.values()), list(self.partitions.values()),
        )  # fmt: skip

    # -- frames -------------------------------------------------------------------------------------

    def on_frame(self, session: ServerSession, frame: Frame) -> None:
        kind = Kind(frame.kind)
        answer: Any
        if kind is Kind.REGISTER:
            answer = self._register(decode_header(frame.header, Register))
        elif kind is Kind.HEARTBEAT:
            beat = decode_header(frame.header, Heartbeat)
            broker = self.brokers[beat.broker_id]
            if broker.fenced and beat.revision >= self.revision:
                self._unfence(beat.broker_id)
            fenced = self.brokers[beat.broker_id].fenced
            leads = any(part.primary == beat.broker_id for part in self.partitions.values())
            answer = HeartbeatOk(fenced, self.coord_epoch, self.revision, beat.want == "stop" and not leads)
        elif kind is Kind.METADATA:
            ask = decode_header(frame.header, MetadataRequest)
            if (ask.coord_epoch, ask.revision) >= (self.coord_epoch, self.revision) and ask.wait_ms:
                self._polls.append((session, frame, ask))
                return
            answer = self.answer()
        elif kind is Kind.ALTER_ISR:
            asked = decode_header(frame.header, AlterIsrs)
            self.proposals += asked.proposals
            if not self.answer_alter_isr:
                return
            answer = AlterIsrsAnswer([self._alter(proposal) for proposal in asked.proposals])
        elif kind is Kind.RESIGN:
            resign = decode_header(frame.header, Resign)
            self.resigned.append(resign)
            for entry in resign.entries:
                part = self.partitions[entry.topic_id, entry.partition]
                others = tuple(member for member in part.isr if member != resign.broker_id)
                if part.epoch != entry.epoch:
                    continue
                if others:
                    self.lead(part.key, others[0], part.isr)
                else:
                    self.change(part.key, primary=0, isr=(), elr=(resign.broker_id,), epoch=part.epoch + 1)
            answer = Done(self.coord_epoch)
        elif kind is Kind.ENSURE_TOPIC:
            answer = EnsureTopicOk(self._ensure(decode_header(frame.header, EnsureTopic)))
        else:
            self.reports.append(frame)
            answer = Done(self.coord_epoch)
        session.answer(kind, frame.correlation, answer)

    def _ensure(self, asked: EnsureTopic) -> TopicMeta:
        self.ensured.append(asked)
        for topic in self.topics.values():
            if topic.name == asked.name:
                return topic
        alive = [broker.id for broker in self.brokers.values() if not broker.fenced][: asked.config.replication]
        made = self.create_topic(asked.name, [tuple(alive)] * asked.config.partitions)
        self.topics[made.id] = made = msgspec.structs.replace(made, config=asked.config)
        self.publish()
        return made

    def _register(self, register: Register) -> RegisterOk:
        self.registered.append(register)
        self.epochs += 1
        known = self.brokers.get(register.broker_id)
        if known is not None and not known.fenced:
            self.fence(register.broker_id)
        self.brokers[register.broker_id] = BrokerMeta(
            register.broker_id, register.internal, register.external, self.epochs, True
        )
        self.publish()
        return RegisterOk(
            register.broker_id, self.epochs, self.coord_epoch, self.cluster_id, CLAIM_KEY,
            revision=self.revision, request=register.request,
        )  # fmt: skip

    def _unfence(self, broker_id: int) -> None:
        self.brokers[broker_id] = msgspec.structs.replace(self.brokers[broker_id], fenced=False)
        for key, part in list(self.partitions.items()):
            if part.primary == 0 and broker_id in part.elr:
                self.partitions[key] = msgspec.structs.replace(
                    part, primary=broker_id, isr=(broker_id,), elr=(), epoch=part.epoch + 1, version=part.version + 1
                )
        self.publish()

    def _alter(self, proposal: Any) -> AlterIsrResult:
        key = (proposal.topic_id, proposal.partition)
        part = self.partitions[key]
        accepted = proposal.epoch == part.epoch and proposal.version == part.version
        if accepted:
            part = self.change(key, isr=tuple(member.broker_id for member in proposal.new_isr))
        return AlterIsrResult(*key, proposal.request_id, accepted, self.coord_epoch, part)


class RunningBroker:
    """One in-process broker, its stop event and its exit status."""

    def __init__(self, broker: Broker, http: aiohttp.ClientSession) -> None:
        self.broker = broker
        self.url = broker.address.external
        self._http = http
        self._stop = asyncio.Event()
        self._task = asyncio.ensure_future(broker.serve(self._stop))

    @property
    def id(self) -> int:
        return self.broker.node.broker_id

    async def stop(self) -> int:
        """A clean stop; returns the exit status."""
        self._stop.set()
        status = await asyncio.wait_for(self._task, DEADLINE_S)
        await self._http.close()
        return status

    async def crash(self) -> None:
        """End without any of the acts of a stop, as far as one process can do that to itself."""
        broker = self.broker
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for work in broker.background():
            work.close()
        broker.dead_letters.close()
        broker.peers.close()
        broker.node_driver.close()
        for session in list(broker.endpoint.sessions):
            session.abort("crash")
        for site in broker.runner.sites:
            site._server.close()  # type: ignore[union-attr]
        await broker.link.close()
        await self._http.close()
        broker.store.close()


class BrokerWorld:
    """Coordinator and brokers below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.coordinator = ScriptedCoordinator(folder / "coordinator")
        self.running: list[RunningBroker] = []
        self.clients: list[RawClient] = []
        self.http: aiohttp.ClientSession

    async def __aenter__(self) -> BrokerWorld:
        await self.coordinator.start()
        self.http = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self.clients:
            await client.close()
        for running in self.running:
            if not running._task.done():
                await running.crash()
            await running._http.close()  # of one that ended by itself, too
        await self.http.close()
        await self.coordinator.stop()

    def config(self, **settings: Any) -> BrokerConfig:
        defaults: dict[str, Any] = {
            "data_root": self.folder / "brokers",
            "port": 0,
            "coordinator": [self.coordinator.url],
            "ca_file": self.coordinator.ca.file,
            "heartbeat_ms": 50,
            "disk_reserve_bytes": 0,
            "disk_reserve_percent": 0.0,
        }
        return BrokerConfig(**{**defaults, **settings})

    async def broker(self, *, ready: bool = True, storage: Any = None, **settings: Any) -> RunningBroker:
        """Start a broker in the next free directory and wait until it serves."""
        config = self.config(**settings)
        store = NodeStore.open(storage or FileStorage(str(config.data_root)))
        address = bind(config)
        tls = TlsFolder(config.data_root / store.directory / "tls")
        broker_id = store.broker_id or self.coordinator.ids.setdefault(store.storage_id, len(self.coordinator.ids) + 1)
        if not tls.complete:
            self.coordinator.ca.files(tls.folder, broker_id, certificate_names([address.internal], []))
            store.set_identity(self.coordinator.cluster_id, broker_id)
        http = aiohttp.ClientSession()
        running = RunningBroker(Broker(config, store, tls, address, http), http)
        self.running.append(running)
        if ready:
            await eventually(lambda: running.broker._not_ready() == "", f"broker {broker_id} serves")
        return running

    async def topic(self, name: str, placement: list[tuple[int, ...]], **config: Any) -> TopicMeta:
        """Create a topic and wait until its primaries have begun."""
        topic = self.coordinator.create_topic(name, placement, **config)

        def begun() -> bool:
            return all(self.primary(topic.id, number) is not None for number in range(len(placement)))

        await eventually(begun, f"primaries of {name}")
        return topic

    def primary(self, topic_id: str, partition: int = 0) -> RunningBroker | None:
        """The broker that leads and has committed the start of its epoch."""
        for running in self.running:
            hosted = running.broker.partitions.replicas.get((topic_id, partition))
            if not running._task.done() and hosted is not None and hosted.core.ready and not hosted.broken:
                return running
        return None

    async def client(self, url: str) -> RawClient:
        client = await RawClient.open(self.http, url, self.coordinator.tls)
        self.clients.append(client)
        return client


class RawClient:
    """A client that speaks frames and nothing else."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.greeting: HelloOk | None = None
        self.correlation = 0
        self._answers: dict[int, asyncio.Queue[Frame]] = {}
        self.stray: list[Frame] = []
        self._task = asyncio.ensure_future(self._read())

    @classmethod
    async def open(cls, http: aiohttp.ClientSession, url: str, tls: TlsFiles, hello: Hello | None = None) -> RawClient:
        context = node_client_context(tls.ca)
        ws = await http.ws_connect(f"{url}/v1/session", ssl=context, max_msg_size=0)
        client = cls(ws)
        frame = await client.ask(Kind.HELLO, hello or Hello(client="test"))
        raise_error(frame)
        client.greeting = decode_header(frame.header, HelloOk)
        return client

    async def _read(self) -> None:
        async for message in self.ws:
            frame = decode_frame(message.data)
            queue = self._answers.get(frame.correlation)
            if queue is None:
                self.stray.append(frame)
            else:
                queue.put_nowait(frame)

    def send(self, kind: int, header: Any, parts: list[Any] | None = None) -> int:
        """Send a request without waiting; returns its correlation."""
        self.correlation += 1
        self._answers[self.correlation] = asyncio.Queue()
        frame = encode_frame_parts(kind, self.correlation, header, parts or [])
        self._sending = asyncio.ensure_future(self.ws.send_bytes(frame))
        return self.correlation

    async def answer(self, correlation: int, *, within_s: float = DEADLINE_S) -> Frame:
        return await asyncio.wait_for(self._answers[correlation].get(), within_s)

    def arrived(self, correlation: int) -> bool:
        return not self._answers[correlation].empty()

    async def ask(self, kind: int, header: Any, parts: list[Any] | None = None) -> Frame:
        return await self.answer(self.send(kind, header, parts))

    async def call(self, kind: int, header: Any, answer: type[Any]) -> Any:
        frame = await self.ask(kind, header)
        raise_error(frame)
        return decode_header(frame.header, answer)

    async def produce_raw(
        self, entries: list[tuple[ProduceEntry, bytes]], timeout_ms: int = 5000
    ) -> list[ProduceResult]:
        """Results in order of the entries, however many answers bring them."""
        ask = Produce(timeout_ms, [entry for entry, _ in entries])
        correlation = self.send(Kind.PRODUCE, ask, [data for _, data in entries])
        results: dict[int, ProduceResult] = {}
        while True:
            frame = await self.answer(correlation)
            raise_error(frame)
            for result in decode_header(frame.header, ProduceAnswer).results:
                assert result.index not in results, "an entry was answered twice"
                results[result.index] = result
            if not frame.flags & FLAG_MORE:
                return [results[index] for index in range(len(entries))]

    async def produce(
        self, topic: TopicMeta, partition: int, values: list[bytes], producer: tuple[int, int, int] = (-1, -1, -1)
    ) -> ProduceResult:
        data = bytes(encode_batch([(None, value, []) for value in values], producer=producer))
        entry = ProduceEntry(topic.id, partition, topic.config.partitions, len(data))
        return (await self.produce_raw([(entry, data)]))[0]

    async def fetch(
        self, entries: list[FetchEntry], *, wait_ms: int = 0, bytes_max: int = 2**20, secondary: bool = False
    ) -> tuple[FetchAnswer, memoryview]:
        frame = await self.ask(Kind.FETCH, Fetch(wait_ms, bytes_max, entries, secondary))
        raise_error(frame)
        return decode_header(frame.header, FetchAnswer), frame.payload

    async def close(self) -> None:
        self._task.cancel()
        await self.ws.close()
        await asyncio.gather(self._task, return_exceptions=True)
