"""A broker process from its data directory to its last frame: what is made, in which order, and how it ends.

Start: lock a data directory, listen, join (first start only), open the replicas, serve, register. Stop: hand the
primaryships over, answer whoever waits, end the sessions, write the clean-stop marker.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.messages import LOG_DAMAGED
from ferryline_broker.access_rules import ROUTES
from ferryline_broker.appending import Appender
from ferryline_broker.audit import AuditApi
from ferryline_broker.background import Background
from ferryline_broker.clients import FrameRouter
from ferryline_broker.config import BrokerConfig
from ferryline_broker.coordinator import CoordinatorLink
from ferryline_broker.core import events as ev
from ferryline_broker.core.node import NodeConfig, NodeCore, NodeIdentity
from ferryline_broker.core.partition import ReplicaConfig
from ferryline_broker.core.queue_config import QueueConfig
from ferryline_broker.dead_letters import DeadLetters
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.faulty import open_storage
from ferryline_broker.gauges import Gauges
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.join import TlsFolder, join
from ferryline_broker.log.group import GroupFlush
from ferryline_broker.log.interface import LogDamaged
from ferryline_broker.log.node_store import NodeStore
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.node_driver import NodeDriver
from ferryline_broker.node_sessions import NodeSessions
from ferryline_broker.openapi import OPERATIONS, openapi_handler
from ferryline_broker.opening import Opener
from ferryline_broker.peers import Peers
from ferryline_broker.queue_port import Queues
from ferryline_broker.renewal import Renewal
from ferryline_broker.rest import RestApi
from ferryline_broker.rest_backup import BackupApi
from ferryline_broker.rest_certificates import CertificateApi
from ferryline_broker.rest_offsets import Members, OffsetsApi
from ferryline_broker.rest_queues import QueueApi
from ferryline_broker.rest_read import ReadApi
from ferryline_broker.sabotage import core_class
from ferryline_broker.stored import StoredTeller
from ferryline_broker.upkeep import Upkeep
from ferryline_broker.view import ClusterView
from ferryline_service.access.parts import Access
from ferryline_service.contract import contract_middleware
from ferryline_service.errors import error_middleware
from ferryline_service.expiry import Expiry
from ferryline_service.health import health_routes
from ferryline_service.logs import get_logger
from ferryline_service.programs import announce_ready
from ferryline_service.session import SessionEndpoint
from ferryline_service.slow_connections import SlowConnections
from ferryline_service.tls import knows_node

_log = get_logger()
_FATAL_GRACE_S = 1.0  # to tell the coordinator why, before the process ends
# An idle fetch is renewed rarely, because every idle partition has one: every 5 s, 10,000 partitions cost a quarter of
# a core. A session that is lost shows by its own pings, and a parked fetch at the log end is no lag.
_FETCH_WAIT_MS, _FETCH_RETRY_SLACK_MS = 60_000, 5_000
_STOP_SLACK_S = 3.0  # beyond the node core's own limit
EXIT_OK, EXIT_FAILED = 0, 1
EXIT_SPACE = 75  # replicas stopped for want of space, and there is some again: to be started again (EX_TEMPFAIL)


@dataclass
class Address:
    """Where this broker listens and how it is reached."""

    listening: socket.socket
    internal: str
    external: str


def bind(config: BrokerConfig) -> Address:
    """Listen before joining, so that the advertised URLs name the port that was found. Raises OSError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.create_server((config.host, config.port), family=family, backlog=1024, reuse_port=False)
    port = listening.getsockname()[1]
    host = socket.gethostname() if config.host in ("0.0.0.0", "::") else config.host
    default = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    internal = config.advertise_internal or default
    return Address(listening, internal, config.advertise_external or internal)


def _identity(store: NodeStore, address: Address, partitions: PartitionDriver) -> NodeIdentity:
    return NodeIdentity(
        store.broker_id,
        store.storage_id,
        store.incarnation,
        store.restart_class,
        address.internal,
        address.external,
        store.seen_coord_epoch,
        store.cluster_id,
        {key: hosted.core.report().log_state for key, hosted in partitions.replicas.items()},
    )


