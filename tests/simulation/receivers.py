"""Receivers of the queue: they lease, work, and settle in every way; and they die, close, pause and come back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferryline.proof.queues import FAIL, INFO, OK, QueueOp
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.queue_messages import ACK, EXTEND, NACK, REJECT, RELEASE
from ferryline_broker.core.events import Key
from tests.simulation.clients import Client
from tests.simulation.engine import MS
from tests.simulation.network import Session

if TYPE_CHECKING:
    from tests.simulation.queueing import QueuePart

WAIT_MS = 1_000
LeaseKey = tuple[Key, int, int]  # partition, epoch, number


class Asked:
    """A request under way, or what became of it."""

    __slots__ = ("began_us", "doubtful", "key", "kind", "op", "tries", "wants")

    def __init__(self, kind: str, key: Key, began_us: int, op: QueueOp | None = None, wants: Any = None) -> None:
        self.kind, self.key, self.began_us = kind, key, began_us
        self.op = op
        self.wants = wants
        self.tries = 0
        self.doubtful = False  # some attempt of it may have been carried out


class Receiver(Client):
    """One member of the queue group. What it holds it remembers until it has heard that it is settled."""

    def __init__(self, part: QueuePart, number: int) -> None:
        super().__init__(part.world, f"q{number}")
        self.part = part
        self.rng = part.rng
        self.held: dict[LeaseKey, list[int]] = {}
        self.receiving: set[Key] = set()
        self.primaries: dict[Key, tuple[int, int]] = {}
        self.met: set[str] = set()  # hosts to which it once had a session
        self.closing = False

    def start(self) -> None:
        self.poll_metadata()
        self._redrive()

    def die(self) -> None:
        self.host.end_life()
        self.world.network.host_died(self, silently=False)

    def close(self) -> None:
        """Say that nothing is held, then go."""
        self.closing = True
        self.held.clear()
        for key in sorted(self.metadata.partitions):
            self._keep(key)
        self.host.deliver_after(300 * MS, self.die)

    # -- sessions and primaries ----------------------------------------------------------------------

    def session_opened(self, session: Session) -> None:
        name = session.peer(self).host.name
        again = name in self.met
        self.met.add(name)
        if again:
            broker = self.world.broker_by_host(name)
            for key, part in sorted(self.metadata.partitions.items()):
                if broker is not None and part.primary == broker.id:
                    self._keep(key)
        super().session_opened(session)

    def metadata_changed(self) -> None:
        for key, part in sorted(self.metadata.partitions.items()):
            before = self.primaries.get(key)
            self.primaries[key] = (part.primary, part.epoch)
            if before is not None and before != self.primaries[key] and part.primary != NO_BROKER:
                self._keep(key)
            if key not in self.receiving:
                self.receiving.add(key)
                self._receive(key)

    def _primary(self, key: Key) -> Any:
        part = self.metadata.partitions.get(key)
        return self.world.broker_by_id(part.primary) if part is not None and part.primary != NO_BROKER else None

    def _keep(self, key: Key) -> None:
        target = self._primary(key)
        if target is not None:
            op = QueueOp("keep", self._name(key), proc=self.host.name, t0=self.engine.now_us)
            op.leases = sorted((epoch, number) for (where, epoch, number) in self.held if where == key)
            self.part.note(op)  # whether it came is not known, so it may have
            numbers = [number for _, number in op.leases]
            self.ask(target, "keep", key, self.host.name, numbers, context=Asked("keep", key, op.t0, op))

    def _name(self, key: Key) -> str:
        return f"{key[0][:8]}-{key[1]}"

    def _redrive(self) -> None:
        """An operator who sets parked records free, now and then."""
        if not self.world.calm and self.part.drawn.retry.on_dead == "park":
            self.host.deliver_after(self.part.between(1_000, 4_000) * MS, self._redrive)
            for key in sorted(self.metadata.partitions):
                if self.rng.random() < 0.3:
                    self.redrive(key)

    def redrive(self, key: Key) -> None:
        target = self._primary(key)
        if target is not None:
            self.part.note(QueueOp("redrive", self._name(key), t0=self.engine.now_us))
            self.ask(target, "redrive", key, context=Asked("redrive", key, self.engine.now_us))

    # -- receiving -----------------------------------------------------------------------------------

    def _receive(self, key: Key) -> None:
        target = self._primary(key)
        if key not in self.metadata.partitions or self.closing:
            self.receiving.discard(key)
            return
        if target is None:
            self.refresh()
            self._later(key)
            return
        drawn = self.part.drawn
        limit = drawn.records_max if not self.world.calm else 20
        self.ask(
            target, "receive", key, self.host.name, drawn.ordering, drawn.lease_ms, limit, WAIT_MS,
            context=Asked("receive", key, self.engine.now_us, wants=limit),
        )  # fmt: skip

    def _later(self, key: Key) -> None:
        self.host.deliver_after(self.part.between(50, 400) * MS, self._receive, key)

    def answered(self, context: Any, frame: Any) -> None:
        found, error = frame[2], frame[3]
        if context.kind == "receive":
            if error is not None:
                self.refresh()
                self._later(context.key)
            else:
                if found is not None:
                    self._leased(context, *found)
                self.host.deliver_after(self.part.between(1, 30) * MS, self._receive, context.key)
        elif context.kind == "keep":
            if error is None:
                context.op.t1 = self.engine.now_us
        elif context.kind == "settle":
            if error is None:
                self._settled(context, found)
                return
            context.doubtful |= not error.definite
            self.refresh()
            self._again(context)

    def unanswered(self, context: Any, *, sent: bool) -> None:
        if isinstance(context, str):
            return
        self.refresh()
        if context.kind == "receive":
            self._later(context.key)
        elif context.kind == "settle":
            context.doubtful |= sent
            self._again(context)

    def _leased(self, asked: Asked, lease: Any, values: list[tuple[int, bytes]]) -> None:
        offsets = [offset for offset, _ in values]
        op = QueueOp(
            "deliver", self._name(asked.key), proc=self.host.name, t0=asked.began_us, t1=self.engine.now_us,
            epoch=lease.epoch, lease=lease.lease, lease_ms=lease.lease_ms, offsets=offsets,
            attempts=[count for offset, count in zip(lease.offsets, lease.attempts, strict=True) if offset in offsets],
            limit=asked.wants,
        )  # fmt: skip
        self.part.note(op)
        self.world.count("records leased")
        if not offsets:
            return
        held = (asked.key, lease.epoch, lease.lease)
        self.held[held] = list(offsets)
        self.host.deliver_after(self._work_us(), self._work, held, list(offsets))

    def _work_us(self) -> int:
        return self.part.between(1, max(1, 5 if self.world.calm else 2 * self.part.drawn.work_ms)) * MS

    def _work(self, held: LeaseKey, offsets: list[int]) -> None:
        """One record after the other, in order; some are settled together."""
        if held not in self.held:
            return
        count = len(offsets) if self.world.calm else self.part.between(1, len(offsets))
        now, later = offsets[:count], offsets[count:]
        draw = self.rng.random()
        if self.world.calm or draw < 0.50:
            self._settle(held, ACK, now)
        elif draw < 0.66:
            self._settle(held, NACK, now, delay_ms=self.rng.choice((-1, 0, 300, 1_500)))
        elif draw < 0.74:
            self._settle(held, REJECT, now)
        elif draw < 0.81:
            self._settle(held, RELEASE, [self.rng.choice(offsets)])
        elif draw < 0.87:
            self._settle(held, EXTEND, offsets, delay_ms=self.part.drawn.lease_ms)
            later = offsets
        elif draw < 0.93:
            self._settle(held, NACK, [self.rng.choice(offsets)], delay_ms=self.rng.choice((0, 700)))
        # else: never settled, until the lease ends
        if later:
            self.host.deliver_after(self._work_us(), self._work, held, later)

    # -- settling ------------------------------------------------------------------------------------

    def _settle(self, held: LeaseKey, action: str, offsets: list[int], delay_ms: int = -1) -> None:
        key, epoch, number = held
        op = QueueOp(
            "settle", self._name(key), proc=self.host.name, t0=self.engine.now_us, epoch=epoch, lease=number,
            action=action, offsets=sorted(offsets), delay_ms=delay_ms, type=INFO,
        )  # fmt: skip
        self.part.note(op)
        self._send(Asked("settle", key, op.t0, op))

    def _send(self, asked: Asked) -> None:
        target, op = self._primary(asked.key), asked.op
        assert op is not None
        asked.tries += 1
        if target is None:
            self.refresh()
            self.host.deliver_after(1, self.unanswered_later, asked)
            return
        item = (op.epoch, op.lease, op.action, list(op.offsets), op.delay_ms, f"{op.action} of {self.host.name}")
        self.ask(target, "settle", asked.key, self.host.name, item, context=asked)

    def unanswered_later(self, asked: Asked) -> None:
        self.unanswered(asked, sent=False)

    def _again(self, asked: Asked) -> None:
        """Only acks are repeated, and not for ever."""
        assert asked.op is not None
        if asked.op.action == ACK and asked.tries < 3:
            self.host.deliver_after(self.part.between(50, 600) * MS, self._send, asked)
        else:
            self._ended(asked, INFO if asked.doubtful else FAIL)

    def _settled(self, asked: Asked, found: Any) -> None:
        op = asked.op
        assert op is not None
        op.stale, op.settled = list(found[0]), list(found[1])
        self._ended(asked, OK)
        self.world.count(f"settled {op.action}")

    def _ended(self, asked: Asked, kind: str) -> None:
        op = asked.op
        assert op is not None
        op.type, op.t1 = kind, self.engine.now_us
        held = (asked.key, op.epoch, op.lease)
        if op.action != EXTEND and held in self.held:
            left = [offset for offset in self.held[held] if offset not in op.offsets]
            self.held[held] = left
            if not left:
                del self.held[held]


__all__ = ["FAIL", "INFO", "OK", "Receiver"]
