"""An application beside a cluster that is being restarted: it counts every error that the client shows it.

A producer of keyed records, a consumer in a group and two receivers of a queue, each with a client of its own, as in
four programs. Nothing is caught on the way: whatever an application would have to handle is an error here.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import ferryline as fl
from tests.polling import poll

LOG, QUEUE = "orders", "jobs"
READERS, WORKERS = "billing", "packing"
KEYS = 64
AT_A_TIME = 16  # jobs of one receiver
BACKLOG_MAX = 300  # jobs: on a slow machine fewer are sent, as it is not speed that is in question
RETRY_S = 0.2
Connect = Callable[[], fl.Client]


class Load:
    """Runs between `start` and `stop`. What was sent is numbered by topic and key; `wrong` judges what came of it."""

    def __init__(self, connect: Connect, rate: float) -> None:
        self._connect, self._rate = connect, rate
        self.errors: Counter[str] = Counter()
        self.acknowledged: dict[str, dict[bytes, list[int]]] = {LOG: defaultdict(list), QUEUE: defaultdict(list)}
        self.consumed: dict[bytes, list[int]] = defaultdict(list)
        self.begun: dict[bytes, list[int]] = defaultdict(list)  # jobs, as they were handed out
        # The next job of a key may be handed out, and done, before the acknowledgement of the one before has returned.
        self.done: dict[bytes, list[int]] = defaultdict(list)
        self.redelivered = 0  # handed out again after its acknowledgement had returned: must be none
        self._sent: dict[tuple[str, bytes], int] = defaultdict(int)
        self._backlog = 0  # jobs, sent and not worked off
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._worst_s = 0.0
        self._last_ack = 0.0

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._last_ack = time.perf_counter()
        jobs: list[Coroutine[Any, Any, None]] = [self._produce(), self._consume(), self._work(), self._work()]
        self._tasks = [asyncio.create_task(job) for job in jobs]

    async def stop(self, within_s: float = 60.0) -> None:
        """Send no more, wait until all was consumed and worked off or nothing has moved for so long, end."""
        self._stop.set()
        try:
            await asyncio.wait_for(asyncio.shield(self._tasks[0]), within_s)
            end, seen = time.monotonic() + within_s, ""
            while (left := self.outstanding()) and time.monotonic() < end:
                if left != seen:
                    end, seen = time.monotonic() + within_s, left
                await asyncio.sleep(RETRY_S)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @asynccontextmanager
    async def while_(self, what: str, told: dict[str, Any]) -> AsyncIterator[None]:
        """Note under ``what`` how long a step took, what was acknowledged meanwhile, and the longest time without."""
        self._worst_s, before, started = 0.0, self.total, time.perf_counter()
        errors = sum(self.errors.values())
        yield
        told[what] = {
            "seconds": round(time.perf_counter() - started, 1),
            "acknowledged": self.total - before,
            "longest_wait_s": round(max(self._worst_s, time.perf_counter() - self._last_ack), 2),
            "errors": sum(self.errors.values()) - errors,
        }
        sys.stderr.write(f"{what}: {told[what]}\n")

    async def flows(self, within_s: float = 30.0) -> None:
        """Something new is acknowledged, consumed and worked off."""
        before = self.total, sum(map(len, self.consumed.values())), sum(map(len, self.done.values()))

        def moved() -> bool:
            now = self.total, sum(map(len, self.consumed.values())), sum(map(len, self.done.values()))
            return all(new > old for new, old in zip(now, before, strict=True))

        await poll(moved, within_s=within_s, what="the load moves on")

    # -- judging -----------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        return sum(len(numbers) for keys in self.acknowledged.values() for numbers in keys.values())

    def outstanding(self) -> str:
        """Acknowledged, and not yet consumed or worked off; empty when nothing is."""
        left = {
            topic: sum(len(set(numbers).difference(seen[key])) for key, numbers in self.acknowledged[topic].items())
            for topic, seen in ((LOG, self.consumed), (QUEUE, self.done))
        }
        return ", ".join(f"{count} of {topic}" for topic, count in left.items() if count)

    def wrong(self) -> list[str]:
        """Every promise that was not kept."""
        found = [f"{count} times {error}" for error, count in sorted(self.errors.items())]
        if left := self.outstanding():
            found.append(f"never consumed or worked off: {left}")
        for key, numbers in self.acknowledged[LOG].items():
            seen = self.consumed[key]
            if sorted(set(seen)) != numbers:
                found.append(f"{key!r}: {len(set(numbers) - set(seen))} acknowledged records were not consumed")
            if list(dict.fromkeys(seen)) != sorted(set(seen)):
                found.append(f"{key!r}: consumed out of order")
        for key, numbers in self.acknowledged[QUEUE].items():
            if sorted(self.done[key]) != sorted(numbers):
                missing = len(set(numbers) - set(self.done[key]))
                found.append(f"{key!r}: {missing} jobs were not done, or some were done twice")
            if list(dict.fromkeys(self.begun[key])) != sorted(set(self.begun[key])):
                found.append(f"{key!r}: jobs were handed out out of order")
        if self.redelivered:
            found.append(f"{self.redelivered} jobs came again after their acknowledgement")
        return found

    # -- the four programs --------------------------------------------------------------------------

    async def _produce(self) -> None:
        async with self._connect() as client, client.producer() as producer:
            started, number, flying = time.perf_counter(), 0, set[asyncio.Task[None]]()
            while not self._stop.is_set():
                topic = QUEUE if number % 3 == 0 and self._backlog < BACKLOG_MAX else LOG
                task = asyncio.create_task(self._send(producer, topic, b"key-%d" % (number % KEYS)))
                flying.add(task)
                task.add_done_callback(flying.discard)
                number += 1
                await asyncio.sleep(max(0.0, started + number / self._rate - time.perf_counter()))
            await asyncio.gather(*flying)

    async def _send(self, producer: fl.Producer, topic: str, key: bytes) -> None:
        number = self._sent[topic, key]
        self._sent[topic, key] += 1
        try:
            await producer.send(topic, b"%d" % number, key=key)
        except Exception as error:
            self._count("send", error)
            return
        now = time.perf_counter()
        self._worst_s, self._last_ack = max(self._worst_s, now - self._last_ack), now
        self.acknowledged[topic][key].append(number)
        self._backlog += topic == QUEUE

    async def _consume(self) -> None:
        async with self._connect() as client:
            while True:
                try:
                    async with client.consumer(LOG, group=READERS) as consumer:
                        async for message in consumer:
                            self.consumed[message.key or b""].append(int(message.raw or b""))
                except Exception as error:
                    self._count("consume", error)
                    await asyncio.sleep(RETRY_S)

    async def _work(self) -> None:
        async with self._connect() as client:
            while True:
                try:
                    async with client.receiver(QUEUE, group=WORKERS) as receiver:
                        await asyncio.gather(*(self._jobs(receiver) for _ in range(AT_A_TIME)))
                except Exception as error:
                    self._count("receive", error)
                    await asyncio.sleep(RETRY_S)

    async def _jobs(self, receiver: fl.Receiver[bytes]) -> None:
        async for message in receiver:
            await self._job(message)

    async def _job(self, message: fl.QueueMessage[bytes]) -> None:
        key, number = message.key or b"", int(message.raw or b"")
        if number in self.done[key][-1000:]:
            self.redelivered += 1
        self.begun[key].append(number)
        await message.ack()
        self.done[key].append(number)
        self._backlog -= 1

    def _count(self, what: str, error: Exception) -> None:
        self.errors[f"{what}: {type(error).__name__}: {str(error)[:200]}"] += 1
