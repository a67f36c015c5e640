"""Which records are leased before they are committed: their lease travels to the secondaries with them (docs/adr/0013).
Pure.

Records may be leased ahead when they stand at the high watermark and every secondary waits for them: as soon as they
are appended, or, of what came while others were on their way, when the secondaries ask for it.

The lease is answered when it is committed, and its records are. Should they be lost with this primaryship, it is void:
it names their epoch. Nothing else may be decided of records before they are committed (see `WindowRead.plain`).
"""

from __future__ import annotations

from collections import deque

from ferryline.protocol.messages import RECORDS
from ferryline.protocol.records import BatchHeader
from ferryline_broker.core.feeder import Feeder
from ferryline_broker.core.queue_events import ReadWindow
from ferryline_broker.core.queues import Queues
from ferryline_broker.core.replica import Replica

BYTES_MAX = 16 * 1024  # of batches that are read for it, in between


class LookAhead:
    """The record batches of one primaryship that are not committed, without the mark of its start."""

    def __init__(self, replica: Replica, feeder: Feeder) -> None:
        self._replica = replica
        self._feeder = feeder
        self._uncommitted: deque[BatchHeader] = deque()

    def appended(self, header: BatchHeader) -> None:
        """`look` follows, which forgets what is committed."""
        self._uncommitted.append(header)

    def look(self, queues: Queues | None) -> bool:
        """If a queue has seen all that is before these records, and somebody waits for more, have it look at them.
        Returns whether one does; then a lease may follow in this pass."""
        self._forget_committed()
        if queues is None or not self._uncommitted:
            return False
        base = end = self._uncommitted[0].base_offset
        groups = queues.expecting(base)  # first: without a queue that waits there is nothing to count
        if not groups or not self._feeder.all_wait_at(base):
            return False
        size = 0
        for header in self._uncommitted:
            if header.is_control or size + header.size > BYTES_MAX:
                break
            end, size = header.next_offset, size + header.size
        if end == base:
            return False
        for group in groups:
            self._replica.out.append(ReadWindow(group, base, end, size, ahead=True))
        return True

    def _forget_committed(self) -> None:
        uncommitted, high = self._uncommitted, self._replica.high_watermark[RECORDS]
        while uncommitted and uncommitted[0].next_offset <= high:
            uncommitted.popleft()
