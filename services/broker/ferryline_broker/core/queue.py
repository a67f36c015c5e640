"""One queue group in one partition: what is leased to whom, and what becomes of it. Pure.

`QueueTable` is what the state log says, `Window` where the records stand; here both are moved together. Every method
that changes the table appends its entries to ``out``: they are applied already, and count when they are committed.

The rules (docs/queues.md):

* a record is ready only when nothing before it in its lane is out;
* after a promotion nothing is leased before the window has passed every record with a past;
* what is released goes back to where it was, and what was leased behind it after it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

import msgspec

from ferryline.protocol.metadata import RetryPolicy
from ferryline.protocol.queue_messages import ACK, EXTEND, NACK, ORDER_KEY, ORDER_NONE, ORDER_PARTITION, REJECT
from ferryline_broker.core.queue_config import QueueConfig, backoff_ms
from ferryline_broker.core.queue_entries import (
    ACKED,
    COPIED,
    DUPLICATE,
    EXPIRED,
    GIVEN_BACK,
    LEASE_ENDED,
    NACKED,
    AnyQueueEntry,
    Dying,
    Leased,
    Parked,
    Redriven,
    Released,
    Settled,
    packed,
)
from ferryline_broker.core.queue_events import MoveDead, Scanned, ScannedBatch, SettleItem
from ferryline_broker.core.queue_table import Lease, LeaseId, QueueTable, Story
from ferryline_broker.core.seen_ids import SeenIds
from ferryline_broker.core.window import Window

LANE_RUN = {ORDER_KEY: 1, ORDER_PARTITION: 10_000, ORDER_NONE: 1}  # records of a lane in one lease
_WHOLE = b""  # the one lane of ordering="partition"


class Queue:
    """See the module. ``epoch_at`` tells the epoch of a record of the record log."""

    def __init__(
        self, table: QueueTable, epoch: int, config: QueueConfig, epoch_at: Callable[[int], int], now_ms: int
    ) -> None:
        self.table = table
        self.config = config
        self.out: list[AnyQueueEntry] = []
        self.asked_ms = now_ms  # when somebody last wanted something
        self.hungry = False  # somebody asked and there was nothing
        self.record_bytes = 1024.0  # of a record, as last seen
        self._epoch = epoch
        self._epoch_at = epoch_at
        self._deadlines: list[tuple[int, LeaseId]] = []
        self.moving: int | None = None  # offset that is being copied to the dead letters
        self._ids = SeenIds(config)
        self.restart(now_ms)

    def restart(self, now_ms: int) -> None:
        """Forget the window: it is read again from the start. Leases get a fresh deadline."""
        table = self.table
        self.window = Window(table.start, self.config.overdue_ms, runs=table.ordering == ORDER_PARTITION)
        self.filled = False  # the window has once seen all there was, or as much as it holds
        self.reading = False  # a read is under way
        self.opaque = 0  # nothing below is looked at again before it is committed
        self._past_end = max(table.known(), default=-1)
        for lease in table.leases.values():
            lease.since_ms = now_ms
            self._set_deadline(lease, now_ms + lease.lease_ms)

    @property
    def rebuilding(self) -> bool:
        """Records with a past lie ahead of the window: whether a lane is free is not known yet."""
        return self.window.scanned <= self._past_end

    # -- reading ------------------------------------------------------------------------------------

    def next_read(self, high_watermark: int) -> tuple[int, int] | None:
        """(from, below) of what the window wants to see next; None when it has enough, or everything."""
        window, config = self.window, self.config
        full = len(window.ready) >= config.heads or window.waiting >= config.waiting
        start = self.table.settled.next_outside(max(window.scanned, self.table.start))
        window.scanned = max(window.scanned, start)
        if start >= high_watermark or (full and not self.rebuilding):
            self.filled = True
            return None
        return start, high_watermark

    def expects(self, offset: int) -> bool:
        """Whether the window has seen all that there is before ``offset``, and has room."""
        window = self.window
        seen = self.filled and not self.reading and not self.rebuilding and window.scanned == offset >= self.opaque
        return seen and not self.table.paused and window.waiting < self.config.waiting

    def scan(self, records: Iterable[Scanned | ScannedBatch], next_offset: int, now_ms: int) -> None:
        """Records from the present end of the window to ``next_offset``. Offsets without a record are no records."""
        table, window = self.table, self.window
        whole = table.ordering == ORDER_PARTITION
        lanes = table.ordering != ORDER_NONE
        duplicates: list[int] = []
        for record in self._singly(records, now_ms):
            offset = record.offset
            if offset < window.scanned:
                continue
            if offset > window.scanned:
                table.skip(window.scanned, offset)
            window.scanned = offset + 1
            again = bool(record.id) and self._ids.again(record, now_ms)
            if table.is_settled(offset):
                continue
            if again and table.story(offset) is None:
                duplicates.append(offset)
                continue
            if whole:
                record = msgspec.structs.replace(record, lane=_WHOLE)
            elif not lanes and record.lane is not None:
                record = msgspec.structs.replace(record, lane=None)
            story = table.story(offset)
            if story is None:
                window.scan(record, now_ms)
            else:
                self._enter_with_past(record, story, now_ms)
        if next_offset > window.scanned:
            table.skip(window.scanned, next_offset)
            window.scanned = next_offset
        if duplicates:
            self._put(Settled(self.table.group, DUPLICATE, packed(duplicates), self._epoch_at(duplicates[-1])))

    def _singly(self, records: Iterable[Scanned | ScannedBatch], now_ms: int) -> Iterator[Scanned]:
        """Those that have to be looked at one by one; batches of which there is nothing to say enter as such."""
        for one in records:
            if isinstance(one, Scanned):
                yield one
            elif not self._enter_together(one, now_ms):
                yield from one.singly()

    def _enter_together(self, batch: ScannedBatch, now_ms: int) -> bool:
        table, window = self.table, self.window
        first, end, lanes = batch.offset, batch.offset + len(batch.lanes), batch.lanes
        fresh = first == window.scanned and first >= table.start and first > self._past_end
        if not fresh or table.settled.meets(first, end):
            return False
        if table.ordering != ORDER_KEY:
            lanes = [_WHOLE if table.ordering == ORDER_PARTITION else None] * len(lanes)
        window.scan_batch(range(first, end), lanes, now_ms)
        window.scanned = end
        return True

    def _enter_with_past(self, record: Scanned, story: Story, now_ms: int) -> None:
        self.window.scan_out(record)
        if story.parked or story.dying is not None:
            self.window.stop(record.offset, now_ms)
        elif record.offset not in self.table.holder:
            self._available(record.offset, story.delay_ms, now_ms)

    def _available(self, offset: int, delay_ms: int, now_ms: int) -> None:
        """A record that is out may be leased, after the delay. One that never entered the window will by `scan`."""
        if offset not in self.window.lane_of:
            return
        if delay_ms > 0:
            self.window.back_off(offset, now_ms + delay_ms, now_ms)
        else:
            self.window.make_ready(offset, now_ms)

    # -- leasing ------------------------------------------------------------------------------------

    def lease(self, member: str, lease_ms: int, limit: int, now_ms: int, strict: bool = False) -> Lease | None:
        """Lease up to ``limit`` records to a member. None: nothing is ready."""
        self.asked_ms = now_ms
        table, window = self.table, self.window
        if table.paused or self.rebuilding or not self.filled:
            return None
        taken, expired = window.choose(limit, LANE_RUN[table.ordering], now_ms, strict)
        if expired:
            self._put(Settled(self.table.group, EXPIRED, packed(sorted(expired)), self._epoch_at(max(expired))))
        if not taken:
            return None
        order = list(taken)
        taken.sort()
        number = table.next_lease
        self._put(
            Leased(self.table.group, self._epoch, number, member, lease_ms, packed(taken), self._epoch_at(taken[-1]))
        )
        lease = table.leases[self._epoch, number]
        lease.order = order
        lease.since_ms = now_ms
        self._set_deadline(lease, now_ms + lease_ms)
        return lease

    def _set_deadline(self, lease: Lease, deadline_ms: int) -> None:
        lease.deadline_ms = deadline_ms
        heapq.heappush(self._deadlines, (deadline_ms, lease.id))

    # -- settling -----------------------------------------------------------------------------------

    def settle(self, item: SettleItem, member: str, policy: RetryPolicy, now_ms: int) -> tuple[list[int], list[int]]:
        """Carry out what a receiver says of offsets of a lease. Returns those that were (stale, settled) already."""
        self.asked_ms = now_ms
        identity = (item.epoch, item.lease)
        good, stale, settled = self._sorted_out(item.offsets, identity)
        action = item.action
        if action != ACK:  # what the lease has lost already is not failed, given back or held on to once more
            held = self.table.leases.get(identity)
            lost = [offset for offset in good if held is None or offset not in held.offsets or held.member != member]
            if lost:
                good = [offset for offset in good if offset not in lost]
                stale = sorted(stale + lost)
        if not good:
            return stale, settled
        if action == ACK:
            self._settle(good, ACKED, now_ms)
        elif action == EXTEND:
            lease = self.table.leases[identity]
            self._set_deadline(lease, now_ms + (item.delay_ms if item.delay_ms >= 0 else lease.lease_ms))
        elif action == NACK:
            self._fail(good, policy, now_ms, NACKED, item.delay_ms, item.reason, item.detail)
        elif action == REJECT:
            for offset in self._firsts(good):
                self._kill(offset, policy, now_ms, item.reason, item.detail)
        else:
            self._release(good, GIVEN_BACK, dict.fromkeys(good, 0), now_ms)
        return stale, settled

    def _firsts(self, offsets: list[int]) -> list[int]:
        """Those that no other of them stands before in its lane: what comes behind was not at fault, nor its turn."""
        return offsets[:1] if self.table.ordering == ORDER_PARTITION else offsets

    def _behind(self, offset: int) -> list[int]:
        """What was leased behind a record in its lane: its turn comes after that, again."""
        if self.table.ordering != ORDER_PARTITION:
            return []
        return sorted(other for other in self.table.holder if other > offset)

    def _sorted_out(self, offsets: list[int], identity: LeaseId) -> tuple[list[int], list[int], list[int]]:
        """(those that the receipt is good for, stale ones, settled ones), each in ascending order."""
        lease = self.table.leases.get(identity)
        if lease is not None and lease.offsets.issuperset(offsets):
            return sorted(set(offsets)), [], []
        good, stale, settled = [], [], []
        for offset in sorted(set(offsets)):
            story = self.table.story(offset)
            if story is not None and story.last == identity and not story.parked and story.dying is None:
                good.append(offset)
            elif self.table.is_settled(offset):
                settled.append(offset)
            else:
                stale.append(offset)
        return good, stale, settled

    def _settle(self, offsets: list[int], why: str, now_ms: int) -> None:
        self._put(Settled(self.table.group, why, packed(offsets), self._epoch_at(offsets[-1])))
        self.window.gone(offsets, now_ms)

    def _fail(
        self, offsets: list[int], policy: RetryPolicy, now_ms: int, why: str, delay_ms: int, reason: str, detail: str
    ) -> None:
        """An attempt is over without success: again later, or dead if it was the last. Of a run, the first failed."""
        delays: dict[int, int] = {}
        dead: list[int] = []
        for offset in self._firsts(offsets):
            attempts = self.table.attempts([offset])[0]
            if attempts >= policy.attempts:
                dead.append(offset)
            else:
                delays[offset] = delay_ms if delay_ms >= 0 else backoff_ms(self.table.group, offset, attempts, policy)
        self._release(sorted(delays), why, delays, now_ms, reason, detail)
        for offset in dead:
            self._kill(offset, policy, now_ms, reason or why, detail)

    def _release(
        self, offsets: list[int], why: str, delays: dict[int, int], now_ms: int, reason: str = "", detail: str = ""
    ) -> None:
        """These are available again. What was leased behind one of them in its lane steps back behind it."""
        if not offsets:
            return
        epoch, waits = self._epoch_at(offsets[-1]), [delays[one] for one in offsets]
        self._put(Released(self.table.group, why, packed(offsets), epoch, waits, reason, detail))
        self._give_back(self._behind(offsets[0]))
        for offset in reversed(offsets):
            self._available(offset, delays[offset], now_ms)

    def _give_back(self, offsets: list[int]) -> None:
        """These were leased behind a record that failed: they step back into the line, and no attempt counts."""
        if not offsets:
            return
        self._put(
            Released(self.table.group, GIVEN_BACK, packed(offsets), self._epoch_at(offsets[-1]), [0] * len(offsets))
        )
        for offset in reversed(offsets):
            if offset in self.window.lane_of:
                self.window.put_back(offset)

    def _kill(self, offset: int, policy: RetryPolicy, now_ms: int, reason: str, detail: str) -> None:
        """No further attempt. Its lane stands until the copy is committed, or until it is redriven."""
        self._give_back(self._behind(offset))
        epoch = self._epoch_at(offset)
        if policy.on_dead == "park":
            self._put(Parked(self.table.group, offset, epoch, reason, detail))
        else:
            table = self.table
            self._put(Dying(self.table.group, offset, epoch, table.producer_epoch, table.next_sequence, reason, detail))
        if offset in self.window.lane_of:
            self.window.stop(offset, now_ms)

    def keep(self, member: str, leases: set[int], now_ms: int) -> None:
        """Everything that is leased to a member, but for these leases, never arrived."""
        lost = [lease for lease in self.table.leases.values() if lease.member == member and lease.id[1] not in leases]
        for lease in lost:  # one by one: if one is void because its records are lost, the others are free all the same
            offsets = sorted(lease.offsets)
            self._release(offsets, GIVEN_BACK, dict.fromkeys(offsets, 0), now_ms)

    # -- dead letters -------------------------------------------------------------------------------

    def next_move(self) -> MoveDead | None:
        """The copy that is to be made next; one at a time, in the order of their sequences."""
        offset = self.first_dying()
        if self.moving is not None or offset is None:
            return None
        story = self.table.stories[offset]
        assert story.dying is not None
        epoch, sequence = story.dying
        self.moving = offset
        history = list(story.history)
        reason = history[-1][1] if history else ""
        return MoveDead(self.table.group, offset, epoch, sequence, story.attempts, reason, history)

    def first_dying(self) -> int | None:
        """The offset that is copied first: its sequence is the lowest."""
        dying = [(story.dying, offset) for offset, story in self.table.stories.items() if story.dying is not None]
        return min(dying)[1] if dying else None

    def moved(self, offset: int, sequence: int, done: bool, now_ms: int) -> None:
        """The copy is committed at its target; or the target has forgotten the producer: again in its next epoch."""
        if offset == self.moving:
            self.moving = None
        story = self.table.stories.get(offset)
        if story is None or story.dying is None or story.dying[1] != sequence:
            return  # purged meanwhile
        if done:
            self._settle([offset], COPIED, now_ms)
            return
        dying = [(one.dying, at) for at, one in self.table.stories.items() if one.dying is not None]
        epoch = self.table.producer_epoch + 1
        for number, (_, at) in enumerate(sorted(dying)):
            self._put(Dying(self.table.group, at, self._epoch_at(at), epoch, number))

    # -- operators ----------------------------------------------------------------------------------

    def redrive(self, chosen: Callable[[int], bool], now_ms: int) -> list[int]:
        """Parked records are available again, in place, with no attempts behind them. ``chosen`` is asked in order."""
        offsets = [offset for offset in self.table.parked() if chosen(offset)]
        if offsets:
            self._put(Redriven(self.table.group, packed(offsets), self._epoch_at(offsets[-1])))
            for offset in offsets:
                self._available(offset, 0, now_ms)
        return offsets

    def _put(self, entry: AnyQueueEntry) -> None:
        self.table.apply(entry)
        self.out.append(entry)

    # -- time ---------------------------------------------------------------------------------------

    def tick(self, policy: RetryPolicy, now_ms: int, high_watermark: int) -> None:
        """Leases whose deadline passed are released; what was delayed until now becomes ready. A lease of records that
        are not committed was not answered, so it has not begun."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now_ms:
            deadline_ms, identity = heapq.heappop(deadlines)
            lease = self.table.leases.get(identity)
            if lease is None or lease.deadline_ms != deadline_ms:
                continue
            if max(lease.offsets) >= high_watermark:
                self._set_deadline(lease, now_ms + lease.lease_ms)
            else:
                self._fail(sorted(lease.offsets), policy, now_ms, LEASE_ENDED, -1, "", "")
        self.window.due(now_ms)

    def next_deadline_ms(self) -> int | None:
        deadlines, leases = self._deadlines, self.table.leases
        while deadlines:
            deadline_ms, identity = deadlines[0]
            if identity in leases and leases[identity].deadline_ms == deadline_ms:
                break
            heapq.heappop(deadlines)
        due = self.window.next_due_ms()
        if not deadlines:
            return due
        return deadlines[0][0] if due is None else min(due, deadlines[0][0])
