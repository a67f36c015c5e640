"""All queues of one partition, in one primaryship: events in, state entries and answers out. Pure.

`Primary` appends the entries and holds the answer back until they are committed. The tables belong to the `GroupTable`,
which replays them; a `Queue` is made around each when this primaryship is ready, and dies with it.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.queue_messages import ORDER_PARTITION
from ferryline_broker.core.events import Effect
from ferryline_broker.core.groups import ForgetEntry, GroupTable, Refused, StateEntry
from ferryline_broker.core.queue import Queue
from ferryline_broker.core.queue_config import QueueConfig
from ferryline_broker.core.queue_entries import COPIED, Dying, Opened, Purged, QueuePaused, Settled
from ferryline_broker.core.queue_events import (
    DONE,
    AnswerLease,
    AnswerQueue,
    AnswerSettle,
    DeadMoved,
    KeepAsked,
    LeaseAsked,
    QueueAsked,
    ReadWindow,
    SettleAsked,
    SettleItem,
    WakeReceivers,
    WindowRead,
)
from ferryline_broker.core.queue_view import counts, explain, stats
from ferryline_broker.core.replica import Replica

QueueEvent = LeaseAsked | SettleAsked | KeepAsked | QueueAsked | WindowRead | DeadMoved
QUEUES_MAX = 1_000  # of one partition: each has a row in every snapshot
_WORD_MS = 3_000  # how long the word of one who asked in vain stands for others
_ACTIVE_MS = 10_000  # somebody asked within this time: the window is kept full
_BLOCKED_RETRY_MS = 100  # deadlines that fall due while nothing can be appended are looked at again after this


class Outcome(msgspec.Struct):
    """What is to be appended; then ``answer`` is due, at once or when everything appended so far is committed, and the
    record at ``record``."""

    entries: list[StateEntry] = []
    answer: Effect | None = None
    at_once: bool = False
    record: int = -1
    refused: Refused | None = None


class Queues:
    """``blocked_ms``: nothing can be appended now; deadlines wait until then."""

    def __init__(self, replica: Replica, tables: GroupTable, epoch: int, config: QueueConfig) -> None:
        self._replica = replica
        self._tables = tables
        self._epoch = epoch
        self._config = config
        self._queues: dict[str, Queue] = {}
        self._moves: dict[str, int] = {}  # group -> state offset that must be committed before the next copy
        self._postponed: list[WindowRead | DeadMoved] = []  # came while nothing could be appended
        self.blocked_ms = 0

    def queue(self, group: str, now_ms: int) -> Queue | None:
        """The queue of a group; made when it is first needed."""
        queue = self._queues.get(group)
        table = self._tables.queues.get(group)
        if table is None:
            self._queues.pop(group, None)
            return None
        if queue is None or queue.table is not table:
            queue = Queue(table, self._epoch, self._config, self._replica.epochs[RECORDS].epoch_at, now_ms)
            self._queues[group] = queue
        return queue

    def begin(self, now_ms: int) -> None:
        """This primaryship is ready: leases that were found run from now on; copies that were begun are repeated."""
        for group in sorted(self._tables.queues):
            queue = self.queue(group, now_ms)
            assert queue is not None
            self._follow_retention(queue, now_ms)  # of what is gone nobody knows any more what was void
            if any(story.dying is not None for story in queue.table.stories.values()):
                self._moves[group] = -1

    # -- events -------------------------------------------------------------------------------------

    def handle(self, event: QueueEvent, now_ms: int) -> Outcome:
        match event:
            case LeaseAsked():
                return self._lease(event, now_ms)
            case WindowRead():
                return self._read(event, now_ms)
            case QueueAsked():
                return self._asked(event, now_ms)
        queue = self.queue(event.group, now_ms)
        if queue is None:
            return Outcome(refused=Refused("UNKNOWN_GROUP", f"no queue group {event.group!r} has received here"))
        if isinstance(event, SettleAsked):
            held = [_held_ms(queue, item, now_ms) for item in event.items]
            outcomes = [queue.settle(item, event.member, self._replica.retry, now_ms) for item in event.items]
            answer: Effect = AnswerSettle(event.token, [one[0] for one in outcomes], [one[1] for one in outcomes], held)
            return self._outcome(queue, answer, now_ms)
        if isinstance(event, KeepAsked):
            queue.keep(event.member, set(event.leases), now_ms)
            return self._outcome(queue, AnswerSettle(event.token, [], []), now_ms)
        queue.moved(event.offset, event.sequence, event.outcome == DONE, now_ms)
        return self._outcome(queue, None, now_ms)

    def _lease(self, event: LeaseAsked, now_ms: int) -> Outcome:
        entries: list[StateEntry] = []
        queue = self.queue(event.group, now_ms)
        if queue is None:
            if len(self._tables.queues) >= QUEUES_MAX:
                message = f"group: {QUEUES_MAX} queue groups read this partition already; delete one first"
                return Outcome(refused=Refused("THROTTLED", message))
            replica = self._replica
            start = replica.high_watermark[RECORDS] if event.start == "end" else replica.log_start[RECORDS]
            entry = Opened(event.group, event.ordering, start, self._epoch_before(start))
            self._tables.apply(entry)
            entries.append(entry)
            queue = self.queue(event.group, now_ms)
            assert queue is not None
        elif queue.table.ordering != event.ordering:
            message = f"ordering: group {event.group!r} has {queue.table.ordering!r}, not {event.ordering!r}"
            return Outcome(refused=Refused("INVALID_ARGUMENT", message))
        self._follow_retention(queue, now_ms)
        limit = max(1, min(event.records_max, int(event.bytes_max / queue.record_bytes)))
        high = self._replica.high_watermark[RECORDS]
        blind = queue.window.scanned < event.seen and queue.next_read(high) is not None
        lease = None if blind else queue.lease(event.member, event.lease_ms, limit, now_ms, event.strict)
        if blind:
            queue.asked_ms = now_ms
            outcome = self._outcome(queue, AnswerLease(event.token), now_ms)
            outcome.at_once = queue.hungry = True  # hungry from now on: worth asking again once it has been read
        elif lease is None:
            queue.hungry = True
            outcome = self._outcome(queue, AnswerLease(event.token), now_ms)
            outcome.at_once = True
        else:
            offsets = lease.order
            attempts, contended = queue.table.attempts(offsets), queue.window.contended(offsets)
            answer = AnswerLease(event.token, *lease.id, lease.lease_ms, offsets, attempts, contended)
            # The next record can be leased while this lease is committed, if somebody is known to wait for it.
            if event.stands and not queue.window.ready:
                queue.hungry = True
            outcome = self._outcome(queue, answer, now_ms)
            outcome.record = max(offsets)
        outcome.entries[:0] = entries
        return outcome

    def _read(self, event: WindowRead, now_ms: int) -> Outcome:
        queue = self.queue(event.group, now_ms)
        if queue is None:
            return Outcome()
        if event.ahead and not event.plain:
            queue.opaque = event.next_offset
            return Outcome()
        queue.reading = queue.reading and event.ahead
        if event.offset == queue.window.scanned and event.next_offset > event.offset:
            queue.scan(event.records, event.next_offset, now_ms)
            if event.records:
                count = event.next_offset - event.records[0].offset
                queue.record_bytes += 0.5 * (event.size / count - queue.record_bytes)
        return self._outcome(queue, None, now_ms)

    def _asked(self, event: QueueAsked, now_ms: int) -> Outcome:
        if event.op == "groups":  # all there are, whatever group the question names
            return Outcome(answer=AnswerQueue(event.token, {"groups": sorted(self._tables.queues)}), at_once=True)
        queue = self.queue(event.group, now_ms)
        if queue is None:
            return Outcome(refused=Refused("UNKNOWN_GROUP", f"no queue group {event.group!r} has received here"))
        high, marks = self._replica.high_watermark[RECORDS], self._replica.epochs[RECORDS].marks
        entry: StateEntry
        match event.op:
            case "stats":
                return Outcome(answer=AnswerQueue(event.token, stats(queue, high, marks)), at_once=True)
            case "explain":
                told = explain(queue, event.offset, high, now_ms)
                return Outcome(answer=AnswerQueue(event.token, told), at_once=True)
            case "peek":
                told = {"offsets": self._unsettled(queue, event.offset, event.count, high)}
                return Outcome(answer=AnswerQueue(event.token, told), at_once=True)
            case "redrive":
                chosen = self._chosen(queue, event)
                if event.dry_run:
                    told = {"offsets": [offset for offset in queue.table.parked() if chosen(offset)]}
                    return Outcome(answer=AnswerQueue(event.token, told), at_once=True)
                told = {"offsets": queue.redrive(chosen, now_ms)}
                return self._outcome(queue, AnswerQueue(event.token, told), now_ms)
            case "purge":
                told = {"purged": counts(queue, high, marks)["unsettled"], "below": high}
                if event.dry_run:
                    return Outcome(answer=AnswerQueue(event.token, told), at_once=True)
                entry = Purged(event.group, high, self._epoch_before(high))
            case "pause" | "resume":
                told = {"paused": event.op == "pause"}
                entry = QueuePaused(event.group, event.op == "pause")
            case "delete":
                told = {}
                entry = ForgetEntry(event.group)
            case _:
                return Outcome(refused=Refused("INVALID_ARGUMENT", f"op: {event.op[:32]!r} is unknown"))
        self._tables.apply(entry)
        if event.op == "purge":
            queue.restart(now_ms)
        outcome = self._outcome(queue, AnswerQueue(event.token, told), now_ms)
        outcome.entries.insert(0, entry)
        return outcome

    def _unsettled(self, queue: Queue, offset: int, count: int, high: int) -> list[int]:
        found: list[int] = []
        at = max(queue.table.start, offset)
        while len(found) < count:
            at = queue.table.settled.next_outside(at)
            if at >= high:
                break
            found.append(at)
            at += 1
        return found

    def _chosen(self, queue: Queue, event: QueueAsked) -> Callable[[int], bool]:
        left = [event.count if event.count > 0 else 2**31]

        def chosen(offset: int) -> bool:
            story = queue.table.stories[offset]
            if left[0] <= 0 or offset < event.offset:
                return False
            if event.lane is not None and queue.window.key_of(offset) != event.lane:
                return False
            if event.reason and not any(event.reason in reason for _, reason, _ in story.history):
                return False
            left[0] -= 1
            return True

        return chosen

    def _outcome(self, queue: Queue, answer: Effect | None, now_ms: int) -> Outcome:
        entries: list[StateEntry] = list(queue.out)
        queue.out.clear()
        self._fill(queue, now_ms)
        return Outcome(entries, answer)

    def _epoch_before(self, offset: int) -> int:
        """Epoch of the record before ``offset``; -1 where nobody knows it any more."""
        replica = self._replica
        epochs = replica.epochs[RECORDS]
        return epochs.before if offset == replica.log_start[RECORDS] else epochs.epoch_at(offset - 1)

    # -- what follows from it -----------------------------------------------------------------------

    def _fill(self, queue: Queue, now_ms: int) -> None:
        """Keep the window of a queue that is used full, and wake whoever waits for records."""
        if not queue.reading and (queue.hungry or now_ms - queue.asked_ms < _ACTIVE_MS):
            wanted = queue.next_read(self._replica.high_watermark[RECORDS])
            if wanted is not None:
                queue.reading = True
                self._replica.out.append(ReadWindow(queue.table.group, *wanted, self._config.read_bytes))
        if queue.hungry and queue.filled and not queue.rebuilding and not queue.table.paused and queue.window.ready:
            queue.hungry = False
            self._replica.out.append(WakeReceivers(queue.table.group, len(queue.window.ready)))

    def expecting(self, offset: int) -> list[str]:
        """The groups that have seen everything before ``offset``, and in which somebody waits for more."""
        return [queue.table.group for queue in self._queues.values() if queue.hungry and queue.expects(offset)]

    def _follow_retention(self, queue: Queue, now_ms: int) -> None:
        start = self._replica.log_start[RECORDS]
        if start > queue.table.start:
            queue.table.skip(queue.table.start, start)
            queue.restart(now_ms)  # what retention took may be ready in the window

    def before_snapshot(self, now_ms: int) -> None:
        """No row may begin below the log start: the epoch there is not known any more, so it would count as void."""
        for group in sorted(self._queues):
            queue = self.queue(group, now_ms)
            if queue is not None:
                self._follow_retention(queue, now_ms)

    def appended(self, entries: list[StateEntry], last: int) -> None:
        """These entries stand in the state log, the last one at ``last``.

        The next copy waits for the end of the one before it: targets know the last few sequences only, and whoever
        leads next repeats those whose end was lost. It does not wait for deaths that came after its own.
        """
        dying: dict[str, set[int]] = {}
        for entry in entries:
            if isinstance(entry, Settled) and entry.why == COPIED:
                self._moves[entry.group] = last
            elif isinstance(entry, Dying):
                dying.setdefault(entry.group, set()).add(entry.offset)
        for group, offsets in dying.items():
            queue = self._queues.get(group)
            if group not in self._moves or queue is None or queue.first_dying() in offsets:
                self._moves[group] = last

    def committed(self, now_ms: int) -> None:
        """A high watermark moved: new records may be looked at, and copies whose beginning is committed be made."""
        high = self._replica.high_watermark[STATE]
        for group, after in list(self._moves.items()):
            if after >= high:
                continue
            queue = self.queue(group, now_ms)
            move = queue.next_move() if queue is not None else None
            if move is not None:
                self._replica.out.append(move)
            elif queue is None or queue.moving is None:
                del self._moves[group]
        for queue in self._queues.values():
            if queue.hungry:
                self._fill(queue, now_ms)

    # -- time ---------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> list[StateEntry]:
        """What ended by time. The caller made sure that it can be appended."""
        self.blocked_ms = 0
        entries: list[StateEntry] = []
        postponed, self._postponed = self._postponed, []
        for event in postponed:
            entries += self.handle(event, now_ms).entries
        for queue in list(self._queues.values()):
            due = queue.next_deadline_ms()
            if due is not None and due <= now_ms:
                queue.tick(self._replica.retry, now_ms, self._replica.high_watermark[RECORDS])
                entries += self._outcome(queue, None, now_ms).entries
        return entries

    def block(self, now_ms: int, event: WindowRead | DeadMoved | None = None) -> None:
        """Nothing can be appended now: what happened all the same is looked at later."""
        if isinstance(event, WindowRead) and event.ahead:
            return  # it is read again when it is committed
        self.blocked_ms = now_ms + _BLOCKED_RETRY_MS
        if event is not None:
            self._postponed.append(event)

    def next_deadline_ms(self) -> int | None:
        earliest: int | None = self.blocked_ms if self._postponed else None
        for queue in self._queues.values():
            due = queue.next_deadline_ms()
            if due is not None and (earliest is None or due < earliest):
                earliest = due
        return earliest if earliest is None else max(earliest, self.blocked_ms)

    # -- questions ----------------------------------------------------------------------------------

    def pinned(self, now_ms: int) -> int | None:
        """The lowest record that a queue in use has not settled: retention stops there."""
        starts = [
            queue.table.start for queue in self._queues.values() if now_ms - queue.asked_ms < self._config.idle_ms
        ]
        return min(starts, default=None)

    def counts(self) -> dict[str, dict[str, int]]:
        """Records of each queue by state, for metrics."""
        high, marks = self._replica.high_watermark[RECORDS], self._replica.epochs[RECORDS].marks
        return {group: counts(queue, high, marks) for group, queue in sorted(self._queues.items())}

    def starts(self) -> dict[str, int]:
        """The first offset that each queue has not settled."""
        return {group: queue.table.start for group, queue in sorted(self._queues.items())}

    def holders(self) -> dict[str, set[str]]:
        """Who has leases of each queue."""
        return {
            group: {lease.member for lease in queue.table.leases.values()}
            for group, queue in sorted(self._queues.items())
        }

    def ready(self, group: str) -> int:
        """How many records could be leased now; of a lane that is leased in runs, all that stand in it."""
        queue = self._queues.get(group)
        if queue is None or not queue.filled or queue.rebuilding:
            return 0
        heads = len(queue.window.ready)
        return heads + queue.window.waiting if heads and queue.table.ordering == ORDER_PARTITION else heads

    def waited_for(self, group: str, ordering: str, now_ms: int) -> bool:
        """Whether somebody asked in vain a moment ago: asking once more would change nothing, all are woken alike."""
        queue = self._queues.get(group)
        if queue is None or not queue.hungry or queue.window.ready or queue.table.ordering != ordering:
            return False
        return now_ms - queue.asked_ms < _WORD_MS and self._tables.queues.get(group) is queue.table


def _held_ms(queue: Queue, item: SettleItem, now_ms: int) -> int:
    lease = queue.table.leases.get((item.epoch, item.lease))
    return now_ms - lease.since_ms if lease is not None else -1
