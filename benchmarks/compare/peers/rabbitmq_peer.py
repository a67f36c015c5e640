"""RabbitMQ with quorum queues: one node, or three with each queue on all of them. Plain TCP on loopback.

Nodes run as this user with everything in the temporary folder, and with a port mapper (epmd) of their own: nothing of a
RabbitMQ that is installed on the machine is touched. Names that outlive pauses: net_ticktime is raised, so that a node
that was stopped for a turn is not taken for a dead one, and schedulers do not spin while they are idle.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import Peer, Variant
from benchmarks.compare.processes import PeerFailed, Program, eventually, free_port

HOMES = "/usr/lib/rabbitmq/lib"
READY_S = 120.0
COOKIE = "loopback-only"  # the nodes listen on loopback and end with the run


def _home() -> Path | None:
    return next(iter(sorted(Path(HOMES).glob("rabbitmq_server-*"))), None)


class RabbitmqPeer(Peer):
    """``nodes`` nodes. A topic is one quorum queue, or a fanout exchange with a queue for each group."""

    system = "rabbitmq"
    nodes = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        home = _home()
        self.version = home.name.split("-", 1)[1] if home else ""
        self._ports = [(free_port(), free_port()) for _ in range(self.nodes)]
        self._epmd = free_port()

    @classmethod
    def missing(cls) -> str:
        if _home() is None or shutil.which("epmd") is None:
            return "rabbitmq-server is not installed (scripts/peers/install rabbitmq)"
        return ""

    @property
    def servers(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port, _ in self._ports)

    def start(self) -> None:
        self.folder.mkdir(parents=True)
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(COOKIE)
        cookie.chmod(0o400)
        epmd = ["epmd", "-address", "127.0.0.1", "-port", str(self._epmd)]
        self.programs.append(Program(f"{self.name}-epmd", epmd, self.folder))
        eventually("epmd listens", self._mapper_listens, READY_S, self.programs)
        home = _home()
        assert home is not None
        for number in range(1, self.nodes + 1):
            command = [str(home / "sbin/rabbitmq-server")]
            folder = self.folder / str(number)
            folder.mkdir()
            self._configure(number, folder)
            self.programs.append(Program(f"{self.name}-{number}", command, folder, self._env(number)))
        for number in range(1, self.nodes + 1):
            eventually(f"{self.name}-{number} is up", partial(self._is_up, number), READY_S, self.programs)
        for number in range(2, self.nodes + 1):
            for words in (("stop_app",), ("reset",), ("join_cluster", self._node(1)), ("start_app",)):
                self._control(number, *words)
        eventually(f"{self.name} serves", self._serves, READY_S, self.programs)

    def _mapper_listens(self) -> bool:
        """Otherwise a node starts a mapper of its own, which outlives it."""
        with socket.create_connection(("127.0.0.1", self._epmd), timeout=1):
            return True

    def _node(self, number: int) -> str:
        return f"bench{number}-{self._epmd}@localhost"

    def _configure(self, number: int, folder: Path) -> None:
        port = self._ports[number - 1][0]
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{port}",
            "log.file.level = error",
            "vm_memory_high_watermark.relative = 0.2",
        ]
        lines += ["disk_free_limit.absolute = 1GB", "cluster_partition_handling = ignore"]
        (folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (folder / "advanced.config").write_text("[{kernel, [{net_ticktime, 7200}]}].\n")
        (folder / "enabled_plugins").write_text("[].\n")

    def _env(self, number: int) -> dict[str, str]:
        folder, (port, distribution) = self.folder / str(number), self._ports[number - 1]
        return {
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self._node(number),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none -start_epmd false",
        }

    def _is_up(self, number: int) -> bool:
        """It knows only after a while that it is starting; asked before that, the command fails."""
        try:
            self._control(number, "await_startup")
        except PeerFailed:
            return False
        return True

    def _control(self, number: int, *words: str) -> None:
        home = _home()
        command = [str(home / "sbin/rabbitmqctl") if home else "", "-n", self._node(number), "--timeout", "90", *words]
        program = Program(f"{self.name}-{number}-{words[0]}", command, self.folder / "control", self._env(number))
        try:
            status = program.process.wait(READY_S)
        except subprocess.TimeoutExpired:
            program.end()
            raise PeerFailed(f"{self.name}: {words[0]} took too long\n{program.tail()}") from None
        if status:
            raise PeerFailed(f"{self.name}: {words[0]} failed\n{program.tail()}")

    @contextmanager
    def _channel(self) -> Iterator[Any]:
        """A channel to the first node. Raises RuntimeError when the node does not answer."""
        import pika
        import pika.exceptions

        try:
            port = self._ports[0][0]
            parameters = pika.ConnectionParameters("127.0.0.1", port, socket_timeout=30, blocked_connection_timeout=60)
            connection = pika.BlockingConnection(parameters)
            try:
                yield connection.channel()
            finally:
                connection.close()
        except pika.exceptions.AMQPError as error:
            raise RuntimeError(repr(error)) from None

    def _serves(self) -> bool:
        with self._channel():
            return True

    def create(self, topic: str, partitions: int, variant: Variant, groups: list[str]) -> None:
        def make() -> bool:
            """Declaring twice is allowed: right after a pause an election may be under way."""
            with self._channel() as channel:
                if len(groups) > 1:
                    channel.exchange_declare(topic, "fanout", durable=True)
                for queue in _queues(topic, groups):
                    arguments = {"x-queue-type": "quorum", "x-quorum-initial-group-size": self.nodes}
                    channel.queue_declare(queue, durable=True, arguments=arguments)
                    if len(groups) > 1:
                        channel.queue_bind(queue, topic)
            return True

        self._groups = groups
        eventually(f"{self.name}: {topic} is there", make, READY_S, self.programs)

    def left(self, topic: str, group: str) -> int:
        """Once the receiver is gone: what it had not acknowledged waits again."""
        with self._channel() as channel:
            return int(channel.queue_declare(topic, passive=True).method.message_count)

    def delete(self, topic: str, partitions: int) -> None:
        with self._channel() as channel:
            for queue in _queues(topic, self._groups):
                channel.queue_delete(queue)
            if len(self._groups) > 1:
                channel.exchange_delete(topic)


def _queues(topic: str, groups: list[str]) -> list[str]:
    """One queue of the topic's name; several groups have one each, of their own names."""
    return groups if len(groups) > 1 else [topic]


class Rabbitmq3(RabbitmqPeer):
    name, nodes = "rabbitmq-3", 3


class Rabbitmq1(RabbitmqPeer):
    name, nodes = "rabbitmq-1", 1
