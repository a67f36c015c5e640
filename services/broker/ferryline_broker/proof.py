"""Is this broker still the primary? A deposed one does not know, but nothing that it appends is ever committed."""

from __future__ import annotations

from ferryline.protocol.errors import ErrorInfo, NotReady
from ferryline_broker.core.events import BarrierAsked, Refuse
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.ports import Answer, Emitter
from ferryline_broker.produce import refusal_info

BARRIER_MS = 10_000


class Proof:
    """A barrier in the state log. ``waiter.emit()`` follows once it is ``settled``; ``error``: why nobody can say."""

    def __init__(self, driver: PartitionDriver, hosted: HostedReplica, waiter: Emitter) -> None:
        self.settled = False
        self.error: ErrorInfo | None = None
        self._waiter = waiter
        driver.feed(hosted, BarrierAsked(driver.token(self, 0, hosted), BARRIER_MS))

    def settle(self, _index: int, answer: Answer) -> None:
        self.settled = True
        if isinstance(answer, Refuse):
            self.error = refusal_info(answer)
            if answer.code == "COMMIT_UNKNOWN":  # of the barrier: the reader has written nothing
                self.error = NotReady("this broker cannot prove that it is still the primary").info()

    def emit(self) -> None:
        self._waiter.emit()
