"""What must hold when a queue answers, seen from inside: called by the drivers at that moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferryline.protocol.messages import RECORDS, STATE
from ferryline_broker.core.events import Key
from ferryline_broker.core.groups import StateEntry
from ferryline_broker.core.partition import PartitionCore
from ferryline_broker.core.queue_entries import Dying, Parked, Settled, last_of
from ferryline_broker.core.queue_events import AnswerLease, AnswerQueue, AnswerSettle
from tests.simulation.ghost import Violation
from tests.simulation.serving import Waiter

if TYPE_CHECKING:
    from tests.simulation.broker import Broker
    from tests.simulation.world import World

QueueAnswer = AnswerLease | AnswerSettle | AnswerQueue


class QueueChecks:
    """Leases and settlements count when they are committed, and are told only then."""

    def __init__(self, world: World) -> None:
        self.world = world

    def appended(self, broker: Broker, key: Key, core: PartitionCore, entries: list[StateEntry]) -> None:
        """Whatever is decided of a record but its lease, and that it is given back, could not be void if it is lost."""
        for entry in entries:
            if isinstance(entry, Settled | Dying | Parked) and last_of(entry) >= core.high_watermark[RECORDS]:
                raise Violation("Q0 nothing but leases before the commit", f"{broker} {key}: {entry}")

    def answered(self, broker: Broker, key: Key, core: PartitionCore, waiter: Waiter, answer: QueueAnswer) -> None:
        truth = self.world.truth(key)[STATE]
        if core.role != "primary" or truth.end < waiter.state_end:
            raise Violation(
                "D1.10 queues answer when it is committed",
                f"{broker} {key}: {waiter.event} answered at state end {waiter.state_end}, committed {truth.end}",
            )
        if isinstance(answer, AnswerLease) and max(answer.offsets, default=-1) >= self.world.truth(key)[RECORDS].end:
            raise Violation("Q0 only committed records are given out", f"{broker} {key}: {waiter.event} got {answer}")
        self.world.count(f"queue answers {type(answer).__name__}")
