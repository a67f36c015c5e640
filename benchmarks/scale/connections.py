"""Cost against the number of client connections: TLS sessions with a parked metadata poll each."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.scale.partitions import connected, create
from benchmarks.scale.sampling import fresh_cluster, idle, spread, start_timed, usages

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.frames import Kind
from ferryline.protocol.metadata import ClusterMetadata, MetadataAnswer
from ferryline.transport import Connector, Session

AT_ONCE = 25
PARTITIONS = 30


class Watcher:
    """One connection: knows the cluster, and notes when it learned of each change."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.cluster = ClusterMetadata()
        self.learned = 0.0
        self.task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        wait_ms = 0
        while True:
            try:
                answer, _ = await self.session.request(
                    Kind.METADATA, self.cluster.request(wait_ms), MetadataAnswer, timeout=60
                )
            except fl.FerrylineError:
                return  # the broker was killed
            if self.cluster.apply(answer):
                self.learned = time.monotonic()
            wait_ms = 30_000


async def measure(counts: list[int], *, idle_s: float = 5.0) -> list[dict[str, Any]]:
    """One cluster, more and more connections, spread over its brokers."""
    found: list[dict[str, Any]] = []
    async with fresh_cluster() as cluster:
        await start_timed(cluster)
        connector = Connector(ca=str(cluster.ca), connect_timeout=30)
        watchers: list[Watcher] = []
        try:
            async with connected(cluster) as client:
                await create(client, cluster, PARTITIONS)
                await asyncio.sleep(2.0)
                empty = usages(cluster)
                for count in counts:
                    took = await connect(connector, cluster, watchers, count)
                    await asyncio.sleep(2.0)  # their first answers are behind them
                    now = await idle(cluster, idle_s)
                    grown = sum(now[name]["rss"] - empty[name].rss for name in cluster.brokers)
                    began = time.monotonic()
                    await client.admin.alter_topic("scale-0", retention_ms=3_600_000 + count)
                    await asyncio.sleep(2.0)
                    found.append(
                        {
                            "connections": count,
                            "connect_s": spread(took),
                            "idle": now,
                            "broker_bytes_per_connection": round(grown / count),
                            "told_of_a_change_s": spread([watcher.learned - began for watcher in watchers]),
                        }
                    )
                found[-1]["fail_over"] = await kill_one(cluster, watchers)
        finally:
            for watcher in watchers:
                watcher.task.cancel()
            await asyncio.gather(*(watcher.task for watcher in watchers), return_exceptions=True)
            await asyncio.gather(*(w.session.close() for w in watchers), return_exceptions=True)
            await connector.close()
    return found


async def connect(connector: Connector, cluster: ProcessCluster, watchers: list[Watcher], count: int) -> list[float]:
    """Open sessions until there are ``count``, a few at a time; seconds of each."""
    urls = [cluster.url_of(name) for name in cluster.brokers]
    took: list[float] = []

    async def one(number: int) -> None:
        began = time.monotonic()
        session = await connector.open(urls[number % len(urls)])
        took.append(time.monotonic() - began)
        watchers.append(Watcher(session))

    for first in range(len(watchers), count, AT_ONCE):
        await asyncio.gather(*(one(number) for number in range(first, min(count, first + AT_ONCE))))
    return took


async def kill_one(cluster: ProcessCluster, watchers: list[Watcher]) -> dict[str, Any]:
    """kill -9 of a broker: when those on the others knew of it."""
    victim = cluster.brokers[0]
    gone = cluster.url_of(victim)
    began = time.monotonic()
    await cluster.kill(victim)
    await asyncio.sleep(5.0)
    told = [watcher.learned - began for watcher in watchers if watcher.session.url != gone]
    return {"told_s": spread([seconds for seconds in told if seconds > 0]), "never_told": sum(s <= 0 for s in told)}
