"""A steady stream through a cluster while something is done to it; afterwards an account of every record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ferryline as fl
from ferryline.cli.checker import Verdict
from ferryline.cli.drill import healed, partitions_of
from ferryline.cli.traffic import Traffic
from ferryline.protocol.partitioner import partition_of

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.protocol.metadata import PartitionMeta
    from tests.integration.cluster import Cluster

START_S = 60.0


class Steady:
    """Keys in turn, at a rate, and consumers in a group; use it with ``async with``.

    After the block `verdict` (as consumers saw it) and `stored` (as the logs have it) are set.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        topic: str = "steady",
        keys: int = 8,
        partitions: int = 4,
        replication: int = 2,
        min_isr: int = 1,
        rate: float = 1_000.0,
        consumers: int = 2,
        delivery_timeout: float = 60.0,
    ) -> None:
        self.cluster = cluster
        self.traffic = Traffic(topic, [b"key-%d" % n for n in range(keys)], partitions, group=f"{topic}-readers")
        self.verdict = Verdict()
        self.stored = Verdict()
        self._topic, self._partitions, self._replication, self._min_isr = topic, partitions, replication, min_isr
        self._rate, self._consumers, self._delivery_timeout = rate, consumers, delivery_timeout
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._sender: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Steady:
        self.client = self._connect()
        self.reading = self._connect()
        await self.client.start()
        await self.reading.start()
        await self.client.admin.create_topic(
            self._topic, partitions=self._partitions, replication=self._replication, min_isr=self._min_isr
        )
        assert await self.healed(START_S), self.partitions()
        self._sender = asyncio.create_task(self._send())
        self._tasks = [asyncio.create_task(self.traffic.consume(self.reading)) for _ in range(self._consumers)]
        await self.until(lambda: self.traffic.ledger.deliveries > 0, START_S, "nothing arrives")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            if kind is None and self._sender is not None:
                await self._sender
                await self.traffic.drain()
                await self.traffic.read_log(self.client)
        finally:
            tasks = [*self._tasks, *([self._sender] if self._sender else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.client.close()
            await self.reading.close()
        self.verdict = self.traffic.ledger.verdict()
        self.stored = self.traffic.stored.verdict()

    def _connect(self) -> Client:
        return fl.connect(self.cluster.urls, ca=self.cluster.ca)

    async def _send(self) -> None:
        async with self.client.producer(linger=0.001, delivery_timeout=self._delivery_timeout) as producer:
            started, number = time.perf_counter(), 0
            while not self._stop.is_set():
                await self.traffic.send(producer, number % len(self.traffic.keys))
                number += 1
                await asyncio.sleep(max(0.0, started + number / self._rate - time.perf_counter()))
            await producer.flush()

    # -- looking -------------------------------------------------------------------------------------

    def partitions(self) -> list[PartitionMeta]:
        return partitions_of(self.client, self._topic)

    def primary_name(self, partition: int | None = None) -> str:
        """Name of the broker that is primary of a partition; without one, of the partition of the first key."""
        if partition is None:
            partition = partition_of(self.traffic.keys[0], self._partitions)
        return self.cluster.name_of(self.partitions()[partition].primary)

    async def healed(self, within_s: float = 60.0) -> bool:
        """Every partition has all its copies in sync, within this time."""
        return await healed(self.client, self._topic, self._partitions, self._replication, within_s)

    async def run_for(self, seconds: float) -> None:
        """Let the stream run."""
        await asyncio.sleep(seconds)

    async def flows(self, within_s: float = 30.0) -> None:
        """Every key gets a new acknowledgement, and something new is received, within this time."""
        ledger = self.traffic.ledger
        acked, received = ledger.acknowledged_by_key(), ledger.deliveries

        def moved() -> bool:
            now = ledger.acknowledged_by_key()
            return all(b > a for a, b in zip(acked, now, strict=True)) and ledger.deliveries > received

        await self.until(moved, within_s, "the stream stands still")

    async def until(self, condition: Callable[[], Any], within_s: float, what: str) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, f"not within {within_s:g} s: {what}; {self.traffic.send_errors}"
            if self._sender is not None and self._sender.done():
                self._sender.result()
            await asyncio.sleep(0.02)

    def assert_kept(self) -> None:
        """Nothing acknowledged is missing, out of order or there twice, to consumers and in the logs."""
        assert self.verdict.good, self.verdict
        assert self.stored.good, self.stored
        assert self.stored.received >= self.verdict.acknowledged > 0
