"""kill -9 of every process at once: records, offsets, topics and assignments are back after a restart."""

from __future__ import annotations

import pytest

import ferryline as fl
from ferryline.cli.driver import ProcessCluster

pytestmark = pytest.mark.process

TOPICS = {"orders": 6, "audit": 1}
RECORDS = 2_000


async def test_everything_is_back_after_all_processes_were_killed(cluster: ProcessCluster) -> None:
    """1. two topics, records in both, a group that stands in the middle  2. kill -9 of all processes  3. restart
    4. same topics with the same ids and settings, every record at its offset, the group goes on where it stood.
    """
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        for name, partitions in TOPICS.items():
            await client.admin.create_topic(name, partitions=partitions, replication=2, retention_ms=12_345_678)
        ids = {name: _meta(client, name).id for name in TOPICS}
        async with client.producer() as producer:
            acked = {
                (meta.topic, meta.partition, meta.offset): b"%d" % number
                for name in TOPICS
                for number, meta in enumerate(
                    await producer.send_many(name, [(b"k%d" % (n % 50), b"%d" % n) for n in range(RECORDS)])
                )
                if isinstance(meta, fl.RecordMetadata)
            }
        assert len(acked) == RECORDS * len(TOPICS)
        committed = await _read_half(client)
        assert sum(committed.values()) >= RECORDS // 2

    await cluster.kill_all()
    await cluster.start()

    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        for name, partitions in TOPICS.items():
            meta = _meta(client, name)
            assert (meta.id, meta.config.partitions, meta.config.retention_ms) == (ids[name], partitions, 12_345_678)
        found = {}
        async with client.consumer(list(TOPICS)) as consumer:
            while len(found) < len(acked):
                batch = await consumer.pull(10_000, 10.0)
                assert batch, f"{len(found)} of {len(acked)} records are back"
                found |= {(m.topic, m.partition, m.offset): m.raw for m in batch}
        assert found == acked
        async with client.consumer(
            "orders", group="readers", partitions=range(TOPICS["orders"]), auto_commit=False
        ) as consumer:
            assert await _committed(consumer) == committed
        await _goes_on(client, acked, committed)


def _meta(client: fl.Client, name: str) -> object:
    meta = client.routing.topic(name)
    assert meta is not None, f"topic {name} is gone"
    return meta


async def _committed(consumer: fl.Consumer[bytes]) -> dict[int, int]:
    return {place.partition: await consumer.committed(place) or 0 for place in consumer.assignment}


async def _read_half(client: fl.Client) -> dict[int, int]:
    """A group reads half of the topic and commits; returns what it committed, by partition."""
    seen = 0
    async with client.consumer("orders", group="readers", auto_commit=False) as consumer:
        while seen < RECORDS // 2:
            batch = await consumer.pull(200, 10.0)
            assert batch
            seen += len(batch)
        await consumer.commit()
        return await _committed(consumer)


async def _goes_on(client: fl.Client, acked: dict[tuple[str, int, int], bytes], committed: dict[int, int]) -> None:
    """A new member of the group gets exactly what the group had not committed."""
    expected = {place for place in acked if place[0] == "orders" and place[2] >= committed[place[1]]}
    found: set[tuple[str, int, int]] = set()
    async with client.consumer("orders", group="readers", auto_commit=False) as consumer:
        while len(found) < len(expected):
            batch = await consumer.pull(1_000, 15.0)
            assert batch, f"{len(found)} of {len(expected)}"
            found |= {(m.topic, m.partition, m.offset) for m in batch}
    assert found == expected
