"""Reading a RabbitMQ queue: bodies are collected as they are pushed, and acknowledged many at a time.

A body is key and value: AMQP knows no keys.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import Any

from benchmarks.compare.clients import Adapter
from benchmarks.compare.spec import KEY_BYTES

BATCHES_AHEAD = 2  # prefetched; a batch is acknowledged at once
_WAIT_S = 0.5


class RabbitQueue(Adapter):
    """What both libraries do with what is pushed to them."""

    def _expect(self) -> None:
        """Nothing has come yet."""
        self._found: list[bytes] = []
        self._last: Any = None  # what names the newest delivery to `_ack`
        self._unacked = 0
        self._arrived = asyncio.Event()

    def _note(self, body: bytes, last: Any) -> bool:
        """A delivery has come; True: acknowledge now, then call `_arrived.set`."""
        self._found.append(body)
        self._last = last
        self._unacked += 1
        return self._unacked >= self.spec.batch // 2

    @abstractmethod
    async def _ack(self) -> None:
        """Acknowledge everything up to ``_last``, and set ``_unacked`` to 0."""

    async def _take(self) -> list[bytes]:
        if not self._found:
            self._arrived.clear()
            if self._unacked:
                await self._ack()
            try:
                await asyncio.wait_for(self._arrived.wait(), _WAIT_S)
            except TimeoutError:
                return []
        found, self._found = self._found, []
        return found

    async def read(self) -> tuple[int, int]:
        size = 0
        found = await self._take()
        for body in found:
            size += len(body[:KEY_BYTES]) + len(body[KEY_BYTES:])
        return len(found), size

    async def read_values(self) -> list[bytes]:
        return [body[KEY_BYTES:] for body in await self._take()]
