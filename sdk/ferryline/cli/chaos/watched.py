"""A receiver that writes down what it was given, what it said about it, and what it was told.

The frames are seen where the core of the receiver asks for them and hears of them, so nothing is written down that a
broker did not say, and nothing said is left out but prolongations of leases, which travel beside.
"""

from __future__ import annotations

from typing import Any

from ferryline.cli.chaos.record import now_us
from ferryline.client import Client
from ferryline.core.leases import PartitionKey
from ferryline.core.receiving_events import (
    Effect,
    Event,
    KeepAnswered,
    Received,
    ReceiveFailed,
    SendKeep,
    SendReceive,
    SendSettle,
    SettleAnswered,
    SettleFailed,
)
from ferryline.proof.queues import FAIL, INFO, OK, QueueOp
from ferryline.protocol.errors import from_info
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import Delivery
from ferryline.queues.leasing import Leasing
from ferryline.queues.options import ReceiverOptions
from ferryline.queues.receiver import Receiver


class Journal:
    """What all receivers of a queue did and saw. An entry is made when something is asked, and completed by its answer;
    one that is never answered stays unknown."""

    def __init__(self) -> None:
        self.ops: list[QueueOp] = []

    def note(self, op: QueueOp) -> QueueOp:
        self.ops.append(op)
        return op


class WatchedLeasing(Leasing):
    """`Leasing` whose events and effects are noted as they pass."""

    def __init__(self, client: Client, options: ReceiverOptions, meta: TopicMeta, journal: Journal) -> None:
        super().__init__(client, options, meta)
        self._journal = journal
        self._asked: dict[int, tuple[int, int]] = {}  # ask -> when, and for how many
        self._settling: dict[int, list[QueueOp]] = {}  # frame -> its entries
        self._keeping: dict[int, list[tuple[PartitionKey, QueueOp]]] = {}

    def _carry_out(self, effect: Effect) -> None:
        t0 = now_us()
        if isinstance(effect, SendReceive):
            self._asked[effect.ask] = (t0, effect.records_max)
        elif isinstance(effect, SendSettle):
            self._settling[effect.frame] = [
                self._journal.note(
                    QueueOp(
                        "settle",
                        str(entry.partition),
                        self.member,
                        INFO,
                        t0,
                        epoch=entry.epoch,
                        lease=entry.lease,
                        offsets=list(entry.offsets),
                        action=entry.action,
                        delay_ms=entry.delay_ms,
                    )
                )
                for entry in effect.entries
            ]
        elif isinstance(effect, SendKeep):
            self._keeping[effect.keep] = [(key, self._keep(key, numbers, t0)) for key, numbers in effect.entries]
        super()._carry_out(effect)

    def _keep(self, key: PartitionKey, numbers: list[int], t0: int) -> QueueOp:
        held = [lease for lease in self.table.held.values() if lease.key == key and lease.number in numbers]
        leases = sorted((lease.epoch, lease.number) for lease in held)
        return self._journal.note(QueueOp("keep", str(key[1]), self.member, t0=t0, leases=leases))

    def feed(self, event: Event, parts: list[memoryview] | None = None) -> None:
        if isinstance(event, Received):
            t0, limit = self._asked.pop(event.ask, (0, 0))
            for delivery in event.deliveries:
                if delivery.error is None and delivery.offsets:
                    self._delivered(delivery, t0, limit)
        elif isinstance(event, ReceiveFailed):
            self._asked.pop(event.ask, None)
        elif isinstance(event, SettleAnswered):
            self._settled(event)
        elif isinstance(event, SettleFailed):
            for op in self._settling.pop(event.frame, ()):
                op.type, op.t1 = FAIL if event.error.definite else INFO, now_us()
        elif isinstance(event, KeepAnswered) and event.error is None:
            for key, op in self._keeping.pop(event.keep, ()):
                op.t1 = 0 if key in event.errors else now_us()
        super().feed(event, parts)

    def _delivered(self, delivery: Delivery, t0: int, limit: int) -> None:
        self._journal.note(
            QueueOp(
                "deliver",
                str(delivery.partition),
                self.member,
                OK,
                t0,
                now_us(),
                delivery.epoch,
                delivery.lease,
                delivery.lease_ms,
                list(delivery.offsets),
                list(delivery.attempts),
                limit,
            )
        )

    def _settled(self, event: SettleAnswered) -> None:
        results = {result.index: result for result in event.results}
        for index, op in enumerate(self._settling.pop(event.frame, ())):
            result, op.t1 = results.get(index), now_us()
            if result is None:
                continue
            if result.error is not None:
                op.type = FAIL if from_info(result.error).definite else INFO
            else:
                op.type, op.stale, op.settled = OK, list(result.stale), list(result.settled)


class WatchedReceiver(Receiver[bytes]):
    """A `Receiver` whose frames are noted in a journal, and which may die."""

    def __init__(self, client: Client, topic: str, *, journal: Journal, **options: Any) -> None:
        super().__init__(client, topic, **options)
        self._journal = journal

    def _lease(self, meta: TopicMeta) -> Leasing:
        return WatchedLeasing(self._client, self._options, meta, self._journal)

    async def die(self) -> None:
        """As if the process had been killed: nothing more is sent or heeded, and nobody is told."""
        leasing = self._running()
        self._closed = True
        self._client.closables.remove(self)
        leasing.core.broken = True
        if self._renewing is not None:
            self._renewing.stop()
        await leasing._frames.close()
