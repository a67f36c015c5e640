"""A receiver core, told step by step what happens to it."""

from __future__ import annotations

from typing import Any

from ferryline.core.leases import WAITING, Lease
from ferryline.core.receiving import ReceiverCore
from ferryline.core.receiving_events import (
    Arrived,
    Effect,
    Event,
    Received,
    RoutesChanged,
    SendReceive,
    Settle,
    SettleAsked,
)
from ferryline.protocol.queue_messages import EXTEND, Delivery

A, B, C, D = (("t", number) for number in range(4))
LEASE_MS = 30_000


class Story:
    """A receiver core, and brokers that do what a test tells them. ``effects`` are those of the last event."""

    def __init__(self, routes: dict[tuple[str, int], tuple[int, int]], **options: Any) -> None:
        self.core = ReceiverCore(**{"ordering": "key", "prefetch": 30, "prefetch_bytes": 2**20, **options})
        self.now = 0
        self.numbers = 0
        self.routes = dict(routes)
        self.effects = self.do(RoutesChanged(self.routes))

    def do(self, event: Event, after_ms: int = 0) -> list[Effect]:
        self.now += after_ms
        self.effects = self.core.handle(event, self.now)
        return self.effects

    def pick(self, kind: type[Any]) -> list[Any]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def one(self, kind: type[Any]) -> Any:
        found = self.pick(kind)
        assert len(found) == 1, self.effects
        return found[0]

    def delivery(self, key: tuple[str, int], number: int, offsets: list[int], epoch: int = 1) -> Delivery:
        attempts = [1] * len(offsets)
        return Delivery(*key, epoch, number, b"r%d" % number, LEASE_MS, offsets, attempts, 10 * len(offsets))

    def receive(self, ask: SendReceive, *deliveries: Delivery, after_ms: int = 1, more: bool = False) -> list[Lease]:
        self.do(Received(ask.ask, list(deliveries), more), after_ms)
        return [effect.lease for effect in self.pick(Arrived)]

    def hand_out(self, lease: Lease) -> None:
        for index in lease.indexes(WAITING):
            assert self.core.table.hand_out(lease, index, self.now)

    def settle(
        self, lease: Lease, action: str, *indexes: int, deadline_ms: int = 0, idle: bool = False, **more: Any
    ) -> int:
        if action != EXTEND:
            for index in indexes:
                assert self.core.table.begin(lease, index)
        self.numbers += 1
        deadline_ms = deadline_ms or self.core.settle_deadline_ms(lease, self.now)
        self.do(SettleAsked([Settle(self.numbers, lease, action, list(indexes), deadline_ms, **more)], idle))
        return self.numbers

    def move(self, key: tuple[str, int], broker: int) -> None:
        self.routes[key] = (broker, self.routes[key][1] + 1)
        self.do(RoutesChanged(dict(self.routes)))

    def one_lease(self, *offsets: int) -> Lease:
        """Leased in partition A of broker 1, and handed out."""
        asks = [ask for ask in self.pick(SendReceive) if A in ask.keys]
        (lease,) = self.receive(asks[0], self.delivery(A, 1, list(offsets)))
        self.hand_out(lease)
        return lease


def story(**options: Any) -> Story:
    """Partition A at broker 1, and nothing else."""
    return Story({A: (1, 1)}, **options)
