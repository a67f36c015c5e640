"""The receiver core against brokers that keep the promises of docs/queues.md, under lost answers and fail-overs.

The brokers here share one truth for each partition, as committed entries do; what a fail-over loses is only what was
not said yet. After each step nothing may be in the application's hands, or wait for it, that the brokers could give to
somebody else before the lease ends.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.core.leases import HANDED, WAITING, Lease
from ferryline.core.receiving import ReceiverCore
from ferryline.core.receiving_events import (
    Arrived,
    Closed,
    Event,
    ForgetReceive,
    GiveBack,
    KeepAnswered,
    Received,
    ReceiveFailed,
    RoutesChanged,
    SendKeep,
    SendReceive,
    SendSettle,
    SessionLost,
    Settle,
    SettleAnswered,
    SettleAsked,
    Settled,
    SettleFailed,
    TimePassed,
)
from ferryline.protocol.errors import ConnectionLost, NotPrimary, RequestTimedOut
from ferryline.protocol.queue_messages import ACK, NACK, Delivery, SettleEntry, SettleResult

Key = tuple[str, int]
KEYS: list[Key] = [("t", number) for number in range(4)]
BROKERS = [1, 2, 3]
RECORDS = 40
LEASE_MS = 30_000
OURS, SETTLED = "m", "settled"


@dataclass
class Partition:
    """What is committed: for each offset the lease that it is in, None, or SETTLED."""

    primary: int = 1
    epoch: int = 1
    numbers: int = 0
    records: list[Any] = field(default_factory=lambda: [None] * RECORDS)


@dataclass(eq=False)
class Frame:
    """Something on its way. ``answer`` is set once the broker has handled it; ``dead``: nobody waits for that."""

    effect: Any
    broker: int
    answer: Event | None = None
    dead: bool = False


class World:
    """A receiver core, brokers, and sessions in between, which keep the order of frames.

    A RECEIVE that finds nothing is parked, and may lease at any time later, also when nobody waits for it any more:
    what it leases then comes back when the lease ends. In a ``tidy`` world brokers notice, and no lease ever ends: what
    comes back comes back because the receiver said what it holds.
    """

    def __init__(self, seed: int, *, prefetch: int, forget_keep: bool = False) -> None:
        self.random = random.Random(seed)
        self.parts = {key: Partition(primary=self.random.choice(BROKERS)) for key in KEYS}
        self.core = ReceiverCore(ordering="key", prefetch=prefetch, prefetch_bytes=2**30, seed=seed)
        self.prefetch = prefetch
        self.forget_keep = forget_keep  # a bug: the receiver does not name what it holds
        self.tidy = self.random.random() < 0.5
        self.ends_parked = self.random.random() < 0.5  # a broker that answers who is parked when it hears a KEEP
        self.frames: list[Frame] = []  # that the receiver waits for
        self.lines: dict[int, list[Frame]] = {broker: [] for broker in BROKERS}  # not handled yet
        self.parked: list[Frame] = []
        self.now = 0
        self.numbers = 0
        self.asked: set[int] = set()
        self.done: list[int] = []
        self.waiting: list[tuple[Lease, int]] = []
        self.handed: list[tuple[Lease, int]] = []
        self.feed(self.routes())

    def routes(self) -> RoutesChanged:
        return RoutesChanged({key: (part.primary, part.epoch) for key, part in self.parts.items()})

    # -- the receiver ------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        for effect in self.core.handle(event, self.now):
            if isinstance(effect, (SendReceive, SendKeep, SendSettle)):
                frame = Frame(effect, effect.broker)
                self.frames.append(frame)
                self.lines[effect.broker].append(frame)
            elif isinstance(effect, Arrived):
                self.waiting += [(effect.lease, index) for index in range(len(effect.lease.offsets))]
            elif isinstance(effect, Settled):
                self.done.append(effect.number)
            elif isinstance(effect, ForgetReceive):
                for frame in self.frames:
                    frame.dead |= isinstance(frame.effect, SendReceive) and frame.effect.ask == effect.ask
                self.frames = [frame for frame in self.frames if not frame.dead]
            elif isinstance(effect, GiveBack):
                for lease, index in self.waiting[-effect.count :]:
                    self.settle(lease, index, "release")
        self.check()

    def settle(self, lease: Lease, index: int, action: str) -> None:
        if self.core.table.begin(lease, index):
            self.numbers += 1
            self.asked.add(self.numbers)
            idle = self.random.random() < 0.5
            self.feed(SettleAsked([Settle(self.numbers, lease, action, [index], self.now + LEASE_MS)], idle))

    def work(self) -> None:
        """The application takes one, or settles one."""
        if self.waiting and self.random.random() < 0.5:
            lease, index = self.waiting.pop(0)
            if self.core.table.hand_out(lease, index, self.now):
                self.handed.append((lease, index))
        elif self.handed:
            lease, index = self.handed.pop(self.random.randrange(len(self.handed)))
            self.settle(lease, index, ACK if self.random.random() < 0.8 else NACK)

    def check(self) -> None:
        table = self.core.table
        for lease in table.held.values():
            for index in lease.indexes(WAITING, HANDED):
                truth = self.parts[lease.key].records[lease.offsets[index]]
                assert truth == (lease.epoch, lease.number), (lease.id, lease.offsets[index], truth)
        reserved = sum(f.effect.records_max for f in self.frames if isinstance(f.effect, SendReceive))
        assert table.unsettled <= self.prefetch + 2 * len(BROKERS), "prefetch, and one for each request"
        assert table.unsettled + reserved <= 2 * (self.prefetch + 2 * len(BROKERS))
        assert table.unsettled == sum(len(lease.indexes(WAITING, HANDED)) for lease in table.held.values())

    # -- the brokers -------------------------------------------------------------------------------

    def handle(self, frame: Frame) -> None:
        """A broker handles a frame; what it does is committed at once."""
        effect = frame.effect
        if isinstance(effect, SendReceive):
            deliveries = self.lease(frame.broker, effect)
            if deliveries or self.random.random() < 0.3:
                frame.answer = Received(effect.ask, deliveries)
            elif not (self.tidy and frame.dead):
                self.parked.append(frame)
        elif isinstance(effect, SendKeep):
            errors = {}
            for key, numbers in effect.entries:
                part = self.parts[key]
                if part.primary != frame.broker:
                    errors[key] = NotPrimary("not here")
                    continue
                held = [] if self.forget_keep else numbers
                part.records = [r if r in (None, SETTLED) or r[1] in held else None for r in part.records]
            frame.answer = KeepAnswered(effect.keep, errors=errors)
            for parked in [parked for parked in self.parked if self.ends_parked and parked.broker == frame.broker]:
                self.parked.remove(parked)
                parked.answer = Received(parked.effect.ask, [])
        else:
            results = [self.settled(frame.broker, number, entry) for number, entry in enumerate(effect.entries)]
            frame.answer = SettleAnswered(effect.frame, results)

    def notice(self) -> None:
        if self.tidy:
            self.parked = [frame for frame in self.parked if not frame.dead]

    def handle_next(self, broker: int) -> None:
        if self.lines[broker]:
            self.handle(self.lines[broker].pop(0))

    def lease(self, broker: int, effect: SendReceive) -> list[Delivery]:
        found = []
        left = effect.records_max
        for key in effect.keys:
            part = self.parts[key]
            if part.primary != broker:
                continue
            offsets = [offset for offset, state in enumerate(part.records) if state is None][:left]
            if offsets:
                left -= len(offsets)
                part.numbers += 1
                for offset in offsets:
                    part.records[offset] = (part.epoch, part.numbers)
                ones = [1] * len(offsets)
                found.append(Delivery(*key, part.epoch, part.numbers, b"", LEASE_MS, offsets, ones, len(offsets)))
        return found

    def settled(self, broker: int, index: int, entry: SettleEntry) -> SettleResult:
        part = self.parts[entry.topic_id, entry.partition]
        if part.primary != broker:
            return SettleResult(index, error=NotPrimary("not here").info())
        result = SettleResult(index, [], [])
        for offset in entry.offsets:
            state = part.records[offset]
            if state == SETTLED:
                result.settled.append(offset)
            elif state != (entry.epoch, entry.lease):
                result.stale.append(offset)
            else:
                part.records[offset] = SETTLED if entry.action == ACK else None
        return result

    # -- trouble -----------------------------------------------------------------------------------

    def give_up(self, frame: Frame, error: Exception) -> None:
        """The receiver gets no answer to a frame; the broker may see it, or has seen it."""
        self.frames.remove(frame)
        frame.dead = True
        effect = frame.effect
        if isinstance(effect, SendReceive):
            self.feed(ReceiveFailed(effect.ask, error))  # type: ignore[arg-type]
        elif isinstance(effect, SendKeep):
            self.feed(KeepAnswered(effect.keep, error))  # type: ignore[arg-type]
        else:
            self.feed(SettleFailed(effect.frame, error))  # type: ignore[arg-type]

    def lose_session(self, broker: int) -> None:
        """What the broker has read of the old session is handled before anything of a new one; the rest is lost."""
        read = self.random.randrange(len(self.lines[broker]) + 1)
        for _ in range(read):
            self.handle_next(broker)
        self.lines[broker].clear()
        self.parked = [frame for frame in self.parked if frame.broker != broker or self.random.random() < 0.3]
        for frame in [frame for frame in self.frames if frame.broker == broker]:
            if not frame.dead:
                self.give_up(frame, ConnectionLost("gone"))
        self.feed(SessionLost(broker))

    def move(self) -> None:
        """A broker has handled what it read before it hears that it is a primary now."""
        part = self.parts[self.random.choice(KEYS)]
        chosen = self.random.choice([*BROKERS, part.primary])
        while chosen != part.primary and self.lines[chosen]:
            self.handle_next(chosen)
        part.primary = chosen
        part.epoch += 1
        if self.random.random() < 0.7:
            self.feed(self.routes())

    def step(self) -> None:
        draw = self.random.random()
        if draw < 0.3:
            self.work()
        elif draw < 0.5:
            self.handle_next(self.random.choice(BROKERS))
        elif draw < 0.7:
            self.answer_one()
        elif draw < 0.75:
            self.notice()
            if not self.parked:
                return
            self.handle(self.parked.pop(self.random.randrange(len(self.parked))))
        elif draw < 0.8:
            self.move()
        elif draw < 0.83:
            self.lose_session(self.random.choice(BROKERS))
        elif draw < 0.86 and self.frames:
            self.give_up(self.random.choice(self.frames), RequestTimedOut("late"))
        elif draw < 0.9:
            self.feed(self.routes())
        else:
            self.pass_time(self.random.randrange(200))

    def answer_one(self) -> None:
        answered = [frame for frame in self.frames if frame.answer is not None]
        if answered:
            frame = self.random.choice(answered)
            self.frames.remove(frame)
            assert frame.answer is not None
            self.feed(frame.answer)

    def pass_time(self, ms: int) -> None:
        self.now += ms
        due = self.core.next_deadline_ms()
        if due is not None and due <= self.now:
            self.feed(TimePassed())
        for lease in self.core.table.held.values():
            lease.prolong(self.now, LEASE_MS)  # the renewal does its work

    def drain(self) -> None:
        """No more trouble: everything is delivered and acknowledged."""
        self.feed(self.routes())
        for broker in BROKERS if not self.tidy else ():
            self.lose_session(broker)
        self.parked = [frame for frame in self.parked if not frame.dead]
        held = {lease.id for lease in self.core.table.held.values()}
        for key, part in self.parts.items() if not self.tidy else ():  # what nobody knows of ends by time
            part.records = [r if r in (None, SETTLED) or (key, *r) in held else None for r in part.records]
        for _ in range(3_000):
            if all(state == SETTLED for part in self.parts.values() for state in part.records):
                break
            parked, self.parked = self.parked, []
            for frame in parked:
                self.handle(frame)
            for broker in BROKERS:
                while self.lines[broker]:
                    self.handle_next(broker)
            while any(frame.answer is not None for frame in self.frames):
                self.answer_one()
            for lease, index in self.waiting:
                if self.core.table.hand_out(lease, index, self.now):
                    self.handed.append((lease, index))
            self.waiting.clear()
            for lease, index in self.handed:
                self.settle(lease, index, ACK)
            self.handed.clear()
            self.pass_time(100)
        assert all(state == SETTLED for part in self.parts.values() for state in part.records)


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), prefetch=st.sampled_from([1, 2, 8, 100]))
def test_nothing_is_worked_on_that_others_may_have_and_everything_comes_to_its_end(seed: int, prefetch: int) -> None:
    world = World(seed, prefetch=prefetch)
    for _ in range(250):
        world.step()
    world.drain()
    world.feed(Closed())
    assert sorted(world.done) == sorted(world.asked), "each settlement has exactly one last word"


def test_the_model_notices_a_receiver_that_does_not_say_what_it_holds() -> None:
    def run() -> None:
        for seed in range(50):
            world = World(seed, prefetch=8, forget_keep=True)
            for _ in range(250):
                world.step()

    with pytest.raises(AssertionError):
        run()
