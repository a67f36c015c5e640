"""FalconQ consumers on queue groups: one consumer is one group; its answers are leases that the next call settles.

What is leased, the file of the position knows before the caller does. Leases that it does not know (the answer of a
primary was lost, a gateway died) never reached anybody and are given back before more are asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import merge
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.falconq.files import PositionFiles
from ferryline.falconq.position import ALL, HeldLease, Position
from ferryline.falconq.primaries import Primaries
from ferryline.falconq.shown import level_of, shown
from ferryline.protocol.errors import CorruptBatch, FerrylineError, Forbidden, UnknownGroup
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import ACK, ORDER_NONE, RELEASE, Delivery, Receive, SettleEntry
from ferryline.protocol.records import DecodedRecord, decode_batch, split_batches
from ferryline.requests import Key

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.falconq")

BATCH_MAX = 1_000
CONSUMERS_MAX = 10_000  # remembered between their calls; who is forgotten is only told once more what it holds
LEASE_MS = 12 * 3_600_000  # the longest there is: FalconQ knows no deadline between two calls
_BYTES, _PARTITION_BYTES = 4 * 1024 * 1024, 64 * 1024  # of one answer, about; of one partition at least
_TOGETHER = 64  # partitions that are asked at the same time
_ARRIVE_MS = 1_000  # for records that are there, and that the primary has yet to look at
_CALL_S = 10.0
_LATE_S = 2.0  # for the other partitions, once one has records

Leased = tuple[Key, Delivery, list[DecodedRecord]]


class _Known:
    """What is remembered of a consumer in one scope. ``kept``: partitions in which it surely holds nothing unknown."""

    __slots__ = ("kept", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.kept: set[int] = set()


class Consumers:
    """All consumers of one gateway."""

    def __init__(self, client: Client, files: PositionFiles) -> None:
        self._files = files
        self._primaries = Primaries(client, min(client.timeout, _CALL_S))
        self._known: OrderedDict[tuple[str, str, int], _Known] = OrderedDict()

    @asynccontextmanager
    async def turn(self, topic: TopicMeta, consumer: str, partition: int | None) -> AsyncIterator[Turn]:
        """The one call of this consumer in this scope that is carried out now; others wait for it."""
        fresh = Position(topic.id, topic.name, consumer, ALL if partition is None else partition)
        name = (topic.id, consumer, fresh.scope)
        known = self._known.setdefault(name, _Known())
        self._known.move_to_end(name)
        async with known.lock:
            position, written = await asyncio.to_thread(self._files.load, fresh)
            yield Turn(self._primaries, self._files, known, topic, position, written)
        while len(self._known) > CONSUMERS_MAX:
            oldest = next(iter(self._known))
            if self._known[oldest].lock.locked():
                break
            del self._known[oldest]


class Turn:
    """One call of one consumer."""

    def __init__(
        self,
        primaries: Primaries,
        files: PositionFiles,
        known: _Known,
        topic: TopicMeta,
        position: Position,
        written: bool,
    ) -> None:
        self._primaries = primaries
        self._files = files
        self._known = known
        self._topic = topic
        self.position = position
        self._written = written
        self._room = asyncio.Semaphore(_TOGETHER)

    async def next(self, batch: int, ack: str | None) -> bool:
        """Leave the answer to this call in ``position``. Returns whether it is the last one again.

        After an error nothing has changed for the consumer: the same call may be made again. Raises Conflict for an
        ``ack`` that is not the last answer's.
        """
        if self.position.repeats(ack, self._written):
            return True
        await self._settle()
        passed = self.position.passed()
        leased = await self._receive(batch)
        leases, surplus, messages = _chosen(leased, batch)
        position = passed.answering(leases, messages)
        if position != self.position:
            await asyncio.to_thread(self._files.save, position)
        self.position, self._written = position, not position.token
        self._known.kept.update(key[1] for key, _, _ in leased)
        await self._give_back(surplus)
        return False

    def written(self) -> None:
        """The answer left, as far as can be seen from here.

        A gateway that dies before this repeats it, so it is done at once: that takes less than handing it to a thread.
        """
        if not self._written:
            try:
                self._files.written(self.position)
            except OSError as error:
                log.warning("consumer %s: its answer will be repeated: %s", self.position.consumer, error)

    # -- inside ------------------------------------------------------------------------------------

    def _partitions(self) -> range:
        scope = self.position.scope
        return range(self._topic.config.partitions) if scope == ALL else range(scope, scope + 1)

    async def _settle(self) -> None:
        """Settle the answer that is out, in all of its partitions or with an error."""
        leases = self.position.leases
        outcomes = await asyncio.gather(*(self._settle_lease(lease, ACK) for lease in leases), return_exceptions=True)
        _raise_first(outcomes)

    async def _give_back(self, surplus: list[HeldLease]) -> None:
        """Release what was leased beyond the batch. Where that fails it is free with the KEEP before the next lease."""
        outcomes = await asyncio.gather(
            *(self._settle_lease(lease, RELEASE) for lease in surplus), return_exceptions=True
        )
        for lease, outcome in zip(surplus, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                self._known.kept.discard(lease.partition)

    async def _settle_lease(self, lease: HeldLease, action: str) -> None:
        position = self.position
        named = (position.topic_id, lease.partition, lease.epoch, lease.number, lease.receipt)
        key = (position.topic_id, lease.partition)
        async with self._room:
            try:
                results = await self._primaries.settle(
                    key, position.consumer, position.member, [SettleEntry(*named, action, lease.offsets)]
                )
            except (UnknownGroup, Forbidden) as error:  # deleted since, perhaps made again: there is nothing to settle
                log.warning("consumer %s, %s/%d: %s", position.consumer, position.topic, lease.partition, error)
                return
        if action == ACK and results[0].stale:
            log.warning(
                "consumer %s, %s/%d: %d records of its last answer had been given to somebody else",
                position.consumer, position.topic, lease.partition, len(results[0].stale),
            )  # fmt: skip

    async def _receive(self, batch: int) -> list[Leased]:
        """Up to ``batch`` records of each partition: which are the first of all can be told only beside each other."""
        partitions = self._partitions()
        size = max(_PARTITION_BYTES, _BYTES // len(partitions))
        tasks = [asyncio.create_task(self._receive_from(partition, batch, size)) for partition in partitions]
        try:
            leased, failed = await _without_latecomers(set(tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if failed and (not leased or not all(isinstance(error, FerrylineError) for error in failed)):
            _raise_first(failed)
        for error in failed:  # the others go on meanwhile
            log.warning("consumer %s, %s: %s", self.position.consumer, self.position.topic, error)
        return leased

    async def _receive_from(self, partition: int, batch: int, size: int) -> Leased | None:
        position, primaries, kept = self.position, self._primaries, self._known.kept
        key = (position.topic_id, partition)
        ask = Receive(
            position.consumer, position.member, [key], batch, size, LEASE_MS, 0, ORDER_NONE, strict=True
        )  # fmt: skip
        async with self._room:
            if partition not in kept:
                await self._keep(key)
            kept.discard(partition)  # until everything that is leased now is accounted for
            delivery, payload = await primaries.receive(key, ask)
            if delivery is None and await self._more(key):
                delivery, payload = await primaries.receive(key, msgspec.structs.replace(ask, wait_ms=_ARRIVE_MS))
        if delivery is None:
            kept.add(partition)
            return None
        records: list[DecodedRecord] = []
        for at, header in split_batches(payload):
            records += decode_batch(payload[at : at + header.size], header)
        if len(records) != len(delivery.offsets):
            raise CorruptBatch(f"{len(records)} records came for {len(delivery.offsets)} offsets")
        return key, delivery, records

    async def _keep(self, key: Key) -> None:
        """Everything is settled that the caller got: what else is leased to this consumer has reached nobody."""
        try:
            await self._primaries.keep(key, self.position.consumer, self.position.member, [])
        except UnknownGroup:
            pass  # it has never received here

    async def _more(self, key: Key) -> bool:
        """Whether there are records that the primary had not looked at, or made ready, a moment ago."""
        details = (await self._primaries.stats(key, self.position.consumer)).details
        if details["paused"]:
            return False
        return bool(details["ready"]) or int(details["scanned"]) < int(details["high_watermark"])


async def _without_latecomers(
    pending: set[asyncio.Task[Leased | None]],
) -> tuple[list[Leased], list[BaseException]]:
    """What was leased, and what failed. Once somebody has records, the others have little time left: a partition that
    has no primary must not hold up the consumer of all."""
    leased: list[Leased] = []
    failed: list[BaseException] = []
    loop = asyncio.get_running_loop()
    end: float | None = None
    while pending and (end is None or loop.time() < end):
        patience = None if end is None else end - loop.time()
        done, pending = await asyncio.wait(pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = task.exception()
            if error is not None:
                failed.append(error)
            elif (found := task.result()) is not None:
                leased.append(found)
                end = end or loop.time() + _LATE_S
    return leased, failed


def _raise_first(outcomes: list[Any]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def _chosen(leased: list[Leased], batch: int) -> tuple[list[HeldLease], list[HeldLease], list[dict[str, Any]]]:
    """The first ``batch`` of all records, high before low: their leases, what is left of the leases, the messages.

    Within a partition and a priority the order is that of the offsets; between partitions that of the timestamps.
    """
    lines = []
    for key, delivery, records in leased:
        line = [
            (-level_of(record.headers), record.timestamp, key[1], offset, record)
            for offset, record in zip(delivery.offsets, records, strict=True)
        ]
        lines.append(sorted(line, key=lambda one: (one[0], one[3])))
    first = list(merge(*lines, key=lambda one: one[:3]))[:batch]
    taken = {(partition, offset) for _, _, partition, offset, _ in first}
    held: list[HeldLease] = []
    surplus: list[HeldLease] = []
    for key, delivery, _ in leased:
        for chosen, leases in ((True, held), (False, surplus)):
            offsets = [offset for offset in delivery.offsets if ((key[1], offset) in taken) == chosen]
            if offsets:
                leases.append(HeldLease(key[1], delivery.epoch, delivery.lease, delivery.receipt, offsets))
    return held, surplus, [shown(partition, offset, record) for _, _, partition, offset, record in first]
