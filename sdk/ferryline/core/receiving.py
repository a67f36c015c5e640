"""Decide what a receiver of a queue asks for, keeps and settles, and where. Pure: no I/O, no clock, no randomness.

`LeaseTable` says what is held, `Asking` whom to ask for how many, `Settling` what becomes of settlements; here they are
driven by one funnel. The driver knows sessions, bytes and futures, and no rule.
"""

from __future__ import annotations

from collections import deque

from ferryline.core.asking import Ask, Asking
from ferryline.core.leases import WAITING, Lease, LeaseTable
from ferryline.core.receiving_events import (
    Arrived,
    Closed,
    Effect,
    Event,
    GiveBack,
    KeepAnswered,
    Parting,
    PrefetchChanged,
    RaiseError,
    Received,
    ReceiveFailed,
    RecordsLost,
    RoutesChanged,
    SessionLost,
    Settle,
    SettleAnswered,
    SettleAsked,
    SettleFailed,
    Stopped,
    TimePassed,
)
from ferryline.core.settling import Settling
from ferryline.protocol.errors import UnknownTopic, from_info
from ferryline.protocol.queue_messages import ORDER_PARTITION, RELEASE, Delivery

SETTLE_MS_MIN = 10_000  # a settlement is tried this long even if the lease ends before: a receipt outlives its lease
LINGER_LEASE_MS = 1_000  # no acknowledgement lingers when its lease ends as soon
LATE_MS = 250  # time passes so late where the application blocks the loop; what lingers would wait for it ...
BLOCKED_MS = 10_000  # ... so for this long nothing does
CONTENDED_MS = 100  # so long after a record that waited for an acknowledgement, or holds others up, none lingers
SURPLUS_MS = 250  # more than `prefetch` waits here for this long, then it goes back to where others can get it


