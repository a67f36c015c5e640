"""White-box checks of single rules that no loss of data would show: C5, C8 and the other half of K7.

Called by `checks.Checks` with what became durable, before it takes it over, and with every refusal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ferryline.protocol.messages import RECORDS
from ferryline.protocol.metadata import NO_BROKER, PartitionMeta
from ferryline_broker.core import events as ev
from ferryline_broker.core.events import Key
from ferryline_broker.core.partition import PartitionCore
from ferryline_coordinator.core.events import Decision, Note
from ferryline_coordinator.core.records import BrokerRecord, ClusterRecord, PartRecord
from tests.simulation.ghost import Copy, Violation
from tests.simulation.serving import Waiter

if TYPE_CHECKING:
    from tests.simulation.world import World


class Conduct:
    """``fenced_at``: the metadata revision with which each broker was last fenced or registered."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.revision = 0
        self.fenced_at: dict[int, int] = {}
        self.forced: set[tuple[Key, int]] = set()  # recovery epochs of operators who accepted any loss

    def decided(self, decision: Decision) -> None:
        """One decision became durable; the records in `checks` are still those before it."""
        for record in decision.puts:
            if isinstance(record, ClusterRecord):
                self.revision = record.revision
        for effect in decision.effects:
            if isinstance(effect, Note) and effect.name == "unclean_recovery" and effect.fields["forced"]:
                key = (effect.fields["topic_id"], effect.fields["partition"])
                self.forced.add((key, effect.fields["epoch"]))
        for record in decision.puts:
            if isinstance(record, BrokerRecord):
                self._broker(record)
            elif isinstance(record, PartRecord):
                self._move(record)

    def _broker(self, record: BrokerRecord) -> None:
        """C2: a process life has one broker epoch. C5: a broker serves again only when it has heard of its fence."""
        meta, known = record.meta, self.world.checks.brokers.get(record.meta.id)
        life = (meta.storage_id, meta.incarnation)
        same = known is not None and (known.meta.storage_id, known.meta.incarnation) == life
        if known is not None and same and known.meta.broker_epoch not in (0, meta.broker_epoch):
            raise Violation("C2 a process life has one broker epoch", f"{known.meta} -> {meta}")
        if known is None or (meta.fenced and (not known.meta.fenced or meta.broker_epoch != known.meta.broker_epoch)):
            self.fenced_at[meta.id] = self.revision
            return
        if meta.fenced or not known.meta.fenced:
            return
        broker = self.world.broker_by_id(meta.id)
        if broker is None or not broker.joined or broker.node.broker_epoch != meta.broker_epoch:
            return  # another life of it has begun
        knows, needs = broker.node.metadata.revision, self.fenced_at.get(meta.id, 0)
        if knows < needs:
            message = f"{broker} serves again at revision {knows}, it was fenced with {needs}"
            raise Violation("C5 unfenced only with the present picture", message)

    def _move(self, record: PartRecord) -> None:
        """C8: no complete copy is dropped before the one that replaces it is complete."""
        known = self.world.checks.parts.get(record.meta.key)
        if known is None:
            return
        old, new = known.meta, record.meta
        if new.epoch != old.epoch:
            self.world.ambushes.elected(new)
        dropped = [b for b in old.removing if b not in new.replicas and b in old.isr]
        arrived = [b for b in old.adding if b in new.isr]
        if len(arrived) < len(dropped):
            raise Violation("C8 a new copy is complete before an old one goes", f"{old} -> {new}")
        given_up = [b for b in old.adding if b not in new.replicas and b in (*old.isr, *old.elr, *old.last_known_elr)]
        candidates = [b for b in given_up if b not in old.last_known_elr and not self._lost_some(old.key, b)]
        if candidates and len(new.isr) < new.min_isr:
            raise Violation("C8 no candidate is dropped with a cancelled move", f"{old} -> {new}")
        if not new.isr and not new.elr and any(self._holds_some(old.key, b) for b in given_up):
            raise Violation("C8 where nobody is surely whole, no copy is dropped", f"{old} -> {new}")

    def _lost_some(self, key: Key, broker_id: int) -> bool:
        """It is no candidate from now on: a power cut, or storage that failed."""
        broker, checks = self.world.broker_by_id(broker_id), self.world.checks
        return broker is None or (broker.number, key) in checks.lossy or (broker.number, key) in checks.damaged

    def _holds_some(self, key: Key, broker_id: int) -> bool:
        broker = self.world.broker_by_id(broker_id)
        if broker is None or (broker.number, key) in self.world.checks.damaged:
            return False
        return self.world.copies(broker, key)[RECORDS].end > 0

    def recovered(self, part: PartitionMeta, chosen: Copy) -> None:
        """C7: without force, nothing is given up that an undamaged replica holds. Before the truth follows."""
        checks, world = self.world.checks, self.world
        leader, others = world.broker_by_id(part.primary), []
        forced = (part.key, part.recovery_epoch) in self.forced
        if forced or leader is None or leader.disk.incarnation != checks.brokers[part.primary].meta.incarnation:
            return  # or it died since it told what it holds, and the coordinator cannot know
        for broker_id in part.replicas:
            broker = world.broker_by_id(broker_id)
            if broker is not None and broker is not leader and (broker.number, part.key) not in checks.damaged:
                others.append(world.copies(broker, part.key)[RECORDS])
        keeps_the_longest(chosen, others)

    def settled(self, keys: Iterable[Key]) -> None:
        """C4: nobody waits for a primary while a candidate could lead. `checks` holds what was decided."""
        parts, brokers = self.world.checks.parts, self.world.checks.brokers
        for key in keys:
            record = parts.get(key)
            if record is None or record.frozen or record.meta.primary != NO_BROKER:
                continue
            pool = record.meta.isr or record.meta.elr
            ready = [b for b in pool if b in brokers and not brokers[b].meta.fenced and not brokers[b].meta.stopping]
            if ready:
                raise Violation("C4 nobody waits while there is a candidate", f"{record.meta}: {ready} could lead")

    def refused(self, core: PartitionCore, waiter: Waiter, refuse: ev.Refuse) -> None:
        """K7, the other way round: what a member has read as committed it can commit, also right after a fail-over."""
        event = waiter.event
        if not isinstance(event, ev.CommitAsked) or refuse.code != "OFFSET_OUT_OF_RANGE" or event.offset < 1:
            return
        truth = self.world.truth(waiter.key)[RECORDS]
        if event.offset > truth.end or truth.lost or self.world.checks.declared.get(waiter.key):
            return
        at = event.offset - 1
        while at >= 0 and at not in truth.batches:
            at -= 1
        if at >= 0 and truth.batches[at][2] <= core.epoch:
            message = f"{waiter.key}: {event} refused in epoch {core.epoch}, committed up to {truth.end}: {refuse}"
            raise Violation("K7 what is committed may be committed by a group", message)


def keeps_the_longest(chosen: Copy, others: Iterable[Copy]) -> None:
    """C7: of logs that end in the same epoch the longest is chosen; a later epoch has outlived every earlier one. Of a
    log that retention has emptied the last epoch is not known here."""
    if not chosen.batches and chosen.start:
        return
    for other in others:
        if other.batches and other.rank > chosen.rank:
            raise Violation("C7 recovery without force keeps the longest log", f"{chosen} was chosen before {other}")
