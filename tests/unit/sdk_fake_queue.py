"""Queues of the fake cluster: leases, lanes, attempts and deadlines as docs/queues.md has them, kept in memory.

One queue for each group and partition, without priorities and delays of records. What it remembers outlives its
primary, as a state log would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ferryline.protocol.errors import FerrylineError, Forbidden, InvalidArgument, UnknownGroup
from ferryline.protocol.frames import Frame, decode_header
from ferryline.protocol.queue_messages import (
    ACK,
    EXTEND,
    NACK,
    ORDER_KEY,
    ORDER_PARTITION,
    REJECT,
    Delivery,
    Keep,
    Receive,
    ReceiveAnswer,
    Settle,
    SettleAnswer,
    SettleEntry,
    SettleResult,
)
from ferryline.protocol.records import decode_batch, encode_batch
from ferryline_service.session import ServerSession

if TYPE_CHECKING:
    from unit.sdk_fake_cluster import FakeCluster, Node

Key = tuple[str, int]
LeaseId = tuple[int, int]  # epoch, number
POLL_S = 0.02
BACKOFF_S = 0.05  # of a nack that names no delay


class Held:
    """One lease. ``offsets``: those that are not settled or released."""

    def __init__(self, member: str, offsets: list[int], lease_s: float, ends: float) -> None:
        self.member = member
        self.offsets = set(offsets)
        self.lease_s = lease_s
        self.ends = ends


class FakeQueue:
    """What one group has made of one partition."""

    def __init__(self, ordering: str, attempts_max: int) -> None:
        self.ordering = ordering
        self.attempts_max = attempts_max
        self.leases: dict[LeaseId, Held] = {}
        self.numbers = 0
        self.settled: set[int] = set()
        self.dead: dict[int, tuple[str, str]] = {}  # offset -> reason, detail
        self.attempts: dict[int, int] = {}
        self.last: dict[int, LeaseId] = {}  # the receipt that is good
        self.not_before: dict[int, float] = {}
        self.story: list[tuple[str, str, list[int]]] = []  # (member, action, offsets), in order

    def expire(self, now: float) -> None:
        for lease in [lease for lease, held in self.leases.items() if held.ends <= now]:
            for offset in sorted(self.leases[lease].offsets):
                if self.holder(offset) == lease:  # else it was given back with one before it
                    self._back(offset, now, 0.0, "lease ended", "")

    def holder(self, offset: int) -> LeaseId | None:
        return next((lease for lease, held in self.leases.items() if offset in held.offsets), None)

    def take(self, keys: list[bytes | None], limit: int, now: float) -> list[int]:
        """Offsets that may be leased: the first open one of each lane, or a run of the only lane."""
        found: list[int] = []
        busy: set[bytes | None] = set()
        for offset, key in enumerate(keys):
            if len(found) == limit:
                break
            if offset in self.settled or offset in self.dead:
                continue
            lane = key if self.ordering == ORDER_KEY else None
            laned = self.ordering == ORDER_PARTITION or (self.ordering == ORDER_KEY and key is not None)
            free = self.holder(offset) is None and self.not_before.get(offset, 0.0) <= now
            if free and not (laned and lane in busy):
                found.append(offset)
                if self.ordering == ORDER_PARTITION:
                    continue  # a run
            if laned:
                busy.add(lane)
        return found

    def lease(self, member: str, epoch: int, offsets: list[int], lease_s: float, now: float) -> LeaseId:
        self.numbers += 1
        identity = (epoch, self.numbers)
        self.leases[identity] = Held(member, offsets, lease_s, now + lease_s)
        for offset in offsets:
            self.attempts[offset] = self.attempts.get(offset, 0) + 1
            self.last[offset] = identity
        self.story.append((member, "lease", list(offsets)))
        return identity

    def settle(self, member: str, entry: SettleEntry, now: float) -> tuple[list[int], list[int]]:
        stale, settled, good = [], [], []
        for offset in sorted(entry.offsets):
            if offset in self.settled:
                settled.append(offset)
            elif self._is_good(offset, entry):
                good.append(offset)
            else:
                stale.append(offset)
        if good:
            self.story.append((member, entry.action, good))
        held = self.leases.get((entry.epoch, entry.lease))
        for offset in good:
            if entry.action == ACK:
                self._out(offset)
                self.settled.add(offset)
            elif entry.action == EXTEND and held is not None:
                held.ends = now + (entry.delay_ms / 1000 if entry.delay_ms >= 0 else held.lease_s)
            elif entry.action == REJECT:
                self._kill(offset, entry.reason, entry.detail)
            elif entry.action == NACK:
                delay_s = entry.delay_ms / 1000 if entry.delay_ms >= 0 else BACKOFF_S
                self._back(offset, now, delay_s, entry.reason, entry.detail)
            elif entry.action != EXTEND:
                self._give_back(offset)
        return stale, settled

    def _is_good(self, offset: int, entry: SettleEntry) -> bool:
        """Whether a receipt is good for an offset; but for an ack the lease must not have ended, either."""
        identity = (entry.epoch, entry.lease)
        if offset in self.dead or self.last.get(offset) != identity:
            return False
        return entry.action == ACK or self.holder(offset) == identity

    def keep(self, member: str, leases: list[int]) -> None:
        for identity, held in list(self.leases.items()):
            if held.member == member and identity[1] not in leases:
                self.story.append((member, "keep", sorted(held.offsets)))
                for offset in sorted(held.offsets):
                    self._give_back(offset)

    def _out(self, offset: int) -> list[int]:
        """Take an offset out of its lease. Returns what stands behind it in a run."""
        identity = self.holder(offset)
        if identity is None:
            return []
        held = self.leases[identity]
        held.offsets.discard(offset)
        if not held.offsets:
            del self.leases[identity]
        return sorted(other for other in held.offsets if other > offset) if self.ordering == ORDER_PARTITION else []

    def _give_back(self, offset: int) -> None:
        behind = self._out(offset)
        self.attempts[offset] -= 1
        self.last.pop(offset, None)
        for other in behind:
            self._give_back(other)

    def _back(self, offset: int, now: float, delay_s: float, reason: str, detail: str) -> None:
        if self.attempts[offset] >= self.attempts_max:
            self._kill(offset, reason, detail)
            return
        for other in self._out(offset):
            self._give_back(other)
        self.not_before[offset] = now + delay_s

    def _kill(self, offset: int, reason: str, detail: str) -> None:
        for other in self._out(offset):
            self._give_back(other)
        self.dead[offset] = (reason, detail)


class FakeQueues:
    """All queues of a fake cluster. The hooks let a test refuse or see what comes."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.queues: dict[tuple[Key, str], FakeQueue] = {}
        self.attempts_max = 5
        self.keeps: list[tuple[int, Keep]] = []  # (broker, header)
        self.kept: dict[tuple[int, str], int] = {}  # (broker, member) -> KEEPs so far: they end what is parked
        self.receives: list[tuple[int, Receive]] = []
        self.settles: list[tuple[int, Settle]] = []
        self.on_receive: Callable[[Node, Receive], None] | None = None
        self.on_settle: Callable[[Node, Settle], None] | None = None
        self.lose_answers = 0  # of so many SETTLE frames, after they were carried out
        self.garble = False  # deliveries do not hold what was leased

    def of(self, key: Key, group: str) -> FakeQueue:
        found = self.queues.get((key, group))
        if found is None:
            raise UnknownGroup(f"no queue group {group!r} has received here")
        return found

    async def receive(self, node: Node, session: ServerSession, frame: Frame) -> None:
        request = decode_header(frame.header, Receive)
        self.receives.append((node.id, request))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.wait_ms / 1000
        kept = self.kept.get((node.id, request.member))
        deliveries: list[Delivery] = []
        parts: list[Any] = []
        while self.kept.get((node.id, request.member)) == kept:
            deliveries, parts = self.lease(node, request, loop.time())
            if deliveries or loop.time() >= deadline or session.closed or node.runner is None:
                break
            try:
                await asyncio.wait_for(self.cluster.appended.wait(), POLL_S)
            except TimeoutError:
                pass
        if not session.closed:
            session.answer(frame.kind, frame.correlation, ReceiveAnswer(deliveries), parts)
            return
        for delivery in deliveries:  # nobody is there any more
            entry = SettleEntry(
                delivery.topic_id, delivery.partition, delivery.epoch, delivery.lease, b"", "release", delivery.offsets
            )
            self.of((delivery.topic_id, delivery.partition), request.group).settle(request.member, entry, loop.time())

    def lease(self, node: Node, request: Receive, now: float) -> tuple[list[Delivery], list[Any]]:
        deliveries: list[Delivery] = []
        parts: list[Any] = []
        left = request.records_max
        for topic_id, partition in request.entries:
            key = (topic_id, partition)
            try:
                if self.on_receive is not None:
                    self.on_receive(node, request)
                log = self.cluster.log(node.id, key)
                queue = self.queues.setdefault((key, request.group), FakeQueue(request.ordering, self.attempts_max))
                if queue.ordering != request.ordering:
                    raise InvalidArgument(f"ordering: the group has {queue.ordering}")
            except FerrylineError as error:
                deliveries.append(Delivery(*key, error=error.info()))
                continue
            queue.expire(now)
            rows = [record for batch in log.batches for record in decode_batch(batch)]
            offsets = queue.take([row.key for row in rows], left, now) if left else []
            if offsets:
                left -= len(offsets)
                epoch, number = queue.lease(
                    request.member, self.cluster.epochs[key], offsets, request.lease_ms / 1000, now
                )
                found = offsets[:-1] if self.garble else offsets
                data = encode_batch([(rows[o].key, rows[o].value, list(rows[o].headers)) for o in found or offsets])
                attempts = [queue.attempts[offset] for offset in offsets]
                receipt = self.receipt(request.group, request.member, key, epoch, number)
                deliveries.append(
                    Delivery(*key, epoch, number, receipt, request.lease_ms, offsets, attempts, len(data))
                )
                parts.append(data)
        return deliveries, parts

    def receipt(self, group: str, member: str, key: Key, epoch: int, number: int) -> bytes:
        return f"{group}/{member}/{key}/{epoch}/{number}".encode()

    def settle(self, node: Node, session: ServerSession, frame: Frame) -> None:
        request = decode_header(frame.header, Settle)
        self.settles.append((node.id, request))
        results = []
        now = asyncio.get_running_loop().time()
        for index, entry in enumerate(request.entries):
            key = (entry.topic_id, entry.partition)
            try:
                if self.on_settle is not None:
                    self.on_settle(node, request)
                self.cluster.log(node.id, key)
                if entry.receipt != self.receipt(request.group, request.member, key, entry.epoch, entry.lease):
                    raise Forbidden("receipt: not for this lease")
                results.append(SettleResult(index, *self.of(key, request.group).settle(request.member, entry, now)))
            except FerrylineError as error:
                results.append(SettleResult(index, error=error.info()))
        if self.lose_answers:
            self.lose_answers -= 1
        else:
            session.answer(frame.kind, frame.correlation, SettleAnswer(results))
        self.cluster.wake()

    def keep(self, node: Node, session: ServerSession, frame: Frame) -> None:
        request = decode_header(frame.header, Keep)
        self.keeps.append((node.id, request))
        self.kept[node.id, request.member] = self.kept.get((node.id, request.member), 0) + 1
        results = []
        for index, entry in enumerate(request.entries):
            key = (entry.topic_id, entry.partition)
            try:
                self.cluster.log(node.id, key)
                self.of(key, request.group).keep(request.member, entry.leases)
                results.append(SettleResult(index))
            except FerrylineError as error:
                results.append(SettleResult(index, error=error.info()))
        session.answer(frame.kind, frame.correlation, SettleAnswer(results))
        self.cluster.wake()
