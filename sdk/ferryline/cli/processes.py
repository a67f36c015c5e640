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

import ctypes
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COORDINATOR = "coordinator"
SERVICES = {"ferryline_coordinator": "ferryline-coordinator", "ferryline_broker": "ferryline-broker"}
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1
# Below the range that the kernel hands out for outgoing connections (32768..60999): a service that is down for a while
# must find its port free again, and no connection attempt to it may by chance connect to itself.
_FREE_PORTS = range(20_000, 32_000)

try:  # looked up now: nothing may be imported or allocated between fork and exec
    _libc: ctypes.CDLL | None = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
except OSError:
    _libc = None


class ProcessFailed(Exception):
    """A service did not start, or ended before it was asked to. The message ends with the tail of its log."""


class NotInstalled(ProcessFailed):
    """The programs to start are not on this machine."""


def missing_services() -> list[str]:
    """Distributions that `LocalCluster` needs and this interpreter cannot find. Imports nothing."""
    return [name for module, name in SERVICES.items() if importlib.util.find_spec(module) is None]


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(taken: set[int]) -> int:
    """A port that nobody listens on and that is not in ``taken``; it is added there."""
    for port in random.sample(_FREE_PORTS, 2_000):
        if port not in taken and port_is_free(port):
            taken.add(port)
            return port
    raise ProcessFailed("no free port between 20000 and 32000")


def _die_with_parent(number: int) -> Callable[[], None]:
    """What a child does before exec: ask the kernel for a signal when the thread that started it ends."""
    parent = os.getpid()
    libc = _libc

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
            if os.getppid() != parent:  # the parent ended between fork and prctl
                os._exit(1)

    return prepare


@dataclass
class Service:
    """One program: how to start it, and the process that runs it now, if one does."""

    name: str
    module: str
    folder: Path
    port: int
    args: list[str]
    process: subprocess.Popen[bytes] | None = None
    ready: dict[str, Any] = field(default_factory=dict)
    asked_to_end: bool = False  # by us, so its end is no surprise
    _seen: int = 0  # bytes of stdout from before this start

    @property
    def out_path(self) -> Path:
        return self.folder / "stdout"

    @property
    def log_path(self) -> Path:
        return self.folder / "log"

    @property
    def url(self) -> str:
        return str(self.ready.get("url", f"https://127.0.0.1:{self.port}"))

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def spawn(self, env: Mapping[str, str], death_signal: int) -> None:
        """Start the program. Returns at once; `read_ready` says when it serves."""
        assert not self.running, f"{self.name} runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ready, self.asked_to_end = {}, False
        self._seen = self.out_path.stat().st_size if self.out_path.exists() else 0
        with self.out_path.open("ab") as out, self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=dict(env),
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C in the terminal reaches only us; we stop the children in order
                preexec_fn=_die_with_parent(death_signal),
            )

    def read_ready(self) -> bool:
        """Whether the READY line of this start has come. Raises ProcessFailed when the process has ended."""
        if self.ready:
            return True
        with self.out_path.open("rb") as out:
            out.seek(self._seen)
            for line in out.read().split(b"\n")[:-1]:
                if line.startswith(b"READY "):
                    self.ready = json.loads(line[6:])
                    return True
        if not self.running:
            code = self.process.returncode if self.process is not None else None
            raise ProcessFailed(f"{self.name} ended with status {code}\n{self.log_tail()}")
        return False

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that the service wrote to stderr."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - 16_384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def send_signal(self, number: int) -> None:
        """Signal the process if it still runs. It cannot hit a stranger: an unreaped child keeps its pid."""
        if self.process is not None and self.running:
            self.process.send_signal(number)


class LocalCluster:
    """One coordinator and some brokers as child processes.

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
    ) -> None:
        self.root = root
        self._death_signal = death_signal
        self._env = _service_environment(env or {})
        self._broker_args = list(broker_args)
        self._ports: set[int] = set()
        self._broker_port = broker_port
        port = port or free_port(self._ports)
        self.coordinator = Service(
            COORDINATOR,
            "ferryline_coordinator",
            root / COORDINATOR,
            port,
            ["--data-dir", str(self.data_dir(COORDINATOR)), "--port", str(port), *coordinator_args],
        )
        self.services: dict[str, Service] = {COORDINATOR: self.coordinator}
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
        return [name for name in self.services if name != COORDINATOR]

    @property
    def urls(self) -> list[str]:
        """Coordinator first, then brokers: any of them is good enough for a client."""
        return [service.url for service in self.services.values()]

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
        """Start whatever does not run and wait until all of it is ready. Stops everything again if that fails."""
        missing = missing_services()
        if missing:
            raise NotInstalled(
                f"{' and '.join(missing)}: not installed; pip install 'ferryline[server]' brings what is started here"
            )
        deadline = time.monotonic() + timeout_s
        try:
            self.start_one(COORDINATOR, timeout_s)
            for name in self.brokers:
                self.spawn(name)
            for name in self.brokers:
                self.wait_ready(name, deadline - time.monotonic())
        except BaseException:
            self.stop(timeout_s=2.0)
            raise

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
        """End everything: brokers first, so that they can sign off, then the coordinator; -9 at the time-out."""
        deadline = time.monotonic() + timeout_s
        for group in (self.brokers, [COORDINATOR]):
            for name in group:
                self.terminate(name)
                self.resume(name)  # a stopped process would never see the signal
            for name in group:
                if self.wait_ended(name, max(0.1, deadline - time.monotonic())) is None:
                    self.kill(name)

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    # -- inside --------------------------------------------------------------------------------------

    def _new_broker(self) -> Service:
        number = len(self.services)
        name = f"broker-{number}"
        port = self._broker_port + number - 1 if self._broker_port else free_port(self._ports)
        args = ["--data-root", str(self.data_dir(name)), "--port", str(port)]
        args += ["--coordinator", f"https://127.0.0.1:{self.coordinator.port}", "--ca-file", str(self.ca)]
        args += ["--join-token-dir", str(self.data_dir(COORDINATOR) / "join-tokens"), *self._broker_args]
        service = Service(name, "ferryline_broker", self.root / name, port, args)
        self.services[name] = service
        return service


def _service_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Our environment without the client's settings, which a service would take for mistyped ones of its own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FERRYLINE_") or name.startswith(("FERRYLINE_BROKER_", "FERRYLINE_COORDINATOR_"))
    }
    kept.update(extra)
    return kept
