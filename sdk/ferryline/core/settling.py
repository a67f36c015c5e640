"""How records are settled: what goes into which frame, what is repeated, what came of it. Pure; used by `ReceiverCore`.

Rules:

* What is settled together travels together, one frame for each broker.
* A few acknowledgements wait for the answer to those before them at the same broker, `HOLD_MS` at most. Those that
  nobody waits for *linger*, until `LINGER_MS` after the first of them. Then they travel together: each frame costs both
  copies of every partition in it a batch and a flush, whatever is in it. Everything else somebody may be waiting for,
  so it leaves at once, and takes what waits along.
* A settlement without an answer is repeated, at whoever is the primary by then, until its deadline. It may have been
  done already (it is *in doubt*): then the broker finds an acknowledged record settled, and one that was given back in
  somebody else's hands. Both are what was asked for.
* A settlement that was surely not done ends with DeadlineExceeded, one in doubt with OutcomeUnknown. Either way nothing
  more is done for its records: their lease ends, and they are delivered again unless they were settled.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from ferryline.core.leases import LOST, SETTLED, LeaseTable, PartitionKey
from ferryline.core.receiving_events import Effect, RefreshMetadata, SendSettle, Settle, Settled
from ferryline.core.retry import Backoff, Jitter
from ferryline.protocol.errors import (
    ClientClosed,
    DeadlineExceeded,
    FerrylineError,
    OutcomeUnknown,
    PrimaryNotAvailable,
    RequestTimedOut,
    UnknownTopic,
    from_info,
)
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.queue_messages import ACK, EXTEND, NACK, REJECT, RELEASE, SettleEntry, SettleResult

FRAME_BYTES = 1024 * 1024  # of one SETTLE, roughly
HOLD_MS = 20  # what an acknowledgement waits at most for the answer to those before it
LINGER_MS = 20  # what one that nobody waits for waits at most for others
BLOCKED_SETTLE_MS = 10_000  # how long one is tried whose time passed while it waited for others
HOLD_RECORDS = 100  # so many acknowledged records wait for nothing
_ENTRY_BYTES, _OFFSET_BYTES = 200, 9
_TAKEN_BACK = (NACK, REJECT, RELEASE)  # in a run, the broker takes what comes behind, too
_FOREVER = 2**62


class Item:
    """One `Settle` until its last word. ``frame``: the one that it is in, 0: none. ``linger_ms``: until when it may
    wait for others."""

    __slots__ = ("broker", "cause", "doubtful", "failures", "frame", "held", "linger_ms", "retry_at_ms", "sent_ms",
                 "settle")  # fmt: skip

    def __init__(self, settle: Settle, linger_ms: int = 0) -> None:
        self.settle = settle
        self.linger_ms = linger_ms
        self.broker = NO_BROKER
        self.frame = 0
        self.doubtful = False
        self.held = False  # it waits for others, or for the answer to an earlier frame
        self.failures = 0
        self.retry_at_ms = self.sent_ms = 0
        self.cause: FerrylineError | None = None  # why it was not done the last time


class Settling:
    """See the module. ``broker_of(key)``: the primary of a partition, None if that does not exist."""

    def __init__(self, table: LeaseTable, broker_of: Callable[[PartitionKey], int | None], *, seed: int) -> None:
        self._table = table
        self._broker_of = broker_of
        self._items: dict[int, Item] = {}
        self._unsent: list[Item] = []
        self._frames: dict[int, list[Item]] = {}
        self._acking: dict[int, tuple[int, int]] = {}  # broker -> (last frame with acknowledgements, when it left)
        self._deadlines: list[tuple[int, int]] = []
        self._last_frame = 0
        self._own = 0  # numbers of what nobody waits for are negative
        self._backoff = Backoff(10, 500)
        self._jitter = Jitter(seed)

    def __len__(self) -> int:
        return len(self._items)

    def next_deadline_ms(self) -> int:
        while self._deadlines and self._deadlines[0][1] not in self._items:
            heapq.heappop(self._deadlines)
        deadline = self._deadlines[0][0] if self._deadlines else _FOREVER
        return min(deadline, min((item.retry_at_ms for item in self._unsent), default=_FOREVER))

    # -- what happened -----------------------------------------------------------------------------

    def add(self, settle: Settle, now_ms: int, *, lingers: bool = False) -> None:
        """Take what the application wants done. Of a run, what stands behind it is not ours any more. ``lingers``: if
        it is an acknowledgement, nobody waits for it."""
        self._table.progress_ms = now_ms
        lease = settle.lease
        if settle.action == EXTEND:
            for index in settle.indexes:
                lease.handed_ms[index] = now_ms  # whoever asks for more time is at work
        elif settle.action in _TAKEN_BACK:
            for index in settle.indexes:
                for later in self._table.behind(lease, index):
                    self._table.lose(lease, later)
        self._items[settle.number] = item = Item(settle, now_ms + LINGER_MS if lingers else 0)
        self._unsent.append(item)
        heapq.heappush(self._deadlines, (settle.deadline_ms, settle.number))

    def release(self, settle: Settle, now_ms: int) -> None:
        """Give records back that the application never saw; nobody waits for the outcome."""
        self._own -= 1
        self.add(Settle(self._own, settle.lease, RELEASE, settle.indexes, settle.deadline_ms), now_ms)

    def answered(self, frame: int, results: list[SettleResult], now_ms: int, out: list[Effect]) -> None:
        by_index = {result.index: result for result in results}
        self._let_go(frame)
        for index, item in enumerate(self._frames.pop(frame, ())):
            if item.frame != frame:
                continue  # it was repeated elsewhere meanwhile, and that answer counts
            result = by_index.get(index)
            if result is None:
                self._again(item, RequestTimedOut("the broker did not answer for this"), now_ms, out)
            elif result.error is not None:
                self._again(item, from_info(result.error), now_ms, out)
            else:
                self._done(item, result, out)

    def failed(self, frame: int, error: FerrylineError, now_ms: int, out: list[Effect]) -> None:
        self._let_go(frame)
        for item in self._frames.pop(frame, ()):
            if item.frame == frame:
                self._again(item, error, now_ms, out)

    def _let_go(self, frame: int) -> None:
        """This frame has its answer: what waited for it may leave."""
        for broker, (last, _) in list(self._acking.items()):
            if last == frame:
                del self._acking[broker]
                for item in self._unsent:
                    if item.held and item.broker == broker:
                        item.retry_at_ms = item.linger_ms

    def hurry(self) -> None:
        """Somebody may wait for what lingers: `send` looks at it again."""
        for item in self._unsent:
            if item.held:
                item.linger_ms = item.retry_at_ms = 0

    def routes_changed(self) -> None:
        """What is on its way to a broker that is not the primary any more is sent to the new one at once."""
        for items in self._frames.values():
            for item in items:
                if item.frame and self._broker_of(item.settle.lease.key) != item.broker:
                    item.doubtful = True
                    item.frame = item.retry_at_ms = 0
                    self._unsent.append(item)
        for item in self._unsent:
            item.retry_at_ms = 0

    def expire(self, now_ms: int, out: list[Effect]) -> None:
        """End what has reached its deadline."""
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            _, number = heapq.heappop(self._deadlines)
            item = self._items.get(number)
            if item is not None and item.held and _is_plain(item):
                # It waited for others when the application blocked the loop: it leaves now, with time to be answered.
                item.linger_ms = item.retry_at_ms = 0
                heapq.heappush(self._deadlines, (now_ms + BLOCKED_SETTLE_MS, number))
            elif item is not None:
                self._fail(item, self._late(item), out)

    def close(self, out: list[Effect]) -> None:
        """Fail everything that has had no last word."""
        for item in list(self._items.values()):
            doubt = item.doubtful or item.frame
            text = "the receiver was closed before the broker answered"
            self._fail(item, OutcomeUnknown(text) if doubt else ClientClosed(text), out)
        self._frames.clear()

    # -- what to do --------------------------------------------------------------------------------

    def send(self, now_ms: int, out: list[Effect]) -> None:
        """Put what is due into frames."""
        if not self._unsent:
            return
        due = [item for item in self._unsent if item.retry_at_ms <= now_ms]
        self._unsent = [item for item in self._unsent if item.retry_at_ms > now_ms]
        by_broker: dict[int, list[Item]] = {}
        for item in due:
            broker = self._broker_of(item.settle.lease.key)
            if broker is None:
                self._fail(item, UnknownTopic("the topic was deleted"), out)
            elif broker == NO_BROKER:
                self._again(item, PrimaryNotAvailable("the partition has no primary at the moment"), now_ms, out)
            else:
                by_broker.setdefault(broker, []).append(item)
        for broker, items in by_broker.items():
            if self._hold(broker, items, now_ms):
                continue
            chunk: list[Item] = []
            size = 0
            for item in items:
                wants = _size(item.settle)
                if chunk and size + wants > FRAME_BYTES:
                    self._send(broker, chunk, now_ms, out)
                    chunk, size = [], 0
                chunk.append(item)
                size += wants
            self._send(broker, chunk, now_ms, out)

    def _hold(self, broker: int, items: list[Item], now_ms: int) -> bool:
        """Whether these wait: for the answer to the acknowledgements before them, or for others. If not, what waits
        goes along."""
        sent = self._acking.get(broker)
        until_ms = sent[1] + HOLD_MS if sent is not None else 0
        if sent is None and not self._unsent and not any(item.linger_ms for item in items):
            return False  # the common case: nothing is on its way, and nothing waits
        waiting = [item for item in self._unsent if item.held and item.broker == broker]
        may_wait = all(max(until_ms, item.linger_ms) > now_ms and _is_plain(item) for item in items)
        few = sum(len(item.settle.indexes) for item in (*waiting, *items)) < HOLD_RECORDS
        if may_wait and few:
            for item in items:
                item.held, item.broker, item.retry_at_ms = True, broker, max(until_ms, item.linger_ms)
            self._unsent += items
            return True
        if waiting:
            self._unsent = [item for item in self._unsent if item not in waiting]
            items[:0] = waiting
        return False

    def _send(self, broker: int, items: list[Item], now_ms: int, out: list[Effect]) -> None:
        self._last_frame += 1
        for item in items:
            item.frame = self._last_frame
            item.broker = broker
            item.held = False
            item.sent_ms = now_ms
        patient = all(item.linger_ms and _is_plain(item) for item in items)
        if not patient and any(item.settle.action == ACK for item in items):
            self._acking[broker] = (self._last_frame, now_ms)
        self._frames[self._last_frame] = items
        out.append(SendSettle(broker, self._last_frame, [_entry(item.settle) for item in items], patient))

    # -- outcomes ----------------------------------------------------------------------------------

    def _done(self, item: Item, result: SettleResult, out: list[Effect]) -> None:
        settle = item.settle
        lease, table = settle.lease, self._table
        del self._items[settle.number]
        item.frame = 0  # an older frame may still hold it
        lost: list[int] = []
        if settle.action == EXTEND:
            gone = {*result.stale, *result.settled}
            lost = [index for index in settle.indexes if lease.offsets[index] in gone]
            for index in lost:
                table.lose(lease, index)
            if len(lost) < len(settle.indexes):
                lease.prolong(item.sent_ms, settle.delay_ms if settle.delay_ms >= 0 else lease.lease_ms)
        else:
            missed = set(result.stale) if settle.action == ACK else {*result.stale, *result.settled}
            if item.doubtful and settle.action != ACK:
                missed = set()  # the first copy may have done it, and others went on from there
            if missed:
                lost = [index for index in settle.indexes if lease.offsets[index] in missed]
                for index in settle.indexes:
                    table.end(lease, index, LOST if lease.offsets[index] in missed else SETTLED)
            else:
                table.end_all(lease, settle.indexes, SETTLED)
        if settle.number > 0:
            out.append(Settled(settle.number, lost))

    def _again(self, item: Item, error: FerrylineError, now_ms: int, out: list[Effect]) -> None:
        item.frame = 0
        item.held = False
        item.cause = error
        item.doubtful = item.doubtful or not error.definite
        if error.refresh_metadata:
            out.append(RefreshMetadata())
        if error.retriable or error.refresh_metadata:
            item.failures += 1
            item.retry_at_ms = now_ms + self._backoff.pause_ms(item.failures, self._jitter.next(), error)
            self._unsent.append(item)
        else:
            self._fail(item, error, out)

    def _late(self, item: Item) -> FerrylineError:
        cause = f"; last error: {item.cause}" if item.cause is not None else ""
        if item.doubtful or item.frame:
            return OutcomeUnknown(f"no broker has answered for the record by the end of its lease{cause}")
        return DeadlineExceeded(f"the record could not be settled by the end of its lease{cause}")

    def _fail(self, item: Item, error: FerrylineError, out: list[Effect]) -> None:
        settle = item.settle
        del self._items[settle.number]
        item.frame = 0
        if item in self._unsent:
            self._unsent.remove(item)
        if settle.action != EXTEND:
            for index in settle.indexes:
                self._table.end(settle.lease, index, LOST)
        if settle.number > 0:
            out.append(Settled(settle.number, error=error))


def _is_plain(item: Item) -> bool:
    """An acknowledgement that was never sent."""
    return item.settle.action == ACK and not item.failures and not item.doubtful


def _size(settle: Settle) -> int:
    return _ENTRY_BYTES + _OFFSET_BYTES * len(settle.indexes) + 4 * (len(settle.reason) + len(settle.detail))


def _entry(settle: Settle) -> SettleEntry:
    lease = settle.lease
    offsets = [lease.offsets[index] for index in settle.indexes]
    return SettleEntry(
        lease.key[0], lease.key[1], lease.epoch, lease.number, lease.receipt, settle.action, offsets, settle.delay_ms,
        settle.reason, settle.detail,
    )  # fmt: skip
