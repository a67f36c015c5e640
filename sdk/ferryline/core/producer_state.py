"""What the producer core remembers of partitions and their unsettled batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ferryline.core.producer_events import PartitionKey
from ferryline.protocol.errors import DeadlineExceeded, FerrylineError, OutcomeUnknown, UnknownTopic
from ferryline.protocol.limits import IN_FLIGHT_MAX
from ferryline.protocol.metadata import NO_BROKER

NEVER = 2**62


class BatchState:
    """One closed batch until its last word.

    Invariants: awaited != 0 implies awaited in doubtful; ordinal < 0 implies clean.
    """

    __slots__ = ("answer_by_ms", "awaited", "deadline_ms", "doubtful", "error", "headmost", "number", "ordinal",
                 "partitions", "records", "sequence")  # fmt: skip

    def __init__(self, number: int, records: int, deadline_ms: int, partitions: int) -> None:
        self.number = number
        self.records = records
        self.deadline_ms = deadline_ms
        self.partitions = partitions
        self.ordinal = -1  # under the present pepoch, one per batch; -1: no identity yet
        self.sequence = -1  # on the wire: of its first record
        self.awaited = 0  # attempt whose answer we wait for; 0: none
        self.answer_by_ms = 0
        self.headmost = False  # the awaited attempt was sent as the lowest unsettled of its partition
        self.doubtful: set[int] = set()  # attempts that may have been applied
        self.error: FerrylineError | None = None  # the last one, told with the deadline

    @property
    def clean(self) -> bool:
        return not self.doubtful


class PartitionState:
    """Sending state of one partition. ``queue`` holds its unsettled batches in the order in which they were closed.

    Invariants: batches with an ordinal come before those without; ordinals rise along the queue; all lie in
    [lowest unsettled, lowest unsettled + IN_FLIGHT_MAX).
    """

    __slots__ = ("armed_ms", "blocked_until_ms", "broker", "bumping", "epoch", "failures", "gone", "key",
                 "next_ordinal", "next_sequence", "partitions", "pepoch", "pid", "queue", "window")  # fmt: skip

    def __init__(self, key: PartitionKey, pid: int) -> None:
        self.key = key
        self.pid = pid
        self.pepoch = 0
        self.next_ordinal = 0
        self.next_sequence = 0
        self.partitions = 0  # of the topic, as far as known
        self.broker = NO_BROKER
        self.epoch = -1
        self.gone = False
        self.bumping = False  # settle what is in doubt, then raise pepoch
        self.failures = 0  # rounds without success since the last acknowledgement
        self.blocked_until_ms = 0  # 0: not held back
        self.window = (
            IN_FLIGHT_MAX  # batches from the head of the queue on that may be sent; IN_FLIGHT_MAX: all of them
        )
        self.queue: deque[BatchState] = deque()
        self.armed_ms = NEVER  # earliest wake-up that stands in the heap

    def wake_ms(self) -> int:
        """When time alone may change something here."""
        if not self.queue:
            return NEVER
        wake = self.queue[0].deadline_ms
        for batch in self.queue:
            if batch.awaited and batch.answer_by_ms < wake:
                wake = batch.answer_by_ms
            if batch.ordinal < 0:
                break
        if self.blocked_until_ms:
            wake = min(wake, self.blocked_until_ms)
        return wake

    @property
    def narrow(self) -> bool:
        """Whether ``window`` counts: not while what is in doubt must be settled, wherever in the queue it is."""
        return self.window < IN_FLIGHT_MAX and not self.bumping

    def numbered(self) -> Iterator[BatchState]:
        """The batches that have an identity, in order."""
        for batch in self.queue:
            if batch.ordinal < 0:
                return
            yield batch


def gone_error(key: PartitionKey) -> FerrylineError:
    """What a batch for a deleted topic fails with."""
    return UnknownTopic(f"topic {key[0]} was deleted", topic_id=key[0], partition=key[1])


def deadline_error(key: PartitionKey, batch: BatchState) -> FerrylineError:
    """What a batch fails with at its deadline: surely not stored if it is clean, else unknown. Tells the last cause."""
    cause = f"; last error: {batch.error}" if batch.error else ""
    where = f"partition {key[1]} of topic {key[0]}"
    if batch.clean:
        error: FerrylineError = DeadlineExceeded(f"not delivered to {where} before the deadline{cause}")
    else:
        error = OutcomeUnknown(f"no acknowledgement from {where} before the deadline{cause}")
    error.__cause__ = batch.error
    return error
