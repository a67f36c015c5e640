"""Cost against the number of partitions: three brokers, replication 2."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.scale.sampling import fresh_cluster, idle, spread, start_timed, until, usages

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.client import Client
from ferryline.protocol.frames import Kind, encode_value
from ferryline.protocol.messages import Offsets, OffsetsAnswer, OffsetsEntry
from ferryline.protocol.metadata import NO_BROKER, MetadataAnswer, MetadataRequest, PartitionMeta
from ferryline.transport import Connector

TOPIC_PARTITIONS = 1_000
SAMPLES = 60
ENTRIES = 1_000
LIMIT_S = 300.0  # for anything: beyond it the point has failed


async def measure(partitions: int, *, settle_s: float = 8.0, idle_s: float = 10.0) -> dict[str, Any]:
    """Every figure of one cluster with that many partitions."""
    found: dict[str, Any] = {"partitions": partitions, "brokers": 3, "replication": 2}
    async with fresh_cluster() as cluster:
        found["start_empty_s"] = await start_timed(cluster)
        await asyncio.sleep(2.0)  # imports and first heartbeats are behind it
        empty = {name: one.rss for name, one in usages(cluster).items()}
        found["empty_rss"] = empty
        async with connected(cluster) as client:
            found["create"] = await create(client, cluster, partitions)
            await asyncio.sleep(settle_s)
            found["idle"] = now = await idle(cluster, idle_s)
            grown = sum(now[name]["rss"] - empty[name] for name in cluster.brokers)
            found["bytes_per_partition"] = {
                "brokers": round(grown / partitions),
                "coordinator": round((now["coordinator"]["rss"] - empty["coordinator"]) / partitions),
            }
            found["metadata"] = await metadata(client, cluster)
            found["fail_over"] = await fail_over(client, cluster, partitions)
        found["restart_all"] = await restart_all(cluster, partitions)
        found["warnings"] = {name: _warnings(cluster.logs(name)) for name in cluster.local.services}
    return found


def connected(cluster: ProcessCluster) -> Client:
    """A client of the cluster."""
    return fl.connect(cluster.urls, ca=str(cluster.ca))


def parts_of(client: Client) -> list[PartitionMeta]:
    """What the client knows of every partition."""
    return list(client.routing.cluster.partitions.values())


async def create(client: Client, cluster: ProcessCluster, partitions: int) -> dict[str, Any]:
    """Make the topics; seconds until each call returned, and until every primary has committed its first mark."""
    began, calls = time.monotonic(), []
    sizes = [min(TOPIC_PARTITIONS, partitions - first) for first in range(0, partitions, TOPIC_PARTITIONS)]
    for number, size in enumerate(sizes):
        call = time.monotonic()
        await client.admin.create_topic(f"scale-{number}", partitions=size, replication=2, timeout=120)
        calls.append(time.monotonic() - call)
    made = time.monotonic() - began
    await until(lambda: len(parts_of(client)) == partitions and in_sync(client), LIMIT_S, "all in sync")
    await serving(client)
    return {
        "topics": len(sizes),
        "call_s": spread(calls),
        "all_calls_s": round(made, 3),
        "all_online_s": round(time.monotonic() - began, 3),
    }


def in_sync(client: Client) -> bool:
    """Every partition has a primary and all replicas in sync, as the client knows it."""
    return all(part.primary != NO_BROKER and len(part.isr) == len(part.replicas) for part in parts_of(client))


async def serving(client: Client, timeout_s: float = LIMIT_S) -> None:
    """Return when every primary answers for every partition and has committed the start of its epoch."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = {part.key: part for part in parts_of(client)}
        wrong = 0
        by_broker: dict[int, list[PartitionMeta]] = {}
        for part in left.values():
            by_broker.setdefault(part.primary, []).append(part)
        for broker, parts in sorted(by_broker.items()):
            session = await client.connections.session(broker, timeout=10)
            for first in range(0, len(parts), ENTRIES):
                entries = [OffsetsEntry(*part.key, "end") for part in parts[first : first + ENTRIES]]
                answer, _ = await session.request(Kind.OFFSETS, Offsets(entries), OffsetsAnswer, timeout=30)
                wrong += sum(result.error is not None or result.high_watermark < 1 for result in answer.results)
        if not wrong:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{wrong} partitions are not served within {timeout_s:.0f} s")
        await asyncio.sleep(0.05)


