"""Ferryline: batches as they come, an acknowledgement for each record that nobody waits for before the next one.

As docs/queues.md advises for many small records. Every acknowledgement has an outcome of its own, committed and flushed
like a record.
"""

from __future__ import annotations

import asyncio
from collections import deque

from benchmarks.compare.receivers import STEP_S, Handler, Receiving
from benchmarks.compare.spec import Spec

import ferryline as fl

PREFETCH, TAKE = 1_000, 500


class Ferryline(Receiving):
    async def connect(self) -> None:
        self._client = fl.connect(self.spec.servers, ca=self.spec.ca)
        await self._client.start()
        self._acks: deque[asyncio.Future[None]] = deque()

    async def subscribe(self) -> None:
        self._receiver = self._client.receiver(self.spec.topic, group=self.spec.group, prefetch=PREFETCH)
        await self._receiver.start()

    async def step(self) -> None:
        acks, handle = self._acks, self.handler.record
        for message in await self._receiver.receive(TAKE, STEP_S):
            handle(message.key or b"", message.raw or b"")
            acks.append(message.ack_nowait())
        while acks and acks[0].done():
            self.errors += acks.popleft().exception() is not None

    async def settled(self) -> None:
        await self._receiver.flush()
        self.errors += sum(one.exception() is not None for one in self._acks)
        self._acks.clear()

    async def close(self) -> None:
        await self._receiver.close()
        await self._client.close()


def make(spec: Spec, handler: Handler) -> Receiving:
    """The receiver for one measurement."""
    return Ferryline(spec, handler)