class ReceiverCore:
    """One receiver: one member of one group, at one topic.

    Every Settle that entered leaves by exactly one Settled.
    """

    def __init__(
        self,
        *,
        ordering: str,
        prefetch: int,
        prefetch_bytes: int,
        seed: int = 0,
        history: int = 64,
    ) -> None:
        self.table = LeaseTable()
        self.history: deque[tuple[int, Event]] = deque(maxlen=history)  # shown with a failed assertion
        self._ordering = ordering
        self._asking = Asking(self.table, prefetch=prefetch, prefetch_bytes=prefetch_bytes, seed=seed)
        self._settling = Settling(self.table, self._asking.broker_of, seed=seed + 1)
        self._surplus_at_ms = 0  # since when too much waits, plus SURPLUS_MS; 0: it does not
        self._known = False  # the topic was there once
        # Until then somebody may wait for every acknowledgement; where the partition is one lane, always.
        self._hurry_until_ms = 2**62 if ordering == ORDER_PARTITION else 0
        self.broken = False  # an invariant did not hold: set by the driver, and nothing is done any more
        self._closed = False

    # -- questions ---------------------------------------------------------------------------------

    @property
    def unsettled(self) -> int:
        """Settlements that have had no last word."""
        return len(self._settling)

    @property
    def full(self) -> bool:
        """Nothing was asked for because of the bytes that wait here: look again when some were handed out."""
        return self._asking.full

    @property
    def parted(self) -> bool:
        """After Parting: whether every primary knows that nothing is held here."""
        return self._asking.parted

    def settle_deadline_ms(self, lease: Lease, now_ms: int) -> int:
        """Until when to try to settle records of a lease."""
        return max(lease.deadline_ms, now_ms + SETTLE_MS_MIN)

    def next_deadline_ms(self) -> int | None:
        """When to hand in TimePassed next; None: only other events can change anything."""
        if self._closed or self.broken:
            return None
        due = min(self._asking.next_deadline_ms, self._settling.next_deadline_ms(), self._surplus_at_ms or 2**62)
        return due if due < 2**62 else None

    # -- events ------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        """The one way in: take an event, return what to do, in order."""
        self.history.append((now_ms, event))
        out: list[Effect] = []
        if self._closed or self.broken:
            return out
        if isinstance(event, SettleAsked):
            if not event.idle:
                self._settling.hurry()
            for settle in event.items:
                lingers = event.idle and self._may_linger(settle.lease, now_ms)
                self._settling.add(settle, now_ms, lingers=lingers)
        elif isinstance(event, SettleAnswered):
            self._settling.answered(event.frame, event.results, now_ms, out)
        elif isinstance(event, Received):
            self._received(event, now_ms, out)
        elif isinstance(event, SettleFailed):
            self._settling.failed(event.frame, event.error, now_ms, out)
        elif isinstance(event, ReceiveFailed):
            self._asking.failed(event.ask, event.error, now_ms, out)
        elif isinstance(event, KeepAnswered):
            self._asking.kept(event.keep, event.error, event.errors, now_ms, out)
        elif isinstance(event, RoutesChanged):
            self._routes(event, out)
        elif isinstance(event, SessionLost):
            self._asking.session_lost(event.broker)
        elif isinstance(event, RecordsLost):
            self._lost(event)
        elif isinstance(event, PrefetchChanged):
            self._asking.prefetch = event.records
        elif isinstance(event, Stopped):
            self._asking.stop()
        elif isinstance(event, Parting):
            self._asking.part_with_all()
        elif isinstance(event, Closed):
            self._settling.close(out)
            self._asking.close(out)
            self._closed = True
            return out
        else:
            assert isinstance(event, TimePassed), event
            due = self.next_deadline_ms()
            if due is not None and now_ms > due + LATE_MS:
                self._hurry_until_ms = max(self._hurry_until_ms, now_ms + BLOCKED_MS)
        self._settling.expire(now_ms, out)
        self._settling.send(now_ms, out)
        self._surplus(now_ms, out)
        self._asking.ask(now_ms, out)
        return out

    def _may_linger(self, lease: Lease, now_ms: int) -> bool:
        """Not where somebody may wait: the next of its lane, or whoever gets the record when the lease has ended."""
        return now_ms >= self._hurry_until_ms and not lease.contended and lease.deadline_ms > now_ms + LINGER_LEASE_MS

    def _routes(self, event: RoutesChanged, out: list[Effect]) -> None:
        self._asking.routes(event.routes, out)
        self._settling.routes_changed()
        if self._known and not event.routes:
            out.append(RaiseError(UnknownTopic("the topic was deleted")))
        self._known = bool(event.routes)

    def _received(self, event: Received, now_ms: int, out: list[Effect]) -> None:
        records = sum(len(delivery.offsets) for delivery in event.deliveries)
        ask = self._asking.answered(event.ask, not event.deliveries, now_ms, records=records, more=event.more)
        if ask is None:
            return
        for index, delivery in enumerate(event.deliveries):
            key = (delivery.topic_id, delivery.partition)
            if delivery.error is not None:
                self._asking.refused(key, from_info(delivery.error), now_ms, out)
            elif delivery.offsets:
                self._arrived(ask, index, delivery, now_ms, out)

    def _arrived(self, ask: Ask, index: int, delivery: Delivery, now_ms: int, out: list[Effect]) -> None:
        key = (delivery.topic_id, delivery.partition)
        run = self._ordering == ORDER_PARTITION
        lease = Lease(
            key, delivery.epoch, delivery.lease, delivery.receipt, delivery.lease_ms, delivery.offsets,
            delivery.attempts, size=delivery.size, run=run, now_ms=now_ms, contended=delivery.contended,
        )  # fmt: skip
        if delivery.contended:
            self._hurry_until_ms = max(self._hurry_until_ms, now_ms + CONTENDED_MS)
        if lease.id in self.table.held:
            return  # the same delivery again
        self.table.add(lease)
        if self._asking.ours(ask, key):
            out.append(Arrived(index, lease))
        else:
            self._release(lease, now_ms)

    def _release(self, lease: Lease, now_ms: int) -> None:
        """Give back a delivery that nobody here may work on: the broker was told that we do not have it, or we stop."""
        waiting = lease.indexes(WAITING)
        for index in waiting:
            self.table.begin(lease, index)
        self._settling.release(Settle(0, lease, RELEASE, waiting, self.settle_deadline_ms(lease, now_ms)), now_ms)

    def _lost(self, event: RecordsLost) -> None:
        lease = event.lease
        for offset in event.offsets:
            index = lease.index(offset)
            if index >= 0 and self.table.lose(lease, index):
                for later in self.table.behind(lease, index):
                    self.table.lose(lease, later)

    def _surplus(self, now_ms: int, out: list[Effect]) -> None:
        table = self.table
        surplus = min(table.waiting, table.unsettled - self._asking.prefetch)
        if surplus <= 0 or self._asking.stopped:
            self._surplus_at_ms = 0
        elif not self._surplus_at_ms:
            self._surplus_at_ms = now_ms + SURPLUS_MS
        elif now_ms >= self._surplus_at_ms:
            self._surplus_at_ms = 0
            out.append(GiveBack(surplus))
