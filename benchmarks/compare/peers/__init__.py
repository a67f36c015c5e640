"""Servers that are compared: each a small cluster of processes on loopback with its data in a temporary folder."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.compare.processes import Program, Usage, send, usage


@dataclass(frozen=True)
class Variant:
    """One row of the tables: a client, a server and how a topic is made there. ``ack``: what a confirmation means."""

    name: str
    peer: str  # name of the server
    client: str
    ack: str
    copies: int
    flushed: bool
    system: str  # ferryline, kafka, rabbitmq, nats, redis
    topic: Mapping[str, str] = field(default_factory=dict)  # settings of the topic, in the words of the server
    main: bool = False  # takes part in every workload, not only in the central ones
    durable: bool = True  # a usual durable setting: counts when the best peer is looked for
    one_by_one: bool = True  # a receiver acknowledges record by record; otherwise a batch at once
    settles: str = ""  # what that acknowledgement means, or what becomes of a task
    slow: bool = False  # its client is slower by an order of magnitude: fewer records, or a round takes minutes


class Peer(ABC):
    """A server, or a cluster of them. `start` and `stop` once; `pause` and `resume` between turns."""

    name: str
    system: str
    version = ""
    sleeps = True  # False: left running between turns, because waking up takes long and idling next to nothing

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[Program] = []

    @classmethod
    @abstractmethod
    def missing(cls) -> str:
        """Why it cannot be started on this machine; empty when it can."""

    @abstractmethod
    def start(self) -> None:
        """Start it and wait until it serves. Raises PeerFailed."""

    @property
    @abstractmethod
    def servers(self) -> str:
        """What a client is told to connect to."""

    @property
    def ca(self) -> str:
        return ""

    @property
    def pids(self) -> list[int]:
        return [program.pid for program in self.programs]

    @abstractmethod
    def create(self, topic: str, partitions: int, variant: Variant, groups: list[str]) -> None:
        """Make a topic, ready to be written to with all its copies, with what ``groups`` need to read it."""

    @abstractmethod
    def delete(self, topic: str, partitions: int) -> None: ...

    @abstractmethod
    def left(self, topic: str, group: str) -> int:
        """Records of a queue that nobody has acknowledged, handed out or not."""

    def usage(self) -> Usage:
        return usage(self.pids)

    def pause(self) -> None:
        if self.sleeps:
            send(self.pids, signal.SIGSTOP)

    def resume(self) -> None:
        send(self.pids, signal.SIGCONT)

    def stop(self) -> None:
        """The last started first: what others need ends after them."""
        for program in reversed(self.programs):
            program.end()
