"""nats-py: many publishes in flight, pull consumers in batches with one acknowledgement for all of a batch.

JetStream knows no keys: the key stands in front of the value.
"""

from __future__ import annotations

import asyncio
from typing import Any

import nats
import nats.errors
from benchmarks.compare.clients import Adapter
from benchmarks.compare.spec import KEY_BYTES, Spec, key_of
from nats.js.api import AckPolicy, ConsumerConfig

WINDOW = 1_000


class Nats(Adapter):
    async def open_producer(self) -> None:
        self._client = await nats.connect(self.spec.servers.split(","))
        self._stream = self._client.jetstream(timeout=30, publish_async_max_pending=4 * WINDOW)
        self._subjects = [f"{self.spec.topic}.{number}" for number in range(self.spec.partitions)]
        self._waiting: list[asyncio.Future[Any]] = []

    def _subject(self, key: bytes) -> str:
        return self._subjects[self.spec.partition_of(key)]

    async def send_all(self, first: int, count: int) -> None:
        publish, value = self._stream.publish_async, self.value
        for number in range(first, first + count):
            key = key_of(number)
            self._waiting.append(await publish(self._subject(key), key + value, wait_stall=60.0))
            if len(self._waiting) >= WINDOW:
                await self._settle(self._waiting[: WINDOW // 2])
                del self._waiting[: WINDOW // 2]
        await self.drain()

    async def _settle(self, waiting: list[asyncio.Future[Any]]) -> None:
        found = await asyncio.gather(*waiting, return_exceptions=True)
        self.errors += sum(isinstance(one, BaseException) for one in found)

    async def send_one(self, number: int) -> None:
        key = key_of(number)
        await self._stream.publish(self._subject(key), key + self.value)

    async def send_soon(self, key: bytes, value: bytes) -> None:
        self._waiting.append(await self._stream.publish_async(self._subject(key), key + value, wait_stall=60.0))

    async def drain(self) -> None:
        await self._settle(self._waiting)
        self._waiting.clear()

    async def open_consumer(self) -> None:
        await self.open_producer()
        if self.spec.throughput:
            self._pull = await self._stream.pull_subscribe_bind(consumer=self.spec.group, stream=self.spec.topic)
            return
        # for latency: the server pushes, nobody asks first
        config = ConsumerConfig(ack_policy=AckPolicy.ALL, max_ack_pending=-1)
        self._push = await self._stream.subscribe(
            f"{self.spec.topic}.*", stream=self.spec.topic, manual_ack=True, config=config
        )

    async def _pushed(self) -> list[Any]:
        try:
            found = [await self._push.next_msg(timeout=0.5)]
        except (TimeoutError, nats.errors.TimeoutError):
            return []
        while self._push.pending_msgs:
            found.append(await self._push.next_msg(timeout=0.5))
        await found[-1].ack()
        return found

    async def _fetch(self, count: int) -> list[Any]:
        try:
            found: list[Any] = await self._pull.fetch(count, timeout=0.5)
        except (TimeoutError, nats.errors.TimeoutError):
            return []
        await found[-1].ack()  # for all before it too
        return found

    async def read(self) -> tuple[int, int]:
        size = 0
        found = await self._fetch(self.spec.batch)
        for message in found:
            data = message.data
            size += len(data[:KEY_BYTES]) + len(data[KEY_BYTES:])
        return len(found), size

    async def read_values(self) -> list[bytes]:
        found = await (self._fetch(self.spec.batch) if self.spec.throughput else self._pushed())
        return [message.data[KEY_BYTES:] for message in found]

    async def close(self) -> None:
        await self._client.close()


def make(spec: Spec) -> Adapter:
    """The adapter for one role."""
    return Nats(spec)
