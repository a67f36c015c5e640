"""One segment: a file of batches back to back, its index, and (once sealed) its seal.

Files, named by the 20-digit base offset: ``.log`` (record batches, the same bytes as on the wire), ``.index``
(`index.py`), ``.seal`` (an envelope, `envelope.py`, holding `Seal`).

The **chain** is the segment's checksum: CRC32 over the first 21 bytes of all batches, in order. Those bytes hold base
offset, length, epoch and the CRC32C of the rest of the batch, so together with the batches' own CRCs it covers every
byte of the file, at 0.2 us a batch instead of a second pass over the data when the segment is sealed; and a check that
goes batch by batch says *which* batch is bad.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import msgspec

from ferryline.protocol.errors import CorruptBatch, FerrylineError, StorageFull
from ferryline.protocol.records import BatchHeader, check_crc, read_header
from ferryline_broker.log.envelope import pack, unpack
from ferryline_broker.log.index import INTERVAL_BYTES, NO_TIMESTAMP, SparseIndex
from ferryline_broker.log.interface import Bytes, FileHandle, LogDamaged, Storage
from ferryline_broker.log.walk import skim, walk

LOG, INDEX, SEAL = ".log", ".index", ".seal"
SEAL_MAGIC = b"FLSL"


class Seal(msgspec.Struct, array_like=True, frozen=True):
    """What is known of a sealed segment without reading it."""

    base: int
    next_offset: int
    size: int
    chain: int
    tail_epoch: int
    max_timestamp: int
    created_ms: int  # wall clock of the first append
    appended_ms: int  # wall clock of the last append: age for retention, never a client's timestamp
    index_bytes: int
    index_crc: int
    epochs: list[tuple[int, int]]  # (epoch, first offset in this segment)


class Walked(msgspec.Struct, gc=False):
    """Where a walk over batches stands: everything below ``position`` is accounted for."""

    position: int
    offset: int  # next offset expected
    chain: int
    max_timestamp: int


class Segment:
    """In-memory picture of one segment. ``PartitionLog`` is the only one that changes it.

    Invariants: ``size`` counts whole batches only; ``base <= next_offset``; batches below ``trusted_from`` were not
    checked by this process, so reading them checks them first (a sealed segment until it was scrubbed, and the part of
    the active one below the checkpoint it was recovered from).
    """

    __slots__ = (
        "appended_ms",
        "base",
        "chain",
        "created_ms",
        "cuts",
        "epochs",
        "file",
        "index",
        "max_timestamp",
        "next_offset",
        "seal",
        "size",
        "stem",
        "storage",
        "tail_epoch",
        "trusted_from",
    )

    def __init__(self, storage: Storage, directory: str, base: int, file: FileHandle) -> None:
        self.storage, self.base, self.file = storage, base, file
        self.stem = f"{directory}/{base:020d}"
        self.size = 0
        self.next_offset = base
        self.chain = 0
        self.tail_epoch = -1
        self.max_timestamp = NO_TIMESTAMP
        self.created_ms = self.appended_ms = 0
        self.epochs: list[tuple[int, int]] = []
        self.index: SparseIndex | None = SparseIndex()  # None: sealed and not loaded
        self.seal: Seal | None = None
        self.trusted_from = 0
        self.cuts = 0  # how often `shorten` was called: who reads it in pieces must begin again

    def account(self, header: BatchHeader, front: bytes | bytearray | memoryview) -> None:
        """Take up the batch that now stands at ``size``. ``front``: its first CHAINED_BYTES."""
        index = self.index
        assert index is not None
        assert self.seal is None
        if header.epoch != self.tail_epoch:
            self.epochs.append((header.epoch, header.base_offset))
            self.tail_epoch = header.epoch
            due = True
        else:
            last = index.last_position()
            due = last is None or self.size - last >= INTERVAL_BYTES
        if due:
            index.add(header.base_offset - self.base, self.size, self.chain, header.epoch, self.max_timestamp)
        self.chain = zlib.crc32(front, self.chain)
        self.size += header.size
        self.next_offset = header.next_offset
        self.max_timestamp = max(self.max_timestamp, header.max_timestamp)

    def write(self, data: Bytes) -> None:
        """Put the bytes of whole batches at the end. Raises StorageFull: the file is as it was before."""
        try:
            self.file.pwrite(data, self.size)
        except StorageFull:
            # What was written in part must go, or a later, shorter append would leave batches behind it: a hole.
            self.file.truncate(self.size)
            raise

    def adopt(self, seal: Seal) -> None:
        """Take the picture from the seal instead of from the file."""
        self.size, self.next_offset, self.chain = seal.size, seal.next_offset, seal.chain
        self.tail_epoch, self.max_timestamp = seal.tail_epoch, seal.max_timestamp
        self.created_ms, self.appended_ms = seal.created_ms, seal.appended_ms
        self.epochs = list(seal.epochs)
        self.index = None
        self.seal = seal
        self.trusted_from = seal.size

    def write_seal(self) -> None:
        """Record that this segment is complete. Durable, names included.

        The index goes first: a seal promises that its index was written.
        """
        assert self.index is not None
        data = bytes(self.index.data)
        file = self.storage.open(self.stem + INDEX, create=True)
        try:
            file.truncate(len(data))
            file.pwrite(data, 0)
            file.fdatasync()
        finally:
            file.close()
        seal = Seal(
            self.base,
            self.next_offset,
            self.size,
            self.chain,
            self.tail_epoch,
            self.max_timestamp,
            self.created_ms,
            self.appended_ms,
            len(data),
            zlib.crc32(data),
            list(self.epochs),
        )
        self.storage.write_small_atomic(self.stem + SEAL, pack(SEAL_MAGIC, seal))
        self.seal = seal
        self.file.set_idle(True)

    def load_index(self) -> SparseIndex:
        """The index in memory; read from its file, or built again from the log when the file does not fit."""
        if self.index is not None:
            return self.index
        assert self.seal is not None
        data = self.storage.read_small(self.stem + INDEX) or b""
        if len(data) != self.seal.index_bytes or zlib.crc32(data) != self.seal.index_crc:
            data = self._rebuilt_index(self.seal)
        self.index = SparseIndex(data)
        return self.index

    def _rebuilt_index(self, seal: Seal) -> bytes:
        """Build the index from the headers, in one go (not in steps: only rot of an index file leads here)."""
        twin = Segment(self.storage, self.stem.rpartition("/")[0], self.base, self.file)
        for header, front in self.walk(0, seal.size):
            if header.base_offset != twin.next_offset or header.epoch < twin.tail_epoch:
                break
            twin.account(header, front)
        if twin.size != seal.size or twin.chain != seal.chain:
            raise self.damaged(twin.next_offset, "headers do not match the seal")
        assert twin.index is not None
        data = bytes(twin.index.data)
        file = self.storage.open(self.stem + INDEX, create=True)
        try:
            file.truncate(len(data))
            file.pwrite(data, 0)
        except FerrylineError:
            pass  # only a copy: next time it is built again
        finally:
            file.close()
        return data

    def unseal(self, index: SparseIndex) -> None:
        """Make the segment writable again: its seal is gone, durably, before anything of it changes."""
        self.index = index
        self.seal = None
        self.storage.unlink(self.stem + SEAL)
        self.storage.fsync_dir(self.stem.rpartition("/")[0])
        self.file.set_idle(False)

    def shorten(self, at: Walked, index: SparseIndex) -> None:
        """Cut the (unsealed) segment at a batch boundary inside it. Durable."""
        self.cuts += 1
        self.file.truncate(at.position)
        self.file.fdatasync()
        self.index = index
        self.size, self.next_offset, self.chain, self.max_timestamp = at.position, at.offset, at.chain, at.max_timestamp
        self.epochs = [pair for pair in self.epochs if pair[1] < at.offset]
        self.tail_epoch = self.epochs[-1][0]
        self.trusted_from = min(self.trusted_from, at.position)

    def remove(self) -> None:
        """Unlink the files. Names are gone durably only after the directory was synced."""
        self.file.close()
        self.storage.unlink(self.stem + LOG)
        self.storage.unlink(self.stem + SEAL)
        self.storage.unlink(self.stem + INDEX)

    # -- reading ----------------------------------------------------------------------------------

    def walk(self, position: int, end: int) -> Iterator[tuple[BatchHeader, bytes]]:
        """Headers of the batches in [position, end), each with its first CHAINED_BYTES."""
        return walk(self.file, self.stem + LOG, position, end)

    def skim(self, position: int, end: int) -> Iterator[tuple[int, int, int, int, bytes]]:
        """(base offset, next offset, size, largest timestamp, first CHAINED_BYTES) of each batch there."""
        return skim(self.file, self.stem + LOG, position, end)

    def locate(self, offset: int) -> Walked:
        """The batch that holds ``offset`` (or the end, if ``offset`` is next_offset): state before it."""
        entry = self.load_index().at_offset(offset - self.base)
        if entry is None:
            raise self.damaged(self.base, "the index does not begin with the segment")
        at = Walked(entry.position, self.base + entry.relative, entry.chain, entry.max_timestamp)
        for base, following, size, max_timestamp, front in self.skim(entry.position, self.size):
            if base != at.offset:
                raise self.damaged(at.offset, f"batch at {at.position} begins at {base}")
            if following > offset:
                break
            at.position += size
            at.offset = following
            at.chain = zlib.crc32(front, at.chain)
            at.max_timestamp = max(at.max_timestamp, max_timestamp)
        return at

    def check_slice(self, data: bytes | memoryview, offset: int) -> None:
        """Check batches that lie back to back in ``data`` from ``offset`` on: CRCs, contiguity, epochs.

        Raises LogDamaged, so that bytes from disk are never served wrong.
        """
        starts = {start: epoch for epoch, start in self.epochs}
        epoch = self._epoch_at(offset)
        at, end = 0, len(data)
        while at < end:
            try:
                header = read_header(data, at)
                check_crc(data, header, at)
            except CorruptBatch as error:
                raise self.damaged(offset, error.message) from error
            epoch = starts.get(header.base_offset, epoch)
            if header.base_offset != offset or header.epoch != epoch:
                raise self.damaged(offset, f"found offset {header.base_offset} of epoch {header.epoch}, not {epoch}")
            offset = header.next_offset
            at += header.size

    def _epoch_at(self, offset: int) -> int:
        found = -1
        for epoch, start in self.epochs:
            if start > offset:
                break
            found = epoch
        return found

    def damaged(self, offset: int, why: str) -> LogDamaged:
        return LogDamaged(f"{self.stem}{LOG}: damaged at offset {offset}: {why}", offset=offset)


def read_seal(storage: Storage, directory: str, base: int) -> Seal | None:
    """The seal of that segment; None when there is none or it is damaged."""
    data = storage.read_small(f"{directory}/{base:020d}{SEAL}")
    if data is None:
        return None
    found = unpack(SEAL_MAGIC, data, Seal)
    return found[1] if found is not None and found[1].base == base else None
