"""Redis Streams: one process with an append-only file, flushed always or every second. No copies."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import Peer, Variant
from benchmarks.compare.processes import Program, eventually, free_port

READY_S = 30.0


class RedisPeer(Peer):
    system = "redis"
    fsync = "always"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._port = free_port()

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("redis-server") else "redis-server is not installed (scripts/peers/install redis)"

    @property
    def servers(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        said = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
        self.version = said.split("v=", 1)[1].split()[0]
        settings = {"port": self._port, "bind": "127.0.0.1", "dir": self.folder, "save": "''", "appendonly": "yes"}
        settings |= {"appendfsync": self.fsync}
        command = ["redis-server"]
        for name, value in settings.items():
            command += [f"--{name}", "" if value == "''" else str(value)]
        self.programs = [Program(self.name, command, self.folder)]
        eventually(f"{self.name} serves", lambda: bool(self._client().ping()), READY_S, self.programs)

    def _client(self) -> Any:
        import redis

        return redis.Redis(port=self._port, socket_timeout=READY_S)

    def create(self, topic: str, partitions: int, variant: Variant, groups: list[str]) -> None:
        with self._client() as client:
            for group in groups:
                client.xgroup_create(topic, group, id="0", mkstream=True)

    def left(self, topic: str, group: str) -> int:
        with self._client() as client:
            [found] = [one for one in client.xinfo_groups(topic) if one["name"] == group.encode()]
            return int(found["pending"]) + int(found["lag"])

    def delete(self, topic: str, partitions: int) -> None:
        with self._client() as client:
            client.flushall(asynchronous=True)  # task queues keep more than one key


class RedisAlways(RedisPeer):
    name, fsync = "redis-always", "always"


class RedisEverysec(RedisPeer):
    name, fsync = "redis-everysec", "everysec"
