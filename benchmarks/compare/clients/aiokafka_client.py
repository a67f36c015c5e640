"""aiokafka: futures of `send()`, getmany() for the consumer, a linger and larger batches for throughput."""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from benchmarks.compare.clients import Adapter
from benchmarks.compare.spec import Spec, key_of

WINDOW = 20_000  # futures that wait before the oldest are looked at


class Aiokafka(Adapter):
    async def open_producer(self) -> None:
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self.spec.servers,
            acks="all",
            enable_idempotence=True,
            linger_ms=5 if self.spec.throughput else 0,
            max_batch_size=262_144 if self.spec.throughput else 16_384,
        )
        await self._producer.start()
        self._waiting: list[asyncio.Future[Any]] = []

    async def send_all(self, first: int, count: int) -> None:
        send, topic, value = self._producer.send, self.spec.topic, self.value
        for number in range(first, first + count):
            self._waiting.append(await send(topic, value, key_of(number)))
            if len(self._waiting) >= WINDOW:
                await self.drain()
        await self._producer.flush()
        await self.drain()

    async def send_one(self, number: int) -> None:
        await self._producer.send_and_wait(self.spec.topic, self.value, key_of(number))

    async def send_soon(self, key: bytes, value: bytes) -> None:
        self._waiting.append(await self._producer.send(self.spec.topic, value, key))

    async def drain(self) -> None:
        found = await asyncio.gather(*self._waiting, return_exceptions=True)
        self.errors += sum(isinstance(one, BaseException) for one in found)
        self._waiting.clear()

    async def open_consumer(self) -> None:
        self._consumer = AIOKafkaConsumer(
            self.spec.topic,
            bootstrap_servers=self.spec.servers,
            group_id=self.spec.group,
            auto_offset_reset="earliest",
            max_poll_records=None,
        )
        await self._consumer.start()

    async def read(self) -> tuple[int, int]:
        seen = size = 0
        for found in (await self._consumer.getmany(timeout_ms=200, max_records=self.spec.batch)).values():
            for message in found:
                size += len(message.key) + len(message.value)
            seen += len(found)
        return seen, size

    async def read_values(self) -> list[bytes]:
        found = await self._consumer.getmany(timeout_ms=500, max_records=self.spec.batch)
        return [message.value for messages in found.values() for message in messages]

    async def close(self) -> None:
        if hasattr(self, "_consumer"):
            await self._consumer.stop()
        else:
            await self._producer.stop()


def make(spec: Spec) -> Adapter:
    """The adapter for one role."""
    return Aiokafka(spec)