class Broker:
    """All parts of one broker. Made by `run_broker` once the broker knows who it is."""

    def __init__(
        self, config: BrokerConfig, store: NodeStore, tls: TlsFolder, address: Address, http: aiohttp.ClientSession
    ) -> None:
        self.config = config
        self.store = store
        self.address = address
        self.fatal: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.leaving: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._status = EXIT_FAILED  # of an end that is not clean
        self.metrics = metrics = BrokerMetrics(config.metrics_topics_max)
        self.tls = files = tls.files()
        group = GroupFlush(store.storage)
        self.partitions = partitions = PartitionDriver(metrics, group, self._on_fatal)
        replica_config = ReplicaConfig(
            fetch_bytes_max=config.fetch_bytes_max,
            fetch_wait_ms=_FETCH_WAIT_MS,
            fetch_retry_ms=_FETCH_WAIT_MS + _FETCH_RETRY_SLACK_MS,
            lag_max_ms=config.lag_max_ms,
            queue=QueueConfig(overdue_ms=config.priority_wait_ms),
        )
        opener = Opener(store, metrics, replica_config, core_class())
        for hosted in opener.open_all(store.broker_id):
            partitions.host(hosted)
        identity = _identity(store, address, partitions)
        node_config = NodeConfig(heartbeat_ms=config.heartbeat_ms, stop_ms=config.stop_ms)
        self.node = node = NodeCore(node_config, identity)
        self.view = view = ClusterView(node.metadata)
        self.access = access = Access(metrics, claim_key=lambda: view.claim_key)
        # Before the first metadata nobody is known; those who ask then are asked again with the next session.
        access.gate.is_node = lambda identity: not view.metadata.brokers or knows_node(view.metadata.brokers, identity)
        self.peers = peers = Peers(partitions, node, http, files)
        self.link = link = CoordinatorLink(node, http, files, store.cluster_id, config.coordinator)
        self.node_driver = NodeDriver(node, partitions, link, store, opener, view, metrics)
        partitions.peers, partitions.link = peers, link
        partitions.delete_replica = self.node_driver.work.delete_replica
        link.listener, link.count = self.node_driver, metrics.error
        link.on_access = lambda policy, registered: access.take(policy, registered=registered)
        self.frames = FrameRouter(config, partitions, view, metrics, peers, access.quotas)
        partitions.queues = self.queues = Queues(partitions, self.frames.queues, self.frames.records)
        sessions = NodeSessions(node, http, files)
        self.dead_letters = DeadLetters(partitions, view, self.frames.records, link, sessions, store.broker_id)
        self.queues.move = self.dead_letters.move
        appender = Appender(partitions, view, sessions, store.broker_id)
        self.rest = RestApi(view, appender, access.quotas)
        self.rest_read = ReadApi(partitions, view, access.gate.admit, quotas=access.quotas)
        members = Members(http, files, view, config.coordinator)
        self.rest_offsets = OffsetsApi(partitions, view, self.frames.groups, sessions, members)
        self.rest_queues = QueueApi(partitions, view, self.frames.queues)
        self.audit = AuditApi(partitions, view, store.broker_id)
        self.backup = BackupApi(partitions, view)
        partitions.on_damaged = self._on_damaged
        partitions.on_unwritable = self._leave_soon
        self.node_driver.on_metadata = self._on_metadata
        metrics.partitions = Gauges(partitions, view)
        metrics.exists = lambda name: view.metadata.topic(name) is not None or not view.metadata.cluster_id
        self.endpoint = SessionEndpoint(
            server="broker",
            cluster_id=store.cluster_id,
            on_frame=self.frames,
            metrics=metrics,
            broker_id=store.broker_id,
        )
        self.upkeep = Upkeep(config, store, group, partitions, self.node_driver, metrics)
        self.upkeep.on_space = lambda: self._leave_soon("there is space again", EXIT_SPACE)
        urls = [address.internal, address.external]
        self.renewal = Renewal(http, tls, files, urls, config.tls_names, config.coordinator)
        self.certificates = CertificateApi(tls, self.renewal)
        self.stored = StoredTeller(partitions, view, node, link, access.gate)

    def _on_metadata(self) -> None:
        self.access.quotas.live(sum(not broker.fenced for broker in self.view.metadata.brokers.values()))
        self.peers.reconcile()
        self.frames.metadata.changed()
        self.dead_letters.metadata_changed()

    def _on_damaged(self, hosted: HostedReplica, damage: LogDamaged) -> None:
        """Remember it beyond a restart, which would trust bytes that it need not read; then fetch this copy again as
        soon as nobody counts on it any more."""
        try:
            hosted.store.mark_damaged(damage.message)
        except FerrylineError as error:
            _log.error("damage could not be remembered", partition=hosted.name, error=str(error))
        told = ev.ReplicaOpened(hosted.key, LOG_DAMAGED)
        asyncio.get_running_loop().call_soon(self.node_driver.node_event, told)  # not inside the node's own effects

    def _on_fatal(self, reason: str) -> None:
        if not self.fatal.done():
            self.fatal.set_result(reason)

    def _leave_soon(self, reason: str, status: int = EXIT_FAILED) -> None:
        """End in order, with ``status`` and without the mark of a clean stop: the next start looks at every log."""
        if not self.leaving.done():
            _log.critical("leaving", reason=reason)
            self._status = status
            self.leaving.set_result(reason)

    # -- serving ------------------------------------------------------------------------------------

    def application(self) -> web.Application:
        self.access.watch(self.endpoint)
        middlewares = [error_middleware(self.metrics), *self.access.middlewares(), contract_middleware(OPERATIONS)]
        app = web.Application(middlewares=middlewares, client_max_size=8 * 1024 * 1024)
        app.router.add_routes(self.access.routes())
        app.router.add_routes(self.endpoint.routes())
        app.router.add_routes(health_routes(self._not_ready, self._about))
        app.router.add_routes(self.metrics.routes())
        app.router.add_routes([*self.rest.routes(), *self.rest_read.routes(), *self.rest_offsets.routes()])
        app.router.add_routes(self.rest_queues.routes())
        app.router.add_routes(self.audit.routes())
        app.router.add_routes(self.backup.routes())
        app.router.add_routes(self.certificates.routes())
        app.router.add_get("/openapi.json", openapi_handler(app.router, lambda: self.access.gate.enabled))
        self.access.gate.guard(app.router, ROUTES)
        app.on_shutdown.append(self._shut_down)
        return app

    def _not_ready(self) -> str:
        node = self.node
        if node.stopping:
            return "stopping"
        if not node.metadata.cluster_id:
            return "not registered yet"
        return "fenced: the coordinator does not count on this broker" if node.fenced else ""

    def _about(self) -> dict[str, Any]:
        node = self.node
        return {
            "service": "broker",
            "broker_id": node.broker_id,
            "broker_epoch": node.broker_epoch,
            "incarnation": self.store.incarnation,
            "cluster_id": self.store.cluster_id,
            "fenced": node.fenced,
        }

    async def _shut_down(self, _: web.Application) -> None:
        self.partitions.settle_everything("COMMIT_UNKNOWN", "this broker stopped before the outcome was known")
        self.frames.close()
        self.rest_read.close()
        self.rest_queues.close()
        await self.endpoint.close()

    async def serve(self, stop: asyncio.Event) -> int:
        """Serve until asked to stop, or until the disk fails. Returns the exit status."""
        self.runner = runner = web.AppRunner(
            self.application(), access_log=None, shutdown_timeout=2.0, auto_decompress=False
        )
        await runner.setup()
        await self._listen(runner)
        slow = SlowConnections(runner)
        slow.start()
        self.link.start()
        for work in self.background():
            work.start()
        self.node_driver.on_serving = self._announce
        ended = await self._until_ended(stop)
        for work in self.background():
            work.close()
        self.dead_letters.close()
        self.peers.close()
        slow.close()
        await runner.cleanup()
        await self.link.close()
        self.node_driver.close()
        await self.access.close()
        return self._leave(ended)

    def background(self) -> tuple[Background, ...]:
        """What goes on beside the traffic, from the first connection to the last."""
        return self.upkeep, self.stored, self.renewal

    async def _listen(self, runner: web.AppRunner) -> None:
        await web.SockSite(runner, self.address.listening, ssl_context=self.tls.server).start()

    def _announce(self) -> None:
        """Registered, and the coordinator counts on this broker: whoever started it may go on."""
        port: int = self.address.listening.getsockname()[1]
        announce_ready(
            service="broker", url=self.address.external, pid=os.getpid(), broker_id=self.store.broker_id, port=port
        )

    async def _until_ended(self, stop: asyncio.Event) -> ev.StopNow:
        asked = asyncio.ensure_future(stop.wait())
        stopped, fatal = self.node_driver.stopped, self.fatal
        waits: list[asyncio.Future[Any]] = [stopped, fatal, asked, self.leaving]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done() and not fatal.done():
            _log.info("stopping: handing over")
            self.node_driver.node_event(ev.StopAsked())
            limit_s = self.config.stop_ms / 1000 + _STOP_SLACK_S
            await asyncio.wait(waits[:2], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if fatal.done():
            reason = fatal.result()
            _log.critical("storage failed, leaving", reason=reason)
            self.partitions.feed_all(ev.StorageFailed(0, reason))
            await asyncio.sleep(_FATAL_GRACE_S)  # the reports leave now; if they do not, fencing does the rest
            self._status = EXIT_FAILED
            return ev.StopNow(False, reason)
        if self.leaving.done():
            return ev.StopNow(False, self.leaving.result())
        return stopped.result() if stopped.done() else ev.StopNow(True, "time for stopping is up")

    def _leave(self, ended: ev.StopNow) -> int:
        """Close the files; a clean stop says so as its last act."""
        _log.info("stopped", clean=ended.clean, reason=ended.reason)
        try:
            if ended.clean:
                self.upkeep.last_checkpoints()
                self.store.mark_clean_stop()
            self.store.close()
        except FerrylineError as error:
            _log.error("stopped, but not cleanly", error=str(error))
            return EXIT_FAILED
        return EXIT_OK if ended.clean else self._status


async def run_broker(config: BrokerConfig, stop: asyncio.Event) -> int:
    """The whole life of a broker. Returns its exit status."""
    storage, boot_id = open_storage(str(config.data_root))
    store = NodeStore.open(storage, boot_id=boot_id)
    _log.info("data directory", directory=f"{config.data_root}/{store.directory}", restart=store.restart_class)
    address = bind(config)
    tls = TlsFolder(config.data_root / store.directory / "tls")
    if not (tls.complete and store.broker_id) and not await _join(config, store, tls, address, stop):
        store.close()
        return EXIT_OK if stop.is_set() else EXIT_FAILED
    timeout = aiohttp.ClientTimeout(total=None, connect=2.0)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        broker = Broker(config, store, tls, address, http)
        broker.metrics.certificates = Expiry({"node": tls.cert, "ca": tls.ca}).seconds
        broker.access.begin(store.cluster_id, config.data_root / store.directory / "audit")
        return await broker.serve(stop)


async def _join(config: BrokerConfig, store: NodeStore, tls: TlsFolder, address: Address, stop: asyncio.Event) -> bool:
    """Become a member of the cluster. False when asked to stop before, or when the coordinator refused."""
    try:
        joined = await join(config, tls, store.storage_id, address.internal, address.external, stopped=stop.is_set)
    except FerrylineError as error:
        _log.critical("the cluster does not take this broker", error=str(error), remedy=error.remedy)
        return False
    if joined is None:
        return False
    store.set_identity(joined.cluster_id, joined.broker_id)
    _log.info("joined", broker_id=joined.broker_id, cluster_id=joined.cluster_id)
    return True
