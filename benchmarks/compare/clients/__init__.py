"""Client libraries behind one small interface. What is measured is in worker.py and the same for all."""

from __future__ import annotations

import asyncio
import importlib
from abc import ABC, abstractmethod

from benchmarks.compare.spec import Spec, key_of, stamp_of

# name of a client -> module of its adapter, and the library whose version is shown
CLIENTS = {
    "ferryline": ("benchmarks.compare.clients.ferryline_client", "ferryline"),
    "confluent-kafka": ("benchmarks.compare.clients.confluent_client", "confluent-kafka"),
    "aiokafka": ("benchmarks.compare.clients.aiokafka_client", "aiokafka"),
    "pika": ("benchmarks.compare.clients.pika_client", "pika"),
    "aio-pika": ("benchmarks.compare.clients.aio_pika_client", "aio-pika"),
    "nats-py": ("benchmarks.compare.clients.nats_client", "nats-py"),
    "redis-py": ("benchmarks.compare.clients.redis_client", "redis"),
}


class Adapter(ABC):
    """One connection of one client, as a producer or as a consumer.

    ``blocking`` adapters occupy their thread instead of awaiting; several of them run in a thread each.
    """

    blocking = False

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.value = spec.value()
        self.errors = 0

    @abstractmethod
    async def open_producer(self) -> None: ...

    @abstractmethod
    async def send_all(self, first: int, count: int) -> None:
        """Send records ``first`` .. as fast as possible. Returns when each is confirmed; failures go to ``errors``."""

    @abstractmethod
    async def send_one(self, number: int) -> None:
        """Send one record and return when it is confirmed."""

    @abstractmethod
    async def send_soon(self, key: bytes, value: bytes) -> None:
        """Begin to send one record; `drain` waits for the confirmations."""

    @abstractmethod
    async def drain(self) -> None: ...

    async def send_stamped(self, number: int, now_ns: int) -> None:
        """`send_soon` of a record that carries the time it was sent."""
        await self.send_soon(key_of(number), stamp_of(now_ns, self.value))

    async def idle(self, seconds: float) -> None:
        """Wait as a producer that has nothing to send right now."""
        await asyncio.sleep(seconds)

    @abstractmethod
    async def open_consumer(self) -> None:
        """A member of group ``spec.group``, from the start of the topic."""

    @abstractmethod
    async def read(self) -> tuple[int, int]:
        """The next records, key and value of each looked at: how many, and their bytes. (0, 0) when none came."""

    @abstractmethod
    async def read_values(self) -> list[bytes]:
        """What is there now or comes first, without waiting for more: the values."""

    @abstractmethod
    async def close(self) -> None: ...


def adapter(spec: Spec) -> Adapter:
    """The adapter of ``spec.client``. Raises ImportError when the library is not installed."""
    module = importlib.import_module(CLIENTS[spec.client][0])
    made: Adapter = module.make(spec)
    return made
