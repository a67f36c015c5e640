"""Keyed records that know who they are, sent and received with every one noted in a ledger.

The value of a record is ``<key number>:<n>:<padding>``; see `checker`. One producer, any number of consumers in one
group that commit after processing, and a reader of the whole log for the end.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ferryline.cli.checker import Gaps, Ledger
from ferryline.protocol.errors import BufferFull, FerrylineError

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.consumer import Consumer
    from ferryline.message import Message
    from ferryline.producer import Producer

DRAIN_S = 60.0  # how long readers may take for what is left once everything was sent
STANDSTILL_S = 10.0  # nothing new for this long: nothing more will come
RETRY_S = 0.2


class Traffic:
    """The traffic of one topic and what became of it.

    ``keys`` are the keys as they are sent; lanes of ``by_key`` are their numbers, of ``by_partition`` the partitions.
    """

    def __init__(self, topic: str, keys: list[bytes], partitions: int, *, group: str, value_bytes: int = 100) -> None:
        self.topic = topic
        self.group = group
        self.keys = keys
        self.ledger = Ledger(len(keys))
        self.stored = self.ledger.second_reader()
        self.by_key = Gaps(len(keys))
        self.by_partition = Gaps(partitions)
        self.send_errors: dict[str, int] = {}
        self.read_errors: dict[str, int] = {}
        self.uncommitted = 0  # delivered, and its commit not yet answered
        self.last_delivery = 0.0
        self._pad = b"." * max(0, value_bytes - 24)

    # -- sending -------------------------------------------------------------------------------------

    async def send(self, producer: Producer, key: int) -> None:
        """Hand one record of a key to the producer, waiting while its buffer is full."""
        n = self.ledger.next_n(key)
        value = b"%d:%d:%s" % (key, n, self._pad)
        while True:
            try:
                future = producer.send_nowait(self.topic, value, self.keys[key])
            except BufferFull:
                await asyncio.sleep(0.002)
                continue
            except FerrylineError as error:
                self._refused(key, n, error)
                return
            future.add_done_callback(partial(self._settled, key, n))
            return

    def _settled(self, key: int, n: int, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self._refused(key, n, error)
            return
        meta = future.result()
        now = time.perf_counter()
        self.ledger.acked(key, n, meta.offset)
        self.by_partition.acknowledged(meta.partition, now)
        self.by_key.acknowledged(key, now)

    def _refused(self, key: int, n: int, error: BaseException) -> None:
        count(self.send_errors, error)
        if isinstance(error, FerrylineError) and error.definite:
            self.ledger.refused_for_certain(key, n)

    def mark(self) -> None:
        """Measure gaps from now on."""
        now = time.perf_counter()
        self.by_key.start(now)
        self.by_partition.start(now)

    # -- receiving -----------------------------------------------------------------------------------

    async def consume(self, client: Client) -> None:
        """Receive, note, commit; after a typed error, as an application would, go on with a new consumer."""
        while True:
            try:
                async with client.consumer(self.topic, group=self.group) as consumer:
                    async for batch in consumer.batches(max_records=2_000, max_wait=0.1):
                        await self._process(consumer, batch)
            except FerrylineError as error:
                count(self.read_errors, error)
                await asyncio.sleep(RETRY_S)

    async def _process(self, consumer: Consumer[Any], batch: list[Message[Any]]) -> None:
        note(self.ledger, batch)
        self.last_delivery = time.perf_counter()
        self.uncommitted += len(batch)
        try:
            await consumer.commit()
        finally:
            self.uncommitted -= len(batch)

    async def drain(self, within_s: float = DRAIN_S) -> None:
        """Wait until every acknowledged record was received, nothing comes any more, or the time is over."""
        end = time.monotonic() + within_s
        seen, moved = -1, time.monotonic()
        while time.monotonic() < min(end, moved + STANDSTILL_S):
            # Looking for gaps costs time for every record: only when the count says that it may be over, or stands.
            moving, seen = self.ledger.deliveries != seen, self.ledger.deliveries
            if moving:
                moved = time.monotonic()
            if (not moving or seen >= self.ledger.acknowledged) and not self.ledger.missing():
                return
            await asyncio.sleep(0.2)

    async def read_log(self, client: Client) -> None:
        """Read everything that is stored, as one who was not there when it happened."""
        async with client.consumer(self.topic, start="start") as consumer:
            moved = time.monotonic()
            while time.monotonic() < moved + STANDSTILL_S:
                batch = await consumer.pull(max_records=10_000, max_wait=0.5)
                note(self.stored, batch)
                if batch:
                    moved = time.monotonic()
                elif not any((await consumer.lag()).values()):
                    return


def note(ledger: Ledger, batch: list[Message[Any]]) -> None:
    """Write a batch of deliveries into a ledger."""
    received = ledger.received
    for message in batch:
        raw = message.raw or b""
        try:
            key, n, _ = raw.split(b":", 2)
            received(int(key), int(n), message.offset)
        except ValueError:
            ledger.stranger(f"{message.partition}@{message.offset}: {raw[:40]!r}")


def count(errors: dict[str, int], error: BaseException) -> None:
    """One more error of its kind."""
    name = error.code if isinstance(error, FerrylineError) else type(error).__name__
    errors[name] = errors.get(name, 0) + 1


def keys_by_victim(total: int, share: float, partitions: int, victims: set[int]) -> list[bytes]:
    """``total`` keys of which about ``share`` live on the partitions ``victims``, if there are both kinds."""
    from ferryline.protocol.partitioner import partition_of

    wanted = round(total * share)
    hit: list[bytes] = []
    other: list[bytes] = []
    for number in range(1_000_000):
        key = b"key-%d" % number
        (hit if partition_of(key, partitions) in victims else other).append(key)
        if len(hit) >= wanted and len(other) >= total - wanted:
            break
    return (hit[:wanted] + other + hit[wanted:])[:total]
