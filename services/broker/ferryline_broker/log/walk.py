"""Walk over the headers of batches that lie back to back in a file, jumping over their bodies.

`walk` yields whole headers; `skim` only what a lookup needs, at a third of the cost (0.4 us a batch). Both raise
LogDamaged where a header cannot be one, so a lookup never runs away over garbage.
"""

from __future__ import annotations

from collections.abc import Iterator

from ferryline.protocol.errors import CorruptBatch
from ferryline.protocol.limits import BATCH_BYTES_MAX
from ferryline.protocol.records import (
    HEADER,
    HEADER_BYTES,
    LENGTH_PREFIX_BYTES,
    MAGIC,
    BatchHeader,
    read_header,
    split_batches,
)
from ferryline_broker.log.interface import FileHandle, LogDamaged

CHAINED_BYTES = 21  # of each batch: everything that its own CRC does not cover, and that CRC
WINDOW_BYTES = 8 * 1024  # two index intervals: most lookups take one read


def walk(file: FileHandle, name: str, position: int, end: int) -> Iterator[tuple[BatchHeader, bytes]]:
    """(header, first CHAINED_BYTES) of each batch in [position, end)."""
    start, window = position, b""
    while position < end:
        at = position - start
        if at + HEADER_BYTES > len(window):
            start, at, window = position, 0, file.pread(min(WINDOW_BYTES, end - position), position)
        try:
            header = read_header(window, at)
        except CorruptBatch as error:
            raise _damaged(name, position, error.message) from error
        if header.size > BATCH_BYTES_MAX or position + header.size > end:
            raise _damaged(name, position, f"batch of {header.size} bytes")
        yield header, window[at : at + CHAINED_BYTES]
        position += header.size


def skim(file: FileHandle, name: str, position: int, end: int) -> Iterator[tuple[int, int, int, int, bytes]]:
    """(base offset, next offset, size, largest timestamp, first CHAINED_BYTES) of each batch in [position, end)."""
    start, window = position, b""
    while position < end:
        at = position - start
        if at + HEADER_BYTES > len(window):
            start, at, window = position, 0, file.pread(min(WINDOW_BYTES, end - position), position)
            if len(window) < HEADER_BYTES:
                raise _damaged(name, position, f"{len(window)} bytes where a header takes {HEADER_BYTES}")
        base, length, _, magic, _, _, delta, _, max_timestamp, _, _, _, count = HEADER.unpack_from(window, at)
        size = length + LENGTH_PREFIX_BYTES
        sound = magic == MAGIC and 0 <= delta == count - 1 and HEADER_BYTES <= size <= BATCH_BYTES_MAX
        if not sound or position + size > end:
            raise _damaged(name, position, f"no header: magic {magic}, {size} bytes, {delta + 1} records")
        yield base, base + delta + 1, size, max_timestamp, window[at : at + CHAINED_BYTES]
        position += size


def checked_batches(name: str, data: bytes, offset: int) -> list[tuple[int, BatchHeader]]:
    """Positions and headers of what a log gave for ``offset``, every byte of it checked: for whoever acts on contents.

    A log does not check again what this process wrote or checked before; readers of batches do that themselves.
    """
    try:
        found = split_batches(data)
        for _, header in found:
            if not header.base_offset <= offset < header.next_offset:
                raise CorruptBatch(f"a batch holds {header.base_offset}..{header.next_offset - 1}")
            offset = header.next_offset
    except CorruptBatch as error:
        raise LogDamaged(f"{name}: damaged at offset {offset}: {error.message}", offset=offset) from error
    return found


def _damaged(name: str, position: int, why: str) -> LogDamaged:
    return LogDamaged(f"{name}: damaged at position {position}: {why}", offset=-1)
