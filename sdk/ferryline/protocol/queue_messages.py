"""Headers of the frames by which queues are read: receive, settle, inspect. See docs/queues.md for what they mean.

A *receiver* leases records of a group in any number of partitions and settles each. ``lease`` numbers what was leased
together in one partition; with ``receipt`` (a MAC over topic, partition, group, member, epoch and lease) it names it.
"""

from __future__ import annotations

from typing import Any

from ferryline.protocol.errors import ErrorInfo
from ferryline.protocol.messages import Message

ORDER_KEY, ORDER_PARTITION, ORDER_NONE = "key", "partition", "none"
ORDERINGS = (ORDER_KEY, ORDER_PARTITION, ORDER_NONE)

ACK, NACK, REJECT, RELEASE, EXTEND = "ack", "nack", "reject", "release", "extend"
ACTIONS = (ACK, NACK, REJECT, RELEASE, EXTEND)

# Headers of records that queues look at. Values are ASCII digits, but for the id.
HEADER_PRIORITY = "fl-priority"  # 0..9, the highest first; 4 when there is none
HEADER_DELIVER_AT = "fl-deliver-at"  # ms since the Unix epoch: not before
HEADER_EXPIRES_AT = "fl-expires-at"  # ms since the Unix epoch: not after
HEADER_ID = "fl-id"  # the same id again within the dedupe window is not delivered again
PRIORITIES = 10
PRIORITY_DEFAULT = 4


class Receive(Message):
    """Lease up to ``records_max`` records of ``entries`` (topic_id, partition); parks up to ``wait_ms`` for the first.
    A later one of the same member on the same session takes its place.

    ``ordering`` is a property of the group in a partition: the first receiver sets it, others must say the same.
    ``start`` ("start" or "end") is where a group begins that has never received here. ``strict``: the highest priority
    first of all that is committed; otherwise a record that has waited for 10 s goes before higher ones that have not,
    and what was committed last may not have been looked at yet. ``batches``: a delivery may be several batches.
    ``standing``: it may be answered more than once, and stays open until FLAG_MORE is not set; what is given counts
    against ``records_max`` and ``bytes_max`` all the same.
    """

    group: str
    member: str
    entries: list[tuple[str, int]]
    records_max: int = 100
    bytes_max: int = 4 * 1024 * 1024
    lease_ms: int = 30_000
    wait_ms: int = 0
    ordering: str = ORDER_KEY
    start: str = "start"
    strict: bool = False
    batches: bool = False
    standing: bool = False


class Delivery(Message):
    """What was leased in one partition, together. Payload: one batch with exactly these records, in this order, or, if
    the receiver said ``batches``, several with these one after the other.

    The offsets of its records are in ``offsets`` (those in the batches say where in the delivery they stand);
    ``attempts`` says for each how often it has been leased, this time included. ``contended``: records of one of their
    lanes wait, or have waited, for an acknowledgement. With ``error`` everything else is empty.
    """

    topic_id: str
    partition: int
    epoch: int = 0
    lease: int = 0
    receipt: bytes = b""
    lease_ms: int = 0
    offsets: list[int] = []
    attempts: list[int] = []
    size: int = 0
    error: ErrorInfo | None = None
    contended: bool = False


class ReceiveAnswer(Message):
    """``deliveries`` is empty when ``wait_ms`` passed and there was nothing."""

    deliveries: list[Delivery]


class SettleEntry(Message):
    """What became of ``offsets`` of one lease.

    ack: done. nack: again, after ``delay_ms`` (-1: the topic's retry policy). reject: never again, to the dead letters
    or parked. release: given back unread, the attempt does not count. extend: the lease is good for ``delay_ms`` from
    now (-1: as long as when it was taken). ``reason`` and ``detail`` (exception, traceback) of a nack or reject stay
    with the record.
    """

    topic_id: str
    partition: int
    epoch: int
    lease: int
    receipt: bytes
    action: str
    offsets: list[int]
    delay_ms: int = -1
    reason: str = ""
    detail: str = ""


class Settle(Message):
    """Answered when all of it is committed. ``patient``: nobody waits for that, so it may take a moment longer, and be
    committed together with what comes next."""

    group: str
    member: str
    entries: list[SettleEntry]
    patient: bool = False


class SettleResult(Message):
    """Outcome of entry ``index``. ``stale``: leased by somebody else since, or given up: nothing was done for these.

    ``settled``: these were settled before (perhaps by a first copy of this request). All others were done.
    """

    index: int
    stale: list[int] = []
    settled: list[int] = []
    error: ErrorInfo | None = None


class SettleAnswer(Message):
    results: list[SettleResult]


class KeepEntry(Message):
    """The leases that a member still holds in one partition."""

    topic_id: str
    partition: int
    leases: list[int]


class Keep(Message):
    """What the member holds, all of it: everything else that is leased to it in these partitions is free at once.

    Sent when a receiver meets a new primary or a new session (what was leased to it and never arrived comes back), and
    with no leases when it closes. What it asked there before and waits for is answered. Answered with a `SettleAnswer`
    when committed.
    """

    group: str
    member: str
    entries: list[KeepEntry]


class QueueAsk(Message):
    """Look at, or change, a queue as a whole, in each of ``entries``.

    ``op``: stats | peek | explain | pause | resume | purge | redrive | delete, or groups: the names of all queue groups
    here, whatever ``group`` says. ``offset`` and ``count`` bound peek, explain and redrive; ``key`` and ``reason``
    choose what redrive takes; with ``dry_run`` nothing is changed.
    """

    group: str
    op: str
    entries: list[tuple[str, int]]
    offset: int = -1
    count: int = 100
    key: bytes | None = None
    reason: str = ""
    dry_run: bool = False


class QueueResult(Message):
    """``details`` holds JSON values; which, docs/queues.md says by ``op``. Peek has payload: one batch."""

    topic_id: str
    partition: int
    details: dict[str, Any] = {}
    size: int = 0
    error: ErrorInfo | None = None


class QueueAnswer(Message):
    results: list[QueueResult]
