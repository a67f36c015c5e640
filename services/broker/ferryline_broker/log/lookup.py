"""Find things inside one segment: where a read must stop, and which record is the first of a time."""

from __future__ import annotations

from ferryline.protocol.errors import CorruptBatch
from ferryline.protocol.records import check_crc, decode_batch
from ferryline_broker.log.segment import Segment, Walked

DECODE_RECORDS_MAX = 100_000  # a larger batch answers with its base offset: decoding it would hold the loop


def stop_position(segment: Segment, at: Walked, bytes_max: int, below: int) -> int:
    """End of the last batch, from ``at`` on, that ends within ``bytes_max`` bytes and not above ``below``.

    The first batch may be larger than ``bytes_max``. Equals ``at.position`` if even that one ends above ``below``.
    """
    limit = at.position + bytes_max
    if limit >= segment.size and segment.next_offset <= below:
        return segment.size
    index = segment.load_index()
    stop = at.position
    for entry in (index.at_position(limit), index.at_offset(below - segment.base)):
        if entry is None or entry.position <= at.position:
            stop = at.position
            break
        stop = entry.position if stop == at.position else min(stop, entry.position)
    for header, _ in segment.walk(stop, segment.size):
        end = stop + header.size
        if header.next_offset > below or (end > limit and stop > at.position):
            break
        stop = end
    return stop


def offset_for_time(segment: Segment, timestamp_ms: int) -> int | None:
    """Offset of the first record of the segment that is not older than ``timestamp_ms``; None if there is none."""
    entry = segment.load_index().before_time(timestamp_ms)
    position = entry.position if entry is not None else 0
    for header, _ in segment.walk(position, segment.size):
        if header.max_timestamp >= timestamp_ms:
            if header.base_timestamp >= timestamp_ms or header.record_count > DECODE_RECORDS_MAX:
                return header.base_offset
            data = segment.file.pread(header.size, position)
            try:
                check_crc(data, header)
                for record in decode_batch(data, header):
                    if record.timestamp >= timestamp_ms:
                        return record.offset
            except CorruptBatch as error:
                raise segment.damaged(header.base_offset, error.message) from error
            return header.base_offset  # the header promised one; start early rather than late
        position += header.size
    return None
