"""What strikes at its moment: the hooks of the weather profiles (`weather.py`).

Each hook is called where something happens that a fault has to meet within milliseconds. With its rate at 0 it does
nothing and draws nothing.
"""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING, Any

from ferryline.protocol.messages import RESTART_OS_CRASH, AlterIsr, AlterIsrs
from ferryline.protocol.metadata import PartitionMeta
from ferryline_broker.core.events import HandOverAsked, Key
from ferryline_broker.core.partition import PartitionCore
from ferryline_coordinator.core.config import CoreConfig
from tests.simulation.engine import MS
from tests.simulation.ghost import Violation

if TYPE_CHECKING:
    from tests.simulation.broker import Broker
    from tests.simulation.coordinator import Coordinator
    from tests.simulation.network import Session
    from tests.simulation.world import World

_NOBODY: tuple[Key, int, Broker | None] = (("", 0), 0, None)
ALONE_MS = 15_000  # a complete replica that comes back alone leads within this


class Ambushes:
    """Delays are in microseconds; 0 means "as usual"."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.engine = world.engine
        self.rates = world.weather.mischief
        self._moments = random.Random(f"moments of {self.engine.seed}")
        self._rng = self._moments
        self._count = 0
        self._asked: dict[int, deque[tuple[Session, Any]]] = {}  # last fetches of a broker that may come again
        self._lies_until_us: dict[int, int] = {}
        if self.rates.fence_one_ms:
            self._plan_fence()
        self._flip_until_us = 0  # a late resignation is under way
        self._flipped = _NOBODY  # whose primary is about to be replaced, and in which epoch
        if self.rates.handovers_ms:
            self.engine.after(self.rates.handovers_ms * MS, self._ask_to_hand_over)
        if self.rates.operator_ms:
            self.engine.after(self.rates.operator_ms * MS, self._operate)

    def _strikes(self, rate: float, what: str) -> bool:
        """Whether it happens now. Each gets a name on the tape of faults and a source of its own (see `Faults`)."""
        if rate <= 0 or not self.world.faults.raging or self._moments.random() >= rate:
            return False
        self._count += 1
        event = f"p{self._count}"
        if event in self.world.without:
            return False
        self._rng = random.Random(f"{self.engine.seed} {event}")
        self.world.faults.struck.append(event)
        self.world.count(f"ambush {what}")
        self.engine.note("fault", (event, what))
        return True

    def _pick(self, items: list[Any]) -> Any:
        return items[int(self._rng.random() * len(items))]

    def _between(self, low: int, high: int) -> int:
        return low + int(self._rng.random() * (high - low + 1))

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _fence(self, broker: Broker | None) -> None:
        """The coordinator is about to take a healthy broker, and only this one, for dead."""
        if broker is None or not broker.host.alive or not self.world.faults.raging:
            return
        self._lies_until_us[broker.id] = self.engine.now_us + 400 * MS
        if broker.coordinator is not None:
            self.world.network.end(broker.coordinator)

    def lies_about(self, broker_id: int) -> bool:
        """A probe of this broker is refused although it lives."""
        return self.world.faults.raging and self.engine.now_us < self._lies_until_us.get(broker_id, 0)

    def _plan_fence(self) -> None:
        gap_us = int(self._moments.random() * 2 * self.rates.fence_one_ms * MS) + 1
        self.engine.after(gap_us, self._fence_one)

    def _fence_one(self) -> None:
        if self._strikes(1.0, "wrong fence"):
            leaders = [b for r in self.world.checks.parts.values() if (b := self.world.broker_by_id(r.meta.primary))]
            self._fence(self._pick(leaders if leaders and self._chance(0.7) else self.world.brokers))
        if not self.world.faults.over:
            self._plan_fence()

    def _operate(self) -> None:
        """An operator who does not wait: what no candidate is left for is recovered while the faults go on."""
        if self.world.faults.over:
            return
        self.world.recover()
        self.engine.after(self.rates.operator_ms * MS, self._operate)

    def core_config(self) -> CoreConfig:
        return self.world.core_config

    # -- primaries ---------------------------------------------------------------------------------

    def proposing(self, broker: Broker, core: PartitionCore, proposal: AlterIsr) -> int:
        """C6: whoever is to join is fenced before the proposal arrives, and back before its repetitions do. Or the
        proposal is late itself (L8): its sender has stopped waiting, and the set is another one by then."""
        others = [member.broker_id for member in proposal.new_isr if member.broker_id != broker.id]
        joining = [broker_id for broker_id in others if broker_id not in core.isr]
        if not others or not self._strikes(self.rates.echo, "echo"):
            return 0
        victim = self.world.broker_by_id(self._pick(joining or others))
        late = not joining or self._chance(0.4)
        if victim is not None and (late or self._chance(0.7)):  # it lags when the proposal or its repetitions come
            self.world.faults.cut_for([(broker.host.name, victim.host.name)], self._between(300, 3_000))
        if late:
            members = [b for b in core.isr if b != broker.id]
            if members and self._chance(0.6):
                self._fence(self.world.broker_by_id(self._pick(members)))
            return self._between(400, 1_600) * MS
        self._fence(victim)
        for _ in range(self._between(2, 6)):
            late_us = self._between(100, 2_500) * MS
            broker.host.deliver_after(late_us, broker.ask, "alter", AlterIsrs([proposal]))
        if self._chance(self.rates.echo_coordinator):
            coordinator = self.world.coordinator
            self.engine.after(self._between(100, 900) * MS, self._replace, coordinator)
        return self._between(20, 300) * MS

    def _replace(self, coordinator: Coordinator) -> None:
        if coordinator.host.alive and coordinator is self.world.coordinator and self.world.faults.raging:
            self.world.faults.kill_coordinator(coordinator)
            self.engine.after(self._between(10, 150) * MS, self.world.faults.restart_coordinator)

    def answering(self, broker: Broker, session: Session, frame: Any) -> int:
        """Section 3: between a fetch that does not match and the answer that says so, flushes may end. F2: an answer
        that says so may come again when the secondary has long gone on."""
        data = frame[2]
        if data.logs is None or not any(log.diverging is not None for log in data.logs):
            return 0
        if not session.ordered and self._strikes(self.rates.repeat_diverging, "repeated answer"):
            for _ in range(self._between(1, 3)):
                self.world.network.repeat(session, broker, frame, self._between(5, 800) * MS)
        return self._between(20, 600) * MS if self._strikes(self.rates.hold_diverging, "held answer") else 0

    def resigning(self, broker: Broker, core: PartitionCore) -> int:
        """C10: the resignation arrives when its sender serves again, and the heir has not seen what came since."""
        others = [b for b in (core.part.replicas if core.part else ()) if b in core.isr and b != broker.id]
        leaving = core.primary is None or core.primary.handover is None or core.primary.handover.stopping
        if leaving or not others or not self._strikes(self.rates.hold_resign, "late resignation"):
            return 0
        late_ms = self._between(550, 1_200)
        self._flip_until_us = self.engine.now_us + (late_ms + 600) * MS
        heir = self.world.broker_by_id(others[0])  # C4: in the order of the assignment
        if heir is not None:
            one, other = broker.host.name, heir.host.name
            self.world.faults.cut_for([(one, other), (other, one)], late_ms + self._between(300, 1_200))
        return late_ms * MS

    def _ask_to_hand_over(self) -> None:
        """C10, as the coordinator does it; with its reasons or without."""
        if self.world.faults.over:
            return
        for key, record in sorted(self.world.checks.parts.items()):
            broker = self.world.broker_by_id(record.meta.primary)
            if broker is not None and key in broker.parts and broker.parts[key].core.role == "primary":
                broker.replicas.feed(key, HandOverAsked())
        gap_ms = self.rates.handovers_ms * (0.5 + self._moments.random())
        self.engine.after(int(gap_ms * MS), self._ask_to_hand_over)

    # -- secondaries -------------------------------------------------------------------------------

    def secondary_flush(self) -> int:
        return self._between(20, 500) * MS if self._strikes(self.rates.late_flush, "late flush") else 0

    def asking(self, broker: Broker, session: Session, kind: str, frame: Any) -> bool:
        """A fetch or progress leaves. Returns whether it was taken care of here."""
        if kind == "fetch":
            if self.rates.flip_back:
                self._asked.setdefault(broker.number, deque(maxlen=6)).append((session, frame))
            if not session.ordered and self._strikes(self.rates.late_fetch, "late fetch"):
                for _ in range(self._between(1, 4)):
                    self.world.network.repeat(session, broker, frame, self._between(20, 1_800) * MS)
            return False
        message = frame[4]
        core = broker.parts[message.topic_id, message.partition].core
        heard = core.secondary is None or core.secondary._primary_version  # answered in this epoch
        if heard or not self._strikes(self.rates.half_open, "half-open session"):
            return False
        late_us = self._between(40, 500) * MS
        self.world.network.repeat(session, broker, frame, late_us)
        self.world.network.half_end(session, broker, late_us + 10 * MS)
        broker.session_ended(session)
        return True

    def truncated(self, core: PartitionCore) -> None:
        """L3: whoever led before leads again at once, while what was asked in its earlier epoch still arrives, and
        before this secondary hears of it."""
        secondary, me = core.secondary, self.world.broker_by_id(core.replica.broker_id)
        leader = self.world.broker_by_id(secondary.primary) if secondary is not None else None
        if self.engine.now_us >= self._flip_until_us or secondary is None or me is None or leader is None:
            return
        if not self._strikes(self.rates.flip_back, "flip"):
            return
        self._flip_until_us = 0
        self._flipped = (core.key, secondary.epoch, me)
        self.engine.after(self._between(0, 20) * MS, self._fence, leader)

    def elected(self, part: PartitionMeta) -> None:
        """A record with another epoch became durable; nobody has heard of it yet."""
        key, epoch, me = self._flipped
        if part.key != key or part.epoch <= epoch or me is None or not self.world.faults.raging:
            return
        self._flipped = _NOBODY
        self.world.faults.cut_for([(self.world.coordinator.host.name, me.host.name)], self._between(100, 700))
        for session, frame in self._asked.get(me.number, ()):
            if frame[4].epoch < epoch and not session.ordered:
                for _ in range(4):
                    self.world.network.repeat(session, me, frame, self._between(2, 500) * MS)

    # -- processes ---------------------------------------------------------------------------------

    def started(self, broker: Broker, restart: str) -> None:
        """Section 7.1: the class of a lossy start must not be forgotten by a second one."""
        if restart == RESTART_OS_CRASH and self._strikes(self.rates.second_death, "second death"):
            self.world.faults.strike_soon(broker, power=False)

    def coordinator(self) -> Coordinator:
        """Whom a broker connects to."""
        world = self.world
        old = [c for c in world.coordinators if c is not world.coordinator and c.host.alive and not c.host.paused]
        if old and self._strikes(self.rates.stale_address, "stale address"):
            found: Coordinator = self._pick(old)
            return found
        return world.coordinator

    def zombie_back(self) -> None:
        """A replaced coordinator goes on: some brokers lose their session just now and look for a coordinator."""
        for broker in self.world.brokers:
            if broker.coordinator is not None and self._strikes(self.rates.stale_address, "session reset"):
                self.world.network.end(broker.coordinator)

    # -- after healing -----------------------------------------------------------------------------

    def twins(self) -> None:
        """C3: whoever dies together stays a candidate together. All die, one comes back alone and has to lead."""
        world, engine = self.world, self.engine
        engine.note("ambush", "twins")
        held = {b for record in world.checks.parts.values() for b in record.meta.isr}
        alone = world.broker_by_id(self._pick(sorted(held)))
        assert alone is not None
        for broker in world.brokers:
            broker.die("kill -9 of all")
        engine.run_until(engine.now_us + 4 * world.weather.fence_ms * MS)
        parts = [record.meta.key for record in world.checks.parts.values() if alone.id in record.meta.replicas]
        if not alone.host.alive:  # a restart that was planned before the healing may have come first
            alone.start()

        def leads() -> bool:
            return all(world.checks.parts[key].meta.primary == alone.id for key in parts)

        if not leads() and not engine.run_until(engine.now_us + ALONE_MS * MS, leads):
            stranded = [world.checks.parts[key].meta for key in parts if world.checks.parts[key].meta.primary == 0]
            if stranded:  # otherwise somebody else came back before it, and leads
                raise Violation("C3 those that die together stay candidates", f"{alone} is back, complete: {stranded}")
        for broker in world.brokers:
            if not broker.host.alive and broker.wanted:
                broker.start()
