"""NATS JetStream with file storage: one server, or three with streams of three copies. Plain TCP on loopback."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import Peer, Variant
from benchmarks.compare.processes import Program, eventually, free_port

READY_S = 60.0


class NatsPeer(Peer):
    """``nodes`` servers; a topic is a stream with one subject for each partition."""

    system = "nats"
    nodes = 3
    sleeps = False  # three servers that wake up elect leaders for seconds; awake they take next to nothing

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._ports = [(free_port(), free_port()) for _ in range(self.nodes)]

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("nats-server") else "nats-server is not installed (scripts/peers/install nats)"

    @property
    def servers(self) -> str:
        return ",".join(f"nats://127.0.0.1:{port}" for port, _ in self._ports)

    def start(self) -> None:
        said = subprocess.run(["nats-server", "--version"], capture_output=True, text=True, check=True).stdout
        self.version = said.rsplit("v", 1)[1].strip()
        for number in range(1, self.nodes + 1):
            folder = self.folder / str(number)
            folder.mkdir(parents=True)
            (folder / "nats.conf").write_text(self._configuration(number, folder))
            command = ["nats-server", "--config", str(folder / "nats.conf")]
            self.programs.append(Program(f"{self.name}-{number}", command, folder))
        eventually(f"{self.name} serves", lambda: asyncio.run(self._serves()), READY_S, self.programs)

    def _configuration(self, number: int, folder: Path) -> str:
        port, cluster = self._ports[number - 1]
        text = f'listen: "127.0.0.1:{port}"\nserver_name: "{self.name}-{number}"\n'
        text += f'jetstream {{ store_dir: "{folder}/data", max_memory_store: 256MB, max_file_store: 20GB }}\n'
        if self.nodes > 1:
            routes = ", ".join(f'"nats://127.0.0.1:{other}"' for _, other in self._ports)
            text += f'cluster {{ name: bench, listen: "127.0.0.1:{cluster}", routes: [{routes}] }}\n'
        return text

    async def _connect(self) -> Any:
        import nats

        async def quiet(_: Exception) -> None:
            """What fails is raised where it is awaited."""

        return await nats.connect(self.servers.split(","), error_cb=quiet, connect_timeout=5)

    async def _serves(self) -> bool:
        import nats.errors
        import nats.js.errors

        try:
            client = await self._connect()
            try:
                await client.jetstream(timeout=5).account_info()
            finally:
                await client.close()
        except (nats.errors.Error, nats.js.errors.Error) as error:
            raise RuntimeError(str(error) or type(error).__name__) from None
        return True

    def create(self, topic: str, partitions: int, variant: Variant, groups: list[str]) -> None:
        made = False

        async def make() -> bool:
            """Right after a pause the servers elect their leaders anew: try until it works."""
            import nats.errors
            import nats.js.errors
            from nats.js.api import AckPolicy, ConsumerConfig, StorageType

            nonlocal made
            client = await self._connect()
            stream = client.jetstream(timeout=10)
            try:
                if not made:
                    await stream.add_stream(
                        name=topic, subjects=[f"{topic}.*"], storage=StorageType.FILE, num_replicas=variant.copies
                    )
                    made = True
                for group in groups:
                    policy = AckPolicy(variant.topic.get("ack_policy", "all"))
                    config = ConsumerConfig(durable_name=group, ack_policy=policy, max_ack_pending=-1)
                    await stream.add_consumer(topic, config)
                found = (await stream.stream_info(topic)).cluster
                copies = found.replicas or [] if found else []
                return not found or (bool(found.leader) and all(one.current for one in copies))
            except (nats.errors.Error, nats.js.errors.Error) as error:
                raise RuntimeError(str(error) or type(error).__name__) from None
            finally:
                await client.close()

        eventually(f"{self.name}: {topic} is there", lambda: asyncio.run(make()), READY_S, self.programs)

    def left(self, topic: str, group: str) -> int:
        async def ask() -> int:
            client = await self._connect()
            try:
                found = await client.jetstream(timeout=10).consumers_info(topic)
                # a receiver that is pushed to has a consumer of its own, and the other one is not used
                return min(int(one.num_pending or 0) + int(one.num_ack_pending or 0) for one in found)
            finally:
                await client.close()

        return asyncio.run(ask())

    def delete(self, topic: str, partitions: int) -> None:
        async def forget() -> None:
            client = await self._connect()
            try:
                await client.jetstream(timeout=30).delete_stream(topic)
            finally:
                await client.close()

        asyncio.run(forget())


class Nats3(NatsPeer):
    name, nodes = "nats-3", 3


class Nats1(NatsPeer):
    name, nodes = "nats-1", 1
