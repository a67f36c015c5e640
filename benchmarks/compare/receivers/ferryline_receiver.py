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

PREFETCH, TAKE = 4_000, 1_000


class Ferryline(Receiving):
    async def connect(self) -> None:
        self._client = fl.connect(self.spec.servers, ca=self.spec.ca)
        await self._client.start()
        self._acks: deque[asyncio.Task[list[fl.FerrylineError | None]]] = deque()

    async def subscribe(self) -> None:
        self._receiver = self._client.receiver(self.spec.topic, group=self.spec.group, prefetch=PREFETCH)
        await self._receiver.start()

    async def step(self) -> None:
        acks, handle = self._acks, self.handler.record
        batch = await self._receiver.receive(TAKE, STEP_S)
        for message in batch:
            handle(message.key or b"", message.raw or b"")
        if batch:
            acks.append(asyncio.create_task(self._receiver.ack_many(batch)))
        while acks and acks[0].done():
            self._count(acks.popleft())

    async def settled(self) -> None:
        await asyncio.gather(*self._acks)
        while self._acks:
            self._count(self._acks.popleft())

    def _count(self, acks: asyncio.Task[list[fl.FerrylineError | None]]) -> None:
        self.errors += sum(outcome is not None for outcome in acks.result())

    async def close(self) -> None:
        await self._receiver.close()
        await self._client.close()


def make(spec: Spec, handler: Handler) -> Receiving:
    """The receiver for one measurement."""
    return Ferryline(spec, handler)
