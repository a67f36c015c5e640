"""Requests about queues that wait for answers of cores: one to receive, one to settle, one about whole queues.

Who asked may be a session or a request over REST: an `Asker` either way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ferryline.protocol.access import GROUP, READ
from ferryline.protocol.errors import ErrorInfo, StorageFailed
from ferryline.protocol.frames import Kind
from ferryline.protocol.queue_messages import (
    Delivery,
    QueueAnswer,
    QueueAsk,
    QueueResult,
    Receive,
    ReceiveAnswer,
    SettleAnswer,
    SettleResult,
)
from ferryline.protocol.records import DecodedRecord
from ferryline_broker.access_rules import TopicCheck, refusal
from ferryline_broker.core.events import Bytes, Key, Refuse
from ferryline_broker.core.queue_events import AnswerLease, AnswerQueue, AnswerSettle, LeaseAsked, SettleItem
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.ports import Answer, Asker
from ferryline_broker.produce import refusal_info
from ferryline_broker.queue_records import batch_of
from ferryline_broker.traffic import GroupCounts

if TYPE_CHECKING:
    from ferryline_broker.queue_frames import QueueHandler

RECORDS_MAX = 10_000  # of one lease
BYTES_MAX = 8 * 1024 * 1024  # of one answer, about; a single record may be larger


class ParkedReceive:
    """One RECEIVE that has not been answered for good. ``left``: records that it may still be given."""

    __slots__ = ("_bytes_max", "_correlation", "_deliveries", "_given_bytes", "_handler", "_leasing", "_parts",
                 "_records_max", "_standing", "ask", "asker", "check", "done", "expired", "hosted", "left", "pause",
                 "seen", "timer")  # fmt: skip

    def __init__(
        self, handler: QueueHandler, asker: Asker, ask: Receive, correlation: int, check: TopicCheck | None = None
    ) -> None:
        self._handler = handler
        self.check = check
        self.asker = asker
        self.ask = ask
        self._correlation = correlation
        self.left = self._records_max = min(ask.records_max, RECORDS_MAX)
        self._bytes_max = min(ask.bytes_max, BYTES_MAX)
        self.hosted: list[HostedReplica] = []
        self.seen: dict[int, int] = {}  # of a strict one: what was there when it asked
        self.timer: asyncio.TimerHandle | None = None
        self.pause: asyncio.TimerHandle | None = None  # the receiver has used its quota up: nothing is leased before
        self.done = self.expired = False
        self._leasing = 0  # leases that are asked for and not committed
        self._given_bytes = 0  # by earlier answers
        self._standing = ask.standing and not ask.strict
        self._deliveries: list[Delivery] = []
        self._parts: list[Bytes] = []

    def lease(self, index: int, limit: int) -> None:
        """Ask one partition for up to ``limit`` records."""
        handler, ask, hosted = self._handler, self.ask, self.hosted[index]
        self._leasing += 1
        self.left -= limit
        token = handler.driver.token(self, index * (RECORDS_MAX + 1) + limit, hosted)
        handler.driver.feed(
            hosted,
            LeaseAsked(
                token, ask.group, ask.member, ask.ordering, ask.start, ask.lease_ms, limit,
                self._bytes_max, strict=ask.strict, seen=self.seen.get(index, 0), stands=self._standing and self.waits,
            ),
        )  # fmt: skip

    def settle(self, index: int, answer: Answer) -> None:
        at, limit = divmod(index, RECORDS_MAX + 1)
        hosted = self.hosted[at]
        self._leasing -= 1
        if isinstance(answer, AnswerLease):
            self.left += limit - len(answer.offsets)
            if answer.offsets:
                self._handler.deliver(self, hosted, answer)
        else:
            assert isinstance(answer, Refuse), answer
            self.left += limit
            self.refuse(hosted.key, refusal_info(answer))

    def refused(self, hosted: HostedReplica) -> bool:
        """Whether this partition may not be received from any more: what was granted is revoked while it waits."""
        if self.check is None or (error := refusal(self.check, hosted.key[0])) is None:
            return False
        self.refuse(hosted.key, error)
        return True

    def refuse(self, key: Key, error: ErrorInfo) -> None:
        self._deliveries.append(Delivery(*key, error=error))

    def add(self, delivery: Delivery, payload: Bytes) -> None:
        self._deliveries.append(delivery)
        self._parts.append(payload)

    def payload(self, hosted: HostedReplica, leased: list[int]) -> tuple[Bytes, list[int], list[int]]:
        """What is delivered of a lease: bytes and offsets, without what retention took, that is still theirs to settle.
        Then the offsets of what is too much for this answer. Raises StorageFailed."""
        room = self._bytes_max - self._bytes()
        if self.ask.batches:
            payload, offsets = self._handler.records.delivery(hosted, leased)
            if len(payload) <= room:
                return payload, offsets, []
        records = self._handler.records.records(hosted, leased)
        payload, fitting = batch_of(records), records
        if len(payload) > room:
            fitting = self._fitting(records, room)
            payload = batch_of(fitting)
        offsets = [record.offset for record in records]
        return payload, offsets[: len(fitting)], offsets[len(fitting) :]

    def _fitting(self, records: list[DecodedRecord], left: int) -> list[DecodedRecord]:
        """Those that the answer has room for; the very first one in any case."""
        for number, record in enumerate(records):
            left -= len(record.key or b"") + len(record.value or b"")
            if left < 0 and (number or self._parts):
                return records[:number]
        return records

    def emit(self) -> None:
        """Answer once there is something to say, and, if nothing may be said after it, nothing on its way."""
        if self.done or not (self._deliveries or self.expired):
            return
        more = self._stands()
        if not more:
            if self._leasing:
                return  # the last answer is for all of them
            self.close()
        self.asker.answer(Kind.RECEIVE, self._correlation, ReceiveAnswer(self._deliveries), self._parts, more=more)
        self._handler.driver.answered(self.asker)
        if more:
            self._given_bytes = self._bytes()
            self._deliveries, self._parts = [], []
            self._handler.goes_on(self)

    def _stands(self) -> bool:
        """Whether it stays open behind this answer: nobody waits for its end, and most of what it asked for is to come.
        A receiver that has been given much asks anew, for it may have more room by then."""
        if not self._standing or self.expired or any(one.error is not None for one in self._deliveries):
            return False
        return self.left >= self._records_max - self._records_max // 4 and self._bytes() <= self._bytes_max // 4

    def _bytes(self) -> int:
        return self._given_bytes + sum(len(part) for part in self._parts)

    @property
    def waits(self) -> bool:
        """It is parked and may be leased something: nothing is on its way to it, or other answers can bring more."""
        if self.done or self.expired:
            return False
        return self._stands() if self._standing else not self.busy

    @property
    def busy(self) -> bool:
        """Something is on its way to it."""
        return bool(self._leasing or self._deliveries)

    def expire(self) -> None:
        self.expired = True
        self.emit()

    def close(self) -> None:
        self.done = True
        for timer in (self.timer, self.pause):
            if timer is not None:
                timer.cancel()
        self._handler.unpark(self)


class SettleRequest:
    """One SETTLE or KEEP; results keep the numbers of its entries."""

    __slots__ = ("_asker", "_correlation", "_driver", "_kind", "_left", "_parts", "_results")

    def __init__(self, driver: PartitionDriver, asker: Asker | None, kind: Kind, correlation: int) -> None:
        self._driver = driver
        self._asker = asker
        self._kind = kind
        self._correlation = correlation
        self._left = 0
        self._parts: list[tuple[list[int], list[SettleItem], GroupCounts | None]] = []
        self._results: list[SettleResult] = []

    def refuse(self, index: int, error: ErrorInfo) -> None:
        self._results.append(SettleResult(index, error=error))

    def part(self, entries: list[int], items: Sequence[SettleItem] = (), counts: GroupCounts | None = None) -> int:
        """The number under which the entries of one partition are settled. ``counts`` is told what ``items`` did."""
        self._left += 1
        self._parts.append((entries, list(items), counts))
        return len(self._parts) - 1

    def settle(self, index: int, answer: Answer) -> None:
        self._left -= 1
        entries, items, counts = self._parts[index]
        if isinstance(answer, AnswerSettle):
            if counts is not None:
                for item, stale, settled, held in zip(items, answer.stale, answer.settled, answer.held_ms, strict=True):
                    counts.settled(item.action, len(item.offsets) - len(stale) - len(settled), held)
            for number, entry in enumerate(entries):
                stale, settled = (answer.stale[number], answer.settled[number]) if answer.stale else ([], [])
                self._results.append(SettleResult(entry, stale, settled))
        else:
            assert isinstance(answer, Refuse), answer
            for entry in entries:
                self.refuse(entry, refusal_info(answer))

    def emit(self) -> None:
        if self._left == 0 and self._asker is not None:
            self._left = -1
            self._asker.answer(self._kind, self._correlation, SettleAnswer(self._results))
            self._driver.answered(self._asker)


class QueueRequest:
    """One QUEUE frame: a question about, or a change of, whole queues."""

    __slots__ = ("_asker", "_correlation", "_handler", "_hosted", "_left", "_parts", "_results", "ask")

    def __init__(self, handler: QueueHandler, asker: Asker, correlation: int, ask: QueueAsk) -> None:
        self._handler = handler
        self._asker = asker
        self._correlation = correlation
        self.ask = ask
        self._left = len(ask.entries)
        self._hosted: dict[int, HostedReplica] = {}
        self._results: dict[int, QueueResult] = {}
        self._parts: dict[int, Bytes] = {}

    def expect(self, index: int, hosted: HostedReplica) -> None:
        self._hosted[index] = hosted

    def refuse(self, index: int, error: ErrorInfo) -> None:
        self._left -= 1
        self._results[index] = QueueResult(*self.ask.entries[index], error=error)

    def settle(self, index: int, answer: Answer) -> None:
        if isinstance(answer, Refuse):
            self.refuse(index, refusal_info(answer))
            return
        assert isinstance(answer, AnswerQueue), answer
        key, details = self.ask.entries[index], answer.details
        payload: Bytes = b""
        caller = self._asker.caller
        if self.ask.op == "groups" and not caller.service:
            details = {"groups": [name for name in details["groups"] if caller.may(READ, GROUP, name)]}
        if self.ask.op == "peek":
            try:
                share = BYTES_MAX // len(self.ask.entries)
                details, payload = self._handler.records.peeked(self._hosted[index], details["offsets"], share)
            except StorageFailed as failure:
                self.refuse(index, failure.info())
                return
        self._left -= 1
        self._parts[index] = payload
        self._results[index] = QueueResult(*key, details, len(payload))

    def emit(self) -> None:
        if self._left == 0:
            self._left = -1
            order = sorted(self._results)
            answer = QueueAnswer([self._results[index] for index in order])
            parts = [self._parts[index] for index in order if self._parts.get(index)]
            self._asker.answer(Kind.QUEUE, self._correlation, answer, parts)
            self._handler.driver.answered(self._asker)
