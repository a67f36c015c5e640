"""Decide what an idempotent producer sends, when, and what became of it. Pure: no I/O, no clock, no randomness.

The core knows batches by a number; the driver keeps their bytes and futures. It gives every batch of a partition an
identity ``(pid, pepoch, sequence)`` when the batch is first sent and keeps it for every retry, so that a broker can
tell a repeat from a new batch.

Rules (replication rules, section 10):

* **Order.** Batches of a partition are sent in the order in which they were closed. No batch is sent while an earlier
  one of its partition is neither settled nor on its way.
* **Window.** ordinal < lowest unsettled ordinal + IN_FLIGHT_MAX, where ordinals count the batches of a pepoch.
  Counting unsettled batches instead would let a batch whose earliest neighbour is unsettled fall out of the last five
  that a broker remembers. On the wire a sequence counts records and wraps at 2^31, as in Kafka.
* **Doubt.** An attempt is in doubt from the moment it is handed to the transport until a *definite* refusal of exactly
  that attempt arrives. A batch without doubtful attempts was surely not applied (`clean`). A definite refusal ends a
  batch only if it is clean; otherwise it is tried again with the same identity until its deadline and then fails with
  OutcomeUnknown.
* **Bump.** When a batch that had an identity leaves without an acknowledgement, its number is a gap that the broker
  will not step over. Everything in doubt is settled first, then pepoch rises by one and what is left is numbered from
  0. The identity of one batch is never given to another.
* **Told to wait.** Until the time that a service told nothing is sent, then one batch, and one more with each that is
  acknowledged: what would be refused anyway is not sent over and over.
* A session delivers a frame at most once and in order (TLS over TCP); two sessions may overtake each other.

pepoch and sequence belong to one partition; brokers keep them per partition too.
"""

from __future__ import annotations

import heapq
from collections import deque
from itertools import islice

from ferryline.core.producer_events import (
    BatchAnswered,
    BatchClosed,
    Closed,
    CompleteBatch,
    Effect,
    Event,
    FailBatch,
    PartitionKey,
    RefreshMetadata,
    RepartitionBatch,
    RouteChanged,
    SendBatch,
    SessionLost,
    TimePassed,
)
from ferryline.core.producer_state import NEVER, BatchState, PartitionState, deadline_error, gone_error
from ferryline.core.retry import Backoff, Jitter, told_ms
from ferryline.protocol.errors import (
    ClientClosed,
    FerrylineError,
    NotPrimary,
    OutcomeUnknown,
    OutOfOrderSequence,
    UnknownProducer,
)
from ferryline.protocol.limits import IN_FLIGHT_MAX
from ferryline.protocol.metadata import NO_BROKER

__all__ = [
    "BatchAnswered", "BatchClosed", "Closed", "CompleteBatch", "Effect", "Event", "FailBatch", "PartitionKey",
    "ProducerCore", "RefreshMetadata", "RepartitionBatch", "RouteChanged", "SendBatch", "SessionLost", "TimePassed",
]  # fmt: skip

PARTIAL_IN_FLIGHT = 1  # more small ones cost brokers a third more CPU for each record: a flush, frames, a wake-up
PEPOCH_MAX = 2**15 - 1  # i16 in the batch header
SEQUENCE_WRAP = 2**31  # i32 in the batch header
PID_BITS = 63


