"""Ferryline: one coordinator and three brokers, over TLS, as `ferryline up` starts them."""

from __future__ import annotations

import asyncio
import importlib.metadata
from contextlib import suppress
from pathlib import Path

from benchmarks.compare.peers import Peer, Variant
from benchmarks.compare.processes import PeerFailed

import ferryline as fl
from ferryline.app.queue import RESULTS
from ferryline.cli.drill import healed
from ferryline.cli.processes import LocalCluster, missing_services
from ferryline.protocol.errors import UnknownTopic

FENCE_MS = 600_000  # a turn of the others lasts minutes, and a paused broker is not a dead one
READY_S = 60.0


class FerrylinePeer(Peer):
    name = system = "ferryline"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.version = importlib.metadata.version("ferryline")
        self._cluster = LocalCluster(folder, brokers=3, coordinator_args=["--fence-ms", str(FENCE_MS)])

    @classmethod
    def missing(cls) -> str:
        return "".join(f"{name} is not installed; " for name in missing_services())

    def start(self) -> None:
        self._cluster.start()

    @property
    def servers(self) -> str:
        return ",".join(self._cluster.urls)

    @property
    def ca(self) -> str:
        return str(self._cluster.ca)

    @property
    def pids(self) -> list[int]:
        return [service.pid for service in self._cluster.services.values() if service.running]

    def create(self, topic: str, partitions: int, variant: Variant, groups: list[str]) -> None:
        async def make() -> None:
            async with fl.connect(self.servers, ca=self.ca) as client:
                settings = {"replication": variant.copies, "min_isr": 1, "flush": variant.topic["flush"]}
                await client.admin.create_topic(topic, partitions=partitions, timeout=READY_S, **settings)
                if not await healed(client, topic, partitions, variant.copies, READY_S):
                    raise PeerFailed(f"ferryline: {topic} did not get {variant.copies} copies in sync")

        asyncio.run(make())

    def left(self, topic: str, group: str) -> int:
        async def ask() -> int:
            async with fl.connect(self.servers, ca=self.ca) as client:
                parts = await client.queue(topic, group).stats()
                return sum(one.high_watermark - one.start - one.settled_above_start for one in parts)

        return asyncio.run(ask())

    def delete(self, topic: str, partitions: int) -> None:
        async def forget() -> None:
            async with fl.connect(self.servers, ca=self.ca) as client:
                await client.admin.delete_topic(topic)
                with suppress(UnknownTopic):
                    await client.admin.delete_topic(topic + RESULTS)  # of tasks

        asyncio.run(forget())

    def stop(self) -> None:
        self._cluster.kill_all()
