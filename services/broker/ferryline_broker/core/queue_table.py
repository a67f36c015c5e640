"""What the state log says of one queue in one partition. Pure: `apply` is the only change, replay is `apply`.

Nothing volatile is here: no deadlines, no lanes, no members that wait (`queue.py`, `window.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

import msgspec

from ferryline_broker.core.heads import exhaust
from ferryline_broker.core.intervals import Runs
from ferryline_broker.core.queue_entries import (
    GIVEN_BACK,
    AnyQueueEntry,
    Dying,
    Leased,
    LeaseRow,
    Opened,
    Parked,
    Purged,
    QueuePaused,
    QueueRow,
    Redriven,
    Released,
    Settled,
    StoryRow,
    packed,
    unpacked,
)

_BRIEF_CHARS = 64
HISTORY_MAX = 3  # reasons of a record that are kept; each may be 4 KiB
LeaseId = tuple[int, int]  # (epoch, number)
NO_LEASE: LeaseId = (0, 0)


class Lease:
    """Records given to one member together. ``deadline_ms`` is the queue's business and in no entry."""

    __slots__ = ("deadline_ms", "id", "lease_ms", "member", "offsets", "order", "since_ms")

    def __init__(self, identity: LeaseId, member: str, lease_ms: int, offsets: list[int]) -> None:
        self.id = identity
        self.member = member
        self.lease_ms = lease_ms
        self.offsets = set(offsets)  # those that are not settled or released yet
        self.order = offsets  # as they are to be worked on: by priority, not by offset
        self.deadline_ms = 0
        self.since_ms = 0


class Story(msgspec.Struct, gc=False, eq=False):
    """A record that has been leased at least once and is not terminal."""

    attempts: int = 0
    last: LeaseId = NO_LEASE  # its last lease: a receipt of an earlier one is stale
    delay_ms: int = 0  # to wait after its last release
    history: tuple[tuple[int, str, str], ...] = ()  # (attempt, reason, detail)
    parked: bool = False
    dying: tuple[int, int] | None = None  # (producer epoch, sequence) of its copy

    def note(self, reason: str, detail: str) -> None:
        if reason or detail:
            self.history = (*self.history, (self.attempts, reason, detail))[-HISTORY_MAX:]

    def told(self, brief: bool) -> list[tuple[int, str, str]]:
        """The history; ``brief``: of the last failure only how it was called."""
        if brief:
            return [(attempt, reason[:_BRIEF_CHARS], "") for attempt, reason, _ in self.history[-1:]]
        return list(self.history)


