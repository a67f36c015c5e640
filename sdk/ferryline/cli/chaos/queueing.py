"""The queue of a run: a topic of its own, receivers that work on it and die, and the verdict on what they were given.

What counts is what went over the wire: each delivery, each settlement and its answer, as the receiver of the SDK had
them. `ferryline.proof.queues` judges; the file with the history is ``queue.jsonl``.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.cli.chaos.record import Place, now_us, number_of
from ferryline.cli.chaos.watched import Journal, WatchedReceiver
from ferryline.cli.traffic import count
from ferryline.proof.queues import QueueOp, QueueRules, check_queue
from ferryline.protocol.dead_letters import HEADER_ORIGIN_OFFSET, HEADER_ORIGIN_PARTITION, SUFFIX
from ferryline.protocol.errors import FerrylineError, UnknownTopic
from ferryline.retry import Retry, exponential

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.queues.message import QueueMessage

GROUP = "chaos-work"
ATTEMPTS = 4
RETRY = Retry(attempts=ATTEMPTS, backoff=exponential(0.1, 0.5))
RECEIVERS = 4
LEASE_S = 4.0
PREFETCH = 20
LIFE_S = (8.0, 30.0)  # of a receiver, until the end of the faults
WORK_S = 0.05  # on a record, at most
DELAY_S = 0.5  # of a nack, at most
POISON = 97  # every so manieth record fails each time
REJECTED, NACKED, RELEASED = 0.02, 0.07, 0.03  # shares of the others
DRIFT = 0.05  # leases and delays may be this much shorter: two clocks of this machine, a busy one
_POLL_S = 0.2
_LETTERS_WAIT_S = 3.0  # without another one there are no more


class Queueing:
    """Receivers of ``topic``. `start`, `drained`, `stop`, then `read_letters`, `judge`."""

    def __init__(self, connect: Callable[[], Client], topic: str, partitions: int, seed: int, path: Path) -> None:
        self.topic = topic
        self.errors: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self._partitions = partitions
        self._connect = connect
        self._path = path
        self._random = random.Random(seed)
        self._journal = Journal()
        self._records: dict[tuple[int, int], QueueOp] = {}  # partition and offset
        self._calm = asyncio.Event()  # nobody dies or fails any more, but for poison
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def stored(self, place: Place, offset: int, key: bytes, sent_us: int) -> None:
        """A producer knows that its record of this lane lies here."""
        lane = f"{key.decode()}"
        op = QueueOp("record", str(place[1]), t0=sent_us, offsets=[offset], lane=lane)
        self._records.setdefault((place[1], offset), op)

    async def start(self) -> None:
        """Begin to receive."""
        self._tasks = [asyncio.create_task(self._receiver(number)) for number in range(RECEIVERS)]

    # -- receiving -----------------------------------------------------------------------------------

    async def _receiver(self, number: int) -> None:
        """One receiver after the other; each second one dies without a word."""
        life = 0
        while not self._stop.is_set():
            life += 1
            try:
                async with self._connect() as client:
                    receiver = WatchedReceiver(
                        client, self.topic, group=GROUP, lease=LEASE_S, prefetch=PREFETCH, journal=self._journal
                    )
                    await self._live(receiver, die=life % 2 == 0)
            except FerrylineError as error:
                count(self.errors, error)
                await asyncio.sleep(_POLL_S)

    async def _live(self, receiver: WatchedReceiver, *, die: bool) -> None:
        working: set[asyncio.Task[None]] = set()
        end = time.monotonic() + self._random.uniform(*LIFE_S)
        async with receiver:
            while not self._stop.is_set() and (self._calm.is_set() or time.monotonic() < end):
                for message in await receiver.receive(max_records=PREFETCH, max_wait=1.0):
                    working.add(task := asyncio.create_task(self._work(message)))
                    task.add_done_callback(working.discard)
                    self.stored((self.topic, message.partition), message.offset, message.key or b"", 0)
            if die and not self._stop.is_set():
                self.counts["died"] += 1
                await receiver.die()
                for task in working:
                    task.cancel()
            if working:
                await asyncio.wait(working)
            self.counts["lives"] += 1

    async def _work(self, message: QueueMessage[Any]) -> None:
        """What becomes of one record. That it could not be said shows in the journal, too."""
        draw = self._random
        await asyncio.sleep(draw.uniform(0.0, WORK_S))
        try:
            if number_of(message.raw) % POISON == 0:
                await message.nack(delay=0.1, reason="poison")
                return
            drawn = 1.0 if self._calm.is_set() else draw.random()
            if drawn < REJECTED:
                await message.reject("rejected")
            elif drawn < REJECTED + NACKED:
                await message.nack(delay=draw.uniform(0.0, DELAY_S), reason="failed")
            elif drawn < REJECTED + NACKED + RELEASED:
                await message.release()
            else:
                await message.ack()
        except FerrylineError as error:
            count(self.errors, error)

    # -- the end -------------------------------------------------------------------------------------

    async def drained(self, client: Client, within_s: float) -> str:
        """Wait until all is settled; "" or what is not."""
        self._calm.set()
        queue, end, left = client.queue(self.topic, GROUP), time.monotonic() + within_s, "nobody has received"
        while time.monotonic() < end:
            try:
                parts = await queue.stats(timeout=5.0)
            except FerrylineError as error:
                left = str(error)
            else:
                left = ", ".join(f"{part.partition}: {part.unsettled}" for part in parts if part.unsettled)
                if not left and len(parts) == self._partitions:
                    return ""
            await asyncio.sleep(_POLL_S)
        return f"the queue is not settled within {within_s:g} s: {left}"

    async def stop(self) -> None:
        """End the receivers; each says goodbye."""
        self._calm.set()
        self._stop.set()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                count(self.errors, result)

    async def read_letters(self, client: Client) -> None:
        """Which records the dead letters took, and how often."""
        try:
            async with client.consumer(self.topic + SUFFIX, start="start") as consumer:
                while batch := await consumer.pull(max_records=1_000, max_wait=_LETTERS_WAIT_S):
                    for message in batch:
                        self.counts["dead letters"] += 1
                        offset = int(message.headers.text(HEADER_ORIGIN_OFFSET) or -1)
                        partition, now = message.headers.text(HEADER_ORIGIN_PARTITION) or "", now_us()
                        self._journal.ops.append(QueueOp("copy", partition, t0=now, t1=now, offsets=[offset]))
        except UnknownTopic:
            return  # nothing has died

    def judge(self) -> list[str]:
        """Write the history down, and say what was wrong."""
        ops = [*self._records.values(), *self._journal.ops]
        with self._path.open("wb") as file:
            file.writelines(msgspec.json.encode(op) + b"\n" for op in ops)
        self.counts["records"] = len(self._records)
        for op in self._journal.ops:
            if op.f == "deliver":
                self.counts["delivered"] += len(op.offsets)
            elif op.f == "settle":
                self.counts[op.action] += len(op.done)
        return list(findings(ops))


def findings(ops: list[QueueOp]) -> Iterator[str]:
    """What is wrong with a history of which everything was settled in the end."""
    for finding in check_queue(ops, QueueRules(attempts_max=ATTEMPTS, drift=DRIFT)):
        yield f"queue: {finding.rule}: {finding.text}"
