"""aio-pika: a callback for each delivery, which acknowledges it; the server confirms no acknowledgement."""

from __future__ import annotations

from typing import Any

import aio_pika
from benchmarks.compare.receivers import PREFETCH, Handler, Pushed, Receiving
from benchmarks.compare.spec import Spec


class AioPika(Pushed):
    async def connect(self) -> None:
        server = self.spec.servers.split(",", maxsplit=1)[0]
        self._connection = await aio_pika.connect(f"amqp://guest:guest@{server}/")
        self._channel = await self._connection.channel()

    async def subscribe(self) -> None:
        await self._channel.set_qos(prefetch_count=PREFETCH)
        queue = await self._channel.get_queue(self.spec.topic)
        await queue.consume(self._deliver)

    async def _deliver(self, message: Any) -> None:
        self.handler.body(message.body)
        await message.ack()
        self.came.set()

    async def settled(self) -> None:
        await self._channel.get_queue(self.spec.topic)  # answered behind all acknowledgements of the channel

    async def close(self) -> None:
        await self._connection.close()


def make(spec: Spec, handler: Handler) -> Receiving:
    """The receiver for one measurement."""
    return AioPika(spec, handler)
