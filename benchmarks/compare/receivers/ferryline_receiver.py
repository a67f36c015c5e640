"""Ferryline: batches as they come, an acknowledgement for each record that nobody waits for before the next one.

As docs/queues.md advises: many small records are acknowledged together, a few one by one. Every acknowledgement has an
outcome of its own, committed and flushed like a record.
"""

from __future__ import annotations

import asyncio
from collections import deque

from benchmarks.compare.receivers import STEP_S, Handler, Receiving
from benchmarks.compare.spec import Spec

import ferryline as fl

PREFETCH, TAKE = 10_000, 1_000
MANY = 100  # records of a batch that are acknowledged together


class Ferryline(Receiving):
    async def connect(self) -> None:
        self._client = fl.connect(self.spec.servers, ca=self.spec.ca)
        await self._client.start()
        self._acks: deque[asyncio.Task[list[fl.FerrylineError | None]] | asyncio.Future[None]] = deque()

    async def subscribe(self) -> None:
        self._receiver = self._client.receiver(self.spec.topic, group=self.spec.group, prefetch=PREFETCH)
        await self._receiver.start()

    async def step(self) -> None:
        acks, handle = self._acks, self.handler.record
        batch = await self._receiver.receive(TAKE, STEP_S)
        for message in batch:
            handle(message.key or b"", message.raw or b"")
        if len(batch) < MANY:
            acks.extend(message.ack_nowait() for message in batch)
        else:
            acks.append(asyncio.create_task(self._receiver.ack_many(batch)))
        while acks and acks[0].done():
            self._count(acks.popleft())

    async def settled(self) -> None:
        await asyncio.gather(*self._acks, return_exceptions=True)
        while self._acks:
            self._count(self._acks.popleft())

    def _count(self, acks: asyncio.Task[list[fl.FerrylineError | None]] | asyncio.Future[None]) -> None:
        if acks.exception() is not None:
            self.errors += 1
        elif outcomes := acks.result():
            self.errors += sum(outcome is not None for outcome in outcomes)

    async def close(self) -> None:
        await self._receiver.close()
        await self._client.close()


def make(spec: Spec, handler: Handler) -> Receiving:
    """The receiver for one measurement."""
    return Ferryline(spec, handler)
