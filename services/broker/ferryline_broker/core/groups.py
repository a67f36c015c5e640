"""Delivery state of one partition: who may commit in a log group and how far it has come; tables of queues. Pure.

The state log is the truth; `GroupTable` is what its entries add up to. The primary alone appends; entries are applied
when appended, and answered when committed. A new primary rebuilds the table from the whole state log.

Void rule: an entry that names a record which is not in the record log (other epoch, or beyond its end) counts for
nothing. It exists after an unflushed power loss, and where a lease was appended together with a record that was lost
with the primaryship. Without the rule, records written later at the same offsets would inherit what was said of them.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from ferryline.protocol.messages import ANY_GENERATION
from ferryline.protocol.records import encode_batch
from ferryline_broker.core.epochs import EpochIndex
from ferryline_broker.core.events import GroupOffset
from ferryline_broker.core.queue_entries import AnyQueueEntry, Opened, QueueEntry, QueueRow, last_of
from ferryline_broker.core.queue_table import QueueTable


class ClaimEntry(msgspec.Struct, array_like=True, frozen=True, tag=1):
    group: str
    member: str
    generation: int


class CommitEntry(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """``offset`` is the next record to read; ``offset_epoch`` the epoch of the record before it (-1: none)."""

    group: str
    offset: int
    offset_epoch: int
    metadata: str


class ForgetEntry(msgspec.Struct, array_like=True, frozen=True, tag=3):
    group: str


class BarrierEntry(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Changes nothing; its commit proves that this primaryship still stood."""


class RestoredEntry(msgspec.Struct, array_like=True, frozen=True, tag=6):
    """All before it comes from a backup of another cluster: its members and generations are nobody's here, and copies
    to the dead letters go on under a new producer epoch, for the target may hold later ones than this log knows."""


class GroupRow(msgspec.Struct, array_like=True, frozen=True):
    group: str
    member: str
    generation: int
    offset: int
    offset_epoch: int
    metadata: str


