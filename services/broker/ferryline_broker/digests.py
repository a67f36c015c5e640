"""Walk a log on disk and sum up what is there: every batch is read and its CRC checked, in steps of a few ms.

The bytes are read again from the files, past everything this process believes it knows of them. What replicas must
agree on is the digest of a *block*: BLAKE2b over the first CHAINED_BYTES of its batches, which hold base offset,
length, epoch and the CRC32C of all other bytes. Blocks end by size alone, counted from where the walk was asked to
begin, so two equal logs have equal blocks however their segments lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from ferryline.protocol.errors import CorruptBatch, FerrylineError
from ferryline.protocol.limits import BATCH_BYTES_MAX
from ferryline.protocol.records import HEADER_BYTES, BatchHeader, check_crc, read_header
from ferryline_broker.log.interface import LogDamaged
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.segment import LOG, Segment
from ferryline_broker.log.walk import CHAINED_BYTES

BLOCK_BYTES = 4 * 1024 * 1024
DIGEST_BYTES = 16
_WINDOW_BYTES = 256 * 1024
_STEP_BATCHES = 256  # checked between two looks at the clock: under a millisecond


@dataclass(frozen=True)
class Block:
    """A stretch of whole batches: offsets [start, end)."""

    start: int
    end: int
    batches: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Wrong:
    """Where the bytes on disk are not a log: the batch that should begin at ``offset``."""

    offset: int
    file: str
    position: int
    reason: str


@dataclass
class Digests:
    """What a walk has found so far: good up to ``next``; ``wrong`` is what ended it early."""

    next: int
    blocks: list[Block] = field(default_factory=list)
    batches: list[BatchHeader] = field(default_factory=list)
    bytes: int = 0
    wrong: Wrong | None = None
    gone: bool = False  # what was asked for was removed under way: retention, or the copy was set aside


class Walk:
    """One walk over [start, below) of a log that may grow, roll and lose its oldest segments meanwhile.

    It ends after about ``bytes_max`` bytes. ``producer``: also keep the headers of its batches (ALL: of everybody's,
    None: of none), at most ``headers_max``.
    """

    ALL = -2

    def __init__(
        self, log: PartitionLog, start: int, below: int, bytes_max: int, *, producer: int | None = None,
        headers_max: int = 10_000,
    ) -> None:  # fmt: skip
        self.found = Digests(start)
        self._log, self._below, self._bytes_max = log, below, bytes_max
        self._producer, self._headers_max = producer, headers_max
        self._hash = blake2b(digest_size=DIGEST_BYTES)
        self._block_start, self._count, self._size = start, 0, 0
        self._done = False

    def steps(self) -> Iterator[None]:
        """Walk; between two steps the caller may do other things."""
        found = self.found
        while not self._done and found.wrong is None and found.next < self._below:
            segment = self._segment()
            if segment is None:
                break
            try:
                yield from self._walk(segment)
            except FerrylineError as error:  # the disk refused to read
                self._wrong(segment, -1, error.message)
        if self._count:
            self._end_block()

    def _segment(self) -> Segment | None:
        log, found = self._log, self.found
        if log.damage is not None:
            found.wrong = Wrong(log.damage.offset, log.path, -1, log.damage.reason)
            return None
        if log.failure or not log.log_start <= found.next < log.log_end:
            found.gone = True
            return None
        for segment in reversed(log.segments):
            if segment.base <= found.next:
                return segment
        found.wrong = Wrong(found.next, log.path, -1, f"no segment holds offset {found.next}")
        return None

    def _walk(self, segment: Segment) -> Iterator[None]:
        """Check this segment from where we are to its end, or to the end of what was asked for."""
        if not segment.storage.exists(segment.stem + LOG):  # it is open still, but the next start will miss it
            self._wrong(segment, -1, "the file is missing")
        position, offset = _begin(segment, self.found.next)
        while position < segment.size and not self._done and self.found.wrong is None:
            if segment not in self._log.segments:
                return  # removed meanwhile; what is left of the log tells how to go on
            window = _window(segment, position)
            at = 0
            for _ in range(_STEP_BATCHES):
                taken = self._batch(segment, window, at, position + at, offset)
                if taken is None:
                    break
                at += taken.size
                offset = taken.next_offset
            position += at
            yield
        if not self._done and self.found.wrong is None and offset != segment.next_offset:
            self._wrong(segment, position, f"the segment ends at offset {offset}, not {segment.next_offset}")

    def _batch(self, segment: Segment, window: memoryview, at: int, position: int, offset: int) -> BatchHeader | None:
        """Take up one batch; None where the window ends, the walk is done, or the bytes are wrong."""
        if self._done or position >= segment.size or (at and at + HEADER_BYTES > len(window)):
            return None
        try:
            header = read_header(window, at)
            if position + header.size > segment.size or header.size > BATCH_BYTES_MAX:
                raise CorruptBatch(f"a batch of {header.size} bytes leaves the segment")
            if at and at + header.size > len(window):
                return None
            check_crc(window, header, at)
            if header.base_offset != offset:
                raise CorruptBatch(f"the batch begins at {header.base_offset}, not {offset}")
            if header.epoch != self._log.epochs.epoch_at(offset):
                raise CorruptBatch(f"the batch has epoch {header.epoch}, not {self._log.epochs.epoch_at(offset)}")
        except CorruptBatch as error:
            self._wrong(segment, position, error.message, offset)
            return None
        if header.next_offset > self._below:
            self._done = True
            return None
        if header.next_offset > self.found.next:
            self._take(header, window[at : at + CHAINED_BYTES])
        return header

    def _take(self, header: BatchHeader, front: memoryview) -> None:
        found = self.found
        if not self._count:
            self._block_start = header.base_offset
        self._hash.update(front)
        self._count += 1
        self._size += header.size
        found.bytes += header.size
        found.next = header.next_offset
        if self._producer is not None and self._producer in (self.ALL, header.producer_id):
            found.batches.append(header)
        if self._size >= BLOCK_BYTES:
            self._end_block()
        # What is not asked for any more must not be read: a walk ends where the next one begins.
        enough = found.bytes >= self._bytes_max or len(found.batches) >= self._headers_max
        self._done = enough or found.next >= self._below

    def _end_block(self) -> None:
        block = Block(self._block_start, self.found.next, self._count, self._size, self._hash.hexdigest())
        self.found.blocks.append(block)
        self._hash = blake2b(digest_size=DIGEST_BYTES)
        self._count = self._size = 0

    def _wrong(self, segment: Segment, position: int, reason: str, offset: int = -1) -> None:
        if segment in self._log.segments:  # otherwise it was removed under our feet: no damage
            found = self.found
            found.wrong = Wrong(max(offset, found.next), segment.stem + LOG, position, reason)


def _begin(segment: Segment, offset: int) -> tuple[int, int]:
    """(position, offset) of an indexed batch at or below ``offset``; the segment's start where the index is no help."""
    loaded = segment.index is not None
    try:
        entry = segment.load_index().at_offset(offset - segment.base)
    except LogDamaged:
        entry = None
    if not loaded and segment.seal is not None:
        segment.index = None  # the chain did not ask for it: it would stay in memory
    return (entry.position, segment.base + entry.relative) if entry is not None else (0, segment.base)


def _window(segment: Segment, position: int) -> memoryview:
    """Bytes from ``position`` on, at least one whole batch if there is one."""
    window = segment.file.pread(min(_WINDOW_BYTES, segment.size - position), position)
    try:
        size = read_header(window).size
    except CorruptBatch:
        return memoryview(window)
    if len(window) < size <= min(BATCH_BYTES_MAX, segment.size - position):
        window = segment.file.pread(size, position)
    return memoryview(window)
