"""One program as a child process of ours: started, watched through its READY line, signalled by its pid."""

from __future__ import annotations

import ctypes
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
# For services on this machine. Below the range that the kernel hands out for outgoing connections (32768..60999): one
# that is down must find its port free again, and no connection attempt to it may by chance connect to itself.
FREE_PORTS = range(20_000, 32_000)

try:  # looked up now: nothing may be imported or allocated between fork and exec
    _libc: ctypes.CDLL | None = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
except OSError:
    _libc = None


class ProcessFailed(Exception):
    """A service did not start, or ended before it was asked to. The message ends with the tail of its log."""


class NotInstalled(ProcessFailed):
    """The programs to start are not on this machine."""


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
    for port in random.sample(FREE_PORTS, 2_000):
        if port not in taken and port_is_free(port):
            taken.add(port)
            return port
    raise ProcessFailed("no free port between 20000 and 32000")


def die_with_parent(number: int) -> Callable[[], None]:
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
    program: list[str] = field(default_factory=list)  # instead of module and args: a program that is not ours
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
                self.program or [sys.executable, "-m", self.module, *self.args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=dict(env),
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C in the terminal reaches only us; we stop the children in order
                preexec_fn=die_with_parent(death_signal),
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
