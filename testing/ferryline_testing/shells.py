"""The services' own shells, with what needs a socket, a disk or a certificate taken out.

Coordinator: its driver, core, sessions, REST and probes, on a store in memory. Broker: all of `Broker`, on
`MemoryStorage`. Left out are join tokens, the making and renewal of certificates, and the READY line.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any, cast

import aiohttp
from aiohttp import web

from ferryline.protocol.metadata import PartitionMeta
from ferryline_broker.app import Address, Broker
from ferryline_broker.config import BrokerConfig
from ferryline_broker.core.replica import ROLE_PRIMARY
from ferryline_broker.log.node_store import NodeStore
from ferryline_coordinator.app import Coordinator
from ferryline_coordinator.config import CoordinatorConfig
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.probing import Prober
from ferryline_coordinator.sessions import Sessions
from ferryline_coordinator.store.memory import MemoryStore
from ferryline_service.session import SessionEndpoint
from ferryline_testing.connecting import NetworkConnector
from ferryline_testing.lives import Life
from ferryline_testing.network import Network

COORDINATOR = "coordinator"
_UPKEEP_TICK_MS = 500  # production looks every 20 ms, which is half of what an idle broker does
_NOWHERE = Path("/nowhere")


def url_of(name: str) -> str:
    return f"https://{name}"


class MemoryCoordinator(Coordinator):
    """A coordinator of one life."""

    def __init__(self, network: Network, life: Life, store: MemoryStore) -> None:
        config = CoordinatorConfig.model_construct(data_dir=_NOWHERE, advertise=url_of(life.name))  # no environment
        super().__init__(config, store)
        self._network, self._life, self._memory = network, life, store

    async def start(self) -> None:
        self.url = self.config.advertise
        self._store = self._memory
        self.driver = driver = Driver(self._memory, self.config.core((self.url,)), self)
        self._driver_made = True
        self._sessions = Sessions(driver)
        self._prober = Prober(None, self._probed, NetworkConnector(self._network, self._life))
        self.metrics.active = lambda: driver.serving
        await driver.start()
        cluster = driver.state.cluster
        assert cluster is not None
        self._life.cluster_id = cluster.cluster_id
        self._endpoint = SessionEndpoint(
            server="coordinator",
            cluster_id=cluster.cluster_id,
            on_frame=self._sessions.on_frame,
            on_open=self._sessions.opened,
            admit=self._admit,
            metrics=self.metrics,
        )
        self._runner = await _serving(self._app(self._endpoint), self._network, self._life)

    def unsettled(self) -> str:
        """What is not yet as it should be; "" if all is well."""
        if not self.driver.serving:
            return "the coordinator does not serve"
        state = self.driver.state
        for broker in state.broker_metas():
            if broker.fenced:
                return f"broker {broker.id} is fenced"
        for key in state.part_keys():
            part = state.parts[key].meta
            if part.primary == 0 or set(part.isr) != set(part.replicas) or part.adding or part.removing:
                return f"{self._name_of(part)}: primary {part.primary}, in sync {part.isr} of {part.replicas}"
        return ""

    def _name_of(self, part: PartitionMeta) -> str:
        return f"{self.driver.state.topics[part.topic_id].name}/{part.partition}"


class _Context(ssl.SSLContext):
    def __repr__(self) -> str:
        return "context"  # it is in error messages, which must not name addresses in memory


class _Files:
    """Of `TlsFiles`: contexts that no handshake ever sees. They make the code paths those of TLS."""

    def __init__(self) -> None:
        self.client = self.server = _Context(ssl.PROTOCOL_TLS_CLIENT)


class _Folder:
    """Of `TlsFolder`."""

    def files(self) -> Any:
        return _Files()


class _NoRenewal:
    """Of `Renewal`: certificates do not end here."""

    def start(self) -> None:
        return

    def close(self) -> None:
        return


class MemoryBroker(Broker):
    """A broker of one life."""

    def __init__(self, network: Network, life: Life, store: NodeStore, http: aiohttp.ClientSession) -> None:
        config = BrokerConfig.model_construct(  # no environment
            data_root=_NOWHERE, coordinator=[url_of(COORDINATOR)], disk_reserve_bytes=0, disk_reserve_percent=0.0
        )
        url = url_of(life.name)
        super().__init__(config, store, cast(Any, _Folder()), Address(cast(Any, None), url, url), http)
        self.renewal = cast(Any, _NoRenewal())
        self.upkeep.tick_ms = _UPKEEP_TICK_MS
        self.upkeep._group._seconds = network.loop.time  # what is cheaper must not hang on this machine
        self.announced = asyncio.Event()
        self._network, self._life = network, life

    async def _listen(self, runner: web.AppRunner) -> None:
        self._network.listen(self._life, _factory(runner))

    def _announce(self) -> None:
        self.announced.set()

    def queue_deadline_ms(self) -> int | None:
        """When the first delayed record or lease of a queue that this broker leads falls due."""
        due = [
            deadline
            for hosted in self.partitions.replicas.values()
            if (primary := hosted.core.primary) is not None
            and primary.queues is not None
            and (deadline := primary.queues.next_deadline_ms()) is not None
        ]
        return min(due, default=None)

    def leases(self) -> int:
        """How many leases receivers hold of the queues that this broker leads."""
        queues = [hosted.core.primary.queues for hosted in self.partitions.replicas.values() if hosted.core.primary]
        return sum(len(queue.table.leases) for led in queues if led is not None for queue in led._queues.values())

    def log_ends(self) -> list[tuple[str, int, tuple[int, ...], bool]]:
        """What changes as soon as anything is written or anybody takes over."""
        return [
            (
                hosted.name,
                hosted.core.epoch,
                tuple(log.log_end for log in hosted.logs),
                hosted.core.role == ROLE_PRIMARY,
            )
            for hosted in self.partitions.replicas.values()
        ]

    def time_passed(self) -> None:
        """Deadlines of partitions that a leap went over."""
        self.partitions._deadlines._tick()


async def _serving(app: web.Application, network: Network, life: Life) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0, auto_decompress=False)
    await runner.setup()
    network.listen(life, _factory(runner))
    return runner


def _factory(runner: web.AppRunner) -> Any:
    assert runner.server is not None
    return runner.server