class SnapshotEntry(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """The whole table; entries before it are no longer needed once it is committed."""

    rows: list[GroupRow]
    queues: list[QueueRow] = []
    copied: list[tuple[str, int]] = []  # of deleted queues: the last producer epoch of their dead letters


COPIED_MAX = 1_000  # deleted queues that are remembered
ROWS_BYTES_MAX = 4 * 1024 * 1024  # of log groups, about: all of them must fit into one entry, and that into a batch
ENTRIES_BYTES_MAX = 8 * 1024 * 1024  # of one batch, or of one entry; below BATCH_BYTES_MAX with its framing
_ROW_BYTES = 40  # of a row, beside its texts
StateEntry = ClaimEntry | CommitEntry | ForgetEntry | BarrierEntry | SnapshotEntry | RestoredEntry | AnyQueueEntry
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[StateEntry] = msgspec.msgpack.Decoder(StateEntry)


def encode_entry(entry: StateEntry) -> bytes:
    return _encoder.encode(entry)


def batches_of(entries: list[StateEntry], base_offset: int, epoch: int) -> list[tuple[list[StateEntry], bytearray]]:
    """Entries as batches of the state log, each with those that it carries. One frame of a receiver can make entries
    for ten thousand records, with a reason in each: more than a log or a frame takes in one piece."""
    found: list[tuple[list[StateEntry], bytearray]] = []
    chunk: list[StateEntry] = []
    rows: list[tuple[None, bytes, list[tuple[str, bytes | None]]]] = []
    size = 0
    for entry in entries:
        encoded = encode_entry(entry)
        if rows and size + len(encoded) > ENTRIES_BYTES_MAX:
            found.append((chunk, encode_batch(rows, base_offset=base_offset, epoch=epoch)))
            base_offset += len(rows)
            chunk, rows, size = [], [], 0
        chunk.append(entry)
        rows.append((None, encoded, []))
        size += len(encoded)
    found.append((chunk, encode_batch(rows, base_offset=base_offset, epoch=epoch)))
    return found


class Refused(msgspec.Struct, frozen=True, gc=False):
    code: str
    message: str


class GroupTable:
    """Group name -> row. `decide_*` say what to append (or refuse); `apply` is the only change.

    ``queues``: the tables of queue groups; `Queue` decides for them. ``copied``: producer epochs under which
    deleted queues have copied dead letters: the target knows them, and would take a first copy for a repetition.
    """

    __slots__ = ("_rows", "_rows_bytes", "copied", "queues")

    def __init__(self) -> None:
        self._rows: dict[str, GroupRow] = {}
        self._rows_bytes = 0  # of `_size` of each
        self.queues: dict[str, QueueTable] = {}
        self.copied: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def offset(self, group: str) -> GroupOffset:
        row = self._rows.get(group)
        return GroupOffset(row.offset, row.offset_epoch, row.generation, row.metadata) if row else GroupOffset()

    def items(self) -> list[tuple[str, GroupOffset]]:
        return [(name, self.offset(name)) for name in sorted(self._rows)]

    def decide_claim(self, group: str, member: str, generation: int) -> ClaimEntry | Refused:
        """The higher generation wins; the same one only for the same member (a repeated request)."""
        row = self._rows.get(group)
        if row and (generation < row.generation or (generation == row.generation and member != row.member)):
            return Refused(
                "STALE_MEMBER", f"generation {generation} of group {group!r} was followed by {row.generation}"
            )
        return ClaimEntry(group, member, generation)

    def decide_commit(
        self,
        group: str,
        member: str,
        generation: int,
        offset: int,
        metadata: str,
        reset: bool,
        *,
        records: EpochIndex,
        high_watermark: int,
        log_start: int,
    ) -> CommitEntry | Refused | None:
        """None: nothing to do, the group is already there (commits never go back unless ``reset``)."""
        row = self._rows.get(group)
        current = row.generation if row else 0
        stale = generation != current or (row and generation and member != row.member)
        if stale and generation != ANY_GENERATION:
            return Refused("STALE_MEMBER", f"group {group!r} is at generation {current}, the commit says {generation}")
        if not 0 <= offset <= high_watermark:
            return Refused("OFFSET_OUT_OF_RANGE", f"offset: {offset} is outside 0..{high_watermark} (high watermark)")
        if row and not reset and offset <= row.offset:
            return None
        epoch = records.epoch_at(offset - 1) if offset > log_start else -1
        grows = _text(metadata) - _text(row.metadata) if row else _ROW_BYTES + len(group) + _text(metadata)
        if grows > 0 and self._rows_bytes + grows > ROWS_BYTES_MAX:
            return Refused("THROTTLED", f"group: groups of this partition take {self._rows_bytes} bytes already")
        return CommitEntry(group, offset, epoch, metadata)

    def apply(self, entry: StateEntry) -> None:
        match entry:
            case ClaimEntry(group, member, generation):
                row = self._rows.get(group)
                old = row or GroupRow(group, "", 0, -1, -1, "")
                self._put(GroupRow(group, member, generation, old.offset, old.offset_epoch, old.metadata))
            case CommitEntry(group, offset, offset_epoch, metadata):
                row = self._rows.get(group)
                member, generation = (row.member, row.generation) if row else ("", 0)
                self._put(GroupRow(group, member, generation, offset, offset_epoch, metadata))
            case ForgetEntry(group):
                row = self._rows.pop(group, None)
                self._rows_bytes -= _size(row) if row else 0
                gone = self.queues.pop(group, None)
                if gone is not None and (gone.producer_epoch or gone.next_sequence):
                    self.copied[group] = gone.producer_epoch
                    if len(self.copied) > COPIED_MAX:
                        del self.copied[next(iter(self.copied))]
            case Opened(group, ordering, start):
                if group not in self.queues:
                    made = self.queues[group] = QueueTable(group, ordering, start)
                    made.producer_epoch = self.copied.pop(group, -1) + 1
            case QueueEntry():
                if (table := self.queues.get(entry.group)) is not None:
                    table.apply(entry)
            case SnapshotEntry(rows):
                self._rows, self._rows_bytes = {}, 0
                for row in rows:
                    self._put(row)
            case RestoredEntry():
                self._restored()
            case BarrierEntry():
                pass

    def _put(self, row: GroupRow) -> None:
        old = self._rows.get(row.group)
        self._rows_bytes += _size(row) - (_size(old) if old else 0)
        self._rows[row.group] = row

    def _restored(self) -> None:
        for row in list(self._rows.values()):
            self._put(replace(row, member="", generation=0))
        for table in self.queues.values():
            table.producer_epoch, table.next_sequence = table.producer_epoch + 1, 0

    def bounded_snapshot(self, epoch_at: Callable[[int], int]) -> tuple[SnapshotEntry | None, int]:
        """What a batch can carry: without details of failures where there are too many, None where it is too large all
        the same. And a size, for when to make the next one: as a whole one costs time, the larger the less often."""
        entry = self.snapshot(epoch_at)
        size = len(encode_entry(entry))
        if size <= ENTRIES_BYTES_MAX:
            return entry, size
        entry = self.snapshot(epoch_at, brief=True)
        return (entry if len(encode_entry(entry)) <= ENTRIES_BYTES_MAX else None), size // 4

    def snapshot(self, epoch_at: Callable[[int], int], brief: bool = False) -> SnapshotEntry:
        """``epoch_at`` tells the epoch of a record, -1 where there is none."""
        queues = [self.queues[name].row(epoch_at, brief) for name in sorted(self.queues)]
        return SnapshotEntry([self._rows[name] for name in sorted(self._rows)], queues, list(self.copied.items()))

    @classmethod
    def replay(
        cls, entries: list[tuple[int, int, bytes]], records: EpochIndex, log_start: int, log_end: int
    ) -> GroupTable:
        """The table after all state entries, void ones left out."""
        table = cls()

        def stands(offset: int, epoch: int) -> bool:
            return offset < log_start or (offset < log_end and records.epoch_at(offset) == epoch)

        for _, _, value in entries:
            entry = _decoder.decode(value)
            if isinstance(entry, CommitEntry) and not _stands(entry, records, log_start, log_end):
                continue
            if isinstance(entry, Opened) and not stands(last_of(entry), entry.record_epoch):
                entry = Opened(entry.group, entry.ordering, log_start, -1)
            elif isinstance(entry, QueueEntry) and not stands(last_of(entry), getattr(entry, "record_epoch", -1)):
                continue
            if isinstance(entry, SnapshotEntry):
                table.queues = {row.group: QueueTable.of_row(row, stands, log_start) for row in entry.queues}
                table.copied = dict(entry.copied)
                entry = SnapshotEntry([_voided(row, records, log_start, log_end) for row in entry.rows])
            table.apply(entry)
        return table


def _size(row: GroupRow) -> int:
    """What a row takes in a snapshot, about."""
    return _ROW_BYTES + len(row.group) + _text(row.member) + _text(row.metadata)


def _text(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _stands(entry: CommitEntry | GroupRow, records: EpochIndex, log_start: int, log_end: int) -> bool:
    if entry.offset <= log_start:
        return True
    return entry.offset <= log_end and records.epoch_at(entry.offset - 1) == entry.offset_epoch


def _voided(row: GroupRow, records: EpochIndex, log_start: int, log_end: int) -> GroupRow:
    """A snapshot keeps only the last commit, so a void one falls back to the start of what is left."""
    if row.offset < 0 or _stands(row, records, log_start, log_end):
        return row
    return GroupRow(row.group, row.member, row.generation, log_start, -1, row.metadata)
