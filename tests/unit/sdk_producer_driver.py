"""A producer core with one partition, driven by hand."""

from __future__ import annotations

from ferryline.core.producer import (
    BatchAnswered,
    BatchClosed,
    CompleteBatch,
    Effect,
    FailBatch,
    ProducerCore,
    RefreshMetadata,
    RepartitionBatch,
    RouteChanged,
    SendBatch,
    TimePassed,
)
from ferryline.protocol.errors import FerrylineError

KEY = ("t" * 32, 0)
DELIVERY_MS = 120_000


class Driver:
    """A producer core with one routed partition, and its sent attempts by batch."""

    def __init__(self, broker: int = 1, epoch: int = 1) -> None:
        self.core = ProducerCore(pid=7)
        self.now = 1_000
        self.batches = 0
        self.sent: list[SendBatch] = []
        self.completed: list[int] = []
        self.failed: dict[int, FerrylineError] = {}
        self.returned: list[int] = []
        self.refreshes = 0
        if broker:
            self.do(RouteChanged(KEY, broker, epoch))

    def do(self, event: object) -> list[SendBatch]:
        effects: list[Effect] = self.core.handle(event, self.now)  # type: ignore[arg-type]
        sends = [effect for effect in effects if isinstance(effect, SendBatch)]
        self.sent += sends
        for effect in effects:
            if isinstance(effect, CompleteBatch):
                self.completed.append(effect.batch)
            elif isinstance(effect, FailBatch):
                self.failed[effect.batch] = effect.error
            elif isinstance(effect, RepartitionBatch):
                self.returned.append(effect.batch)
            elif isinstance(effect, RefreshMetadata):
                self.refreshes += 1
        return sends

    def close(self, count: int = 1, records: int = 1, partitions: int = 0) -> list[SendBatch]:
        sends = []
        for _ in range(count):
            self.batches += 1
            sends += self.do(BatchClosed(KEY, self.batches, records, self.now + DELIVERY_MS, partitions))
        return sends

    def ack(self, send: SendBatch, base_offset: int = 0) -> list[SendBatch]:
        return self.do(BatchAnswered(KEY, send.batch, send.attempt, base_offset, 1))

    def refuse(self, send: SendBatch, error: FerrylineError) -> list[SendBatch]:
        return self.do(BatchAnswered(KEY, send.batch, send.attempt, error=error))

    def later(self, ms: int | None = None) -> list[SendBatch]:
        """Advance by ``ms``, or exactly to the next deadline."""
        deadline = self.core.next_deadline_ms()
        assert ms is not None or deadline is not None
        self.now = self.now + ms if ms is not None else deadline  # type: ignore[assignment]
        return self.do(TimePassed())


def numbers(sends: list[SendBatch]) -> list[int]:
    return [send.batch for send in sends]
