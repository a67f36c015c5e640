"""One redrive: lease letters, send each to its origin, acknowledge it when it is stored there.

Partition by partition. What is leased and not meant (another key, another reason, dead since the redrive began) is held
until its partition is done, or it would be leased again and again; then it goes back, and the attempt does not count.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ferryline.core.retry import Backoff, Jitter, told_ms
from ferryline.dead_letters import PAGE, REDRIVE_GROUP, Choice, DeadLetter, Progress, Redrive, why_not
from ferryline.message import Headers
from ferryline.protocol.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    FerrylineError,
    PrimaryNotAvailable,
    from_info,
)
from ferryline.protocol.frames import Kind
from ferryline.protocol.metadata import NO_BROKER, TopicMeta
from ferryline.protocol.queue_messages import (
    ACK,
    EXTEND,
    ORDER_NONE,
    Delivery,
    Keep,
    KeepEntry,
    Receive,
    ReceiveAnswer,
    Settle,
    SettleAnswer,
    SettleEntry,
)
from ferryline.protocol.records import decode_batch
from ferryline.queue_admin import Queue, StoredRecord
from ferryline.requests import ATTEMPT_S

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.producer import Producer

log = logging.getLogger("ferryline.redrive")

T = TypeVar("T")
_LEASE_MS = 180_000
_EXTEND_S = 60.0  # leases of what is held are renewed this often
_WAIT_MS = 1_000
_GIVE_BACK_S = 5.0
_HELD_MAX = 100_000  # offsets of one partition that are not meant; beyond it the rest stays for another run


class Run:
    """A redrive on its way; ``done`` is what it has come to, told to ``progress`` after each batch."""

    def __init__(
        self,
        client: Client,
        meta: TopicMeta,
        choice: Choice,
        count: int,
        rate: float,
        done: Redrive,
        progress: Progress,
        limit_s: float,
    ) -> None:
        self.done = done
        self._client = client
        self._meta = meta
        self._choice = choice
        self._count = count
        self._rate = rate
        self._progress = progress
        self._limit_s = limit_s
        self._member = f"redrive-{secrets.token_hex(6)}"
        self._batch = PAGE if not rate else max(1, min(PAGE, int(rate)))
        self._held: dict[tuple[int, int], tuple[Delivery, list[int]]] = {}  # by epoch and lease
        self._unsure = False  # a lease may have been made whose answer was lost
        self._loop = asyncio.get_running_loop()
        self._extended = self._next = 0.0

    async def run(self, ends: dict[int, int]) -> None:
        """Everything below ``ends``. Raises what ended it before that; what was done stays done."""
        async with self._client.producer() as producer:
            for partition, end in ends.items():
                if end and not self._full:
                    await self._partition(producer, partition, end)

    @property
    def _full(self) -> bool:
        return bool(self._count) and self.done.redriven >= self._count

    async def _partition(self, producer: Producer, partition: int, end: int) -> None:
        self._held.clear()
        self._extended, headway = self._loop.time(), self._loop.time()
        try:
            while not self._full and sum(len(offsets) for _, offsets in self._held.values()) < _HELD_MAX:
                await self._pace(partition)
                delivery, records = await self._until(lambda: self._receive(partition))
                if delivery is not None:
                    await self._work_off(producer, delivery, records, end)
                    headway = self._loop.time()
                elif await self._is_drained(partition, end):
                    return
                elif self._loop.time() - headway > self._limit_s:
                    raise DeadlineExceeded(f"{self._meta.name}/{partition}: no letter in {self._limit_s:g} s")
        finally:
            await self._give_back(partition)

    async def _work_off(self, producer: Producer, delivery: Delivery, records: list[StoredRecord], end: int) -> None:
        """Send what is meant, acknowledge what was stored, hold the rest."""
        letters: list[DeadLetter] = []
        held: list[int] = []
        for record in records:
            letter = DeadLetter.of(record)
            room = not self._count or self.done.redriven + len(letters) < self._count
            if record.offset >= end or not room or not self._choice.takes(letter):
                held.append(record.offset)
                self.done.left += record.offset < end
            elif why := why_not(letter, self._meta.name, self._client.routing.topic(letter.origin_topic)):
                held.append(record.offset)
                self.done.refused.append((letter, why))
            else:
                letters.append(letter)
        if self._rate:
            self._next = max(self._next, self._loop.time()) + len(letters) / self._rate
        sent = await asyncio.gather(*(self._send(producer, letter) for letter in letters), return_exceptions=True)
        stored: list[int] = []
        failure: BaseException | None = None
        for letter, outcome in zip(letters, sent, strict=True):
            if outcome is None:
                stored.append(letter.record.offset)
                self.done.origins[letter.origin_topic] = self.done.origins.get(letter.origin_topic, 0) + 1
            elif isinstance(outcome, FerrylineError) and outcome.definite and not outcome.retriable:
                held.append(letter.record.offset)
                self.done.refused.append((letter, str(outcome)))
            else:
                failure = failure or outcome
        if held:
            self._held[delivery.epoch, delivery.lease] = (delivery, held)
        if stored:
            await self._until(lambda: self._settle(delivery.partition, [_entry(delivery, ACK, stored)]))
            self.done.redriven += len(stored)
        self._progress(self.done)
        if failure is not None:
            raise failure

    async def _send(self, producer: Producer, letter: DeadLetter) -> None:
        """To the partition of its key; without one, to where it was."""
        topic = await self._client.learn_topic(letter.origin_topic)
        where = letter.origin_partition
        by_hand = letter.record.key is None and where < topic.config.partitions
        await producer.send(
            letter.origin_topic,
            letter.record.value,
            letter.record.key,
            letter.resent(self._meta.id),
            partition=where if by_hand else None,
        )

    # -- frames ------------------------------------------------------------------------------------

    async def _receive(self, partition: int) -> tuple[Delivery | None, list[StoredRecord]]:
        if self._unsure:
            await self._keep(partition)
            self._unsure = False
        key = (self._meta.id, partition)
        room = min(self._batch, self._count - self.done.redriven) if self._count else self._batch
        ask = Receive(
            REDRIVE_GROUP, self._member, [key], room, lease_ms=_LEASE_MS, wait_ms=_WAIT_MS, ordering=ORDER_NONE
        )
        self._unsure = True
        answer, payload = await self._ask(partition, Kind.RECEIVE, ask, ReceiveAnswer)
        self._unsure = False
        if not answer.deliveries:
            return None, []
        delivery = answer.deliveries[0]
        if delivery.error is not None:
            raise from_info(delivery.error)
        return delivery, [
            StoredRecord(self._meta.name, partition, at, one.timestamp, one.key, one.value, Headers(one.headers))
            for at, one in zip(delivery.offsets, decode_batch(payload), strict=True)
        ]

    async def _keep(self, partition: int) -> None:
        """What else is leased to this run never arrived: it is free at once."""
        entry = KeepEntry(self._meta.id, partition, sorted(lease for _, lease in self._held))
        answer, _ = await self._ask(partition, Kind.KEEP, Keep(REDRIVE_GROUP, self._member, [entry]), SettleAnswer)
        _raise_first(answer)

    async def _settle(self, partition: int, entries: list[SettleEntry]) -> None:
        ask = Settle(REDRIVE_GROUP, self._member, entries)
        answer, _ = await self._ask(partition, Kind.SETTLE, ask, SettleAnswer)
        _raise_first(answer)

    async def _ask(self, partition: int, kind: int, header: Any, answer: type[T]) -> tuple[T, memoryview]:
        """One try at the primary."""
        broker = self._client.routing.route((self._meta.id, partition)).broker
        if broker == NO_BROKER:
            raise PrimaryNotAvailable(f"{self._meta.name}/{partition} has no primary at the moment")
        session = await self._client.connections.session(broker, timeout=ATTEMPT_S)
        return await session.request(kind, header, answer, timeout=ATTEMPT_S)

    async def _until(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try again, through fail-overs, as long as there is time. All that is asked here may be repeated."""
        end, failures = self._loop.time() + self._limit_s, 0
        backoff, jitter = Backoff(20, 500), Jitter(secrets.randbits(63))
        while True:
            changed = self._client.watch.change()
            try:
                return await attempt()
            except FerrylineError as error:
                again = (
                    error.retriable or error.refresh_metadata or isinstance(error, (ConnectionFailed, DeadlineExceeded))
                )
                if not again or self._loop.time() >= end:
                    raise
                told = told_ms(error)
                pause = backoff.pause_ms(failures + 1, jitter.next(), error) / 1000
            failures += 1
            if told:
                await asyncio.sleep(pause)
                continue
            self._client.watch.refresh()
            await self._client.watch.wait_for(changed, pause)

    # -- time --------------------------------------------------------------------------------------

    async def _pace(self, partition: int) -> None:
        """Wait until the rate allows another batch; meanwhile keep what is held."""
        while (left := self._next - self._loop.time()) > 0:
            await asyncio.sleep(min(left, _EXTEND_S / 2))
            await self._extend(partition)
        await self._extend(partition)

    async def _extend(self, partition: int) -> None:
        if not self._held or self._loop.time() - self._extended < _EXTEND_S:
            return
        entries = [_entry(delivery, EXTEND, offsets) for delivery, offsets in self._held.values()]
        await self._until(lambda: self._settle(partition, entries))
        self._extended = self._loop.time()

    async def _is_drained(self, partition: int, end: int) -> bool:
        """Nothing below ``end`` can be leased any more."""
        queue = Queue(self._client, self._meta.name, REDRIVE_GROUP)
        for part in await queue.stats(timeout=self._limit_s):
            if part.partition == partition:
                return part.ready == 0 and part.scanned >= min(end, part.high_watermark)
        return True

    async def _give_back(self, partition: int) -> None:
        """Nothing is held any more. If nobody hears that, the leases end by themselves."""
        self._held.clear()
        try:
            async with asyncio.timeout(_GIVE_BACK_S):
                await self._until(lambda: self._keep(partition))
        except (FerrylineError, TimeoutError) as error:
            log.debug("leases of a redrive are left to their end: %r", error)


def _entry(delivery: Delivery, action: str, offsets: list[int]) -> SettleEntry:
    return SettleEntry(
        delivery.topic_id, delivery.partition, delivery.epoch, delivery.lease, delivery.receipt, action, offsets
    )


def _raise_first(answer: SettleAnswer) -> None:
    for result in answer.results:
        if result.error is not None:
            raise from_info(result.error)
