"""Something to see on dashboards: producers, log consumers, queue receivers, dead letters and parked records.

Each part can be stopped and started again, so that a test can make an alert fire, and end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import ferryline as fl
from ferryline.protocol.errors import FerrylineError

LOG, JOBS, LANES, SINGLE, WIDE = "orders", "jobs", "lanes", "single", "wide"
BILLING, WORKERS, KEEPERS = "billing", "workers", "keepers"
RECORDS_PER_S = 200  # of each of two topics
TOPICS = {
    LOG: {"partitions": 4, "replication": 2},
    JOBS: {"partitions": 2, "replication": 2, "retry": fl.Retry(2, fl.exponential(0.05, 0.1))},
    LANES: {"partitions": 1, "replication": 2, "retry": fl.Retry(1, on_dead="park")},
    SINGLE: {"partitions": 6, "replication": 1},  # whichever broker dies, some partition has no other copy
    WIDE: {"partitions": 3, "replication": 3},  # and cannot be replaced when one of three is gone
}


class Load:
    """``rejecting``: every tenth job is rejected; some fail once in any case."""

    def __init__(self, client: fl.Client) -> None:
        self.rejecting = False
        self.sent = self.handled = self._changes = 0
        self._client = client
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}

    async def __aenter__(self) -> Load:
        for name, options in TOPICS.items():
            await self._client.admin.create_topic(name, **options)  # type: ignore[arg-type]
        for part in self._parts():
            self.start(part)
        return self

    async def __aexit__(self, *_: object) -> None:
        for part in list(self._tasks):
            await self.stop(part)

    def _parts(self) -> dict[str, list[Callable[[], Awaitable[None]]]]:
        return {
            "producers": [lambda: self._produce(LOG), lambda: self._produce(JOBS), self._touch],
            "consumers": [self._consume] * 2,
            "receivers": [self._receive] * 3,
            "keepers": [self._keep],
        }

    def start(self, part: str) -> None:
        makers = self._parts()[part]
        self._tasks[part] = [asyncio.create_task(self._again(make)) for make in makers]

    async def stop(self, part: str) -> None:
        tasks = self._tasks.pop(part, [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _again(self, make: Callable[[], Awaitable[None]]) -> None:
        """Brokers die here: whoever fails begins again."""
        while True:
            with contextlib.suppress(FerrylineError):
                await make()
            await asyncio.sleep(0.2)

    async def _produce(self, topic: str) -> None:
        async with self._client.producer(delivery_timeout=5.0, request_timeout=3.0) as producer:
            while True:
                futures = [
                    producer.send_nowait(topic, b"%d" % number, key=f"k{number % 50}")
                    for number in range(self.sent, self.sent + RECORDS_PER_S // 10)
                ]
                self.sent += len(futures)
                await asyncio.gather(*futures, return_exceptions=True)
                await asyncio.sleep(0.1)

    async def _touch(self) -> None:
        """A little of everything else, changes at the coordinator among it."""
        async with self._client.producer(delivery_timeout=5.0, request_timeout=3.0) as producer:
            while True:
                for topic in (SINGLE, WIDE):
                    await asyncio.gather(
                        *(producer.send_nowait(topic, b"x", key=f"k{number}") for number in range(20)),
                        return_exceptions=True,
                    )
                self._changes += 1
                await self._client.admin.alter_topic(WIDE, retention_ms=3_600_000 + self._changes)
                await asyncio.sleep(0.5)

    async def poison(self) -> None:
        """One record that is parked, and some that wait behind it."""
        async with self._client.producer() as producer:
            for value in (b"poison", b"waits", b"waits"):
                await producer.send(LANES, value, key="k")

    async def _consume(self) -> None:
        async with self._client.consumer(LOG, group=BILLING) as consumer:
            while True:
                if await consumer.pull(max_wait=0.2):
                    await consumer.commit()

    async def _receive(self) -> None:
        async with self._client.receiver(JOBS, group=WORKERS) as receiver:
            async for message in receiver:
                self.handled += 1
                if self.rejecting and self.handled % 10 == 0:
                    await message.reject("bad", "it was meant to be")
                elif self.handled % 23 == 0 and message.delivery_count == 1:
                    await message.nack(0.0, "not yet")
                else:
                    message.ack_nowait().add_done_callback(_look)

    async def _keep(self) -> None:
        async with self._client.receiver(LANES, group=KEEPERS) as receiver:
            async for message in receiver:
                if message.value == b"poison":
                    await message.reject("poison")
                else:
                    await message.ack()


def _look(settled: asyncio.Future[None]) -> None:
    """Whatever came of it: the record comes again."""
    if not settled.cancelled():
        settled.exception()
