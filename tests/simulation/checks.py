"""The white-box invariants (D.1 of the proof page), checked while the simulation runs, and the group rules K1 to K7.

Called by the drivers at the moment at which something became true, so that a violation stops at the step that made it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferryline.protocol.messages import (
    LOG_OK,
    RECORDS,
    RESTART_FOREIGN,
    RESTART_OS_CRASH,
    STATE,
    AlterIsr,
)
from ferryline.protocol.metadata import NO_BROKER, PartitionMeta, check_partition
from ferryline.protocol.records import BatchHeader
from ferryline_broker.core import events as ev
from ferryline_broker.core.events import Key
from ferryline_broker.core.partition import PartitionCore
from ferryline_coordinator.core.events import Decision
from ferryline_coordinator.core.records import BrokerRecord, PartRecord
from tests.simulation.conduct import Conduct
from tests.simulation.disks import ReplicaFiles
from tests.simulation.ghost import Violation
from tests.simulation.queue_checks import QueueChecks
from tests.simulation.serving import Waiter

if TYPE_CHECKING:
    from tests.simulation.broker import Broker
    from tests.simulation.world import World

BOTH = (RECORDS, STATE)
Life = tuple[int, str, int]  # of a broker, by its number: storage, incarnation


class GroupTruth:
    """What one group was told about one partition, in the order of the answers."""

    __slots__ = ("claim_answered", "commit", "commit_answered_us", "forgotten", "generation")

    def __init__(self) -> None:
        self.generation = 0  # highest claim that was answered
        self.claim_answered: dict[int, int] = {}  # generation -> when first answered
        self.commit = -1  # highest commit that was answered
        self.commit_answered_us = -1
        self.forgotten = False


class Checks:
    """Knows the truth (`world.truth`, `world.copies`) and the coordinator's durable records."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.conduct = Conduct(world)
        self.queues = QueueChecks(world)
        self.parts: dict[Key, PartRecord] = {}
        self.brokers: dict[int, BrokerRecord] = {}
        self.primaries: dict[tuple[Key, int], tuple[int, int]] = {}  # epoch -> (broker number, life)
        # (broker number, key) -> storage, and its incarnation from which on this replica must not be a candidate
        self.lossy: dict[tuple[int, Key], tuple[str, int]] = {}
        # lives that began with a loss, or what counts as one; several, for a broker may die before it could say so
        self.unclean: set[Life] = set()
        self.damaged: set[tuple[int, Key]] = set()  # replicas whose storage failed and that said so
        self._vouched: dict[tuple[Key, int], int] = {}  # -> broker epoch named by the last accepted proposal
        self.coord_epoch = 0
        self.groups: dict[tuple[str, Key], GroupTruth] = {}
        self.declared: dict[Key, int] = {}  # recovery epochs that were seen

    def fail(self, rule: str, message: str) -> None:
        raise Violation(rule, message)

    # -- the coordinator's records -----------------------------------------------------------------

    def campaigned(self, epoch: int) -> None:
        if epoch <= self.coord_epoch:
            self.fail("D1.5 coord_epoch rises", f"{self.coord_epoch} -> {epoch}")
        self.coord_epoch = epoch

    def committed(self, decisions: list[Decision]) -> None:
        """Decisions became durable, in this order, by one commit."""
        changed: dict[Key, None] = {}
        for decision in decisions:
            self.conduct.decided(decision)
            for gone in decision.deletes:
                self._deleted(gone)
            for record in decision.puts:
                if isinstance(record, BrokerRecord):
                    self._broker_changed(record)
            for record in decision.puts:
                if isinstance(record, PartRecord):
                    self._part_changed(record)
                    changed[record.meta.key] = None
        for key in changed:
            if key in self.parts:
                self.check_record(self.parts[key].meta)
        for record in self.parts.values():
            self._check_fenced(record.meta)
        self.conduct.settled(changed)

    def _deleted(self, key: str) -> None:
        kind, _, rest = key.partition("/")
        if kind == "broker":
            self.brokers.pop(int(rest), None)
        elif kind == "part":
            topic_id, _, number = rest.partition("/")
            self.parts.pop((topic_id, int(number)), None)

    def _broker_changed(self, record: BrokerRecord) -> None:
        meta = record.meta
        known = self.brokers.get(meta.id)
        self.brokers[meta.id] = record
        if known is None:
            return
        before = known.meta
        if meta.broker_epoch < before.broker_epoch:
            self.fail("D1.5 broker_epoch never falls", f"{before} -> {meta}")
        if before.storage_id == meta.storage_id and before.incarnation > meta.incarnation:
            self.fail("D1.5 incarnation never falls", f"{before} -> {meta}")

    def _part_changed(self, record: PartRecord) -> None:
        part = record.meta
        before = self.parts.get(part.key)
        if before is not None:
            old = before.meta
            if part.epoch < old.epoch or part.version <= old.version:
                self.fail("D1.5 epoch and version", f"{old} -> {part}")
            if part.primary not in (NO_BROKER, old.primary) and part.epoch == old.epoch:
                self.fail("D1.5 one primary per epoch", f"{old} -> {part}")
            if part.primary != old.primary:
                self.world.count("elections" if part.primary else "left without primary")
            if part.isr != old.isr:
                self.world.count("in-sync set grew" if len(part.isr) > len(old.isr) else "in-sync set changed")
            if part.elr and part.elr != old.elr:
                self.world.count("eligible set filled")
            self._check_somebody_left(old, part)
            if part.primary == old.primary and part.epoch == old.epoch:
                for broker_id in set(part.isr) - set(old.isr):  # its primary saw it complete: D1.1 checks that it is
                    self._taken_in(part.key, broker_id)
        self.parts[part.key] = record
        if part.recovery_epoch and part.recovery_epoch != self.declared.get(part.key, 0):
            self._recovered(part)

    def vouched(self, proposal: AlterIsr) -> None:
        """The coordinator accepts this proposal."""
        for member in proposal.new_isr:
            self._vouched[(proposal.topic_id, proposal.partition), member.broker_id] = member.broker_epoch

    def _taken_in(self, key: Key, broker_id: int) -> None:
        """A primary vouches for a replica, in the life that it has seen. What it lost in another one counts on."""
        broker, record = self.world.broker_by_id(broker_id), self.brokers[broker_id].meta
        if self._vouched.get((key, broker_id)) != record.broker_epoch:
            return
        since = self.lossy.get((broker.number, key)) if broker is not None else None
        if (
            broker is not None
            and since is not None
            and since[0] == record.storage_id
            and since[1] <= record.incarnation
        ):
            del self.lossy[broker.number, key]

    def _check_somebody_left(self, old: PartitionMeta, part: PartitionMeta) -> None:
        """C3, C8: the last replica that is still whole never stops being a candidate."""
        if part.isr or part.elr:
            return
        for broker_id in (*old.isr, *old.elr):
            broker = self.world.broker_by_id(broker_id)
            if broker is None or (broker.number, part.key) in self.lossy or (broker.number, part.key) in self.damaged:
                continue
            record = self.brokers[broker_id].meta
            if (broker.number, record.storage_id, record.incarnation) in self.unclean:
                continue
            self.fail("C8 the last whole replica stays a candidate", f"{old} -> {part}: {broker} was dropped")

    def _recovered(self, part: PartitionMeta) -> None:
        """An operator accepted a loss: the truth is what the chosen replica holds, from now on."""
        self.declared[part.key] = part.recovery_epoch
        self.world.count("recoveries")
        broker = self.world.broker_by_id(part.primary)
        if broker is None:  # its disk went before anybody noticed: the next recovery settles what is kept
            assert part.primary in self.world.destroyed, part
            return
        copies, truths = self.world.copies(broker, part.key), self.world.truth(part.key)
        self.conduct.recovered(part, copies[RECORDS])
        for log in BOTH:
            if truths[log].recovered_from(copies[log], part.recovery_epoch):
                self.world.count("declared losses")
                if self.world.queues is not None:
                    self.world.queues.lost_us[part.key] = self.world.engine.now_us
                for other in self.world.brokers:
                    for view in self.world.copies(other, part.key):
                        view.agreed = min(view.agreed, view.truth.end)
        if copies[STATE].truth.lost:
            for (_, key), group in self.groups.items():
                if key == part.key:
                    group.forgotten = True
        for number, key in list(self.lossy):
            if key == part.key and self.world.brokers[number] is broker:
                del self.lossy[number, key]

    def _check_fenced(self, part: PartitionMeta) -> None:
        for broker_id in part.isr:
            broker = self.brokers.get(broker_id)
            if broker is None or broker.meta.fenced:
                self.fail("D1.9 a fenced broker is not in isr", f"{part} {broker}")

    def check_record(self, part: PartitionMeta) -> None:
        """D1.1, 1.2, 1.4, 1.8, 1.9 for one partition, as the durable record stands."""
        check_partition(part)
        self._check_fenced(part)
        self._check_candidates(part)
        self._check_primary(part)

    def _check_candidates(self, part: PartitionMeta) -> None:
        world = self.world
        # Who leads by a declared recovery was in no in-sync set: what it has may be on its way to the disk.
        fsync = world.config.flush == "fsync" and not 0 < part.recovery_epoch == part.epoch
        for broker_id in (*part.isr, *part.elr):
            if broker_id in world.destroyed:
                continue  # its disk is gone for good; nobody can elect it
            broker = world.broker_by_id(broker_id)
            if broker is None:
                self.fail("D1.1 candidates exist", f"{part}: no broker {broker_id}")
                continue
            since = self.lossy.get((broker.number, part.key))
            if since is not None:
                record = self.brokers[broker_id].meta
                if record.storage_id == since[0] and record.incarnation >= since[1]:
                    self.fail("D1.8 unclean replicas are excluded", f"{broker} of {part} lost data")
                continue  # the coordinator has not heard yet
            for copy in world.copies(broker, part.key):
                if not (copy.durably_complete if fsync else copy.complete):
                    self.fail("D1.1 candidates hold everything committed", f"{part}: {copy}")

    def _check_primary(self, part: PartitionMeta) -> None:
        broker = self.world.broker_by_id(part.primary)
        if broker is None:
            return
        hosted = broker.parts.get(part.key)
        if hosted is None or hosted.core.role != "primary" or hosted.core.epoch != part.epoch:
            return
        core = hosted.core
        for copy in self.world.copies(broker, part.key):
            if not copy.complete:
                self.fail("D1.2 the primary holds everything committed", f"{part}: {copy}")
        if len(core.isr) >= part.min_isr and not set(part.isr) | set(part.elr) <= core.maximal_isr:
            self.fail(
                "D1.4 maximal in-sync set covers all candidates",
                f"{broker} counts {sorted(core.maximal_isr)}, the record says {part}",
            )

    # -- brokers -----------------------------------------------------------------------------------

    def broker_started(self, broker: Broker, restart: str) -> None:
        self.world.count(f"start {restart}")
        if restart == RESTART_FOREIGN or (restart == RESTART_OS_CRASH and self.world.config.flush != "fsync"):
            self.unclean.add((broker.number, broker.disk.storage_id, broker.disk.incarnation))

    def disk_changed(self, broker: Broker, *, lossy: bool, empty: bool = False) -> None:
        """A power cut, or another disk: the copies are what the disk holds now.

        ``lossy``: from its next start on, no replica on it may be a candidate before it has been refetched.
        """
        for (number, key), copies in self.world.all_copies():
            if number != broker.number:
                continue
            if lossy:
                self.lossy[number, key] = (broker.disk.storage_id, broker.disk.incarnation + 1)
            files = broker.disk.survivors(key)
            for log in BOTH:
                if empty:
                    copies[log].reset(0)
                elif files is None:
                    copies[log].cut_to_synced()
                else:
                    copies[log].load(files.start(log), files.stored(log), synced=False)
                copies[log].watermark = copies[log].start
            self._check_key(key)

    def broker_registered(self, broker: Broker) -> None:
        self.world.count("registrations")

    def replica_opened(self, broker: Broker, key: Key, files: ReplicaFiles, core: PartitionCore) -> None:
        """Recovery is over: everything found is synced, and the high watermark is the one that was checkpointed."""
        copies, state = self.world.copies(broker, key), core.report().log_state
        if state != LOG_OK:
            self.world.count(f"opened {state}")
            self.damaged.add((broker.number, key))
            self.lossy[broker.number, key] = (broker.disk.storage_id, broker.disk.incarnation)
        for log in BOTH:
            before = copies[log].synced if state == LOG_OK else 0
            copies[log].load(files.start(log), files.stored(log), synced=True)
            if copies[log].end < before:
                self.fail("recovery finds what was synced", f"{copies[log]}, synced up to {before}")
            copies[log].watermark = 0
            if copies[log].truth.lost and copies[log].tail_epoch < self.declared[key]:
                copies[log].watermark = core.high_watermark[log]  # it slept through a declared loss, and will cut
                continue
            if core.high_watermark[log] > copies[log].truth.end:
                self.fail("D1.7 a recovered high watermark is committed", f"{copies[log]}: {core.high_watermark[log]}")
            copies[log].raise_watermark(core.high_watermark[log])
        self._check_key(key)

    def replica_deleted(self, broker: Broker, key: Key) -> None:
        for copy in self.world.copies(broker, key):
            copy.reset(0)
        self._check_key(key)

    def role_changed(self, broker: Broker, key: Key, role: str, epoch: int, reason: str) -> None:
        self.world.count(f"became {role}")
        if role == "stopped":
            self.damaged.add((broker.number, key))
            self.world.stopped(broker, key, reason)
        if role != "primary":
            return
        life = (broker.number, broker.host.life)
        known = self.primaries.setdefault((key, epoch), life)
        if known != life:
            self.fail("D1.5 one primary, one life per epoch", f"{key} epoch {epoch}: {known} and {life}")
        self._check_key(key)

    def shrunk(self, broker: Broker, key: Key, what: str) -> None:
        self.world.count(what)
        self._check_key(key)

    def watermark(self, broker: Broker, key: Key, log: int, value: int, core: PartitionCore) -> None:
        """A high watermark moved: everything below is committed from here on."""
        if self.world.copies(broker, key)[log].raise_watermark(value):
            self.world.count("commits of records" if log == RECORDS else "commits of state")
            copy = self.world.copies(broker, key)[log]
            if len(core.maximal_isr) == 1 and copy.synced < value:
                self.fail("L9 alone means synced", f"{copy} commits {value} with nobody else")
            if core.role != "primary":
                self.fail("only primaries commit", f"{broker} {key} log {log} to {value} as {core.role}")
            self._check_key(key)

    def after_step(self, broker: Broker, key: Key, core: PartitionCore) -> None:
        copies = self.world.copies(broker, key)
        for log in BOTH:
            if core.high_watermark[log] != copies[log].watermark and core.role != "stopped":
                self.fail(
                    "the high watermark moves only by WakeReaders",
                    f"{broker} {key} log {log}: core {core.high_watermark[log]}, told {copies[log].watermark}",
                )
        if core.role == "primary":
            record = self.parts.get(key)
            if record is not None and record.meta.epoch == core.epoch:
                self._check_primary(record.meta)

    def _check_key(self, key: Key) -> None:
        record = self.parts.get(key)
        if record is not None:
            self._check_candidates(record.meta)
            self._check_primary(record.meta)

    # -- answers -----------------------------------------------------------------------------------

    def produce_answered(
        self, broker: Broker, key: Key, core: PartitionCore, waiter: Waiter, answer: ev.AnswerProduce
    ) -> None:
        truth = self.world.truth(key)[RECORDS]
        header: BatchHeader = waiter.event.header  # type: ignore[attr-defined]
        stored = truth.batches.get(answer.base_offset)
        if stored is None or stored[3] != header.crc:
            self.fail(
                "D1.7 acknowledged only when committed",
                f"{broker} {key}: batch {header} answered at {answer.base_offset}, committed there: {stored}",
            )
        if core.role != "primary":
            self.fail("only a primary acknowledges", f"{broker} {key} as {core.role}")
        self.world.count("produce answered")
        if stored is not None and stored[2] != core.epoch:
            self.world.count("duplicates answered across epochs")

    def refused(self, core: PartitionCore, waiter: Waiter, refuse: ev.Refuse) -> None:
        """A definite refusal of what is stored shows up as an aborted read."""
        self.conduct.refused(core, waiter, refuse)

    def group_answered(
        self, broker: Broker, key: Key, core: PartitionCore, waiter: Waiter, answer: ev.AnswerGroup
    ) -> None:
        truth = self.world.truth(key)[STATE]
        if core.role != "primary" or truth.end < waiter.state_end:
            self.fail(
                "D1.10 answered only when committed in the present epoch",
                f"{broker} {key}: {waiter.event} answered at state end {waiter.state_end}, committed {truth.end}",
            )
        event = waiter.event
        group = self.groups.setdefault((event.group, key), GroupTruth())  # type: ignore[attr-defined]
        state = answer.state
        if isinstance(event, ev.Claimed):
            self.world.count("claims answered")
            self._check_claim(key, event, waiter, group, state)
        elif isinstance(event, ev.CommitAsked):
            self.world.count("group commits answered")
            self._check_commit(key, event, waiter, group, state)
        elif isinstance(event, ev.CommittedAsked):
            self._check_read_back(key, waiter, group, state)

    def _check_claim(
        self, key: Key, event: ev.Claimed, waiter: Waiter, group: GroupTruth, state: ev.GroupOffset
    ) -> None:
        self._check_not_superseded("claim", key, event.generation, waiter, group)
        self._check_read_back(key, waiter, group, state)
        group.claim_answered.setdefault(event.generation, self.world.engine.now_us)
        group.generation = max(group.generation, event.generation)

    def _check_commit(
        self, key: Key, event: ev.CommitAsked, waiter: Waiter, group: GroupTruth, state: ev.GroupOffset
    ) -> None:
        self._check_not_superseded("commit", key, event.generation, waiter, group)
        if event.offset > self.world.truth(key)[RECORDS].end and not self.declared.get(key):
            self.fail("K7 no commit beyond the high watermark", f"{key}: {event}")
        if not event.reset:
            self._check_read_back(key, waiter, group, state)
        if event.offset > group.commit:
            group.commit, group.commit_answered_us = event.offset, self.world.engine.now_us

    def _check_not_superseded(self, what: str, key: Key, generation: int, waiter: Waiter, group: GroupTruth) -> None:
        """K1, K4: what was asked after a later generation's claim had been answered must be refused."""
        for later, answered_us in group.claim_answered.items():
            if later > generation and answered_us < waiter.asked_us and not group.forgotten:
                self.fail(
                    "K1/K4 only the latest claim may commit",
                    f"{key}: {what} of generation {generation} accepted after claim {later} was answered",
                )

    def _check_read_back(self, key: Key, waiter: Waiter, group: GroupTruth, state: ev.GroupOffset) -> None:
        """K2, K3: an offset that is read back is not below a commit that was answered before."""
        if (
            group.commit > state.offset
            and group.commit_answered_us < waiter.asked_us
            and not (group.forgotten or self.declared.get(key))
        ):
            self.fail("K2/K3 committed offsets never fall", f"{key}: committed {group.commit}, read back {state}")
        if state.offset > self.world.truth(key)[RECORDS].end:
            self.fail("K7 no commit beyond the high watermark", f"{key}: {state}")

    def group_heard(self, member: str, kind: str, frame: Any) -> None:
        """For statistics only: the answers were checked where they were given."""

    # -- readers -----------------------------------------------------------------------------------

    def polled(self, consumer: str, key: Key, header: BatchHeader) -> None:
        truth = self.world.truth(key)[RECORDS]
        stored = truth.batches.get(header.base_offset)
        if (stored is None or stored[2:] != (header.epoch, header.crc)) and not truth.lost:
            self.fail("D2 only committed records are read", f"{consumer} {key} got {header}, committed is {stored}")
        self.world.count("batches polled")

    def read_refused(self, consumer: str, key: Key, offset: int, error: Any) -> None:
        """LOG_TRUNCATED and OFFSET_OUT_OF_RANGE are possible only after a declared loss, or below the log start."""
        ahead = error.code in ("LOG_TRUNCATED", "OFFSET_OUT_OF_RANGE") and offset >= error.details.get("log_start", 0)
        if ahead and not self.declared.get(key):
            self.fail("no reader is ahead of the log", f"{consumer} {key} at {offset}: {error}")
