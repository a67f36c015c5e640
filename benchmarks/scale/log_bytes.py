"""Time to start against bytes of log: one broker, kill -9 and clean stop, files in the page cache and not.

The log is written by the broker's own storage code while the broker is down: through the network it would take an hour.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.scale.partitions import connected, serving
from benchmarks.scale.sampling import fresh_cluster, start_timed, usages

from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.records import encode_batch, split_batches, stamp
from ferryline_broker.log.files import FileStorage
from ferryline_broker.log.node_store import NodeStore

GIB = 1024**3
PARTITIONS = 16
BATCH_RECORDS = 256
RECORD_BYTES = 1024


async def measure(gibibytes: list[int]) -> list[dict[str, Any]]:
    """One broker whose log grows; each size is started four times."""
    found: list[dict[str, Any]] = []
    async with fresh_cluster(1) as cluster:
        await start_timed(cluster)
        async with connected(cluster) as client:
            await create_one_copy(client, cluster)
        name = cluster.brokers[0]
        data = cluster.local.data_dir(name)
        written = 0
        for size in gibibytes:
            await cluster.terminate(name)
            began = time.monotonic()
            written += await asyncio.to_thread(fill, data, size * GIB - written)
            row: dict[str, Any] = {
                "gib": size,
                "partitions": PARTITIONS,
                "filled_s": round(time.monotonic() - began, 1),
            }
            row["first_start"] = await start(cluster, name)
            await cluster.kill(name)
            row["after_kill"] = await start(cluster, name)
            await cluster.terminate(name)
            row["after_clean_stop"] = await start(cluster, name)
            await cluster.kill(name)
            await asyncio.to_thread(forget_pages, data)
            row["after_kill_cold"] = await start(cluster, name)
            usage = usages(cluster)[name]
            row["rss"], row["descriptors"] = usage.rss, usage.descriptors
            found.append(row)
    return found


async def create_one_copy(client: Any, cluster: ProcessCluster) -> None:
    """The topic of this measurement; a record in each partition proves that it is served."""
    await client.admin.create_topic("log", partitions=PARTITIONS, replication=1, segment_bytes=128 * 1024 * 1024)
    await serving(client)


async def start(cluster: ProcessCluster, name: str) -> dict[str, float]:
    """Seconds from exec to READY, and until every partition is served."""
    began = time.monotonic()
    ready = await start_timed(cluster, [name])
    async with connected(cluster) as client:
        await serving(client)
    return {"ready_s": ready[name], "all_online_s": round(time.monotonic() - began, 3)}


def fill(data: Path, size: int) -> int:
    """Append records of about ``size`` bytes to the stopped broker's logs, evenly; returns the bytes written."""
    storage = FileStorage(str(data))
    store = NodeStore.open(storage)
    written = 0
    try:
        value = os.urandom(RECORD_BYTES)
        rows: list[Any] = [(b"key", value, [])] * BATCH_RECORDS
        batch = bytearray(encode_batch(rows, base_offset=0, epoch=0, timestamp_ms=int(time.time() * 1000)))
        replicas = [store.open_replica(*key) for key in store.replicas_on_disk()]
        while written < size:
            for replica in replicas:
                log = replica.records
                stamp(batch, log.log_end, max(0, log.tail_epoch))
                log.append(batch, split_batches(batch, verify=False))
                written += len(batch)
        for replica in replicas:
            replica.flush()
            replica.write_checkpoint(replica.records.log_end, replica.state.log_end)
        store.mark_clean_stop()
    finally:
        store.close()
        storage.close()
    return written


def forget_pages(data: Path) -> None:
    """Let the kernel drop what it has cached of these files, so that the next start reads from the medium."""
    for path in data.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
