"""Who waits for a high watermark: answered when it passes, told "unknown" when time or the primaryship ends. Pure."""

from __future__ import annotations

import heapq

import msgspec

from ferryline.protocol.messages import RECORDS, STATE
from ferryline_broker.core.events import Effect, Refuse
from ferryline_broker.core.replica import BOTH_LOGS, Replica


class Waiting(msgspec.Struct, order=True, gc=False):
    """A token that is answered when the high watermark passes ``last_offset``; of a record with ``then`` >= 0 when that
    of the state log has passed ``then``, too."""

    last_offset: int
    order: int
    deadline_ms: int
    token: int
    answer: Effect
    then: int = -1


class WaitList:
    """Tokens by the offset they wait for, one heap per log. Every token that enters leaves by exactly one effect."""

    def __init__(self, replica: Replica, epoch: int) -> None:
        self._replica = replica
        self._epoch = epoch
        self._heaps: tuple[list[Waiting], list[Waiting]] = ([], [])
        self._order = 0
        self._expiry_ms: int | None = None  # earliest deadline of anything waiting

    def add(self, log: int, last: int, token: int, answer: Effect, deadline_ms: int, *, record: int = -1) -> None:
        """``answer`` goes out when everything up to offset ``last`` is committed, and up to ``record`` in the record
        log; at once if it is."""
        high, then = self._replica.high_watermark, -1
        if record >= high[RECORDS]:
            log, last, then = RECORDS, record, last
        elif high[log] > last:
            self._replica.out.append(answer)
            return
        self._order += 1
        heapq.heappush(self._heaps[log], Waiting(last, self._order, deadline_ms, token, answer, then))
        self._expiry_ms = deadline_ms if self._expiry_ms is None else min(self._expiry_ms, deadline_ms)

    def release(self) -> None:
        """Rule L5: answer what the high watermarks have passed."""
        for log in BOTH_LOGS:
            heap, high = self._heaps[log], self._replica.high_watermark[log]
            while heap and heap[0].last_offset < high:
                entry = heapq.heappop(heap)
                if entry.then >= 0:  # of a lease: its record is committed, perhaps it is not yet
                    self.add(STATE, entry.then, entry.token, entry.answer, entry.deadline_ms)
                else:
                    self._replica.out.append(entry.answer)

    def expire(self, now_ms: int) -> None:
        if self._expiry_ms is None or now_ms < self._expiry_ms:
            return
        message = "not committed within the time asked for"
        for heap in self._heaps:
            for entry in sorted(heap):
                if entry.deadline_ms <= now_ms:
                    refusal = Refuse(entry.token, "COMMIT_UNKNOWN", message, self._replica.broker_id, self._epoch)
                    self._replica.out.append(refusal)
            heap[:] = [entry for entry in heap if entry.deadline_ms > now_ms]
            heapq.heapify(heap)
        self._expiry_ms = min((entry.deadline_ms for heap in self._heaps for entry in heap), default=None)

    def give_up(self, code: str, reason: str, primary: int, epoch: int) -> None:
        """The primaryship ended: what waits may still be committed by the next primary, so nobody can say."""
        for heap in self._heaps:
            for entry in sorted(heap):
                self._replica.out.append(Refuse(entry.token, code, reason, primary, epoch))
            heap.clear()
        self._expiry_ms = None

    def next_deadline_ms(self) -> int | None:
        return self._expiry_ms if any(self._heaps) else None
