"""What happens to the queues of a partition, and what they want done. See `events.py` for the rules of both.

Times in ms. ``token`` is answered exactly once: by AnswerLease, AnswerSettle or AnswerQueue, or by `Refuse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ferryline_broker.core.events import Effect, Event

DONE, UNKNOWN_PRODUCER = "done", "unknown_producer"  # outcomes of a move to the dead letters


# -- events -----------------------------------------------------------------------------------------


class LeaseAsked(Event, frozen=True):
    """A receiver wants up to ``records_max`` records, now: what is not there is not waited for.

    An answer without records is given at once; the effect WakeReceivers says when it is worth asking again. ``strict``:
    by priority alone, and nothing before every record below ``seen`` has been looked at. ``stands``: whoever asks waits
    for more also when he is given something now.
    """

    token: int
    group: str
    member: str
    ordering: str
    start: str
    lease_ms: int
    records_max: int
    bytes_max: int
    timeout_ms: int = 30_000
    strict: bool = False
    seen: int = 0
    stands: bool = False


class SettleItem(msgspec.Struct, frozen=True, gc=False):
    """Some offsets of one lease; the receipt was checked. See `SettleEntry` of the protocol."""

    epoch: int
    lease: int
    action: str
    offsets: list[int]
    delay_ms: int = -1
    reason: str = ""
    detail: str = ""


class SettleAsked(Event, frozen=True):
    """All that one frame settles in this partition. ``patient``: its answer may wait for what is appended next."""

    token: int
    group: str
    member: str
    items: list[SettleItem]
    timeout_ms: int = 30_000
    patient: bool = False

    def story(self) -> Any:
        return (
            "SettleAsked",
            self.token,
            self.group,
            self.member,
            [(i.lease, i.action, len(i.offsets)) for i in self.items],
        )


class KeepAsked(Event, frozen=True):
    """``leases`` is all that the member holds here: what else is leased to it is free."""

    token: int
    group: str
    member: str
    leases: list[int]
    timeout_ms: int = 30_000


class QueueAsked(Event, frozen=True):
    """Look at a queue, or change it as a whole. See `QueueAsk` of the protocol."""

    token: int
    group: str
    op: str
    offset: int = -1
    count: int = 100
    lane: bytes | None = None
    reason: str = ""
    dry_run: bool = False
    timeout_ms: int = 30_000


class Scanned(msgspec.Struct, frozen=True, gc=False):
    """What a queue must know of a record. ``due_ms`` and ``expires_ms`` are on the broker's clock, 0: none."""

    offset: int
    lane: bytes | None
    priority: int = 4
    due_ms: int = 0
    expires_ms: int = 0
    id: bytes = b""


class ScannedBatch(msgspec.Struct, frozen=True, gc=False):
    """Records in a row, from ``offset`` on, of which there is nothing to know but their lanes."""

    offset: int
    lanes: list[bytes | None]

    def singly(self) -> list[Scanned]:
        return [Scanned(self.offset + at, lane) for at, lane in enumerate(self.lanes)]


class WindowRead(Event, frozen=True):
    """Answer to ReadWindow: the records of [offset, next_offset), control records left out. ``size``: their bytes.
    ``ahead``: as in the question."""

    group: str
    offset: int
    next_offset: int
    records: Sequence[Scanned | ScannedBatch]
    size: int = 0
    ahead: bool = False

    @property
    def plain(self) -> bool:
        """All there is to say of these records is that they are there: none is settled by looking at it, as where an id
        comes again, the time is over, or no record is."""
        records = self.records
        count = sum(len(one.lanes) if isinstance(one, ScannedBatch) else 1 for one in records)
        whole = count == self.next_offset - self.offset and bool(records) and records[0].offset == self.offset
        return whole and not any(isinstance(one, Scanned) and (one.id or one.expires_ms) for one in records)

    def story(self) -> Any:
        return ("WindowRead", self.group, self.offset, self.next_offset, len(self.records))


class DeadMoved(Event, frozen=True):
    """The copy of a dead record is committed at its target (DONE), or the target does not know the producer any more
    (UNKNOWN_PRODUCER) and it must be sent under the next producer epoch."""

    group: str
    offset: int
    sequence: int
    outcome: str = DONE


# -- effects ----------------------------------------------------------------------------------------


class AnswerLease(Effect, frozen=True):
    """``attempts[i]`` is how often ``offsets[i]`` has been leased, this time included. No offsets: nothing is ready.
    ``contended``: see `Window.contended`."""

    token: int
    epoch: int = 0
    lease: int = 0
    lease_ms: int = 0
    offsets: list[int] = []
    attempts: list[int] = []
    contended: bool = False


class AnswerSettle(Effect, frozen=True):
    """For each item: offsets that were leased again or given up since, such as were settled before, and how long its
    lease had lasted until now, -1 where it is over."""

    token: int
    stale: list[list[int]]
    settled: list[list[int]]
    held_ms: list[int] = []


class AnswerQueue(Effect, frozen=True):
    token: int
    details: dict[str, Any]


class ReadWindow(Effect, frozen=True):
    """Read records from ``offset`` on, below ``below``, about ``bytes_max`` of them; report WindowRead soon, so that
    other work gets its turn between two of them. A failed read is reported as one that read nothing.

    ``ahead``: these are not committed; report WindowRead as soon as the effects of this event are carried out."""

    group: str
    offset: int
    below: int
    bytes_max: int
    ahead: bool = False


class WakeReceivers(Effect, frozen=True):
    """``ready`` records of the group can be leased: somebody who waits may ask again."""

    group: str
    ready: int


class MoveDead(Effect, frozen=True):
    """Copy the record at ``offset`` to the dead letters, with exactly this producer epoch and sequence, until it is
    committed there; then report DeadMoved. The same may be asked for again by the next primary."""

    group: str
    offset: int
    producer_epoch: int
    sequence: int
    attempts: int
    reason: str
    history: list[tuple[int, str, str]]  # (attempt, reason, detail), oldest first
