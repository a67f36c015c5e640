"""Read a log file whose end may be torn: find where it stops being a log, and tell a torn tail from a hole.

Everything here yields between bounded steps, so that recovery never holds the event loop.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass

from ferryline.protocol.errors import CorruptBatch
from ferryline.protocol.limits import BATCH_BYTES_MAX, BATCH_RECORDS_MAX
from ferryline.protocol.records import HEADER_BYTES, LENGTH_PREFIX_BYTES, MAGIC, BatchHeader, check_crc, read_header
from ferryline_broker.log.interface import FileHandle

WINDOW_BYTES = 1024 * 1024  # CRC32C of one window takes about 0.6 ms
_MAGIC_AT = 16
_PROBE = struct.Struct(">qiiBIhi")
_MAGIC_BYTE = bytes([MAGIC])


@dataclass
class ScanEnd:
    """Where the scan stopped. ``reason`` is empty at a clean end; ``damaged`` means no torn write can explain it."""

    position: int
    reason: str = ""
    damaged: bool = False


Accept = Callable[[BatchHeader, memoryview], None]


def scan_batches(
    file: FileHandle, position: int, size: int, offset: int, epoch: int, epoch_max: int, accept: Accept
) -> Generator[None, None, ScanEnd]:
    """Check batches from ``position`` on and hand each good one to ``accept`` with its bytes.

    Good means: whole, CRC holds, begins at the expected offset, epoch neither falls nor exceeds ``epoch_max``.
    """
    want = WINDOW_BYTES
    while position < size:
        window = memoryview(file.pread(min(want, size - position), position))
        want = WINDOW_BYTES
        at = 0
        while True:
            left = len(window) - at
            if left < HEADER_BYTES:
                if position + at + left >= size:
                    break  # the file ends here: at a boundary, or inside a header
                want = WINDOW_BYTES
                break
            try:
                header = read_header(window, at)
            except CorruptBatch as error:
                return ScanEnd(position + at, error.message)
            if header.size > BATCH_BYTES_MAX or position + at + header.size > size:
                return ScanEnd(position + at, f"batch of {header.size} bytes is cut off")
            if header.size > left:
                want = max(WINDOW_BYTES, header.size)
                break
            try:
                check_crc(window, header, at)
            except CorruptBatch as error:
                return ScanEnd(position + at, error.message)
            if header.base_offset != offset or not epoch <= header.epoch <= epoch_max:
                found = f"offset {header.base_offset} of epoch {header.epoch}"
                return ScanEnd(position + at, f"{found} where {offset} of epoch {epoch} or later belongs", damaged=True)
            accept(header, window[at : at + header.size])
            offset, epoch = header.next_offset, header.epoch
            at += header.size
        if at == 0 and position + len(window) >= size:
            return ScanEnd(position, f"{len(window)} bytes are left, less than a header")
        position += at
        yield
    return ScanEnd(position)


def find_batch_after(file: FileHandle, start: int, size: int, offset: int, epoch: int) -> Generator[None, None, int]:
    """Position of a valid batch that begins above ``start`` and can belong to this log; -1 if there is none.

    The batch at ``start`` is bad and would have begun at ``offset``. A batch further on that is whole, whose CRC holds,
    whose epoch is not older and whose offset is higher means that data was lost in the middle: a hole, not a torn tail.

    Values may contain copies of batches, so bytes that the header at ``start`` claims for itself count only if they
    hold the very next batch (then the claim was wrong: its length had rotted).
    """
    own_end, own_next = _claimed(file, start, offset, epoch)
    position = start + 1
    while position + HEADER_BYTES <= size:
        window = file.pread(min(WINDOW_BYTES + HEADER_BYTES, size - position), position)
        at = window.find(_MAGIC_BYTE, _MAGIC_AT)
        while at >= 0 and at - _MAGIC_AT + HEADER_BYTES <= len(window):
            begin = at - _MAGIC_AT
            base, length, found_epoch, _, _, _, delta = _PROBE.unpack_from(window, begin)
            total = length + LENGTH_PREFIX_BYTES
            if (
                (base == own_next if position + begin < own_end else base > offset)
                and HEADER_BYTES <= total <= min(BATCH_BYTES_MAX, size - position - begin)
                and found_epoch >= epoch
                and 0 <= delta < BATCH_RECORDS_MAX
                and _is_batch(file.pread(total, position + begin))
            ):
                return position + begin
            at = window.find(_MAGIC_BYTE, at + 1)
        position += max(1, len(window) - HEADER_BYTES + 1)
        yield
    return -1


def _claimed(file: FileHandle, start: int, offset: int, epoch: int) -> tuple[int, int]:
    """(end, next offset) of the bad batch by its own header; (start, -1) if that cannot be believed either."""
    try:
        header = read_header(file.pread(HEADER_BYTES, start))
    except CorruptBatch:
        return start, -1
    if header.base_offset != offset or header.epoch < epoch:
        return start, -1
    return start + header.size, header.next_offset


def _is_batch(data: bytes) -> bool:
    try:
        check_crc(data, read_header(data))
    except CorruptBatch:
        return False
    return True
