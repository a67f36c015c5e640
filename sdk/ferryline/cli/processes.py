"""A cluster of real processes on this machine: what `ferryline up`, `ferryline demo` and the tests run.

    cluster = LocalCluster(Path("/tmp/x"), brokers=3)
    cluster.start()                      # one coordinator and three brokers, ready to serve
    cluster.kill("broker-1")             # kill -9; pause, resume, terminate and restart likewise
    cluster.stop()

It only spawns programs (``python -m ferryline_coordinator``, ``python -m ferryline_broker``) and never imports one.
Each service has its own folder below the root: data, ``stdout`` (the READY lines) and ``log`` (stderr). Signals go to
the processes that this object started, by their pid, and to nobody else.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ferryline.cli.etcd import LocalEtcd, run_coordinator
from ferryline.cli.service import NotInstalled, ProcessFailed, Service, free_port, port_is_free

__all__ = [
    "COORDINATOR",
    "LocalCluster",
    "NotInstalled",
    "ProcessFailed",
    "Service",
    "free_port",
    "missing_services",
    "port_is_free",
]

COORDINATOR = "coordinator"
SERVICES = {"ferryline_coordinator": "ferryline-coordinator", "ferryline_broker": "ferryline-broker"}
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.02


def missing_services() -> list[str]:
    """Distributions that `LocalCluster` needs and this interpreter cannot find. Imports nothing."""
    return [name for module, name in SERVICES.items() if importlib.util.find_spec(module) is None]


class LocalCluster:
    """A coordinator and some brokers as child processes; or, with ``store="etcd"``, several coordinators.

    Then the services are ``etcd-1`` ..., ``coordinator``, ``coordinator-2`` ..., ``broker-1`` ...; with
    ``etcd_args`` (what a coordinator is told of an etcd that runs already) no etcd is started.

    Everything lies below ``root`` and is found again by the next `start` there. Ports of 0 are picked once, outside the
    ephemeral range, and kept over restarts. Children die with the thread that started them (Linux), by
    ``death_signal``; so start them from a thread that lives as long as the cluster should.
    """

    def __init__(
        self,
        root: Path,
        *,
        brokers: int = 3,
        port: int = 0,
        broker_port: int = 0,
        env: Mapping[str, str] | None = None,
        coordinator_args: Sequence[str] = (),
        broker_args: Sequence[str] = (),
        death_signal: int = signal.SIGKILL,
        coordinators: int = 1,
        store: str = "sqlite",
        etcd_members: int = 3,
        etcd_args: Sequence[str] = (),
    ) -> None:
        self.root = root
        self._death_signal = death_signal
        self._env = _service_environment(env or {})
        self._broker_args = list(broker_args)
        self._ports: set[int] = set()
        self._broker_port = broker_port
        self.services: dict[str, Service] = {}
        self.etcd: LocalEtcd | None = None
        self._secret = root / "cluster-secret"
        self._tokens = self.data_dir(COORDINATOR) / "join-tokens"
        self._shared = store == "etcd"
        args = list(coordinator_args)
        if self._shared:
            args += self._shared_store(etcd_members, list(etcd_args))
        elif coordinators != 1:
            raise ValueError(f"{coordinators} coordinators need store='etcd', not {store!r}")
        for number in range(1, coordinators + 1):
            self._new_coordinator(number, port + number - 1 if port else free_port(self._ports), args)
        self.coordinator = self.services[COORDINATOR]
        for _ in range(brokers):
            self._new_broker()

    # -- what others need to know --------------------------------------------------------------------

    @property
    def ca(self) -> Path:
        """The certificate that clients trust; made by the coordinator on its first start."""
        return self.data_dir(COORDINATOR) / "tls" / "ca.crt"

    @property
    def url(self) -> str:
        return self.coordinator.url

    @property
    def brokers(self) -> list[str]:
        return [name for name in self.services if name.startswith("broker-")]

    @property
    def coordinators(self) -> list[str]:
        return [name for name in self.services if name.startswith(COORDINATOR)]

    @property
    def stages(self) -> list[list[str]]:
        """Names in the order of starting: etcd, coordinators, brokers."""
        return [list(self.etcd.services) if self.etcd is not None else [], self.coordinators, self.brokers]

    @property
    def urls(self) -> list[str]:
        """Coordinators first, then brokers: any of them is good enough for a client."""
        return [self.services[name].url for name in (*self.coordinators, *self.brokers)]

    def data_dir(self, name: str) -> Path:
        return self.root / name / "data"

    def broker_id(self, name: str) -> int:
        return int(self.services[name].ready.get("broker_id", 0))

    def name_of(self, broker_id: int) -> str:
        """Name of the service that runs this broker. Raises KeyError."""
        for name in self.brokers:
            if self.broker_id(name) == broker_id:
                return name
        raise KeyError(f"no broker {broker_id} here")

    def logs(self, name: str) -> str:
        path = self.services[name].log_path
        return path.read_text(errors="replace") if path.exists() else ""

    # -- life ----------------------------------------------------------------------------------------

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Start whatever does not run and wait until all of it is ready: etcd, coordinators and brokers for at most
        ``timeout_s`` each. Stops everything again if that fails."""
        missing = missing_services()
        if missing:
            raise NotInstalled(
                f"{' and '.join(missing)}: not installed; pip install 'ferryline[server]' brings what is started here"
            )
        try:
            self.prepare()
            for stage in self.stages:
                deadline = time.monotonic() + timeout_s
                for name in stage:
                    self.spawn(name)
                for name in stage:
                    self.wait_ready(name, deadline - time.monotonic())
        except BaseException:
            self.stop(timeout_s=2.0)
            raise

    def prepare(self) -> None:
        """What several coordinators share before any of them starts: etcd's certificates, the cluster secret."""
        if self.etcd is not None:
            self.etcd.prepare(self._env)
        if self._shared and not self._secret.exists():
            run_coordinator(["secret", "--out", str(self._secret)], self._env)

    def spawn(self, name: str) -> None:
        """Start one service without waiting for it. A running one is left alone."""
        service = self.services[name]
        if not service.running:
            service.spawn(self._env, self._death_signal)

    def is_ready(self, name: str) -> bool:
        return self.services[name].read_ready()

    def wait_ready(self, name: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.is_ready(name):
            if time.monotonic() > deadline:
                raise ProcessFailed(f"{name} was not ready in time\n{self.services[name].log_tail()}")
            time.sleep(_POLL_S)

    def start_one(self, name: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        self.spawn(name)
        self.wait_ready(name, timeout_s)

    def add_broker(self) -> str:
        """Prepare one more broker and return its name; `start_one` or `spawn` starts it."""
        return self._new_broker().name

    def kill(self, name: str) -> None:
        """kill -9, and wait until it is gone."""
        service = self.services[name]
        service.asked_to_end = True
        service.send_signal(signal.SIGKILL)
        if service.process is not None:
            service.process.wait()

    def kill_all(self) -> None:
        """kill -9 everything at once: no process sees another one's end."""
        for service in self.services.values():
            service.asked_to_end = True
            service.send_signal(signal.SIGKILL)
        for service in self.services.values():
            if service.process is not None:
                service.process.wait()

    def pause(self, name: str) -> None:
        self.services[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self.services[name].send_signal(signal.SIGCONT)

    def terminate(self, name: str) -> None:
        """SIGTERM, without waiting: the service hands over and ends by itself."""
        service = self.services[name]
        service.asked_to_end = True
        service.send_signal(signal.SIGTERM)

    def wait_ended(self, name: str, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """Exit status, or None when it still runs after ``timeout_s``."""
        process = self.services[name].process
        if process is None:
            return 0
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def ended(self) -> Iterator[Service]:
        """Services that have ended without being asked to."""
        for service in self.services.values():
            if service.process is not None and not service.running and not service.asked_to_end:
                yield service

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End everything: brokers first, so that they can sign off, then the coordinators; -9 at the time-out."""
        deadline = time.monotonic() + timeout_s
        for group in (self.brokers, self.coordinators):
            for name in group:
                self.terminate(name)
                self.resume(name)  # a stopped process would never see the signal
            for name in group:
                if self.wait_ended(name, max(0.1, deadline - time.monotonic())) is None:
                    self.kill(name)
        for name in self.stages[0]:
            self.kill(name)  # etcd loses nothing by that, and without its majority a clean end takes seconds

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    # -- inside --------------------------------------------------------------------------------------

    def _shared_store(self, members: int, etcd_args: list[str]) -> list[str]:
        """Settings by which coordinators find the same etcd, secret and join tokens."""
        if not etcd_args:
            self.etcd = LocalEtcd(self.root, members=members, ports=self._ports)
            self.services.update(self.etcd.services)
            etcd_args = self.etcd.coordinator_args()
        shared = ["--cluster-secret-file", str(self._secret), "--join-token-dir", str(self._tokens)]
        return ["--store", "etcd", *etcd_args, *shared]

    def _new_coordinator(self, number: int, port: int, args: list[str]) -> None:
        name = COORDINATOR if number == 1 else f"{COORDINATOR}-{number}"
        args = ["--data-dir", str(self.data_dir(name)), "--port", str(port), *args]
        self.services[name] = Service(name, "ferryline_coordinator", self.root / name, port, args)

    def _new_broker(self) -> Service:
        number = len(self.brokers) + 1
        name = f"broker-{number}"
        port = self._broker_port + number - 1 if self._broker_port else free_port(self._ports)
        args = ["--data-root", str(self.data_dir(name)), "--port", str(port)]
        for coordinator in self.coordinators:
            args += ["--coordinator", f"https://127.0.0.1:{self.services[coordinator].port}"]
        args += ["--ca-file", str(self.ca), "--join-token-dir", str(self._tokens), *self._broker_args]
        service = Service(name, "ferryline_broker", self.root / name, port, args)
        self.services[name] = service
        return service


def _service_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Our environment without the client's settings, which a service would take for mistyped ones of its own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FERRYLINE_")
        or name.startswith(("FERRYLINE_BROKER_", "FERRYLINE_COORDINATOR_"))
        or name == "FERRYLINE_CODEC"
    }
    kept.update(extra)
    return kept