async def metadata(client: Client, cluster: ProcessCluster) -> dict[str, Any]:
    """Seconds and bytes of the whole picture and of one change, from the coordinator and from a broker."""
    connector = Connector(ca=str(cluster.ca))
    found: dict[str, Any] = {}
    try:
        for role, url in (("coordinator", cluster.url), ("broker", cluster.url_of("broker-2"))):
            session = await connector.open(url)
            whole, times = MetadataAnswer("", 0, 0, True), []
            for _ in range(5):
                began = time.monotonic()
                whole, _ = await session.request(Kind.METADATA, MetadataRequest(), MetadataAnswer, timeout=30)
                times.append(time.monotonic() - began)
            ask = MetadataRequest(whole.cluster_id, whole.coord_epoch, whole.revision, 20_000)
            poll = asyncio.ensure_future(session.request(Kind.METADATA, ask, MetadataAnswer, timeout=30))
            await asyncio.sleep(0.05)  # parked by then, or answered at once: either is an answer to this question
            began = time.monotonic()
            await client.admin.alter_topic("scale-0", retention_ms=3_600_000 + (role == "broker"), timeout=30)
            delta, _ = await poll
            found[role] = {
                "full_s": spread(times),
                "full_bytes": len(encode_value(whole)),
                "change_s": round(time.monotonic() - began, 4),
                "change_bytes": len(encode_value(delta)),
                "change_is_full": delta.full,
            }
            await session.close()
    finally:
        await connector.close()
    return found


class Stream:
    """One record after another into one partition, and the longest time between two acknowledgements."""

    def __init__(self, producer: Any, topic: str, partition: int) -> None:
        self.worst = 0.0
        self.last = time.monotonic()
        self.errors = 0
        self._producer, self._topic, self._partition = producer, topic, partition

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``."""
        while not stop.is_set():
            try:
                await self._producer.send(self._topic, b"x" * 100, partition=self._partition)
            except fl.FerrylineError:
                self.errors += 1
                continue
            now = time.monotonic()
            self.worst, self.last = max(self.worst, now - self.last), now
            await asyncio.sleep(0.02)  # its own pace

    def mark(self) -> None:
        """Gaps count from here."""
        self.worst, self.last = 0.0, time.monotonic()


async def fail_over(client: Client, cluster: ProcessCluster, partitions: int) -> dict[str, Any]:
    """kill -9 of the broker that leads most; gaps of sampled partitions it led, and of others; then its return."""
    names = {topic_id: topic.name for topic_id, topic in client.routing.cluster.topics.items()}
    led: dict[int, list[PartitionMeta]] = {}
    for part in parts_of(client):
        led.setdefault(part.primary, []).append(part)
    victim_id = max(sorted(led), key=lambda broker: len(led[broker]))
    victim = cluster.name_of(victim_id)
    hit = led[victim_id][:: max(1, len(led[victim_id]) // SAMPLES)][:SAMPLES]
    others = [part for broker, parts in sorted(led.items()) if broker != victim_id for part in parts]
    spared = others[:: max(1, len(others) // 20)][:20]
    stop = asyncio.Event()
    async with client.producer(linger=0) as producer:
        streams = {part.key: Stream(producer, names[part.topic_id], part.partition) for part in (*hit, *spared)}
        tasks = [asyncio.create_task(stream.run(stop)) for stream in streams.values()]
        await asyncio.sleep(2.0)  # all of them flow
        for stream in streams.values():
            stream.mark()
        before = usages(cluster)
        await cluster.kill(victim)
        killed = time.monotonic()
        await until(
            lambda: all(p.primary not in (NO_BROKER, victim_id) for p in parts_of(client)),
            LIMIT_S,
            "a primary everywhere",
        )
        elected = time.monotonic() - killed
        await until(
            lambda: all(stream.last > killed + elected for stream in streams.values()), LIMIT_S, "all flow again"
        )
        after = usages(cluster)
        hit_gaps = [streams[part.key].worst for part in hit]
        spared_gaps = [streams[part.key].worst for part in spared]
        stop.set()
        await asyncio.gather(*tasks)
    await serving(client)
    online = time.monotonic() - killed
    began = time.monotonic()
    ready = await start_timed(cluster, [victim])
    await until(lambda: in_sync(client), LIMIT_S, "all in sync again", 0.02)
    return {
        "primaries_lost": len(led[victim_id]),
        "gap_s": spread(hit_gaps),
        "gap_of_others_s": spread(spared_gaps),
        "known_to_client_s": round(elected, 3),
        "all_serve_s": round(online, 3),
        "cpu_s": {name: round(after[name].cpu_s - before[name].cpu_s, 2) for name in after},
        "send_errors": sum(stream.errors for stream in streams.values()),
        "restart_ready_s": ready[victim],
        "restart_in_sync_s": round(time.monotonic() - began, 3),
    }


async def restart_all(cluster: ProcessCluster, partitions: int) -> dict[str, Any]:
    """kill -9 of everything, and start again: until ready, and until every partition is served."""
    await cluster.kill_all()
    began = time.monotonic()
    ready = await start_timed(cluster)
    async with connected(cluster) as client:
        await until(lambda: len(parts_of(client)) == partitions and in_sync(client), LIMIT_S, "all in sync")
        await serving(client)
    return {"ready_s": ready, "all_online_s": round(time.monotonic() - began, 3)}


def _warnings(log: str) -> int:
    return sum("error" in line.lower() or "warning" in line.lower() for line in log.splitlines())
