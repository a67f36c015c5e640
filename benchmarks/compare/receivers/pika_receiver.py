"""pika: its asynchronous connection, a callback for each delivery, which acknowledges it by its own tag."""

from __future__ import annotations

import asyncio
from typing import Any

import pika
from benchmarks.compare.receivers import PREFETCH, STEP_S, Handler, Receiving
from benchmarks.compare.spec import Spec
from pika.adapters.asyncio_connection import AsyncioConnection


class Pika(Receiving):
    async def connect(self) -> None:
        port = int(self.spec.servers.split(",", maxsplit=1)[0].split(":")[1])
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[Any] = loop.create_future()
        AsyncioConnection(
            pika.ConnectionParameters("127.0.0.1", port),
            on_open_callback=opened.set_result,
            on_open_error_callback=lambda _, error: opened.set_exception(RuntimeError(repr(error))),
            custom_ioloop=loop,
        )
        self._connection = await opened
        ready: asyncio.Future[Any] = loop.create_future()
        self._connection.channel(on_open_callback=ready.set_result)
        self._channel = await ready
        self._came = asyncio.Event()

    async def subscribe(self) -> None:
        self._channel.basic_qos(prefetch_count=PREFETCH)
        self._channel.basic_consume(self.spec.topic, self._deliver)

    def _deliver(self, channel: Any, method: Any, _: Any, body: bytes) -> None:
        self.handler.body(body)
        channel.basic_ack(method.delivery_tag)
        self._came.set()

    async def step(self) -> None:
        self._came.clear()
        try:
            await asyncio.wait_for(self._came.wait(), STEP_S)
        except TimeoutError:
            return

    async def settled(self) -> None:
        answered = asyncio.get_running_loop().create_future()
        self._channel.queue_declare(self.spec.topic, passive=True, callback=answered.set_result)
        await answered  # behind all acknowledgements of the channel

    async def close(self) -> None:
        closed = asyncio.Event()
        self._connection.add_on_close_callback(lambda *_: closed.set())
        self._connection.close()
        await closed.wait()


def make(spec: Spec, handler: Handler) -> Receiving:
    """The receiver for one measurement."""
    return Pika(spec, handler)
