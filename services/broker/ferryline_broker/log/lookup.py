"""Find things in segments: where a read must stop, which record is the first of a time, what retention may take."""

from __future__ import annotations

from ferryline.protocol.errors import CorruptBatch
from ferryline.protocol.records import check_crc, decode_batch
from ferryline_broker.log.model import LogConfig, SegmentInfo
from ferryline_broker.log.segment import Segment, Walked

DECODE_RECORDS_MAX = 100_000  # a larger batch answers with its base offset: decoding it would hold the loop

RETENTION_STEP = 4  # segments named at once: unlinking a large file takes milliseconds


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
    for _, following, size, _, _ in segment.skim(stop, segment.size):
        end = stop + size
        if following > below or (end > limit and stop > at.position):
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


def expired_segments(
    segments: list[Segment], config: LogConfig, now_wall_ms: int, limit_offset: int
) -> list[SegmentInfo]:
    """The oldest segments that are over age or over the size limit, as far as ``limit_offset`` allows.

    Too old: nothing was appended to it for ``retention_ms``; this may take the active segment too. Too much: without it
    the log still holds ``retention_bytes``.
    """
    found: list[SegmentInfo] = []
    over = sum(segment.size for segment in segments) - config.retention_bytes if config.retention_bytes >= 0 else -1
    for segment in segments:
        if segment.next_offset > limit_offset or len(found) == RETENTION_STEP:
            break
        too_old = 0 <= config.retention_ms < now_wall_ms - segment.appended_ms
        too_much = segment.seal is not None and segment.size <= over
        if not (too_old or too_much):
            break
        found.append(SegmentInfo(segment.base, segment.next_offset, segment.size, segment.appended_ms))
        over -= segment.size
    return found
