"""What the tables of bad input share: a cluster with a topic, and the proof that it still serves."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ferryline.protocol.metadata import ClusterMetadata, PartitionMeta, TopicMeta
from ferryline.protocol.records import decode_batch, encode_batch, split_batches
from tests.integration.process_driver import ProcessCluster
from tests.integration.wire import Rest, Wire

TOPIC = "victim"
PARTITIONS = 3


def batch(*values: bytes, codec: str = "none", producer: tuple[int, int, int] = (-1, -1, -1)) -> bytes:
    """One batch as a client sends it."""
    return bytes(encode_batch([(b"k", value, []) for value in values or (b"v",)], codec=codec, producer=producer))


@dataclass
class World:
    """One cluster under attack: its topic, and addresses by broker id."""

    cluster: ProcessCluster
    topic: TopicMeta
    urls: dict[int, str]
    metadata: ClusterMetadata
    pids: itertools.count[int] = field(default_factory=lambda: itertools.count(random.getrandbits(40)))

    @classmethod
    async def make(cls, cluster: ProcessCluster) -> World:
        """Create the topic and wait until each of its partitions has a primary and both copies."""
        async with Rest(cluster.url, cluster.ca) as rest:
            body = {"name": TOPIC, "config": {"partitions": PARTITIONS, "replication": 2}}
            status, answer = await rest.call("POST", "/v1/topics", body)
            assert status in (200, 201, 409), answer
        end = time.monotonic() + 15
        while True:
            async with await Wire.connect(cluster.url, cluster.ca) as wire:
                metadata = await wire.metadata()
            topic = metadata.topic(TOPIC)
            parts = metadata.partitions_of(topic.id) if topic else []
            if topic and len(parts) == PARTITIONS and all(part.primary and len(part.isr) == 2 for part in parts):
                urls = {broker.id: broker.external for broker in metadata.brokers.values()}
                return cls(cluster, topic, urls, metadata)
            assert time.monotonic() < end, f"the topic did not come up: {parts}"
            await asyncio.sleep(0.1)

    def part(self, partition: int = 0) -> PartitionMeta:
        found = self.metadata.partition(self.topic.id, partition)
        assert found is not None
        return found

    async def primary(self, partition: int = 0) -> Wire:
        """A session to the primary of a partition."""
        return await Wire.connect(self.urls[self.part(partition).primary], self.cluster.ca)

    async def secondary(self, partition: int = 0) -> Wire:
        part = self.part(partition)
        other = next(broker for broker in part.replicas if broker != part.primary)
        return await Wire.connect(self.urls[other], self.cluster.ca)

    async def coordinator(self) -> Wire:
        return await Wire.connect(self.cluster.url, self.cluster.ca)

    async def send(self, wire: Wire, data: bytes, partition: int = 0, **changes: Any) -> str:
        """Produce ``data``; returns the error code, "" if it was taken."""
        target = {"topic_id": self.topic.id, "partition": partition, "partitions": PARTITIONS, **changes}
        result = await wire.produce(target["topic_id"], target["partition"], target["partitions"], data)
        return result.error.code if result.error else ""

    async def still_serves(self) -> None:
        """A record goes into each partition and comes out again, whatever happened before."""
        for partition in range(PARTITIONS):
            for _ in range(20):
                if await self._serves(partition):
                    break
                self.metadata = (await World.make(self.cluster)).metadata
            else:
                raise AssertionError(f"partition {partition} is at no primary for long")

    async def _serves(self, partition: int) -> bool:
        """False: the primary has moved, as it may at any time."""
        value = b"proof %d" % random.getrandbits(60)
        async with await self.primary(partition) as wire:
            result = await wire.produce(self.topic.id, partition, PARTITIONS, batch(value))
            if result.error is not None and result.error.code == "NOT_PRIMARY":
                return False
            assert result.error is None, result.error
            fetched, payload = await wire.fetch(self.topic.id, partition, result.base_offset)
            if fetched.error is not None and fetched.error.code == "NOT_PRIMARY":
                return False
            assert fetched.error is None, fetched.error
            found = [
                record.value
                for at, header in split_batches(payload)
                for record in decode_batch(payload[at : at + header.size], header)
            ]
            assert value in found
            return True


@dataclass(frozen=True)
class Case:
    """One piece of nonsense and the codes that it may be answered with."""

    name: str
    act: Callable[[World], Awaitable[str]]
    codes: frozenset[str]

    def __str__(self) -> str:
        return self.name


def case(table: list[Case], name: str, *codes: str) -> Callable[[Callable[[World], Awaitable[str]]], None]:
    """Decorator: one row of a table."""

    def add(act: Callable[[World], Awaitable[str]]) -> None:
        assert name not in {row.name for row in table}, f"two cases are called {name!r}"
        table.append(Case(name, act, frozenset(codes)))

    return add
