"""One queue group in one partition: what is leased to whom, and what becomes of it. Pure.

`QueueTable` is what the state log says, `Window` where the records stand; here both are moved together. Every method
that changes the table appends its entries to ``out``: they are applied already, and count when they are committed.

The rules (docs/queues.md):

* a record is ready only when nothing before it in its lane is out; what is leased leaves the window's `ready`;
* after a promotion nothing is leased before the window has passed every record with a past: lanes are known only then;
* what is released goes back to where it was: the record that failed first, those that were leased behind it after it.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ferryline.protocol.metadata import RetryPolicy
from ferryline.protocol.queue_messages import ACK, EXTEND, NACK, ORDER_KEY, ORDER_NONE, ORDER_PARTITION, REJECT
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
from ferryline_broker.core.queue_events import MoveDead, Scanned, SettleItem
from ferryline_broker.core.queue_table import NO_LEASE, Lease, LeaseId, QueueTable, Story
from ferryline_broker.core.window import Window

LANE_RUN = {ORDER_KEY: 1, ORDER_PARTITION: 10_000, ORDER_NONE: 1}  # records of a lane in one lease
_WHOLE = b""  # the one lane of ordering="partition"


class QueueConfig(msgspec.Struct, frozen=True):
    """Limits of one queue in one partition."""

    heads: int = 20_000  # ready records in the window: what priorities choose from
    waiting: int = 1_000_000  # records in lanes behind them, 8 bytes each
    read_bytes: int = 1024 * 1024  # of log, at a time
    overdue_ms: int = 10_000  # ready for this long: before everything of a higher priority that is not
    dedupe_ms: int = 300_000  # an id that comes again within this time is a duplicate
    ids: int = 100_000  # that are remembered, the newest ones
    idle_ms: int = 7 * 86_400_000  # nobody asked: it holds back retention no longer


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
        self._ids: dict[bytes, tuple[int, int]] = {}  # id -> (offset, when it was seen), oldest first
        self.restart(now_ms)

    @property
    def group(self) -> str:
        return self.table.group

    def restart(self, now_ms: int) -> None:
        """Forget the window: it is read again from the start. Leases get a fresh deadline."""
        table = self.table
        self.window = Window(table.start, self.config.overdue_ms, runs=table.ordering == ORDER_PARTITION)
        self.filled = False  # the window has once seen all there was, or as much as it holds
        self.reading = False  # a read is under way
        self._past_end = max(table.stories, default=-1)
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

    def scan(self, records: Iterable[Scanned], next_offset: int, now_ms: int) -> None:
        """Records from the present end of the window to ``next_offset``. Offsets without a record are no records."""
        table, window = self.table, self.window
        whole = table.ordering == ORDER_PARTITION
        lanes = table.ordering != ORDER_NONE
        at = window.scanned
        duplicates: list[int] = []
        for record in records:
            offset = record.offset
            if offset < at:
                continue
            if offset > at:
                table.skip(at, offset)
            at = offset + 1
            again = bool(record.id) and self._seen(record, now_ms)
            if table.is_settled(offset):
                continue
            if again and offset not in table.stories:
                duplicates.append(offset)
                continue
            if whole:
                record = msgspec.structs.replace(record, lane=_WHOLE)
            elif not lanes and record.lane is not None:
                record = msgspec.structs.replace(record, lane=None)
            story = table.stories.get(offset)
            if story is None:
                window.scan(record, now_ms)
            else:
                self._enter_with_past(record, story, now_ms)
        if next_offset > at:
            table.skip(at, next_offset)
        window.scanned = max(window.scanned, next_offset)
        if duplicates:
            self._put(Settled(self.group, DUPLICATE, packed(duplicates), self._epoch_at(duplicates[-1])))

    def _seen(self, record: Scanned, now_ms: int) -> bool:
        """Has this id come by within the dedupe window, on an earlier record?"""
        ids = self._ids
        found = ids.get(record.id)
        if found is not None and now_ms - found[1] < self.config.dedupe_ms:
            return found[0] < record.offset
        ids.pop(record.id, None)
        ids[record.id] = (record.offset, now_ms)
        if len(ids) > self.config.ids:
            del ids[next(iter(ids))]
        return False

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
        taken: list[int] = []
        expired: list[int] = []
        run = LANE_RUN[table.ordering]
        barrier = window.barrier() if run > 1 else 0
        while len(taken) < limit:
            offset = window.pick(now_ms, strict)
            if offset is None:
                break
            if window.expired(offset, now_ms):
                expired.append(offset)
                window.gone(offset, now_ms)
                continue
            taken.append(offset)
            followed = 1
            while followed < run and len(taken) < limit:
                more = window.follow(offset, barrier)
                if more is None:
                    break
                if window.expired(more, now_ms):
                    expired.append(more)
                    window.gone(more, now_ms)
                    continue
                taken.append(more)
                followed += 1
        if expired:
            self._put(Settled(self.group, EXPIRED, packed(sorted(expired)), self._epoch_at(max(expired))))
        if not taken:
            return None
        order = list(taken)
        taken.sort()
        number = table.next_lease
        self._put(Leased(self.group, self._epoch, number, member, lease_ms, packed(taken), self._epoch_at(taken[-1])))
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
        good, stale, settled = [], [], []
        for offset in sorted(set(offsets)):
            story = self.table.stories.get(offset)
            if story is not None and story.last == identity and not story.parked and story.dying is None:
                good.append(offset)
            elif self.table.is_settled(offset):
                settled.append(offset)
            else:
                stale.append(offset)
        return good, stale, settled

    def _settle(self, offsets: list[int], why: str, now_ms: int) -> None:
        self._put(Settled(self.group, why, packed(offsets), self._epoch_at(offsets[-1])))
        for offset in offsets:
            self.window.gone(offset, now_ms)

    def _fail(
        self, offsets: list[int], policy: RetryPolicy, now_ms: int, why: str, delay_ms: int, reason: str, detail: str
    ) -> None:
        """An attempt is over without success: again later, or dead if it was the last. Of a run, the first failed."""
        delays: dict[int, int] = {}
        dead: list[int] = []
        for offset in self._firsts(offsets):
            attempts = self.table.stories[offset].attempts
            if attempts >= policy.attempts:
                dead.append(offset)
            else:
                delays[offset] = delay_ms if delay_ms >= 0 else self.backoff_ms(offset, attempts, policy)
        self._release(sorted(delays), why, delays, now_ms, reason, detail)
        for offset in dead:
            self._kill(offset, policy, now_ms, reason or why, detail)

    def backoff_ms(self, offset: int, attempts: int, policy: RetryPolicy) -> int:
        """Drawn evenly from [0, limit], by a hash: the same on every replica and in every test."""
        limit: int = min(policy.backoff_max_ms, policy.backoff_ms << min(attempts - 1, 40))
        named = f"{self.group}/{offset}/{attempts}".encode()
        draw = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")
        return draw * (limit + 1) >> 64

    def _release(
        self, offsets: list[int], why: str, delays: dict[int, int], now_ms: int, reason: str = "", detail: str = ""
    ) -> None:
        """These are available again. What was leased behind one of them in its lane steps back behind it."""
        if not offsets:
            return
        self._put(
            Released(
                self.group, why, packed(offsets), self._epoch_at(offsets[-1]), [delays[one] for one in offsets],
                reason, detail,
            )
        )  # fmt: skip
        self._give_back(self._behind(offsets[0]))
        for offset in reversed(offsets):
            self._available(offset, delays[offset], now_ms)

    def _give_back(self, offsets: list[int]) -> None:
        """These were leased behind a record that failed: they step back into the line, and no attempt counts."""
        if not offsets:
            return
        self._put(Released(self.group, GIVEN_BACK, packed(offsets), self._epoch_at(offsets[-1]), [0] * len(offsets)))
        for offset in reversed(offsets):
            if offset in self.window.lane_of:
                self.window.put_back(offset)

    def _kill(self, offset: int, policy: RetryPolicy, now_ms: int, reason: str, detail: str) -> None:
        """No further attempt. Its lane stands until the copy is committed, or until it is redriven."""
        self._give_back(self._behind(offset))
        epoch = self._epoch_at(offset)
        if policy.on_dead == "park":
            self._put(Parked(self.group, offset, epoch, reason, detail))
        else:
            table = self.table
            self._put(Dying(self.group, offset, epoch, table.producer_epoch, table.next_sequence, reason, detail))
        if offset in self.window.lane_of:
            self.window.stop(offset, now_ms)

    def keep(self, member: str, leases: set[int], now_ms: int) -> None:
        """Everything that is leased to a member, but for these leases, never arrived."""
        lost = [lease for lease in self.table.leases.values() if lease.member == member and lease.id[1] not in leases]
        offsets = sorted(offset for lease in lost for offset in lease.offsets)
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
        return MoveDead(self.group, offset, epoch, sequence, story.attempts, reason, history)

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
            self._put(Dying(self.group, at, self._epoch_at(at), epoch, number))

    # -- operators ----------------------------------------------------------------------------------

    def redrive(self, chosen: Callable[[int], bool], now_ms: int) -> list[int]:
        """Parked records are available again, in place, with no attempts behind them."""
        offsets = sorted(o for o, story in self.table.stories.items() if story.parked and chosen(o))
        if offsets:
            self._put(Redriven(self.group, packed(offsets), self._epoch_at(offsets[-1])))
            for offset in offsets:
                self._available(offset, 0, now_ms)
        return offsets

    def _put(self, entry: AnyQueueEntry) -> None:
        self.table.apply(entry)
        self.out.append(entry)

    # -- time ---------------------------------------------------------------------------------------

    def tick(self, policy: RetryPolicy, now_ms: int) -> None:
        """Leases whose deadline passed are released; what was delayed until now becomes ready."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now_ms:
            deadline_ms, identity = heapq.heappop(deadlines)
            lease = self.table.leases.get(identity)
            if lease is not None and lease.deadline_ms == deadline_ms:
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

    # -- looking ------------------------------------------------------------------------------------

    def stats(self, high_watermark: int) -> dict[str, Any]:
        table, window = self.table, self.window
        members: dict[str, int] = {}
        for lease in table.leases.values():
            members[lease.member] = members.get(lease.member, 0) + len(lease.offsets)
        return {
            "start": table.start,
            "high_watermark": high_watermark,
            "ordering": table.ordering,
            "paused": table.paused,
            "scanned": window.scanned,
            "settled_above_start": table.settled.total,
            "members": members,
            **self.counts(high_watermark),
        }

    def counts(self, high_watermark: int) -> dict[str, int]:
        """Records by state. ``unsettled`` counts offsets that hold no record (control batches) until they are seen."""
        table, window = self.table, self.window
        stories = table.stories.values()
        return {
            "unsettled": max(0, high_watermark - table.start - table.settled.total),
            "ready": len(window.ready),
            "waiting": window.waiting,
            "delayed": len(window.scheduled) + len(window.backing_off),
            "leased": len(table.holder),
            "parked": sum(story.parked for story in stories),
            "dying": sum(story.dying is not None for story in stories),
        }

    def explain(self, offset: int, high_watermark: int, now_ms: int) -> dict[str, Any]:
        """Where a record is, and what it waits for."""
        table = self.table
        story = table.stories.get(offset)
        told: dict[str, Any] = {"offset": offset, "attempts": story.attempts if story else 0}
        if story is not None and story.history:
            told["history"] = [{"attempt": a, "reason": r, "detail": d} for a, r, d in story.history]
        lease = table.holder.get(offset)
        if offset >= high_watermark:
            state, detail = "not committed", 0
        elif table.is_settled(offset):
            state, detail = "settled", 0
        elif lease is not None:
            state, detail = "leased", 0
            told |= {
                "member": lease.member,
                "leased_for_ms": now_ms - lease.since_ms,
                "lease_ends_in_ms": lease.deadline_ms - now_ms,
            }
        elif story is not None and (story.parked or story.dying is not None):
            state, detail = "parked" if story.parked else "dying", 0
        else:
            state, detail = self.window.place(offset)
        told["state"] = state
        if state == "waiting":
            told["behind"] = detail
        elif state == "delayed":
            told["due_in_ms"] = max(0, detail - now_ms)
        if state in ("available", "waiting") and table.paused:
            told["paused"] = True
        if state == "available" and not self.hungry:
            told["why"] = "no receiver asks for records"
        return told


__all__ = ["NO_LEASE", "Queue", "QueueConfig"]
