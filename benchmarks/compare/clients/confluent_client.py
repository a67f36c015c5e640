"""confluent-kafka (librdkafka): delivery callbacks, larger batches and a linger, as its documentation advises.

Its documentation: raise linger.ms and batch.size for throughput, serve callbacks with poll(), consume() for many
messages at a time and poll() for one. acks=all and idempotence are said, not left to defaults.
"""

from __future__ import annotations

from typing import Any

from benchmarks.compare.clients import Adapter
from benchmarks.compare.spec import Spec, key_of
from confluent_kafka import Consumer, Producer

POLL_EVERY = 1_000
READ_WAIT_S = 0.2


class Confluent(Adapter):
    blocking = True

    def _count(self, error: Any, _: Any) -> None:
        self._settled += 1
        if error is not None:
            self.errors += 1

    async def open_producer(self) -> None:
        settings: dict[str, Any] = {
            "bootstrap.servers": self.spec.servers,
            "acks": "all",
            "enable.idempotence": True,
            "socket.nagle.disable": True,
            "linger.ms": 5 if self.spec.throughput else 0,
            "log_level": 0,
        }
        if self.spec.throughput:
            settings |= {
                "batch.size": 1_000_000,
                "batch.num.messages": 100_000,
                "queue.buffering.max.messages": 2_000_000,
                "queue.buffering.max.kbytes": 1_048_576,
            }
        self._producer = Producer(settings)
        self._settled = self._sent = 0
        self._producer.list_topics(self.spec.topic, timeout=30)

    async def send_all(self, first: int, count: int) -> None:
        produce, poll, topic, value, done = (
            self._producer.produce,
            self._producer.poll,
            self.spec.topic,
            self.value,
            self._count,
        )
        for number in range(first, first + count):
            while True:
                try:
                    produce(topic, value, key_of(number), on_delivery=done)
                    break
                except BufferError:
                    poll(0.01)
            if not number % POLL_EVERY:
                poll(0)
        self._sent += count
        await self.drain()

    async def send_one(self, number: int) -> None:
        before = self._settled
        self._producer.produce(self.spec.topic, self.value, key_of(number), on_delivery=self._count)
        while self._settled == before:
            self._producer.poll(1.0)
        self._sent += 1

    async def send_soon(self, key: bytes, value: bytes) -> None:
        self._producer.produce(self.spec.topic, value, key, on_delivery=self._count)
        self._sent += 1
        self._producer.poll(0)

    async def idle(self, seconds: float) -> None:
        self._producer.poll(seconds)

    async def drain(self) -> None:
        while self._settled < self._sent:
            self._producer.poll(0.1)

    async def open_consumer(self) -> None:
        settings: dict[str, Any] = {
            "bootstrap.servers": self.spec.servers,
            "group.id": self.spec.group,
            "auto.offset.reset": "earliest",
            "log_level": 0,
        }
        if self.spec.throughput:
            settings |= {"queued.min.messages": 1_000_000, "queued.max.messages.kbytes": 1_048_576}
        self._consumer = Consumer(settings)
        self._consumer.subscribe([self.spec.topic])

    async def read(self) -> tuple[int, int]:
        size = 0
        found = self._consumer.consume(num_messages=self.spec.batch, timeout=READ_WAIT_S)
        for message in found:
            size += len(message.key() or b"") + len(message.value() or b"")
        return len(found), size

    async def read_values(self) -> list[bytes]:
        poll = self._consumer.poll
        message, found = poll(0.5), []
        while message is not None:
            if message.error() is None:
                found.append(message.value())
            message = poll(0) if len(found) < self.spec.batch else None
        return found

    async def close(self) -> None:
        if hasattr(self, "_consumer"):
            self._consumer.close()


def make(spec: Spec) -> Adapter:
    """The adapter for one role."""
    return Confluent(spec)