class ProducerCore:
    """Sequencing, retries and settlement for one producer over all its partitions.

    ``pid``: 63 random bits. ``request_timeout_ms`` bounds one attempt, the deadline of a batch bounds all of them.
    Every batch that entered leaves by exactly one CompleteBatch, FailBatch or RepartitionBatch.
    """

    def __init__(
        self,
        pid: int,
        *,
        request_timeout_ms: int = 30_000,
        partial_in_flight: int = PARTIAL_IN_FLIGHT,
        backoff: Backoff | None = None,
        history: int = 64,
    ) -> None:
        assert 0 <= pid < 2**PID_BITS, pid
        self.pid = pid
        self.request_timeout_ms = request_timeout_ms
        self.partial_in_flight = partial_in_flight
        self.backoff = backoff or Backoff()
        self.history: deque[tuple[int, Event]] = deque(maxlen=history)  # shown with a failed assertion
        self._jitter = Jitter(pid)
        self._partitions: dict[PartitionKey, PartitionState] = {}
        self._timers: list[tuple[int, PartitionKey]] = []
        self._attempts = 0
        self._closed = False

    # -- questions ---------------------------------------------------------------------------------

    def room(self, key: PartitionKey) -> bool:
        """Whether a batch that is not full should be closed now. Otherwise letting it grow costs next to no time.

        Full batches do not ask. Under load this makes batches as large as the way to the acknowledgement is long.
        """
        partition = self._partitions.get(key)
        return partition is None or (len(partition.queue) < self.partial_in_flight and not partition.bumping)

    def unsettled(self) -> int:
        return sum(len(partition.queue) for partition in self._partitions.values())

    def next_deadline_ms(self) -> int | None:
        """When to hand in TimePassed next; None: only other events can change anything."""
        timers = self._timers
        while timers:
            wake_ms, key = timers[0]
            if self._partitions[key].armed_ms == wake_ms:
                return wake_ms
            heapq.heappop(timers)  # another, earlier entry has taken its place
        return None

    # -- events ------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        """The one way in: take an event, return what to do, in order."""
        self.history.append((now_ms, event))
        out: list[Effect] = []
        try:
            if isinstance(event, BatchAnswered):
                self._answered(event, now_ms, out)
            elif isinstance(event, BatchClosed):
                self._batch_closed(event, now_ms, out)
            elif isinstance(event, TimePassed):
                self._time_passed(now_ms, out)
            elif isinstance(event, RouteChanged):
                self._route_changed(event, now_ms, out)
            elif isinstance(event, SessionLost):
                self._session_lost(event.broker, now_ms, out)
            elif isinstance(event, Closed):
                self._close(out)
            else:
                raise TypeError(f"unknown event {event!r}")
        except AssertionError as failed:
            story = "\n".join(f"{at} {past!r}" for at, past in self.history)
            raise AssertionError(f"{failed}\nlast events:\n{story}") from failed
        return out

    def _batch_closed(self, event: BatchClosed, now_ms: int, out: list[Effect]) -> None:
        if self._closed:
            out.append(FailBatch(event.key, event.batch, ClientClosed("the producer is closed")))
            return
        partition = self._partition(event.key)
        if partition.gone:
            out.append(FailBatch(event.key, event.batch, gone_error(event.key)))
            return
        deadline_ms = event.deadline_ms
        if partition.queue:  # a deadline earlier than its predecessor's could not be seen from the head of the queue
            deadline_ms = max(deadline_ms, partition.queue[-1].deadline_ms)
        partition.queue.append(BatchState(event.batch, event.records, deadline_ms, event.partitions))
        self._pump(partition, now_ms, out)

    def _answered(self, event: BatchAnswered, now_ms: int, out: list[Effect]) -> None:
        partition = self._partitions.get(event.key)
        if partition is None:
            return
        batch = next((b for b in partition.queue if b.number == event.batch), None)
        if batch is None or event.attempt not in batch.doubtful:
            return  # settled meanwhile, or an answer that came twice
        awaited = batch.awaited == event.attempt
        if awaited:
            batch.awaited = 0
        if event.error is None:
            partition.queue.remove(batch)
            partition.failures = 0
            if not partition.narrow:
                partition.blocked_until_ms = 0
            partition.window = min(IN_FLIGHT_MAX, partition.window + 1)
            out.append(CompleteBatch(event.key, batch.number, event.base_offset))
        else:
            self._refused(partition, batch, event, awaited, now_ms, out)
        self._pump(partition, now_ms, out)

    def _refused(
        self,
        partition: PartitionState,
        batch: BatchState,
        event: BatchAnswered,
        awaited: bool,
        now_ms: int,
        out: list[Effect],
    ) -> None:
        error = event.error
        assert error is not None
        batch.error = error
        if error.definite:
            batch.doubtful.discard(event.attempt)
        if isinstance(error, NotPrimary) and self._heed_hint(partition, error):
            return
        if isinstance(error, OutOfOrderSequence) and not batch.headmost:
            # An earlier batch of the same round was refused; this one only has to follow it once more.
            if awaited:
                self._hold_back(partition, error, now_ms, out)
        elif batch.clean and isinstance(error, (OutOfOrderSequence, UnknownProducer)):
            # The broker does not know what it had acknowledged before (unclean recovery, expiry): begin anew.
            partition.bumping = True
            self._hold_back(partition, error, now_ms, out)
        elif batch.clean and (partition.gone or not (error.retriable or error.refresh_metadata)):
            self._remove(partition, batch)
            out.append(FailBatch(event.key, batch.number, error))
        elif awaited:
            self._hold_back(partition, error, now_ms, out)

    def _session_lost(self, broker: int, now_ms: int, out: list[Effect]) -> None:
        for partition in self._partitions.values():
            if partition.broker == broker and any(batch.awaited for batch in partition.queue):
                for batch in partition.queue:
                    batch.awaited = 0
                self._hold_back(partition, None, now_ms, out)
                self._pump(partition, now_ms, out)

    def _route_changed(self, event: RouteChanged, now_ms: int, out: list[Effect]) -> None:
        partition = self._partition(event.key)
        if event.gone:
            partition.gone = True
            for batch in [b for b in partition.queue if b.clean]:
                self._remove(partition, batch)
                out.append(FailBatch(event.key, batch.number, gone_error(event.key)))
            self._pump(partition, now_ms, out)
            return
        if event.partitions > partition.partitions:
            partition.partitions = event.partitions
            self._pump(partition, now_ms, out)
        if event.epoch < partition.epoch or (event.broker, event.epoch) == (partition.broker, partition.epoch):
            return
        self._retarget(partition, event.broker, event.epoch)
        self._pump(partition, now_ms, out)

    def _retarget(self, partition: PartitionState, broker: int, epoch: int) -> None:
        """A new primaryship: do not wait for the old one, which may be paused for minutes. Its attempts stay doubtful,
        and the same identity is sent to the new primary in order."""
        partition.broker = broker
        partition.epoch = epoch
        partition.gone = False
        partition.failures = 0
        partition.blocked_until_ms = 0
        for batch in partition.queue:
            batch.awaited = 0

    def _heed_hint(self, partition: PartitionState, error: FerrylineError) -> bool:
        """A refusal may name the primary of a later epoch: use it without waiting for metadata."""
        broker, epoch = error.details.get("primary"), error.details.get("epoch")
        if isinstance(broker, int) and isinstance(epoch, int) and broker != NO_BROKER and epoch > partition.epoch:
            self._retarget(partition, broker, epoch)
            return True
        return False

    def _time_passed(self, now_ms: int, out: list[Effect]) -> None:
        timers = self._timers
        while timers and timers[0][0] <= now_ms:
            wake_ms, key = heapq.heappop(timers)
            partition = self._partitions[key]
            if partition.armed_ms != wake_ms:
                continue
            partition.armed_ms = NEVER
            self._expire(partition, now_ms, out)
            self._pump(partition, now_ms, out)

    def _expire(self, partition: PartitionState, now_ms: int, out: list[Effect]) -> None:
        queue = partition.queue
        while queue and queue[0].deadline_ms <= now_ms:
            batch = queue[0]
            self._remove(partition, batch)
            out.append(FailBatch(partition.key, batch.number, deadline_error(partition.key, batch)))
        overdue = [batch for batch in queue if batch.awaited and batch.answer_by_ms <= now_ms]
        for batch in overdue:
            batch.awaited = 0  # still doubtful
        if overdue:
            self._hold_back(partition, None, now_ms, out)

    def _close(self, out: list[Effect]) -> None:
        self._closed = True
        for partition in self._partitions.values():
            while partition.queue:
                batch = partition.queue.popleft()
                error: FerrylineError = ClientClosed("the producer was closed before this record was sent")
                if not batch.clean:
                    error = OutcomeUnknown("the producer was closed before this record was acknowledged")
                out.append(FailBatch(partition.key, batch.number, error))

    # -- sending -----------------------------------------------------------------------------------

    def _pump(self, partition: PartitionState, now_ms: int, out: list[Effect]) -> None:
        """Send what may be sent, in order, and arm the timer."""
        self._give_back(partition, out)
        if partition.bumping and all(batch.clean for batch in partition.numbered()):
            self._bump(partition)
        if now_ms >= partition.blocked_until_ms:
            partition.blocked_until_ms = 0
            if partition.queue and partition.broker == NO_BROKER:
                self._hold_back(partition, None, now_ms, out)
            elif partition.queue:
                self._send_due(partition, now_ms, out)
        wake_ms = partition.wake_ms()
        if wake_ms < partition.armed_ms:
            partition.armed_ms = wake_ms
            heapq.heappush(self._timers, (wake_ms, partition.key))

    def _give_back(self, partition: PartitionState, out: list[Effect]) -> None:
        """Hand back what was hashed with another partition count, while nothing before it is in doubt."""
        queue = partition.queue
        while queue and queue[0].clean and 0 < queue[0].partitions < partition.partitions:
            batch = queue[0]
            self._remove(partition, batch)
            out.append(RepartitionBatch(partition.key, batch.number))

    def _send_due(self, partition: PartitionState, now_ms: int, out: list[Effect]) -> None:
        lowest = partition.queue[0].ordinal
        for batch in islice(partition.queue, partition.window if partition.narrow else None):
            if batch.ordinal < 0:
                if partition.bumping or (lowest >= 0 and partition.next_ordinal >= lowest + IN_FLIGHT_MAX):
                    return
                batch.ordinal = partition.next_ordinal
                batch.sequence = partition.next_sequence
                partition.next_ordinal += 1
                partition.next_sequence = (partition.next_sequence + batch.records) % SEQUENCE_WRAP
                if lowest < 0:
                    lowest = batch.ordinal
            assert batch.ordinal < lowest + IN_FLIGHT_MAX, (partition.key, batch.ordinal, lowest)
            if not batch.awaited and not (partition.bumping and batch.clean):
                self._send(partition, batch, now_ms, out, headmost=batch.ordinal == lowest)

    def _send(
        self, partition: PartitionState, batch: BatchState, now_ms: int, out: list[Effect], *, headmost: bool
    ) -> None:
        self._attempts += 1
        batch.awaited = self._attempts
        batch.doubtful.add(self._attempts)
        batch.headmost = headmost
        timeout_ms = max(1, min(self.request_timeout_ms, batch.deadline_ms - now_ms))
        batch.answer_by_ms = now_ms + timeout_ms
        out.append(
            SendBatch(
                partition.key,
                batch.number,
                self._attempts,
                partition.broker,
                partition.pid,
                partition.pepoch,
                batch.sequence,
                timeout_ms,
            )
        )

    def _hold_back(
        self, partition: PartitionState, error: FerrylineError | None, now_ms: int, out: list[Effect]
    ) -> None:
        """Wait a little before the next round. Several refusals of one round count once."""
        if now_ms < partition.blocked_until_ms:
            return
        partition.failures += 1
        partition.blocked_until_ms = now_ms + self.backoff.pause_ms(partition.failures, self._jitter.next(), error)
        if told_ms(error):
            partition.window = 1
        if error is None or error.refresh_metadata:
            out.append(RefreshMetadata())

    def _remove(self, partition: PartitionState, batch: BatchState) -> None:
        partition.queue.remove(batch)
        if batch.ordinal >= 0:
            partition.bumping = True  # its number is a gap now

    def _bump(self, partition: PartitionState) -> None:
        """A new pepoch, under which nothing is in doubt: what is left is numbered from 0."""
        assert all(batch.clean and not batch.awaited for batch in partition.queue), partition.key
        partition.bumping = False
        partition.pepoch += 1
        if partition.pepoch > PEPOCH_MAX:  # an unknown pid at sequence 0 is always welcome
            partition.pid = Jitter(partition.pid).next_bits() >> (64 - PID_BITS)
            partition.pepoch = 0
        partition.next_ordinal = 0
        partition.next_sequence = 0
        for batch in partition.queue:
            batch.ordinal = batch.sequence = -1

    def _partition(self, key: PartitionKey) -> PartitionState:
        partition = self._partitions.get(key)
        if partition is None:
            partition = self._partitions[key] = PartitionState(key, self.pid)
        return partition
