"""Scrubber: reads segments in the background and compares them with what was written.

A sealed segment is compared with its seal, the active one with the checksum in memory, as far as it is flushed: what is
above may still be on its way to the disk, and the next round comes to it.

Bounded work per call: the driver calls `Scrubber.step` with a budget in bytes between other work, so that checking
never holds the loop; at 2 GB/s of CRC32C a budget of 4 MiB costs about 3 ms with a warm page cache. A finding means
that the bytes on disk are wrong: report the replica DAMAGED, then open it again with quarantine.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from ferryline.protocol.errors import CorruptBatch, FerrylineError
from ferryline.protocol.limits import BATCH_BYTES_MAX
from ferryline.protocol.records import HEADER_BYTES, check_crc, read_header
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.segment import Segment
from ferryline_broker.log.walk import CHAINED_BYTES

BUDGET_BYTES = 4 * 1024 * 1024
_WINDOW_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Finding:
    """A segment of the log in directory ``path`` is not what was written; ``offset`` is the first bad one."""

    path: str
    segment: int
    offset: int
    reason: str


class Scrubber:
    """Goes round the segments of one log, oldest first, for ever."""

    def __init__(self, log: PartitionLog) -> None:
        self.log = log
        self.rounds = 0  # complete passes over all segments
        self.bytes_read = 0
        self._segment: Segment | None = None
        self._next_base = -1  # continue with the first segment from here on

    def step(self, budget_bytes: int = BUDGET_BYTES) -> Finding | None:
        """Check up to about ``budget_bytes`` and return the first thing found wrong, if any."""
        until = self.bytes_read + budget_bytes
        while self.bytes_read < until:
            segment = self._current()
            if segment is None:
                return None
            try:
                self.bytes_read += self._check(segment, self._end)
            except FerrylineError as error:  # CorruptBatch, or the disk refused to read
                return self._found(segment, error.message)
            if self._position == self._end:
                if self._chain != self._end_chain:
                    return self._found(segment, "checksum differs from what was written")
                if segment.seal is not None and self._end == segment.seal.size:
                    segment.trusted_from = 0  # from now on read without checking, until the next start
                self._segment = None
                self._next_base = segment.base + 1
        return None

    def _current(self) -> Segment | None:
        """The segment to go on with; None at the end of a round."""
        segment = self._segment
        if segment is not None and segment.cuts == self._cuts and segment in self.log.segments:
            return segment
        for candidate in self.log.segments:  # retention or a cut may have taken the one we were at
            if candidate.base >= self._next_base and self._begin(candidate):
                return candidate
        self._segment = None
        self._next_base = -1
        self.rounds += 1
        return None

    def _begin(self, segment: Segment) -> bool:
        """Begin with ``segment``, unless nothing of it can be checked yet."""
        flushed = self.log.flushed_mark
        if segment.seal is not None:
            self._end, self._end_chain = segment.seal.size, segment.seal.chain
        elif segment.base == flushed.segment and flushed.position > 0:
            self._end, self._end_chain = flushed.position, flushed.chain
        else:
            return False
        self._segment, self._cuts = segment, segment.cuts
        self._position = self._chain = 0
        self._offset = segment.base
        return True

    def _check(self, segment: Segment, size: int) -> int:
        want = min(_WINDOW_BYTES, size - self._position)
        window = memoryview(segment.file.pread(want, self._position))
        header = read_header(window)
        if header.size > len(window):  # larger than a window: read it whole
            if header.size > BATCH_BYTES_MAX or self._position + header.size > size:
                raise CorruptBatch(f"batch of {header.size} bytes at position {self._position} leaves the segment")
            window = memoryview(segment.file.pread(header.size, self._position))
        at = 0
        while at + HEADER_BYTES <= len(window):
            header = read_header(window, at)
            if at + header.size > len(window):
                break
            check_crc(window, header, at)
            if header.base_offset != self._offset:
                raise CorruptBatch(f"batch begins at {header.base_offset}, expected {self._offset}")
            self._chain = zlib.crc32(window[at : at + CHAINED_BYTES], self._chain)
            self._offset = header.next_offset
            at += header.size
        if at == 0:
            raise CorruptBatch(f"nothing but {len(window)} bytes at position {self._position}")
        self._position += at
        return at

    def _found(self, segment: Segment, reason: str) -> Finding:
        finding = Finding(self.log.path, segment.base, self._offset, reason)
        self._next_base = segment.base + 1
        self._segment = None
        return finding
