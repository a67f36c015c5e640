"""Three etcd processes on loopback for a test session, and stores on them. `etcd` is a fixture of conftest."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import tempfile
import time
from pathlib import Path

from ferryline.cli.etcd import LocalEtcd
from ferryline.cli.service import Service
from ferryline_coordinator.store.etcd import EtcdStore
from ferryline_coordinator.store.etcd_campaign import Refuses
from ferryline_coordinator.store.etcd_client import EtcdClient
from ferryline_coordinator.store.etcd_requests import Values
from ferryline_coordinator.store.vault import EtcdVault, Seal

READY_S = 60.0
SECRET = b"a secret that all coordinators share"


class EtcdProcesses:
    """Started by `start`, killed by `stop`. Members may be killed, paused and started again meanwhile."""

    def __init__(self, members: int = 3) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ferryline-etcd-"))
        self.local = LocalEtcd(self.root, members=members, ports=set())
        self.names = list(self.local.services)

    def start(self) -> EtcdProcesses:
        self.local.prepare(os.environ)
        for name in self.names:
            self.spawn(name)
        for name in self.names:
            self.wait_ready(name)
        return self

    def spawn(self, name: str) -> None:
        self.service(name).spawn(os.environ, signal.SIGKILL)

    def wait_ready(self, name: str) -> None:
        end = time.monotonic() + READY_S
        while not self.service(name).read_ready():
            assert time.monotonic() < end, self.service(name).log_tail()
            time.sleep(0.05)

    def settle(self) -> None:
        """Wait until every member is healthy: an earlier test may have killed or paused some."""
        for name in self.names:
            self.service(name).ready = {}
            self.wait_ready(name)

    def kill(self, name: str) -> None:
        service = self.service(name)
        service.send_signal(signal.SIGKILL)
        assert service.process is not None
        service.process.wait()

    def service(self, name: str) -> Service:
        return self.local.services[name]

    def stop(self) -> None:
        for name in self.names:
            self.kill(name)
        shutil.rmtree(self.root, ignore_errors=True)

    # -- clients of it -------------------------------------------------------------------------------

    def client(self, endpoints: list[str] | None = None) -> EtcdClient:
        context = ssl.create_default_context(cafile=str(self.local.tls / "ca.crt"))
        context.load_cert_chain(self.local.tls / "client.crt", self.local.tls / "client.key")
        return EtcdClient(endpoints or self.local.endpoints, tls=context)

    def store(
        self, prefix: str, *, url: str = "", ttl_s: float = 5.0, refuses: Refuses | None = None, sealed: bool = True
    ) -> EtcdStore:
        seal = Seal(SECRET)
        values = Values(lambda key: key == "cluster", seal.seal, seal.unseal) if sealed else None
        return EtcdStore(self.client(), prefix=prefix, url=url, ttl_s=ttl_s, values=values, refuses=refuses)

    def vault(self, prefix: str, secret: bytes = SECRET) -> tuple[EtcdVault, EtcdClient]:
        client = self.client()
        return EtcdVault(client, prefix, Seal(secret)), client
