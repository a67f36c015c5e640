"""Entries of the state log that are about queues, and the rows of its snapshots.

Offsets travel as a first one and distances (`packed`): 1 or 2 bytes each. ``record_epoch`` is the epoch of the highest
record that an entry names: at replay an entry counts only if that record is in the record log with that epoch.
"""

from __future__ import annotations

from itertools import accumulate
from operator import sub

import msgspec

ACKED, EXPIRED, COPIED, DUPLICATE = "acked", "expired", "copied", "duplicate"
NACKED, LEASE_ENDED, GIVEN_BACK = "nacked", "lease ended", "given back"


class QueueEntry(msgspec.Struct, array_like=True, frozen=True):
    """Base of all entries about a queue."""


class Opened(QueueEntry, frozen=True, tag=10):
    """The first receiver of the group in this partition. ``record_epoch``: of the record before ``start``, -1: none."""

    group: str
    ordering: str
    start: int
    record_epoch: int


class Leased(QueueEntry, frozen=True, tag=11):
    """``offsets`` are with ``member``. ``epoch`` and ``lease`` name the lease: a number may come back in a later epoch,
    after a power cut took its entry."""

    group: str
    epoch: int
    lease: int
    member: str
    lease_ms: int
    offsets: list[int]  # packed
    record_epoch: int


class Settled(QueueEntry, frozen=True, tag=12):
    """Terminal. ``why``: ACKED, EXPIRED, COPIED (to the dead letters), or DUPLICATE (its id was there before)."""

    group: str
    why: str
    offsets: list[int]  # packed
    record_epoch: int


class Released(QueueEntry, frozen=True, tag=13):
    """Available again, ``delays_ms[i]`` from now on. The attempt of what was GIVEN_BACK does not count."""

    group: str
    why: str
    offsets: list[int]  # packed
    record_epoch: int
    delays_ms: list[int]
    reason: str = ""
    detail: str = ""


class Parked(QueueEntry, frozen=True, tag=14):
    """Dead, and left where it is: its lane stands until it is redriven."""

    group: str
    offset: int
    record_epoch: int
    reason: str = ""
    detail: str = ""


class Redriven(QueueEntry, frozen=True, tag=15):
    """Parked records are available again, with no attempts behind them."""

    group: str
    offsets: list[int]  # packed
    record_epoch: int


class Dying(QueueEntry, frozen=True, tag=16):
    """Dead, and to be copied under exactly this producer epoch and sequence. The same record may be told again with a
    higher producer epoch, when the target has forgotten the producer."""

    group: str
    offset: int
    record_epoch: int
    producer_epoch: int
    sequence: int
    reason: str = ""
    detail: str = ""


class QueuePaused(QueueEntry, frozen=True, tag=17):
    group: str
    paused: bool


class Purged(QueueEntry, frozen=True, tag=18):
    """Everything below ``below`` is terminal, whatever it was."""

    group: str
    below: int
    record_epoch: int


class LeaseRow(msgspec.Struct, array_like=True, frozen=True):
    epoch: int
    lease: int
    member: str
    lease_ms: int
    offsets: list[int]  # packed
    record_epoch: int


class StoryRow(msgspec.Struct, array_like=True, frozen=True):
    """A record that has been leased before, or is parked or dying. ``last``: (epoch, lease) of its last lease."""

    offset: int
    record_epoch: int
    attempts: int
    last: tuple[int, int]
    delay_ms: int = 0
    history: list[tuple[int, str, str]] = []
    parked: bool = False
    dying: tuple[int, int] | None = None  # (producer epoch, sequence)


class QueueRow(msgspec.Struct, array_like=True, frozen=True):
    """One queue in a snapshot. ``runs``: (first, end, epoch of the record before end): what is settled above start."""

    group: str
    ordering: str
    start: int
    record_epoch: int  # of the record before start, -1: there is none
    next_lease: int
    producer_epoch: int
    next_sequence: int
    paused: bool
    runs: list[tuple[int, int, int]]
    leases: list[LeaseRow]
    stories: list[StoryRow]


AnyQueueEntry = Opened | Leased | Settled | Released | Parked | Redriven | Dying | QueuePaused | Purged


def packed(offsets: list[int]) -> list[int]:
    """Ascending offsets as the first one and distances."""
    return [*offsets[:1], *map(sub, offsets[1:], offsets)]


def unpacked(distances: list[int]) -> list[int]:
    return list(accumulate(distances))


def last_of(entry: AnyQueueEntry) -> int:
    """The highest offset that an entry names; -1 if it names none."""
    if isinstance(entry, Leased | Settled | Released | Redriven):
        return sum(entry.offsets)
    if isinstance(entry, Parked | Dying):
        return entry.offset
    if isinstance(entry, Opened):
        return entry.start - 1
    return entry.below - 1 if isinstance(entry, Purged) else -1
