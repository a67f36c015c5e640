"""The sparse index of one segment: offset, position and time of about every 4 KiB.

Entry, big endian, 28 bytes, of the batch at ``position``::

    relative offset u32 | position u32 | chain u32 | epoch i32 | max timestamp before i64 | reserved u32

``chain`` is the segment's checksum up to (not including) that batch, so a cut of the segment needs no second reading.
``max timestamp before`` is the largest timestamp of all batches of the segment before this one: it never falls, so the
same entries answer "which batch holds offset x" and "which is the first batch not older than t" by bisection.

The file is only a copy of what the log says: it is written without fsync while the segment is active, and rebuilt from
the log whenever it does not fit (`recovery.py`).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_ENTRY = struct.Struct(">IIIiqI")
ENTRY_BYTES = _ENTRY.size
_POSITION, _POSITION_AT = struct.Struct(">I").unpack_from, 4
INTERVAL_BYTES = 4096  # as in Kafka: a lookup then walks at most a few dozen small headers
NO_TIMESTAMP = -(2**63)


class IndexEntry(NamedTuple):
    relative: int  # base offset of the batch minus base offset of the segment
    position: int
    chain: int
    epoch: int
    max_timestamp: int  # of all batches of the segment before this one


class SparseIndex:
    """Entries of one segment in memory, as the bytes of its file. Positions and offsets rise strictly."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | bytearray = b"") -> None:
        self.data = bytearray(data)

    def __len__(self) -> int:
        return len(self.data) // ENTRY_BYTES

    def add(self, relative: int, position: int, chain: int, epoch: int, max_timestamp: int) -> None:
        self.data += _ENTRY.pack(relative, position, chain, epoch, max_timestamp, 0)

    def entry(self, number: int) -> IndexEntry:
        return IndexEntry._make(_ENTRY.unpack_from(self.data, number * ENTRY_BYTES)[:5])

    def last_position(self) -> int | None:
        """Where the batch of the last entry stands."""
        data = self.data
        return _POSITION(data, len(data) - ENTRY_BYTES + _POSITION_AT)[0] if data else None

    def at_offset(self, relative: int) -> IndexEntry | None:
        """The last entry at or below that offset."""
        return self._last_not_above(0, relative)

    def at_position(self, position: int) -> IndexEntry | None:
        """The last entry at or below that position."""
        return self._last_not_above(4, position)

    def before_time(self, timestamp_ms: int) -> IndexEntry | None:
        """The last entry with only older records before it: the first batch not older is at it or after it."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.entry(middle).max_timestamp < timestamp_ms:
                low = middle + 1
            else:
                high = middle
        return self.entry(low - 1) if low else None

    def cut(self, position: int) -> None:
        """Forget entries at or above ``position``."""
        del self.data[self.count_below(position) * ENTRY_BYTES :]

    def count_below(self, position: int) -> int:
        """Number of entries below ``position``."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.entry(middle).position < position:
                low = middle + 1
            else:
                high = middle
        return low

    def epochs(self, base: int) -> list[tuple[int, int]]:
        """(epoch, first offset) of a segment that begins at ``base``: every change of epoch has an entry of its own."""
        found: list[tuple[int, int]] = []
        at = 0
        while at < len(self):
            first = self.entry(at)
            found.append((first.epoch, base + first.relative))
            low, high = at + 1, len(self)
            while low < high:
                middle = (low + high) // 2
                if self.entry(middle).epoch <= first.epoch:
                    low = middle + 1
                else:
                    high = middle
            at = low
        return found

    def _last_not_above(self, field: int, value: int) -> IndexEntry | None:
        data = self.data
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            at = middle * ENTRY_BYTES + field
            if int.from_bytes(data[at : at + 4], "big") <= value:
                low = middle + 1
            else:
                high = middle
        return self.entry(low - 1) if low else None
