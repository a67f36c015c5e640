"""RECEIVE, SETTLE, KEEP and QUEUE: queues, as receivers see them.

The core leases what is ready; here is who waits. A receiver asks for records of many partitions; it is parked when none
has any, and asks the core again when one of them wakes. What was leased for a receiver that has left goes back at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from ferryline.protocol.errors import (
    ErrorInfo,
    FerrylineError,
    Forbidden,
    InvalidArgument,
    MalformedRequest,
    NotReady,
    StorageFailed,
)
from ferryline.protocol.frames import Frame, Kind, decode_header, encode_value
from ferryline.protocol.limits import FRAME_ENTRIES_MAX, OFFSET_MAX, WAIT_MS_MAX, check_name, check_range
from ferryline.protocol.messages import RECORDS
from ferryline.protocol.queue_messages import (
    ACTIONS,
    ORDERINGS,
    RELEASE,
    Delivery,
    Keep,
    QueueAnswer,
    QueueAsk,
    QueueResult,
    Receive,
    ReceiveAnswer,
    Settle,
    SettleAnswer,
    SettleEntry,
    SettleResult,
)
from ferryline.protocol.records import BatchBuilder, DecodedRecord
from ferryline_broker.core.events import Bytes, Key, Refuse
from ferryline_broker.core.queue_events import (
    AnswerLease,
    AnswerQueue,
    AnswerSettle,
    KeepAsked,
    LeaseAsked,
    QueueAsked,
    SettleAsked,
    SettleItem,
    WakeReceivers,
)
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.ports import Answer
from ferryline_broker.produce import refusal_info
from ferryline_broker.queue_records import QueueRecords
from ferryline_broker.view import ClusterView
from ferryline_service.server_session import ServerSession

RECORDS_MAX = 10_000  # of one lease
BYTES_MAX = 8 * 1024 * 1024  # of one answer, about; a single record may be larger
LEASE_MS_MIN, LEASE_MS_MAX = 1_000, 12 * 3_600_000
DELAY_MS_MAX = 366 * 86_400_000
REASON_CHARS_MAX, DETAIL_CHARS_MAX = 256, 4_096
_MEMBER_CHARS_MAX = 256
_RECEIPT_BYTES = 16
_PARKED_MAX = 20_000


class ParkedReceive:
    """One RECEIVE that has not been answered yet. ``left``: records that it may still be given."""

    __slots__ = ("_correlation", "_deliveries", "_handler", "_leasing", "_parts", "ask", "done", "expired", "hosted",
                 "left", "session", "timer")  # fmt: skip

    def __init__(self, handler: QueueHandler, session: ServerSession, ask: Receive, correlation: int) -> None:
        self._handler = handler
        self.session = session
        self.ask = ask
        self._correlation = correlation
        self.left = min(ask.records_max, RECORDS_MAX)
        self.hosted: list[HostedReplica] = []
        self.timer: asyncio.TimerHandle | None = None
        self.done = self.expired = False
        self._leasing = 0  # leases that are asked for and not committed
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
                token, ask.group, ask.member, ask.ordering, ask.start, ask.lease_ms, limit, min(ask.bytes_max, BYTES_MAX)
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

    def refuse(self, key: Key, error: ErrorInfo) -> None:
        self._deliveries.append(Delivery(*key, error=error))

    def add(self, delivery: Delivery, payload: Bytes) -> None:
        self._deliveries.append(delivery)
        self._parts.append(payload)

    def emit(self) -> None:
        """Answer once nothing is on its way and there is something to say."""
        if not self.done and not self._leasing and (self._deliveries or self.expired):
            self.answer()

    def answer(self) -> None:
        self.close()
        self.session.answer(Kind.RECEIVE, self._correlation, ReceiveAnswer(self._deliveries), self._parts)
        self._handler.driver.answered(self.session)

    @property
    def waits(self) -> bool:
        """It is parked, and nothing is on its way to it."""
        return not self.done and not self._leasing and not self._deliveries

    def expire(self) -> None:
        self.expired = True
        self.emit()

    def close(self) -> None:
        self.done = True
        if self.timer is not None:
            self.timer.cancel()
        self._handler.unpark(self)


class SettleRequest:
    """One SETTLE or KEEP; results keep the numbers of its entries."""

    __slots__ = ("_correlation", "_driver", "_kind", "_left", "_parts", "_results", "_session")

    def __init__(self, driver: PartitionDriver, session: ServerSession | None, kind: Kind, correlation: int) -> None:
        self._driver = driver
        self._session = session
        self._kind = kind
        self._correlation = correlation
        self._left = 0
        self._parts: list[list[int]] = []  # numbers of the entries in each part
        self._results: list[SettleResult] = []

    def refuse(self, index: int, error: ErrorInfo) -> None:
        self._results.append(SettleResult(index, error=error))

    def part(self, entries: list[int]) -> int:
        """The number under which the entries of one partition are settled."""
        self._left += 1
        self._parts.append(entries)
        return len(self._parts) - 1

    def settle(self, index: int, answer: Answer) -> None:
        self._left -= 1
        entries = self._parts[index]
        if isinstance(answer, AnswerSettle):
            for number, entry in enumerate(entries):
                stale, settled = (answer.stale[number], answer.settled[number]) if answer.stale else ([], [])
                self._results.append(SettleResult(entry, stale, settled))
        else:
            assert isinstance(answer, Refuse), answer
            for entry in entries:
                self.refuse(entry, refusal_info(answer))

    def emit(self) -> None:
        if self._left == 0 and self._session is not None:
            self._left = -1
            self._session.answer(self._kind, self._correlation, SettleAnswer(self._results))
            self._driver.answered(self._session)


class QueueRequest:
    """One QUEUE frame: a question about, or a change of, whole queues."""

    __slots__ = ("_correlation", "_handler", "_hosted", "_left", "_parts", "_results", "_session", "ask")

    def __init__(self, handler: QueueHandler, session: ServerSession, correlation: int, ask: QueueAsk) -> None:
        self._handler = handler
        self._session = session
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
        if self.ask.op == "peek":
            try:
                details, payload = self._handler.peeked(self._hosted[index], details["offsets"])
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
            self._session.answer(Kind.QUEUE, self._correlation, answer, parts)
            self._handler.driver.answered(self._session)


class QueueHandler:
    """Checks what receivers say, lets the cores decide, and keeps who waits."""

    def __init__(
        self, driver: PartitionDriver, view: ClusterView, metrics: BrokerMetrics, records: QueueRecords
    ) -> None:
        self.driver = driver
        self._view = view
        self._metrics = metrics
        self._records = records
        self._loop = asyncio.get_running_loop()
        self._parked: dict[tuple[Key, str], dict[ParkedReceive, int]] = {}  # (partition, group) -> in order of arrival
        self._sessions: dict[ServerSession, set[ParkedReceive]] = {}
        self._count = 0

    # -- frames -------------------------------------------------------------------------------------

    def receive(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Receive)
        _check_group(ask.group, ask.member, len(ask.entries))
        check_range(ask.records_max, "records_max", 1, RECORDS_MAX)
        check_range(ask.bytes_max, "bytes_max", 1, 2**31)
        check_range(ask.lease_ms, "lease_ms", LEASE_MS_MIN, LEASE_MS_MAX)
        check_range(ask.wait_ms, "wait_ms", 0, WAIT_MS_MAX)
        _check_one_of(ask.ordering, "ordering", ORDERINGS)
        _check_one_of(ask.start, "start", ("start", "end"))
        self._key()
        parked = ParkedReceive(self, session, ask, frame.correlation)
        for topic_id, partition in ask.entries:
            hosted = self.driver.replicas.get((topic_id, partition))
            if hosted is None:
                parked.refuse((topic_id, partition), self._view.not_here(topic_id, partition).info())
            else:
                parked.hosted.append(hosted)
        order = range(len(parked.hosted))
        first = self._count % len(order) if order else 0
        self._count += 1
        for step in order:
            if parked.left <= 0:
                break
            index = (first + step) % len(order)
            ready = parked.hosted[index].core.queue_ready(ask.group)
            parked.lease(index, min(parked.left, max(1, ready)))
        self._park(parked)
        self.driver.at_end(parked)

    def settle(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Settle)
        _check_group(ask.group, ask.member, len(ask.entries))
        key = self._key()
        request = SettleRequest(self.driver, session, Kind.SETTLE, frame.correlation)
        items: dict[Key, tuple[list[int], list[SettleItem]]] = {}
        for index, entry in enumerate(ask.entries):
            try:
                _check_settle(entry)
                if entry.receipt != receipt(key, ask.group, ask.member, entry):
                    raise Forbidden("receipt: it is not this cluster's for this lease, group and member")
            except FerrylineError as error:
                self._metrics.error(error.code)
                request.refuse(index, error.info())
                continue
            numbers, told = items.setdefault((entry.topic_id, entry.partition), ([], []))
            numbers.append(index)
            told.append(
                SettleItem(
                    entry.epoch, entry.lease, entry.action, entry.offsets, entry.delay_ms, entry.reason, entry.detail
                )
            )
        for where, (numbers, told) in items.items():
            hosted = self.driver.replicas.get(where)
            if hosted is None:
                for index in numbers:
                    request.refuse(index, self._view.not_here(*where).info())
                continue
            token = self.driver.token(request, request.part(numbers), hosted)
            self.driver.feed(hosted, SettleAsked(token, ask.group, ask.member, told))
        self.driver.at_end(request)

    def keep(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Keep)
        _check_group(ask.group, ask.member, len(ask.entries))
        request = SettleRequest(self.driver, session, Kind.KEEP, frame.correlation)
        for index, entry in enumerate(ask.entries):
            hosted = self.driver.replicas.get((entry.topic_id, entry.partition))
            if hosted is None:
                request.refuse(index, self._view.not_here(entry.topic_id, entry.partition).info())
                continue
            token = self.driver.token(request, request.part([index]), hosted)
            self.driver.feed(hosted, KeepAsked(token, ask.group, ask.member, entry.leases))
        self.driver.at_end(request)

    def queue(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, QueueAsk)
        _check_group(ask.group, "", len(ask.entries))
        check_range(ask.count, "count", 0, RECORDS_MAX)
        request = QueueRequest(self, session, frame.correlation, ask)
        for index, (topic_id, partition) in enumerate(ask.entries):
            hosted = self.driver.replicas.get((topic_id, partition))
            if hosted is None:
                request.refuse(index, self._view.not_here(topic_id, partition).info())
                continue
            request.expect(index, hosted)
            token = self.driver.token(request, index, hosted)
            event = QueueAsked(token, ask.group, ask.op, ask.offset, ask.count, ask.key, ask.reason, ask.dry_run)
            self.driver.feed(hosted, event)
        self.driver.at_end(request)

    # -- deliveries ---------------------------------------------------------------------------------

    def deliver(self, parked: ParkedReceive, hosted: HostedReplica, answer: AnswerLease) -> None:
        """A lease is committed: its records go to the receiver, or back if it has left."""
        ask = parked.ask
        if parked.session.closed or parked.done:
            self._give_back(hosted, ask, answer)
            return
        try:
            records = self._records.records(hosted, answer.offsets)
        except StorageFailed as failure:
            self.driver.storage_failed(hosted, RECORDS, failure)
            parked.refuse(hosted.key, failure.info())
            return
        offsets, attempts = answer.offsets, answer.attempts
        if len(records) != len(offsets):  # retention was faster; the rest is still theirs to settle
            there = {record.offset for record in records}
            attempts = [count for offset, count in zip(offsets, attempts, strict=True) if offset in there]
            offsets = [record.offset for record in records]
        payload = _payload(records)
        delivery = Delivery(
            *hosted.key, answer.epoch, answer.lease, b"", answer.lease_ms, offsets, attempts, len(payload)
        )
        mac = receipt(self._key(), ask.group, ask.member, delivery)
        parked.add(_with_receipt(delivery, mac), payload)

    def _give_back(self, hosted: HostedReplica, ask: Receive, answer: AnswerLease) -> None:
        sink = SettleRequest(self.driver, None, Kind.SETTLE, 0)
        token = self.driver.token(sink, sink.part([0]), hosted)
        item = SettleItem(answer.epoch, answer.lease, RELEASE, answer.offsets)
        event = SettleAsked(token, ask.group, ask.member, [item])
        self._loop.call_soon(self.driver.feed, hosted, event)  # not while the core's effects are carried out

    def peeked(self, hosted: HostedReplica, offsets: list[int]) -> tuple[dict[str, object], Bytes]:
        records = self._records.records(hosted, offsets)
        return {"offsets": [record.offset for record in records]}, _payload(records) if records else b""

    # -- waiting ------------------------------------------------------------------------------------

    def wake(self, hosted: HostedReplica, effect: WakeReceivers) -> None:
        """Records became ready: those who wait the longest ask for them, each for a fair share."""
        waiting = self._parked.get((hosted.key, effect.group))
        if waiting:
            self._loop.call_soon(self._ask_again, hosted, effect.group)

    def _ask_again(self, hosted: HostedReplica, group: str) -> None:
        waiting = self._parked.get((hosted.key, group))
        if not waiting or hosted.broken:
            return
        idle = [(parked, index) for parked, index in waiting.items() if parked.waits]
        for number, (parked, index) in enumerate(idle):
            ready = hosted.core.queue_ready(group)
            share = max(1, -(-ready // (len(idle) - number)))
            parked.lease(index, min(parked.left, share))  # also of nothing: it leaves word that somebody waits
            self.driver.at_end(parked)
            if not ready:
                break

    def role_changed(self, hosted: HostedReplica) -> None:
        """Whoever waits here learns that this broker does not lead the partition any more."""
        for (key, _), waiting in list(self._parked.items()):
            if key == hosted.key:
                for parked in list(waiting):
                    if parked.waits and hosted.core.role != "primary":
                        parked.refuse(key, self._view.not_here(*key).info())
                        self.driver.at_end(parked)

    def _park(self, parked: ParkedReceive) -> None:
        wait_ms = parked.ask.wait_ms
        if len(self._sessions) > _PARKED_MAX:
            wait_ms = 0
        for index, hosted in enumerate(parked.hosted):
            self._parked.setdefault((hosted.key, parked.ask.group), {})[parked] = index
        known = self._sessions.get(parked.session)
        if known is None:
            known = self._sessions[parked.session] = set()
            parked.session.close_callbacks.append(self._session_closed)
        known.add(parked)
        if wait_ms:
            parked.timer = self._loop.call_later(wait_ms / 1000, parked.expire)
        else:
            parked.expired = True

    def unpark(self, parked: ParkedReceive) -> None:
        for hosted in parked.hosted:
            where = (hosted.key, parked.ask.group)
            waiting = self._parked.get(where)
            if waiting is not None:
                waiting.pop(parked, None)
                if not waiting:
                    del self._parked[where]
        known = self._sessions.get(parked.session)
        if known is not None:
            known.discard(parked)

    def _session_closed(self, session: ServerSession) -> None:
        for parked in list(self._sessions.pop(session, ())):
            parked.close()

    def close(self) -> None:
        """Answer everybody who waits: a stop must not take as long as the longest wait."""
        for known in list(self._sessions.values()):
            for parked in list(known):
                if parked.waits:
                    parked.expire()

    def _key(self) -> bytes:
        if not self._view.claim_key:
            raise NotReady("this broker has no key for receipts yet; it is not registered")
        return self._view.claim_key


def receipt(key: bytes, group: str, member: str, lease: Delivery | SettleEntry) -> bytes:
    """The MAC that names a lease of a member. MessagePack is injective here: no field can leak into another."""
    named = encode_value(("lease", group, member, lease.topic_id, lease.partition, lease.epoch, lease.lease))
    return hmac.digest(key, named, hashlib.sha256)[:_RECEIPT_BYTES]


def _with_receipt(delivery: Delivery, mac: bytes) -> Delivery:
    return Delivery(
        delivery.topic_id, delivery.partition, delivery.epoch, delivery.lease, mac, delivery.lease_ms, delivery.offsets,
        delivery.attempts, delivery.size,
    )  # fmt: skip


def _payload(records: list[DecodedRecord]) -> bytearray:
    """One batch of exactly these records."""
    builder = BatchBuilder(2**30)
    builder.extend([(record.timestamp, record.key, record.value, record.headers) for record in records])
    return builder.build()


def _check_group(group: str, member: str, entries: int) -> None:
    check_name(group, "group")
    if len(member) > _MEMBER_CHARS_MAX:
        raise InvalidArgument(f"member: {len(member)} characters, limit {_MEMBER_CHARS_MAX}", field="member")
    if not 0 < entries <= FRAME_ENTRIES_MAX:
        raise MalformedRequest(f"entries: {entries} is outside 1..{FRAME_ENTRIES_MAX}")


def _check_one_of(value: str, what: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgument(f"{what}: {value[:32]!r} is not one of {', '.join(known)}", field=what)


def _check_settle(entry: SettleEntry) -> None:
    _check_one_of(entry.action, "action", ACTIONS)
    check_range(entry.delay_ms, "delay_ms", -1, DELAY_MS_MAX)
    if not 0 < len(entry.offsets) <= RECORDS_MAX:
        raise InvalidArgument(f"offsets: {len(entry.offsets)} is outside 1..{RECORDS_MAX}", field="offsets")
    for offset in entry.offsets:
        check_range(offset, "offsets", 0, OFFSET_MAX)
    if len(entry.reason) > REASON_CHARS_MAX:
        raise InvalidArgument(f"reason: {len(entry.reason)} characters, limit {REASON_CHARS_MAX}", field="reason")
    if len(entry.detail) > DETAIL_CHARS_MAX:
        raise InvalidArgument(f"detail: {len(entry.detail)} characters, limit {DETAIL_CHARS_MAX}", field="detail")
