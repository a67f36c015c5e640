"""Ferryline's own client: a future for each record, batches for the consumer, as `ferryline bench` uses it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.compare.clients import Adapter
from benchmarks.compare.spec import Spec, key_of

import ferryline as fl
from ferryline.cli.bench.client import send_all

READ_WAIT_S = 0.2


class Ferryline(Adapter):
    _batches: AsyncIterator[list[Any]] | None = None

    async def open_producer(self) -> None:
        self._client = fl.connect(self.spec.servers, ca=self.spec.ca)
        await self._client.start()
        self._producer = self._client.producer(linger=0.005 if self.spec.throughput else 0.0)
        await self._producer.start()
        self._waiting: deque[asyncio.Future[Any]] = deque()

    async def send_all(self, first: int, count: int) -> None:
        numbers = range(first, first + count)
        self.errors += await send_all(self._producer, self.spec.topic, self.value, key_of, numbers)

    async def send_one(self, number: int) -> None:
        await self._producer.send(self.spec.topic, self.value, key_of(number))

    async def send_soon(self, key: bytes, value: bytes) -> None:
        self._waiting.append(self._producer.send_nowait(self.spec.topic, value, key))
        while self._waiting[0].done() and len(self._waiting) > 1:
            self.errors += self._waiting.popleft().exception() is not None

    async def drain(self) -> None:
        await self._producer.flush()
        self.errors += sum(future.exception() is not None for future in self._waiting)
        self._waiting.clear()

    async def open_consumer(self) -> None:
        self._client = fl.connect(self.spec.servers, ca=self.spec.ca)
        await self._client.start()
        self._consumer = self._client.consumer(self.spec.topic, group=self.spec.group)
        await self._consumer.start()

    async def read(self) -> tuple[int, int]:
        if self._batches is None:
            self._batches = aiter(self._consumer.batches(max_records=self.spec.batch, max_wait=READ_WAIT_S))
        batch = await anext(self._batches)
        size = 0
        for message in batch:
            size += len(message.key or b"") + len(message.raw or b"")
        return len(batch), size

    async def read_values(self) -> list[bytes]:
        if self._batches is None:
            self._batches = aiter(self._consumer.batches(max_records=self.spec.batch, max_wait=0.0))
        return [message.raw for message in await anext(self._batches)]

    async def close(self) -> None:
        await self._client.close()


def make(spec: Spec) -> Adapter:
    """The adapter for one role."""
    return Ferryline(spec)
