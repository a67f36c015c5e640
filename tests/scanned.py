"""What a window reads, as `queue_records.py` puts it."""

from __future__ import annotations

from collections.abc import Sequence

from ferryline_broker.core.queue_events import Scanned, ScannedBatch


def together(records: Sequence[Scanned]) -> list[Scanned | ScannedBatch]:
    """Records of one batch: as one, if of each there is nothing to know but its lane; otherwise as they are."""
    if not records:
        return []
    plain = all(one == Scanned(one.offset, one.lane) for one in records)
    row = [one.offset for one in records] == list(range(records[0].offset, records[0].offset + len(records)))
    if not (plain and row):
        return list(records)
    return [ScannedBatch(records[0].offset, [one.lane for one in records])]
