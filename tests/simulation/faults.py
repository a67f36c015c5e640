"""The nemesis: at intervals drawn from the seed it breaks something, and mends it later.

Every action draws its victims and its duration itself. `heal` ends all of them.

What it does is a tape of numbered faults: ``s7`` is the seventh strike, ``a3`` the third ambush. Each draws from a
source of its own, so that leaving one out (``World.without``) leaves the draws of the others as they were; `shrink.py`
lives on that.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ferryline.protocol.messages import AlterIsr
from ferryline_broker.core import events as ev
from ferryline_coordinator.core import events as ce
from tests.simulation.broker import Broker
from tests.simulation.coordinator import Coordinator
from tests.simulation.engine import MS
from tests.simulation.real_disk import RealDisk

if TYPE_CHECKING:
    from tests.simulation.world import World


class Faults:
    """Invariant: after `heal` nothing is broken, and nothing breaks any more."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.engine = world.engine
        self.over = False
        self.struck: list[str] = []  # the tape, as far as it was played
        self.rng = random.Random(f"faults of {self.engine.seed}")
        self._tape = random.Random(f"tape of {self.engine.seed}")
        self._ambushes = random.Random(f"ambushes of {self.engine.seed}")
        self._strikes = self._ambush_count = 0
        self._begun = False
        self._successors_slow_until_us = 0
        self.disks_lost = 0
        weights = world.weather.weights
        self._names = [name for name in weights if weights[name] > 0]
        self._weights = [weights[name] for name in self._names]
        self._mends: list[Callable[[], None]] = []

    @property
    def raging(self) -> bool:
        return self._begun and not self.over

    def begin(self) -> None:
        self._begun = True
        if self._names:
            self._next()

    def _next(self) -> None:
        gap_us = int(self._tape.random() * 2 * self.world.weather.fault_gap_ms * MS) + 1
        self.engine.after(gap_us, self._strike)

    def _strike(self) -> None:
        if self.over:
            return
        name = self._tape.choices(self._names, self._weights)[0]
        self._strikes += 1
        event = f"s{self._strikes}"
        if event not in self.world.without:
            self.rng = random.Random(f"{self.engine.seed} {event}")
            self.struck.append(event)
            self.world.count(f"fault {name}")
            self.engine.note("fault", (event, name))
            getattr(self, f"_{name}")()
        self._next()

    # -- drawing: never from the source of the engine, or a fault that is left out would change everything else ------

    def _pick(self, items: list[Any]) -> Any:
        return items[int(self.rng.random() * len(items))]

    def _between(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))

    def _chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _for_a_while(self, mend: Callable[[], None]) -> None:
        """``mend`` runs later, or with `heal`; running twice must not hurt."""
        self._mends.append(mend)
        self.engine.after(int((0.1 + self.rng.random() * 1.9) * self.world.weather.fault_ms * MS), mend)

    def heal(self) -> None:
        self.over = True
        for mend in self._mends:
            mend()
        self._mends.clear()
        world = self.world
        world.network.heal_all()
        world.network.calm = True
        world.calm = True
        for broker in world.brokers:
            broker.steps_to_death = -1
            broker.slow_disk = broker.disk.write_error = broker.disk.sync_error = broker.disk.no_space = False
            broker.host.resume()
        world.coordinator.steps_to_death = -1
        world.coordinator.probes_lie_until_us = 0
        world.coordinator.host.resume()
        self.restart_all()

    def restart_all(self) -> None:
        """Whoever is down comes back: also a broker that had been asked to stop before the healing."""
        self.restart_coordinator()
        for broker in self.world.brokers:
            self._restart(broker)

    # -- ambushes ----------------------------------------------------------------------------------

    def _ambushed(self, what: str) -> bool:
        if self.over or not self._begun or self._ambushes.random() >= self.world.weather.ambush:
            return False
        self._ambush_count += 1
        event = f"a{self._ambush_count}"
        if event in self.world.without:
            return False
        self.rng = random.Random(f"{self.engine.seed} {event}")
        self.struck.append(event)
        self.world.count(f"ambush {what}")
        self.engine.note("fault", (event, f"ambush {what}"))
        return True

    def proposing(self, broker: Broker, proposal: AlterIsr) -> int:
        """A primary proposes an in-sync set. Returns how long (us) the proposal is held up."""
        if not self._ambushed("proposal"):
            return 0
        others = [member.broker_id for member in proposal.new_isr if member.broker_id != broker.id]
        victim = self.world.broker_by_id(self._pick(others)) if others else None
        choice = self._between(0, 3)
        if choice <= 1 and victim is not None and victim.host.alive:
            self.strike_soon(victim, power=choice == 0)
        elif choice == 2:
            self.engine.after(self._between(0, 20) * MS, self.kill_coordinator, self.world.coordinator)
        elif victim is not None and victim.host.alive:
            self._fence_wrongly(victim)
        return self._between(0, 800) * MS

    def flushing(self, broker: Broker, *, primary: bool) -> int:
        """A log is being flushed. Returns by how much (us) the disk is late.

        A primary is fenced wrongly in the middle of its flush, and its successor's disk may be slow too: then the flush
        of the deposed one ends while nothing is committed yet in the new epoch.
        """
        if not primary:
            return self.world.ambushes.secondary_flush()
        if self.engine.now_us < self._successors_slow_until_us:
            return self._between(20, 300) * MS
        if not self._ambushed("flush"):
            return 0
        self._fence_wrongly(broker)
        if self._chance(0.6):
            self._successors_slow_until_us = self.engine.now_us + 600 * MS
        return self._between(5, 400) * MS

    def truncated(self, broker: Broker) -> None:
        if self._ambushed("truncation"):
            self.strike_soon(broker, power=self._chance(0.5))

    def promoted(self, broker: Broker) -> None:
        if self._ambushed("promotion"):
            self.strike_soon(broker, power=self._chance(0.5))

    def strike_soon(self, broker: Broker, *, power: bool) -> None:
        """Down within a few ms, and back soon."""

        def strike() -> None:
            if not broker.host.alive or self.over:
                return
            if power:
                self._lose_power(broker)
            else:
                self.world.count("killed")
                broker.die("kill -9 from ambush")
            self.engine.after(self._between(5, 150) * MS, self._restart, broker)

        self.engine.after(self._between(0, 8_000), strike)

    def _fence_wrongly(self, broker: Broker) -> None:
        coordinator = self.world.coordinator
        coordinator.probes_lie_until_us = max(coordinator.probes_lie_until_us, self.engine.now_us + 400 * MS)
        if broker.coordinator is not None:
            self.world.network.end(broker.coordinator)

    # -- processes ---------------------------------------------------------------------------------

    def _broker(self) -> Broker | None:
        alive = [broker for broker in self.world.brokers if broker.host.alive]
        return self._pick(alive) if alive else None

    def _restart(self, broker: Broker) -> None:
        if not broker.host.alive and broker.wanted:
            broker.start()

    def _restart_later(self, broker: Broker) -> None:
        self._for_a_while(lambda: self._restart(broker))

    def start_again(self, broker: Broker) -> None:
        """What a supervisor does when a broker has ended by itself."""
        self.engine.after(1_000 * MS, lambda: self._restart(broker))

    def kill_now(self, broker: Broker) -> None:
        self.world.count("killed")
        broker.die("kill -9")
        self._restart_later(broker)

    def died_starting(self, broker: Broker, why: str) -> None:
        broker.die(f"while starting: {why}")
        self._restart_later(broker)

    def died_of_disk(self, broker: Broker, why: str = "its disk failed") -> None:
        broker.die(why)
        self._restart_later(broker)

    def _kill(self) -> None:
        broker = self._broker()
        if broker is not None:
            self.kill_now(broker)

    def _kill_mid_step(self) -> None:
        broker = self._broker()
        if broker is None:
            return
        if isinstance(broker.disk, RealDisk) and self._chance(0.6):
            broker.disk.stop_after(self._between(0, 30))
        else:
            broker.steps_to_death = self._between(0, 40)

    def _cut_power(self, broker: Broker) -> None:
        self._lose_power(broker)
        self._restart_later(broker)

    def _lose_power(self, broker: Broker) -> None:
        self.world.count("power cuts")
        broker.die("power cut", power=True)
        if broker.disk.power_cut(self.rng):
            self.world.count("power cuts that lost something")
        lossy = self.world.config.flush != "fsync" and not broker.disk.stopped_clean
        self.world.checks.disk_changed(broker, lossy=lossy)

    def _power_cut(self) -> None:
        broker = self._pick(self.world.brokers)
        self._cut_power(broker)

    def _power_cut_all(self) -> None:
        for broker in self.world.brokers:
            self._cut_power(broker)

    def _kill_all(self) -> None:
        for broker in self.world.brokers:
            if broker.host.alive:
                self.kill_now(broker)
        if self._chance(0.5):
            self.kill_coordinator(self.world.coordinator)

    def _pause(self) -> None:
        broker = self._broker()
        if broker is not None:
            broker.host.pause()
            self._for_a_while(broker.host.resume)

    def _stop(self) -> None:
        broker = self._broker()
        if broker is not None and broker.joined and not broker.host.paused:
            broker.stopping = True
            broker.node_event(ev.StopAsked())
            self._restart_later(broker)

    # -- network -----------------------------------------------------------------------------------

    def _names_of_nodes(self) -> list[str]:
        return [broker.host.name for broker in self.world.brokers] + [self.world.coordinator.host.name]

    def _cut(self, pairs: list[tuple[str, str]]) -> Callable[[], None]:
        network = self.world.network
        for source, target in pairs:
            network.cut(source, target)
        open_pairs = list(pairs)

        def mend() -> None:
            while open_pairs:
                network.heal(*open_pairs.pop())

        self._for_a_while(mend)
        return mend

    def cut_for(self, pairs: list[tuple[str, str]], time_ms: int) -> None:
        """Cut links for a time that the caller knows."""
        self.engine.after(time_ms * MS, self._cut(pairs))

    def _two(self) -> tuple[str, str]:
        one, other = self.rng.sample(self._names_of_nodes(), 2)
        return one, other

    def _cut_pair(self) -> None:
        one, other = self._two()
        self._cut([(one, other), (other, one)])

    def _cut_one_way(self) -> None:
        self._cut([self._two()])

    def _isolate(self) -> None:
        names = self._names_of_nodes()
        lonely = self._pick(names)
        spared = self._pick(names) if self._chance(0.3) else ""
        pairs = []
        for other in names:
            if other not in (lonely, spared):
                pairs += [(lonely, other), (other, lonely)]
        self._cut(pairs)

    def _end_sessions(self) -> None:
        for session in list(self.world.network.sessions.values()):
            if self._chance(0.3):
                self.world.network.end(session)

    # -- coordinator -------------------------------------------------------------------------------

    def _false_probe(self) -> None:
        coordinator = self.world.coordinator
        coordinator.probes_lie_until_us = self.engine.now_us + 1_500 * MS
        broker = self._broker()
        if broker is not None and broker.coordinator is not None:
            self.world.network.end(broker.coordinator)

    def kill_coordinator(self, coordinator: Coordinator) -> None:
        self.world.count("coordinator killed")
        coordinator.die("kill -9")
        if coordinator is self.world.coordinator:
            self._for_a_while(self.restart_coordinator)

    def restart_coordinator(self) -> None:
        if not self.world.coordinator.host.alive:
            self.world.coordinator.start()

    def _coordinator_kill(self) -> None:
        coordinator = self.world.coordinator
        if not coordinator.host.alive:
            return
        if self._chance(0.5):
            coordinator.steps_to_death = self._between(0, 30)
        else:
            self.kill_coordinator(coordinator)

    def _coordinator_pause(self) -> None:
        coordinator = self.world.coordinator
        if coordinator.host.alive:
            coordinator.host.pause()
            self._for_a_while(coordinator.host.resume)

    def _zombie(self) -> None:
        """The active coordinator stands still, a successor campaigns, then the old one goes on as if nothing was."""
        old = self.world.coordinator
        if not old.host.alive or old.host.paused:
            return
        old.host.pause()
        self.world.replace_coordinator()

        def mend() -> None:
            old.host.resume()
            self.world.ambushes.zombie_back()
            lease_us = 0 if self.over else self._between(0, 4_000) * MS
            self.engine.after(lease_us, old.die, "its lease has ended")

        self._for_a_while(mend)

    # -- disks -------------------------------------------------------------------------------------

    def _lose_disk(self) -> None:
        if self.disks_lost or self.world.rotted:
            return  # more than one would leave nothing to check
        self.disks_lost += 1
        broker = self._pick(self.world.brokers)
        broker.die("disk destroyed", power=True)
        self.world.replace_disk(broker, same_id=False)
        self._restart_later(broker)

    def _foreign_disk(self) -> None:
        if self.disks_lost or self.world.rotted:
            return
        self.disks_lost += 1
        broker = self._pick(self.world.brokers)
        if not broker.id:
            return
        broker.die("disk exchanged", power=True)
        self.world.replace_disk(broker, same_id=True)
        self._restart_later(broker)

    def _write_error(self) -> None:
        self._disk_error("write_error")

    def _sync_error(self) -> None:
        self._disk_error("sync_error")

    def _disk_error(self, kind: str) -> None:
        broker = self._broker()
        if broker is None:
            return
        disk = broker.disk
        setattr(disk, kind, True)

        def mend() -> None:
            if getattr(disk, kind):
                setattr(disk, kind, False)
                if broker.host.alive and kind == "sync_error":
                    broker.die("restarted after disk errors")
            self._restart(broker)

        self._for_a_while(mend)

    def _rot(self) -> None:
        """A bit flips, on one copy of whole ones: where every copy rots, nothing can be asked of anybody."""
        world = self.world
        found = []
        for key, record in sorted(world.checks.parts.items()):
            part = record.meta
            brokers = [b for b in world.brokers if b.at_work and b.id in part.isr and key in b.parts]
            whole = len(brokers) == len(part.replicas) >= 2
            if whole and not any(world.rotted and b.parts[key].files.rotten() >= 0 for b in brokers):
                found += [(b, key) for b in brokers]
        if not found or self.disks_lost:
            return
        broker, key = self._pick(found)
        if broker.parts[key].files.rot(self.rng):
            world.rotted = True
            world.count("rotten batches")
            self.engine.note("fault", ("rot", broker.host.name, key[1]))

    def _wall_jump(self) -> None:
        host = self._pick(self.world.brokers).host
        by_ms = self._pick([300, 5_000, 50_000, 10**7, 10**10])
        host.set_wall_clock(by_ms if self._chance(0.6) else -by_ms)

    def _disk_full(self) -> None:
        broker = self._broker()
        if broker is None or not broker.joined:
            return
        broker.disk_full(True)
        broker.disk.no_space = self._chance(0.5)  # or others fill it beyond the reserve

        def mend() -> None:
            """There is space again."""
            broker.disk.no_space = False
            broker.disk_full(False)
            if any(hosted.core.full is not None for hosted in broker.parts.values()):
                broker.leave_in_order()

        self._for_a_while(mend)

    def _slow_disk(self) -> None:
        broker = self._pick(self.world.brokers)
        broker.slow_disk = True

        def mend() -> None:
            broker.slow_disk = False

        self._for_a_while(mend)

    # -- operators ---------------------------------------------------------------------------------

    def _grow(self) -> None:
        self.world.grow()

    def _move(self) -> None:
        """Replicas move when a broker is drained; here at once, and back."""
        self._drain()

    def _drain(self) -> None:
        broker = self._pick(self.world.brokers)
        if broker.id:
            broker_id = broker.id
            self.world.command(lambda reply: ce.DrainSet(reply, broker_id, True))
            self._for_a_while(lambda: self.world.command(lambda reply: ce.DrainSet(reply, broker_id, False)))

    def _recreate(self) -> None:
        self.world.recreate_topic(f"{self.rng.getrandbits(128):032x}", self._between(1, 800))

    def _add_broker(self) -> None:
        if len(self.world.brokers) < 6:
            self.world.add_broker().start()

    # -- clients -----------------------------------------------------------------------------------

    def _producer_joins(self) -> None:
        self.world.add_producer(burst=4)

    def _consumer_dies(self) -> None:
        self.world.end_member()

    def _consumer_joins(self) -> None:
        self.world.add_member()

    def _producer_pause(self) -> None:
        if self.world.producers:
            producer = self._pick(self.world.producers)
            producer.host.pause()
            self._for_a_while(producer.host.resume)

    def _consumer_pause(self) -> None:
        if self.world.members:
            member = self._pick(self.world.members)
            member.host.pause()
            self._for_a_while(member.host.resume)
