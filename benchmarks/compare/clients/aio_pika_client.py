"""aio-pika: publisher confirms with many publishes in flight, acknowledgements for many."""

from __future__ import annotations

import asyncio
from typing import Any

import aio_pika
from benchmarks.compare.clients import Adapter
from benchmarks.compare.clients.rabbit_queue import BATCHES_AHEAD, RabbitQueue
from benchmarks.compare.spec import Spec, key_of

WINDOW = 1_000


class AioPika(RabbitQueue):
    async def _open(self) -> Any:
        server = self.spec.servers.split(",", maxsplit=1)[0]
        self._connection = await aio_pika.connect(f"amqp://guest:guest@{server}/")
        return await self._connection.channel(publisher_confirms=True)

    async def open_producer(self) -> None:
        channel = await self._open()
        fan_out = self.spec.fan_out
        self._exchange = await channel.get_exchange(self.spec.topic) if fan_out else channel.default_exchange
        self._key = "" if fan_out else self.spec.topic
        self._waiting: set[asyncio.Task[Any]] = set()

    def _publish(self, key: bytes, value: bytes) -> Any:
        message = aio_pika.Message(key + value, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        return self._exchange.publish(message, self._key)

    async def send_all(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self._waiting.add(asyncio.create_task(self._publish(key_of(number), self.value)))
            if len(self._waiting) >= WINDOW:
                await self._settle(asyncio.FIRST_COMPLETED)
        await self.drain()

    async def _settle(self, when: str) -> None:
        done, self._waiting = await asyncio.wait(self._waiting, return_when=when)
        self.errors += sum(one.exception() is not None for one in done)

    async def send_one(self, number: int) -> None:
        await self._publish(key_of(number), self.value)

    async def send_soon(self, key: bytes, value: bytes) -> None:
        self._waiting.add(asyncio.create_task(self._publish(key, value)))

    async def drain(self) -> None:
        if self._waiting:
            await self._settle(asyncio.ALL_COMPLETED)

    async def open_consumer(self) -> None:
        channel = await self._open()
        await channel.set_qos(prefetch_count=BATCHES_AHEAD * self.spec.batch)
        queue = await channel.get_queue(self.spec.group if self.spec.fan_out else self.spec.topic)
        self._expect()
        await queue.consume(self._deliver)

    async def _deliver(self, message: Any) -> None:
        if self._note(message.body, message):
            await self._ack()
        self._arrived.set()

    async def _ack(self) -> None:
        self._unacked = 0
        await self._last.ack(multiple=True)

    async def close(self) -> None:
        await self._connection.close()


def make(spec: Spec) -> Adapter:
    """The adapter for one role."""
    return AioPika(spec)
