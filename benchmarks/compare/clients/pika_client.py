"""pika: its asynchronous connection with publisher confirms, many publishes in flight, acknowledgements for many.

BlockingConnection would wait for each confirm.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import pika
from benchmarks.compare.clients import Adapter
from benchmarks.compare.clients.rabbit_queue import BATCHES_AHEAD, RabbitQueue
from benchmarks.compare.spec import Spec, key_of
from pika.adapters.asyncio_connection import AsyncioConnection

WINDOW = 2_000
PERSISTENT = pika.BasicProperties(delivery_mode=2)


async def open_channel(servers: str) -> tuple[Any, Any]:
    """A connection to the first of ``servers``, and a channel of it."""
    port = int(servers.split(",", maxsplit=1)[0].split(":")[1])
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[Any] = loop.create_future()
    AsyncioConnection(
        pika.ConnectionParameters("127.0.0.1", port),
        on_open_callback=opened.set_result,
        on_open_error_callback=lambda _, error: opened.set_exception(RuntimeError(repr(error))),
        custom_ioloop=loop,
    )
    connection = await opened
    ready: asyncio.Future[Any] = loop.create_future()
    connection.channel(on_open_callback=ready.set_result)
    return connection, await ready


async def close_connection(connection: Any) -> None:
    """Returns when the server has closed it, too."""
    closed = asyncio.Event()
    connection.add_on_close_callback(lambda *_: closed.set())
    connection.close()
    await closed.wait()


class Pika(RabbitQueue):
    async def _open(self) -> None:
        self._connection, self._channel = await open_channel(self.spec.servers)
        # fan-out: the exchange has the topic's name, the queues those of the groups
        self._route = (self.spec.topic, "") if self.spec.fan_out else ("", self.spec.topic)

    async def open_producer(self) -> None:
        await self._open()
        self._waiting: OrderedDict[int, asyncio.Future[None] | None] = OrderedDict()
        self._tag = 0
        self._room = asyncio.Event()
        confirmed = asyncio.get_running_loop().create_future()
        self._channel.confirm_delivery(self._confirm, callback=confirmed.set_result)
        await confirmed

    def _confirm(self, frame: Any) -> None:
        method = frame.method
        bad = isinstance(method, pika.spec.Basic.Nack)
        if method.multiple:
            tags = []
            for tag in self._waiting:
                if tag > method.delivery_tag:
                    break
                tags.append(tag)
        else:
            tags = [method.delivery_tag]
        for tag in tags:
            future = self._waiting.pop(tag)
            self.errors += bad
            if future is not None:
                future.set_result(None)
        self._room.set()

    def _publish(self, key: bytes, value: bytes, future: asyncio.Future[None] | None = None) -> None:
        self._tag += 1
        self._waiting[self._tag] = future
        self._channel.basic_publish(*self._route, key + value, PERSISTENT)

    async def _until(self, most: int) -> None:
        while len(self._waiting) > most:
            self._room.clear()
            await self._room.wait()

    async def send_all(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self._publish(key_of(number), self.value)
            if len(self._waiting) >= WINDOW:
                await self._until(WINDOW // 2)
            elif not number % 100:
                await asyncio.sleep(0)
        await self._until(0)

    async def send_one(self, number: int) -> None:
        future = asyncio.get_running_loop().create_future()
        self._publish(key_of(number), self.value, future)
        await future

    async def send_soon(self, key: bytes, value: bytes) -> None:
        self._publish(key, value)

    async def drain(self) -> None:
        await self._until(0)

    async def open_consumer(self) -> None:
        await self._open()
        self._expect()
        self._channel.basic_qos(prefetch_count=BATCHES_AHEAD * self.spec.batch)
        queue = self.spec.group if self.spec.fan_out else self.spec.topic
        self._channel.basic_consume(queue, self._deliver)

    def _deliver(self, _: Any, method: Any, __: Any, body: bytes) -> None:
        if self._note(body, method.delivery_tag):
            self._ack_now()
        self._arrived.set()

    async def _ack(self) -> None:
        self._ack_now()

    def _ack_now(self) -> None:
        self._channel.basic_ack(self._last, multiple=True)
        self._unacked = 0

    async def close(self) -> None:
        await close_connection(self._connection)


def make(spec: Spec) -> Adapter:
    """The adapter for one role."""
    return Pika(spec)