class QueueTable:
    """Invariants: nothing below ``start`` is in any collection; a leased offset is not settled."""

    def __init__(self, group: str, ordering: str, start: int) -> None:
        self.group = group
        self.ordering = ordering
        self.start = start  # everything below is terminal
        self.settled = Runs()  # terminal, above start
        self.leases: dict[LeaseId, Lease] = {}
        self.holder: dict[int, Lease] = {}  # offset -> the lease that it is in
        self.stories: dict[int, Story] = {}  # of a record in its first lease there need not be one: see `story`
        self.next_lease = 1
        self.producer_epoch = 0  # of copies to the dead letters
        self.next_sequence = 0
        self.paused = False

    def is_settled(self, offset: int) -> bool:
        return offset < self.start or offset in self.settled

    def story(self, offset: int) -> Story | None:
        """What has become of a record so far; None: nothing, or it is terminal. Of one in its first lease, which most
        never leave but by an ack, it is made up here."""
        story = self.stories.get(offset)
        if story is None and (lease := self.holder.get(offset)) is not None:
            return Story(1, lease.id)
        return story

    def attempts(self, offsets: list[int]) -> list[int]:
        """How often each of these has been leased; at least once."""
        stories = self.stories
        if stories.keys().isdisjoint(offsets):
            return [1] * len(offsets)
        return [stories[offset].attempts if offset in stories else 1 for offset in offsets]

    def known(self) -> set[int]:
        """The records that `story` can tell something of."""
        return self.stories.keys() | self.holder.keys()

    def parked(self) -> list[int]:
        """In ascending order."""
        return sorted(offset for offset, story in self.stories.items() if story.parked)

    # -- change -------------------------------------------------------------------------------------

    def apply(self, entry: AnyQueueEntry) -> None:
        match entry:
            case Leased():
                self._leased(entry)
            case Settled(_, _, offsets):
                self.settle(unpacked(offsets))
            case Released():
                self._released(entry)
            case Parked(_, offset, _, reason, detail):
                story = self._end_lease(offset)
                story.note(reason, detail)
                story.parked = True
            case Redriven(_, offsets):
                for offset in unpacked(offsets):
                    self.stories.pop(offset, None)
            case Dying(_, offset, _, producer_epoch, sequence, reason, detail):
                story = self._end_lease(offset)
                story.note(reason, detail)
                story.dying = (producer_epoch, sequence)
                self.producer_epoch, self.next_sequence = producer_epoch, sequence + 1
            case QueuePaused(_, paused):
                self.paused = paused
            case Purged(_, below):
                self.skip(self.start, below)
            case Opened():
                pass  # made this table

    def _leased(self, entry: Leased) -> None:
        offsets = unpacked(entry.offsets)
        if not self.holder.keys().isdisjoint(offsets):  # of records that were lost: below the log start nobody can tell
            for offset in offsets:
                self._end_lease(offset)
        lease = Lease((entry.epoch, entry.lease), entry.member, entry.lease_ms, offsets)
        self.leases[lease.id] = lease
        self.next_lease = max(self.next_lease, entry.lease + 1)
        self.holder.update(dict.fromkeys(offsets, lease))
        identity, stories = lease.id, self.stories
        if stories.keys().isdisjoint(offsets):
            return
        for offset in offsets:
            story = stories.get(offset)
            if story is not None:
                story.attempts += 1
                story.last = identity
                story.delay_ms = 0

    def _released(self, entry: Released) -> None:
        for offset, delay_ms in zip(unpacked(entry.offsets), entry.delays_ms, strict=True):
            story = self._end_lease(offset)
            if entry.why == GIVEN_BACK:
                story.attempts -= 1
                story.last = NO_LEASE  # given up, so a late ack for it must not overtake its lane
            else:
                story.note(entry.reason, entry.detail)
            story.delay_ms = delay_ms

    def _end_lease(self, offset: int) -> Story:
        """Take an offset out of its lease, if it is in one."""
        lease = self.holder.pop(offset, None)
        if lease is not None:
            lease.offsets.discard(offset)
            if not lease.offsets:
                del self.leases[lease.id]
        story = self.stories.get(offset)
        if story is None:
            story = self.stories[offset] = Story() if lease is None else Story(1, lease.id)
        return story

    def settle(self, offsets: list[int]) -> None:
        """These are terminal: at least one, in ascending order."""
        holder, stories, settled = self.holder, self.stories, self.settled
        lease = holder.get(offsets[0])
        if lease is not None and lease.offsets.issuperset(offsets):  # as a rule: a part of one lease, or all of it
            lease.offsets.difference_update(offsets)
            if not lease.offsets:
                del self.leases[lease.id]
            exhaust(map(holder.__delitem__, offsets))
            if not stories.keys().isdisjoint(offsets):
                exhaust(map(stories.pop, offsets, repeat(None)))
        else:
            for offset in offsets:
                self._end_lease(offset)
                del stories[offset]
        first = end = offsets[0]
        if offsets[-1] - first < len(offsets):  # as a rule: all there are between the first and the last
            end = first + len(offsets)
            offsets = []
        for offset in offsets:
            if offset == end:
                end += 1
                continue
            settled.add(first, end)
            first, end = offset, offset + 1
        settled.add(first, end)
        self._advance()

    def skip(self, first: int, end: int) -> None:
        """Nothing in [first, end) will ever be delivered: purged, retained away, or no records at all."""
        if end - first < len(self.stories) + len(self.holder):
            gone = [offset for offset in range(first, end) if offset in self.stories or offset in self.holder]
        else:
            gone = [offset for offset in self.known() if first <= offset < end]
        if gone:
            self.settle(sorted(gone))
        self.settled.add(max(first, self.start), end)
        self._advance()

    def _advance(self) -> None:
        start = self.settled.next_outside(self.start)
        if start > self.start:
            self.start = start
            self.settled.cut_below(start)

    # -- snapshots ----------------------------------------------------------------------------------

    def row(self, epoch_at: Callable[[int], int], brief: bool = False) -> QueueRow:
        """Everything, as it goes into a snapshot. ``epoch_at`` tells the epoch of the record at an offset, -1: none.
        ``brief``: of each failure only how it was called, and only of the last one."""
        leases = []
        for lease in self.leases.values():
            offsets = sorted(lease.offsets)
            leases.append(LeaseRow(*lease.id, lease.member, lease.lease_ms, packed(offsets), epoch_at(offsets[-1])))
        stories = [
            StoryRow(
                offset, epoch_at(offset), story.attempts, story.last, story.delay_ms, story.told(brief), story.parked,
                story.dying,
            )
            for offset in sorted(self.known())
            if (story := self.story(offset)) is not None
        ]  # fmt: skip
        runs = [(first, end, epoch_at(end - 1)) for first, end in self.settled]
        return QueueRow(
            self.group, self.ordering, self.start, epoch_at(self.start - 1), self.next_lease, self.producer_epoch,
            self.next_sequence, self.paused, runs, leases, stories,
        )  # fmt: skip

    @classmethod
    def of_row(cls, row: QueueRow, stands: Callable[[int, int], bool], log_start: int) -> QueueTable:
        """``stands(offset, epoch)``: is the record at this offset still the one of that epoch? What is not is void."""
        start = row.start if stands(row.start - 1, row.record_epoch) else log_start
        table = cls(row.group, row.ordering, start)
        table.next_lease, table.paused = row.next_lease, row.paused
        table.producer_epoch, table.next_sequence = row.producer_epoch, row.next_sequence
        for first, end, epoch in row.runs:
            if stands(end - 1, epoch):
                table.settled.add(max(first, start), end)
        for told in row.stories:
            if stands(told.offset, told.record_epoch) and not table.is_settled(told.offset):
                story = table.stories[told.offset] = Story(told.attempts, (told.last[0], told.last[1]))
                story.delay_ms, story.history = told.delay_ms, tuple(told.history)
                story.parked, story.dying = told.parked, told.dying
        for given in row.leases:
            offsets = [offset for offset in unpacked(given.offsets) if offset in table.stories]
            if not stands(sum(given.offsets), given.record_epoch):  # it was never answered
                for offset in offsets:
                    table.stories[offset].attempts -= 1
                    table.stories[offset].last = NO_LEASE
            elif offsets:
                lease = Lease((given.epoch, given.lease), given.member, given.lease_ms, offsets)
                table.leases[lease.id] = lease
                table.holder.update(dict.fromkeys(offsets, lease))
        table._advance()
        return table
