"""Server processes: started here, ended here, by their ids; and what they have used so far.

Idle servers are stopped with SIGSTOP between turns rather than ended: a JVM keeps its compiled code and everybody's
caches stay warm, while nobody's housekeeping takes processor time from the one whose turn it is.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

_PORTS = range(20_000, 32_000)  # below what the kernel hands out for outgoing connections
_taken: set[int] = set()
STOP_S = 20.0


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # looked up now: nothing may be imported between fork and exec


def _die_with_parent() -> None:
    """Child, before exec: the kernel ends it when we end, even by kill -9."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


class PeerFailed(Exception):
    """A server did not start or does not answer. The message ends with the tail of its log."""


def free_port() -> int:
    """A loopback port that nobody listens on, handed out once."""
    for port in random.sample(_PORTS, 2_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _taken:
            _taken.add(port)
            return port
    raise PeerFailed("no free port between 20000 and 32000")


@dataclass(frozen=True)
class Usage:
    """Processor seconds and written bytes of each process since it began; resident bytes of all now."""

    each: Mapping[int, tuple[float, int]]
    rss: int

    @property
    def cpu_s(self) -> float:
        return sum(cpu for cpu, _ in self.each.values())

    @property
    def written(self) -> int:
        return sum(written for _, written in self.each.values())

    def since(self, before: Usage) -> Usage:
        """Of what lives now: a helper that ended in between takes nothing back of what the others used."""
        none = (0.0, 0)
        each = {
            pid: (cpu - before.each.get(pid, none)[0], written - before.each.get(pid, none)[1])
            for pid, (cpu, written) in self.each.items()
        }
        return Usage(each, self.rss)


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes and all their descendants that still live."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            for one in [process, *process.children(recursive=True)]:
                found[one.pid] = one
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def usage(pids: Iterable[int]) -> Usage:
    """Of the processes and their descendants."""
    each, rss = {}, 0
    for process in family(pids):
        try:
            times = process.cpu_times()
            # bytes that reached, or will reach, the disk; not sockets
            each[process.pid] = (times.user + times.system, process.io_counters().write_bytes)
            rss += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return Usage(each, rss)


class Program:
    """One server process with its own folder and log."""

    def __init__(self, name: str, command: list[str], folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.pid = self.process.pid

    def check(self) -> None:
        """Raises PeerFailed when the process has ended."""
        if self.process.poll() is not None:
            raise PeerFailed(f"{self.name} ended with status {self.process.returncode}\n{self.tail()}")

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        """SIGTERM to it, SIGKILL to what is left of it and its children after a while."""
        members = family([self.pid])
        for number in (signal.SIGTERM, signal.SIGCONT):
            if self.process.poll() is None:
                self.process.send_signal(number)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for one in members:
            try:  # psutil compares the time of birth: a pid that was given out again is left alone
                one.kill()
            except psutil.NoSuchProcess:
                continue


def send(pids: Iterable[int], number: int) -> None:
    """A signal to the processes and all their descendants."""
    for process in family(pids):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def eventually(what: str, found: Callable[[], bool], within_s: float, programs: Iterable[Program] = ()) -> None:
    """Poll until ``found()``. Raises PeerFailed after ``within_s`` seconds, or as soon as a program has ended."""
    deadline = time.monotonic() + within_s
    programs = list(programs)
    while True:
        for program in programs:
            program.check()
        try:
            if found():
                return
            reason = ""
        except (OSError, RuntimeError) as error:
            reason = f": {error}"
        if time.monotonic() > deadline:
            tails = "".join(f"\n{program.name}: {program.tail(5)}" for program in programs)
            raise PeerFailed(f"{what}: not within {within_s:.0f} s{reason}{tails}")
        time.sleep(0.1)
