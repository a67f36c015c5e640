"""Ids of records that a queue has come across: the same id again, within the dedupe window, is not delivered. Pure."""

from __future__ import annotations

from ferryline_broker.core.queue_config import QueueConfig
from ferryline_broker.core.queue_events import Scanned


class SeenIds:
    """As many as the configuration allows; older ones are forgotten."""

    def __init__(self, config: QueueConfig) -> None:
        self._config = config
        self._ids: dict[bytes, tuple[int, int]] = {}  # id -> (offset, when it was seen), oldest first

    def again(self, record: Scanned, now_ms: int) -> bool:
        """Has this id come by within the dedupe window, on an earlier record?"""
        ids = self._ids
        found = ids.get(record.id)
        if found is not None and now_ms - found[1] < self._config.dedupe_ms:
            return found[0] < record.offset
        ids.pop(record.id, None)
        ids[record.id] = (record.offset, now_ms)
        if len(ids) > self._config.ids:
            del ids[next(iter(ids))]
        return False
