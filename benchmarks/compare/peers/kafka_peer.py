"""Apache Kafka in KRaft mode: one or three processes that are broker and controller at once, plain TCP on loopback.

Settings are Kafka's own defaults except for what follows from the place (one machine, small heap, idle turns):
time-outs that would take a paused process for a dead one are raised, and a new group does not wait three seconds.
"""

from __future__ import annotations

import base64
import shutil
import uuid
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import Peer, Variant
from benchmarks.compare.processes import PeerFailed, Program, eventually, free_port

JARS = Path(__file__).resolve().parents[3] / ".venv/peers/kafka"
HEAP_MB = {1: 1024, 3: 640}
# as Kafka's own start script sets them
JVM = ["-server", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-XX:InitiatingHeapOccupancyPercent=35"]
JVM += ["-XX:+ExplicitGCInvokesConcurrent", "-Djava.awt.headless=true"]
HOUR_MS = 3_600_000
READY_S = 90.0

LOG4J = """
Configuration:
  status: ERROR
  Appenders: {Console: {name: out, PatternLayout: {pattern: "%d %p %c %m%n"}}}
  Loggers: {Root: {level: WARN, AppenderRef: [{ref: out}]}}
"""


class KafkaPeer(Peer):
    """``nodes`` processes; internal topics have as many copies as there are nodes."""

    system = "kafka"
    nodes = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.version = next((path.stem.split("-", 1)[1] for path in JARS.glob("kafka_2.13-*.jar")), "")
        self._ports = [(free_port(), free_port()) for _ in range(self.nodes)]
        self._cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")

    @classmethod
    def missing(cls) -> str:
        if shutil.which("java") is None:
            return "there is no java"
        return "" if any(JARS.glob("kafka_2.13-*.jar")) else "its jars are not here (scripts/peers/install kafka)"

    @property
    def servers(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port, _ in self._ports)

    def start(self) -> None:
        for number in range(1, self.nodes + 1):
            self._format(number)
            folder = self.folder / str(number)
            command = [*self._java(number), "kafka.Kafka", str(folder / "server.properties")]
            self.programs.append(Program(f"{self.name}-{number}", command, folder))
        eventually(f"{self.name} serves", self._serves, READY_S, self.programs)

    def _java(self, number: int) -> list[str]:
        heap = HEAP_MB[self.nodes]
        log4j = f"-Dlog4j2.configurationFile={self.folder / str(number) / 'log4j2.yaml'}"
        return ["java", f"-Xms{heap}m", f"-Xmx{heap}m", *JVM, log4j, "-cp", f"{JARS}/*"]

    def _format(self, number: int) -> None:
        folder = self.folder / str(number)
        folder.mkdir(parents=True)
        (folder / "log4j2.yaml").write_text(LOG4J)
        properties = self._properties(number, folder)
        (folder / "server.properties").write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        command = [*self._java(number), "kafka.tools.StorageTool", "format", "--cluster-id", self._cluster]
        command += ["--config", str(folder / "server.properties")]
        formatting = Program(f"{self.name}-{number}-format", command, folder)
        if formatting.process.wait(READY_S):
            raise PeerFailed(f"{self.name}: the storage could not be formatted\n{formatting.tail()}")

    def _properties(self, number: int, folder: Path) -> dict[str, Any]:
        port, controller = self._ports[number - 1]
        voters = ",".join(f"{node}@127.0.0.1:{ports[1]}" for node, ports in enumerate(self._ports, 1))
        return {
            "process.roles": "broker,controller",
            "node.id": number,
            "controller.quorum.voters": voters,
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": folder / "data",
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": self.nodes,
            "transaction.state.log.replication.factor": self.nodes,
            "group.initial.rebalance.delay.ms": 0,
            "broker.session.timeout.ms": HOUR_MS,
            "controller.quorum.fetch.timeout.ms": HOUR_MS,
            "replica.lag.time.max.ms": HOUR_MS,
        }

    def _admin(self) -> Any:
        from confluent_kafka.admin import AdminClient

        return AdminClient({"bootstrap.servers": self.servers, "log_level": 0})

    def _serves(self) -> bool:
        from confluent_kafka import KafkaException

        try:
            return len(self._admin().list_topics(timeout=2).brokers) == self.nodes
        except KafkaException as error:
            raise RuntimeError(str(error)) from None

    def create(self, topic: str, partitions: int, variant: Variant, groups: list[str]) -> None:
        from confluent_kafka.admin import NewTopic

        admin = self._admin()
        new = NewTopic(topic, partitions, variant.copies, config=dict(variant.topic))
        admin.create_topics([new], operation_timeout=READY_S)[topic].result(READY_S)

        def ready() -> bool:
            found = admin.list_topics(topic, timeout=10).topics[topic].partitions.values()
            return len(found) == partitions and all(
                part.leader >= 0 and len(part.isrs) == variant.copies for part in found
            )

        eventually(f"{self.name}: {topic} has all its copies", ready, READY_S, self.programs)

    def left(self, topic: str, group: str) -> int:
        raise NotImplementedError("it has no queues")

    def delete(self, topic: str, partitions: int) -> None:
        admin = self._admin()  # kept until the answer is here: its end would end the request
        admin.delete_topics([topic], operation_timeout=READY_S)[topic].result(READY_S)


class Kafka3(KafkaPeer):
    name, nodes = "kafka-3", 3


class Kafka1(KafkaPeer):
    name, nodes = "kafka-1", 1
