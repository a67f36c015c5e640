"""pika: its asynchronous connection, a callback for each delivery, which acknowledges it by its own tag."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.compare.clients.pika_client import close_connection, open_channel
from benchmarks.compare.receivers import PREFETCH, Handler, Pushed, Receiving
from benchmarks.compare.spec import Spec


class Pika(Pushed):
    async def connect(self) -> None:
        self._connection, self._channel = await open_channel(self.spec.servers)

    async def subscribe(self) -> None:
        self._channel.basic_qos(prefetch_count=PREFETCH)
        self._channel.basic_consume(self.spec.topic, self._deliver)

    def _deliver(self, channel: Any, method: Any, _: Any, body: bytes) -> None:
        self.handler.body(body)
        channel.basic_ack(method.delivery_tag)
        self.came.set()

    async def settled(self) -> None:
        answered = asyncio.get_running_loop().create_future()
        self._channel.queue_declare(self.spec.topic, passive=True, callback=answered.set_result)
        await answered  # behind all acknowledgements of the channel

    async def close(self) -> None:
        await close_connection(self._connection)


def make(spec: Spec, handler: Handler) -> Receiving:
    """The receiver for one measurement."""
    return Pika(spec, handler)
