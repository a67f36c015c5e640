"""What is left of a replica whose disk is full: it refuses, serves what is committed, and lets another copy lead. Pure.

The append that failed is gone from the file, but not from what this core had counted on; so the replica takes part in
nothing any more until its log was opened again, by another process life. What it has acknowledged is on its disk: it is
not reported as damaged and stays a candidate.
"""

from __future__ import annotations

from ferryline.protocol.messages import ResignEntry
from ferryline_broker.core.events import Refuse, SendResign
from ferryline_broker.core.replica import BOTH_LOGS, Replica


class OutOfSpace:
    """``ends``: of both logs, as they are on the disk. ``led``: the replica was primary when the disk refused."""

    def __init__(self, replica: Replica, led: bool, reason: str, ends: tuple[int, int], now_ms: int) -> None:
        self.reason = reason
        self._replica = replica
        self._resigning = replica.part.epoch if replica.part is not None and led else -1
        self._due_ms = now_ms
        for log in BOTH_LOGS:  # reports must not tell of what never reached the disk
            end = max(replica.log_start[log], min(replica.log_end[log], ends[log]))
            replica.log_end[log] = end
            replica.flushed[log] = min(replica.flushed[log], end)
            replica.high_watermark[log] = min(replica.high_watermark[log], end)
            replica.epochs[log].truncate(end)
        self.tick(now_ms)

    @property
    def leads(self) -> bool:
        """By the coordinator's record this is the primary: it serves reads, and says why it refuses everything else."""
        part = self._replica.part
        return part is not None and part.primary == self._replica.broker_id

    def next_deadline_ms(self) -> int | None:
        return self._due_ms if self._may_resign() else None

    def tick(self, now_ms: int) -> None:
        """Give up the primaryship in which the disk refused, until the coordinator has heard it.

        Not a later one: where every disk is full, the copies would hand the partition round and round.
        """
        if self._may_resign() and now_ms >= self._due_ms:
            self._due_ms = now_ms + self._replica.config.alter_retry_ms
            self._replica.out.append(SendResign(ResignEntry(*self._replica.key, self._resigning, "handover")))

    def refuse(self, token: int) -> None:
        part = self._replica.part
        assert part is not None
        self._replica.out.append(Refuse(token, "STORAGE_FULL", self.reason, part.primary, part.epoch))

    def _may_resign(self) -> bool:
        part = self._replica.part
        return part is not None and self.leads and part.epoch == self._resigning and len(part.isr) > 1
