"""A Redis of one's own: on loopback, in memory only, and killed as a test pleases. Needs redis-server in PATH."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.polling import POLL_SECONDS

_START_S = 30.0


class RedisServer:
    """One redis-server; `start` again after `kill` gives an empty one at the same address."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Return once it takes connections."""
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self._port), "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "no"]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", self._port), timeout=1.0):
                    return
            except OSError:
                time.sleep(POLL_SECONDS)
        raise TimeoutError(f"redis-server on port {self._port} does not answer")

    def kill(self) -> None:
        """kill -9."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It takes connections and answers nobody, until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
