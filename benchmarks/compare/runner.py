"""Rounds and turns: who is awake when, how many records, and what to do when something fails.

A round visits every turn (a set of workloads), a turn visits every server, and while a server is awake the others are
stopped (SIGSTOP). Who comes first moves on by one from round to round. Before the first round every server is warmed
up: a JVM needs millions of records before its code is compiled, and its first figures are a third of the later ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare.measure import measure
from benchmarks.compare.peers import Peer
from benchmarks.compare.peers.catalogue import PEERS
from benchmarks.compare.plan import WARM_UP_MAX_S, Cell
from benchmarks.compare.processes import PeerFailed
from benchmarks.compare.work import MeasurementFailed, Work

# Processor seconds that a server needs at least before its rates stop rising, by what it is written in. More may be
# needed: a JVM compiles by how often a method ran, and the passes of a short run call the produce path seldom.
WARM_UP_CPU_S = {"kafka-3": 75.0, "kafka-1": 30.0, "rabbitmq-3": 4.0, "rabbitmq-1": 2.0}
STEADY = 1.1  # warm is who was no faster in the later half of its passes than this times the best of the earlier half
WARM_UP_SCALE = 5.0  # of the counts: in short passes a JVM compiles the making and deleting of topics
WARM_UP_LIMIT_S = {"kafka-3": 240.0, "kafka-1": 90.0}  # others: WARM_UP_MAX_S
_WARMING = ("produce", "produce-only", "latency")  # these run the code of all others too
IDLE_S = 2.0
DATA = "/var/tmp"  # a real disk: /tmp may be memory
SCALE_MIN, SCALE_MAX = 0.05, 4.0


@dataclass
class Found:
    """Raw results: rounds by cell and by what was measured, and what was left out, each with its reason."""

    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    idle_cpu: dict[str, float] = field(default_factory=dict)  # of one core, of a server that nobody uses

    def add(self, cell: Cell, number: int, results: dict[str, dict[str, Any]]) -> None:
        for what, result in results.items():
            key = f"{cell.workload.name}|{what}|{cell.variant.name}"
            self.rounds.setdefault(key, []).append({"round": number, **result})


class Comparison:
    """One run over ``cells``. Servers live from `running` to its end."""

    def __init__(self, cells: list[Cell], *, warm_up_s: float, tell: Callable[[str], None]) -> None:
        self.cells = cells
        self._warm_up_s = warm_up_s  # at most, for each server
        self._tell = tell
        self._peers: dict[str, Peer] = {}
        self._topics = 0
        self.found = Found()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Every server that is needed and can be started, warm and asleep. What cannot is left out, with the reason."""
        folder = Path(tempfile.mkdtemp(prefix="bench-compare-", dir=DATA))
        try:
            for name in dict.fromkeys(cell.variant.peer for cell in self.cells):
                self._start(name, folder / name)
            self.cells = [cell for cell in self.cells if cell.variant.peer in self._peers]
            yield
        finally:
            for peer in self._peers.values():
                peer.resume()
                peer.stop()
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, name: str, folder: Path) -> None:
        made = PEERS[name]
        if reason := made.missing():
            self._leave_out(name, reason)
            return
        self._tell(f"{name}: starting")
        peer = made(folder)
        try:
            peer.start()
            self._peers[name] = peer
            if self._warm_up_s:
                self._warm(peer)
        except (PeerFailed, MeasurementFailed, OSError, RuntimeError) as error:
            self._peers.pop(name, None)
            peer.stop()
            self._leave_out(name, str(error))
            return
        self.found.versions[name] = peer.version
        self.found.idle_cpu[name] = idle_share(peer)
        peer.pause()

    def _leave_out(self, name: str, reason: str) -> None:
        self.found.left_out[name] = reason
        self._tell(f"{name} is left out: {reason}")

    def _warm(self, peer: Peer) -> None:
        """Everything that will be measured on this server, until it has used the processor for long enough and its
        rates of producing no longer rise."""
        started, enough = time.monotonic(), WARM_UP_CPU_S.get(peer.name, 0.0)
        cells = [cell for cell in self.cells if cell.variant.peer == peer.name and cell.workload.producers == 1]
        cells = [cell for cell in cells if cell.workload.kind in _WARMING and cell.workload.partitions <= 12] or cells
        if not enough:  # nothing to compile: once through the code of each client is all it takes
            cells = list({(cell.workload.kind, cell.variant.client): cell for cell in reversed(cells)}.values())
        compiling, limit_s = peer.system == "kafka", min(self._warm_up_s, WARM_UP_LIMIT_S.get(peer.name, WARM_UP_MAX_S))
        rates: dict[str, list[float]] = {cell.name: [] for cell in cells}
        while True:
            for cell in cells:
                try:
                    found = self._measure(cell, 0, WARM_UP_SCALE if compiling else 0.5 if enough else 0.1)
                except MeasurementFailed as error:  # said again in the rounds if it is not for the cold start
                    self._tell(f"{peer.name}, warming up: {error}")
                    continue
                rates[cell.name].append(found.get("produce", {}).get("records_per_s", 0.0))
                if time.monotonic() - started > limit_s:
                    break
            used, taken = peer.usage().cpu_s, time.monotonic() - started
            steady = not compiling or not any(still_rising(found) for found in rates.values())
            if (used >= enough and steady) or taken > limit_s:
                said = "" if steady else ", its rates still rose"
                self._tell(f"{peer.name}: warm after {taken:.0f} s, {used:.0f} s of processor time{said}")
                return

    def round(self, number: int, scale: float) -> float:
        """Every cell once. Returns the seconds it took."""
        started = time.monotonic()
        for turn in dict.fromkeys(cell.workload.turn for cell in self.cells):
            names = list(self._peers)
            first = number % max(1, len(names))
            for name in names[first:] + names[:first]:
                todo = [cell for cell in self.cells if cell.workload.turn == turn and cell.variant.peer == name]
                if todo:
                    self._turn(self._peers[name], todo, number, scale)
        return time.monotonic() - started

    def _turn(self, peer: Peer, cells: list[Cell], number: int, scale: float) -> None:
        peer.resume()
        try:
            # workload by workload, its variants in an order that moves on
            for workload in dict.fromkeys(cell.workload for cell in cells):
                some = [cell for cell in cells if cell.workload is workload]
                first = number % len(some)
                for cell in some[first:] + some[:first]:
                    self._tell(f"round {number}: {cell.name}")
                    try:
                        self.found.add(cell, number, self._measure(cell, number, scale))
                    except (MeasurementFailed, PeerFailed, RuntimeError, OSError) as error:
                        self.found.failures.append(f"round {number}, {cell.name}: {error}")
                        self._tell(self.found.failures[-1])
        finally:
            peer.pause()

    def _measure(self, cell: Cell, number: int, scale: float) -> dict[str, dict[str, Any]]:
        self._topics += 1
        topic = f"bench-{number}-{self._topics}"
        count = cell.workload.count(cell.variant, scale)
        found = measure(Work(cell.workload, cell.variant, self._peers[cell.variant.peer], topic, count))
        # What is still to be written back must not be paid by the next one, whose acknowledgement waits for the disk.
        os.sync()
        return found


def still_rising(rates: list[float]) -> bool:
    """Whether the later half of these is clearly better than the earlier half, or there are too few to say."""
    half = len(rates) // 2
    return len(rates) < 4 or max(rates[half:]) > STEADY * max(rates[:half])


def idle_share(peer: Peer) -> float:
    """How much of a core a server takes while nobody uses it."""
    before, started = peer.usage(), time.monotonic()
    time.sleep(IDLE_S)
    return peer.usage().since(before).cpu_s / (time.monotonic() - started)


def fitting(cells: list[Cell], seconds: float, left_s: float, rounds: int, *, tried: float) -> float:
    """The scale at which ``rounds`` rounds fit into ``left_s``, when one of scale ``tried`` took ``seconds``.

    About a second of a measurement is start-up and does not scale; the rest does.
    """
    fixed = 1.0 * len(cells)
    scalable = max(1.0, seconds - fixed)
    wanted = left_s / rounds - fixed
    return min(SCALE_MAX, max(SCALE_MIN, tried * wanted / scalable))
