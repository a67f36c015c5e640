"""One timer for the deadlines of all partition cores."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

from ferryline_broker.clock import now_ms
from ferryline_broker.hosted import HostedReplica

_ARM_S = 0.004  # so much later than its time a deadline may be seen


class Deadlines:
    """Calls ``due(hosted, now_ms)`` when the deadline that a replica was armed with has passed, or may have.

    A replica has at most one entry that counts: one that fires earlier than its deadline finds nothing due, and whoever
    is called arms it again.
    """

    def __init__(
        self, due: Callable[[HostedReplica, int], None], broken: Callable[[HostedReplica, Exception], None]
    ) -> None:
        self._call = due
        self._broken = broken  # a core that failed when it was asked
        self._fed: dict[HostedReplica, None] = {}  # to be armed
        self._loop = asyncio.get_running_loop()
        self._heap: list[tuple[int, int, HostedReplica]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._earliest_ms = 0  # of the next timer: a deadline that its Tick did not clear must not spin the loop

    def arm_soon(self, hosted: HostedReplica) -> None:
        """Its deadline may be another now. Not looked at in every pass: frames that somebody waits for leave first, and
        once is enough for all that happens to it in between."""
        if not self._fed:
            self._loop.call_later(_ARM_S, self._arm_fed)
        self._fed[hosted] = None

    def _arm_fed(self) -> None:
        fed, self._fed = self._fed, {}
        for hosted in fed:
            try:
                self.arm(hosted)
            except Exception as error:
                self._broken(hosted, error)

    def arm(self, hosted: HostedReplica) -> None:
        """Look at the deadline of its core again."""
        deadline = hosted.core.next_deadline_ms()
        hosted.deadline_ms = deadline
        if deadline is None or (hosted.queued_ms is not None and hosted.queued_ms <= deadline):
            return  # what is queued fires earlier, finds nothing due and queues the present deadline
        hosted.queued_ms = deadline
        heapq.heappush(self._heap, (deadline, id(hosted), hosted))
        if self._timer is None or deadline < self._timer_ms:
            self._set_timer(deadline)

    def _set_timer(self, deadline_ms: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ms = max(deadline_ms, self._earliest_ms)
        self._timer = self._loop.call_later(max(0, self._timer_ms - now_ms()) / 1000, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now, heap = now_ms(), self._heap
        self._earliest_ms = now + 1
        due: list[HostedReplica] = []
        while heap and heap[0][0] <= now:
            queued, _, hosted = heapq.heappop(heap)
            if hosted.queued_ms == queued:
                hosted.queued_ms = None
                due.append(hosted)
        for hosted in due:
            self._call(hosted, now)
        if heap:
            self._set_timer(heap[0][0])
