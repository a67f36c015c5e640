"""The coordinator put together: authority, store, driver, sessions and REST behind one listening socket."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from ferryline.protocol.access import CLUSTER, AccessPolicy
from ferryline.protocol.errors import CoordinatorLoading, FerrylineError, Forbidden
from ferryline_coordinator.access_rules import ROUTES
from ferryline_coordinator.access_watch import AccessWatch
from ferryline_coordinator.authority import Authority, checked_request
from ferryline_coordinator.bootstrap import ADMIN, bootstrap_admin
from ferryline_coordinator.config import CoordinatorConfig
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.coordinator import CoordinatorCore
from ferryline_coordinator.core.records import CLUSTER_KEY, cluster_id_of
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.metrics import CoordinatorMetrics
from ferryline_coordinator.models import BODY_BYTES_MAX, Join, Renew
from ferryline_coordinator.openapi import OPERATIONS, document
from ferryline_coordinator.own_certificate import OwnCertificate
from ferryline_coordinator.probing import Prober, refuses
from ferryline_coordinator.rest import Rest
from ferryline_coordinator.rest_backup import BackupRest
from ferryline_coordinator.rest_certificates import CertificateRest
from ferryline_coordinator.rest_definitions import DefinitionRest
from ferryline_coordinator.rest_exchanges import ExchangeRest
from ferryline_coordinator.rest_login import LoginRest
from ferryline_coordinator.rest_principals import PrincipalRest
from ferryline_coordinator.rest_upgrade import UpgradeRest
from ferryline_coordinator.sessions import Sessions
from ferryline_coordinator.store.interface import MetaStore, StoreUnusable
from ferryline_coordinator.store.opening import open_store
from ferryline_service.access.parts import Access
from ferryline_service.contract import contract_middleware
from ferryline_service.errors import error_middleware, read_json
from ferryline_service.expiry import Expiry
from ferryline_service.health import health_routes
from ferryline_service.logs import get_logger
from ferryline_service.programs import announce_ready
from ferryline_service.session import SessionEndpoint
from ferryline_service.slow_connections import SlowConnections
from ferryline_service.tls import TlsFiles, identity_broker_id, knows_node, node_identity

_REFILL_S = 1.0
_FOUNDED_S = 0.2  # a standby looks this often whether the cluster has been founded
_AWAY_S = 600.0
_RELOAD_S = 60.0
_SHARED_S = 5.0  # for a look at what the coordinators share; without etcd there is the next one
_log = get_logger()


class Coordinator:
    """One coordinator process. `start` returns when it serves; `wait` when it must end; `stop` ends it."""

    def __init__(self, config: CoordinatorConfig, store: MetaStore | None = None) -> None:
        self.config = config
        self.authority: Authority
        self.metrics = CoordinatorMetrics(self._core)
        self.access = Access(self.metrics, claim_key=self._claim_key, unknown=self._unknown)
        self.access.gate.is_node = self._is_node
        self.url = ""
        self.driver: Driver
        self._given_store = store
        self._store: MetaStore
        self._own: OwnCertificate | None = None
        self._tls: TlsFiles | None = None
        self._prober: Prober
        self._sessions: Sessions
        self._endpoint: SessionEndpoint | None = None
        self._members: dict[str, float] = {}  # URL -> when it was last seen to run
        self._runner: web.AppRunner | None = None
        self._slow: SlowConnections | None = None
        self._access_watch: AccessWatch | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._driver_made = False
        self._bootstrapped = config.bootstrap_admin is None

    def _core(self) -> CoordinatorCore | None:
        return self.driver.core if self._driver_made else None

    def _claim_key(self) -> bytes:
        cluster = self.driver.state.cluster if self._driver_made else None
        return cluster.claim_key if cluster is not None else b""

    def _is_node(self, identity: str) -> bool:
        """A standby cannot know: it serves nodes, and changes nothing for them."""
        if not self._driver_made or not self.driver.serving:
            return True
        return knows_node(self.driver.state.brokers, identity)

    def _unknown(self) -> FerrylineError:
        if self._driver_made and not self.driver.serving:
            return self.driver.not_serving()
        return CoordinatorLoading("this coordinator is about to learn who may do what")

    # -- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, win primaryship or stand by, serve. Raises StoreUnusable, OSError."""
        config = self.config
        listener = await self._listen()
        port = listener.getsockname()[1]
        self.url = config.url(port)
        cluster_id = await self._open()
        if not config.plain_http:
            self.authority.crl_url = f"{self.url}/v1/ca.crl"
            hosts = [socket.gethostname(), *self._listening_name(), *config.hosts, *self._url_host()]
            self._own = OwnCertificate(self.authority, cluster_id, hosts)
            self._tls = self._own.files
            self.metrics.certificates = Expiry({"node": self._tls.cert, "ca": self._tls.ca}).seconds
        self.access.begin(cluster_id, config.data_dir / "audit")
        self._prober = Prober(self._tls.client if self._tls is not None else None, self._probed)
        self._endpoint = SessionEndpoint(
            server="coordinator",
            cluster_id=cluster_id,
            on_frame=self._sessions.on_frame,
            on_open=self._sessions.opened,
            admit=self._admit,
            metrics=self.metrics,
            trust_hello=config.plain_http,
        )
        self.authority.refill(config.join_tokens)
        self._upkeep = asyncio.get_running_loop().create_task(self._keep_up())
        self._runner = web.AppRunner(
            self._app(self._endpoint), access_log=None, shutdown_timeout=3.0, auto_decompress=False
        )
        await self._runner.setup()
        await web.SockSite(self._runner, listener, ssl_context=self._tls.server if self._tls else None).start()
        self._slow = SlowConnections(self._runner)
        self._slow.start()
        await self._bootstrap()
        active = self.driver.serving
        _log.info("serving", url=self.url, cluster_id=cluster_id, active=active, epoch=self.driver.core.coord_epoch)
        announce_ready(
            service="coordinator",
            url=self.url,
            port=port,
            pid=os.getpid(),
            cluster_id=cluster_id,
            ca=str(self.authority.ca_path),
            active=active,
        )

    async def _open(self) -> str:
        """Store, authority and driver. Returns the cluster's id, once it is known."""
        config, store, vault = self.config, self._given_store, None
        if store is None:
            store, vault = open_store(config, self.url, refuses)
        self._store = store
        if vault is None:
            self.authority = Authority(config.data_dir, config.join_token_dir)
        else:
            self.authority = await Authority.shared(config.data_dir, vault, config.join_token_dir)
        if config.access is not None:
            self._access_watch = AccessWatch(config.access)
        access = self._access_watch.policy if self._access_watch is not None else None
        self.driver = driver = Driver(store, config.core((self.url,), access), self)
        if self._access_watch is not None:
            self._access_watch.take = self._access_file_changed
        self._driver_made = True
        self._sessions = Sessions(driver)
        driver.on_committed = self.metrics.commit_seconds.observe
        self.metrics.active = lambda: driver.serving
        self.metrics.terms_lost = lambda: driver.terms_lost
        self.metrics.deposed = lambda: getattr(store, "deposed", 0)
        if await store.members() is None:
            await driver.start()
            await driver.settled()  # what the access file says holds before anybody is served
            assert driver.state.cluster is not None
            return driver.state.cluster.cluster_id
        driver.begin()
        while not driver.failed.done():
            known = (await store.load(0)).records.get(CLUSTER_KEY)
            if known is not None:
                return cluster_id_of(known[0])
            await asyncio.sleep(_FOUNDED_S)
        raise driver.failed.result()

    def _admit(self) -> None:
        """A standby has no sessions: whoever comes is told who is active."""
        if not self.driver.serving:
            raise self.driver.not_serving()

    async def _listen(self) -> socket.socket:
        host, port = self.config.host, self.config.port
        infos = await asyncio.get_running_loop().getaddrinfo(host or None, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = infos[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        return listener

    def _listening_name(self) -> list[str]:
        return [] if self.config.host in ("0.0.0.0", "::", "") else [self.config.host]

    def _url_host(self) -> list[str]:
        host = urlsplit(self.config.advertise).hostname if self.config.advertise else None
        return [host] if host else []

    async def stop(self) -> None:
        """Answer whoever waits, end sessions, commit what was decided, let go of the store."""
        if self._upkeep is not None:
            self._upkeep.cancel()
        if self._driver_made:
            await self.driver.step_down()  # first of all: the next one begins while we say goodbye
        if self._slow is not None:
            self._slow.close()
        if self._runner is not None:
            await self._runner.cleanup()
            await self._prober.close()
        await self.access.close()
        if self._driver_made:
            await self.driver.close()

    async def wait(self, stop: asyncio.Event) -> BaseException | None:
        """Return None when ``stop`` is set, or why this process cannot go on."""
        self.driver.failed.add_done_callback(lambda _: stop.set())
        await stop.wait()
        return self.driver.failed.result() if self.driver.failed.done() else None

    def _app(self, endpoint: SessionEndpoint) -> web.Application:
        if self.config.access is None:
            self.access.take(None)
        self.access.watch(endpoint)
        middlewares = [error_middleware(self.metrics), *self.access.middlewares(), contract_middleware(OPERATIONS)]
        app = web.Application(middlewares=middlewares, client_max_size=BODY_BYTES_MAX)
        app.router.add_routes(endpoint.routes())
        app.router.add_routes([*self.access.routes(), *PrincipalRest(self.driver, self.access.gate).routes()])
        app.router.add_routes(LoginRest(self.access.gate).routes())
        app.router.add_routes([*Rest(self.driver).routes(), *ExchangeRest(self.driver).routes()])
        app.router.add_routes(DefinitionRest(self.driver).routes())
        app.router.add_routes([*BackupRest(self.driver).routes(), *UpgradeRest(self.driver).routes()])
        app.router.add_routes(CertificateRest(lambda: self.authority, self._renew_own).routes())
        app.router.add_routes([web.post("/v1/join", self._join), web.post("/v1/renew", self._renew)])
        app.router.add_routes(health_routes(self._not_ready, self._about, self._standby_for))
        app.router.add_routes(self.metrics.routes())
        app.router.add_routes([web.get("/openapi.json", self._openapi), web.get("/v1/ca.crl", self._revoked)])
        self.access.gate.guard(app.router, ROUTES)
        app.on_shutdown.append(self._shut_down)
        return app

    async def _openapi(self, request: web.Request) -> web.Response:
        """This document."""
        return web.json_response(document(request.app.router.routes(), secured=self.access.gate.enabled))

    async def _revoked(self, _: web.Request) -> web.Response:
        """Certificates of brokers that were forgotten. A standby does not know."""
        self._admit()
        body = self.authority.revocation_list(self.driver.state.brokers)
        return web.Response(body=body, content_type="application/pkix-crl", headers={"Cache-Control": "max-age=60"})

    async def _shut_down(self, _: web.Application) -> None:
        self.driver.answer_parked()
        self._sessions.stop()
        if self._endpoint is not None:
            await self._endpoint.close()

    def _not_ready(self) -> str:
        return "" if self.driver.serving else "no coordinator is active at the moment"

    def _standby_for(self) -> str:
        return "" if self.driver.serving else self._store.active()

    def _about(self) -> dict[str, Any]:
        core = self.driver.core
        return {
            "service": "coordinator",
            "cluster_id": self._endpoint.cluster_id if self._endpoint is not None else "",
            "coord_epoch": core.coord_epoch,
            "active": self.driver.serving,
            "certificates": self._own.shown if self._own is not None else None,
        }

    async def _keep_up(self) -> None:
        """Replace used join tokens; take over renewed certificates; tell which coordinators there are."""
        loop = asyncio.get_running_loop()
        reload_at = loop.time() + _RELOAD_S
        while True:
            await asyncio.sleep(_REFILL_S)
            try:
                self.authority.refill(self.config.join_tokens)
                if self._tls is not None and loop.time() >= reload_at:
                    reload_at = loop.time() + _RELOAD_S
                    self._renew_own()
                if self._access_watch is not None:
                    self._access_watch.look()
                brokers = self.driver.state.brokers.values()
                self.access.quotas.live(sum(not record.meta.fenced for record in brokers))
                await self._bootstrap()
                await self._tell_members(loop.time())
                await asyncio.wait_for(self._follow_ca(), _SHARED_S)
            except (OSError, FerrylineError, StoreUnusable) as error:
                _log.error("upkeep failed", error=f"{type(error).__name__}: {error}")

    async def _follow_ca(self) -> None:
        """Take over what another coordinator has made of the CA; new sessions see it at once."""
        if await self.authority.refresh():
            self._renew_own()

    def _renew_own(self, anew: bool = False) -> Path | None:
        """See `OwnCertificate.renew`; None without TLS."""
        return self._own.renew(anew) if self._own is not None else None

    async def _bootstrap(self) -> None:
        """The first key, if it was asked for, by whoever is active first."""
        if not self._bootstrapped and self.driver.serving and self.config.bootstrap_admin is not None:
            if await bootstrap_admin(self.driver, self.config.bootstrap_admin):
                self.access.noted("bootstrap_admin", "principal", ADMIN)
            self._bootstrapped = True

    async def _tell_members(self, now_s: float) -> None:
        """One that is away for a while is still told: it may come back, and asking it costs little."""
        running = await self._store.members() if self.driver.serving else None
        if running is None or not self.driver.serving:
            return
        told = self.driver.state.cluster.coordinators if self.driver.state.cluster is not None else ()
        for url in [*[url for url in told if url not in self._members], *running, self.url]:
            self._members[url] = now_s
        self._members = {url: seen for url, seen in self._members.items() if now_s - seen < _AWAY_S}
        urls = tuple(sorted(self._members))
        if urls != told:
            self.driver.post(ev.CoordinatorsKnown(urls))

    # -- what the driver needs done -----------------------------------------------------------------

    def tell(self, broker_id: int, kind: int, message: Any) -> None:
        self._sessions.tell(broker_id, kind, message)

    def probe(self, probe: ev.Probe) -> None:
        self._prober.start(probe)

    def _probed(self, event: ev.ProbeEnded) -> None:
        if self.driver.serving:
            self.driver.post(event)

    def noted(self, note: ev.Note) -> None:
        self.metrics.noted(note)
        getattr(_log, note.level)(note.name.replace("_", " "), **note.fields)

    def access_changed(self, policy: AccessPolicy) -> None:
        self.access.take(policy, registered=True)

    def _access_file_changed(self, file: AccessPolicy) -> None:
        counts = {name: len(getattr(file, name)) for name in ("principals", "issuers", "rules")}
        self.access.noted("reload_access", CLUSTER, str(self.config.access), **counts)
        self.driver.take_access(file)

    def reload_access(self) -> None:
        """Read the access file again now, if there is one."""
        if self._access_watch is not None:
            self._access_watch.reload()

    def term_ended(self) -> None:
        if self.config.access is not None:
            self.access.gate.forget()
        self._sessions.end_all(self._endpoint.sessions if self._endpoint is not None else ())

    # -- joining ------------------------------------------------------------------------------------

    async def _join(self, request: web.Request) -> web.Response:
        """A new broker: a token for an id and a certificate."""
        body = Join.model_validate(await read_json(request))
        checked_request(body.csr)  # before the token is used up
        self._admit()
        await self.authority.use_token(body.token, body.storage_id)
        admitted = await self.driver.ask(
            lambda reply: ev.BrokerAdmitted(reply, body.storage_id, body.internal_url, body.external_url)
        )
        return await self._certified(body.csr, admitted.broker_id, admitted.cluster_id)

    async def _renew(self, request: web.Request) -> web.Response:
        """A known broker: a new certificate for the one it shows."""
        body = Renew.model_validate(await read_json(request))
        self._admit()
        assert self._endpoint is not None
        cluster_id = self._endpoint.cluster_id
        broker_id = identity_broker_id(node_identity(request.get_extra_info("peercert"), cluster_id))
        if not broker_id or broker_id not in self.driver.state.brokers:
            raise Forbidden("renewal needs the certificate of a broker of this cluster")
        return await self._certified(body.csr, broker_id, cluster_id)

    async def _certified(self, csr: str, broker_id: int, cluster_id: str) -> web.Response:
        await self._follow_ca()  # it may have been changed by the one that was active before
        cert = self.authority.sign_broker(csr, broker_id, cluster_id)
        told = {"broker_id": broker_id, "cert": cert, "ca": self.authority.ca_pem, "cluster_id": cluster_id}
        return web.json_response(told)
