"""Admission and registration of brokers (rule C2), and what they report of their replicas."""

from __future__ import annotations

from msgspec.structs import replace

from ferryline.protocol.errors import (
    Fenced,
    InvalidArgument,
    StaleBrokerEpoch,
    StaleCoordinator,
    Throttled,
    UnsupportedVersion,
)
from ferryline.protocol.messages import (
    LOG_CONFLICT,
    LOG_DAMAGED,
    LOG_TRUNCATED,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    RESTART_FOREIGN,
    RESTART_OS_CRASH,
    Register,
    RegisterOk,
    ReplicaReport,
)
from ferryline.protocol.metadata import FLUSH_FSYNC, BrokerMeta
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.elections import exclude
from ferryline_coordinator.core.events import (
    Admitted,
    BrokerAdmitted,
    Recampaign,
    RegisterReceived,
)
from ferryline_coordinator.core.fencing import REGISTERING, Fencing, is_draining
from ferryline_coordinator.core.principals import Principals
from ferryline_coordinator.core.records import BrokerRecord
from ferryline_coordinator.core.recovery import Reports
from ferryline_coordinator.core.sessions import Sessions

INCOMPLETE_LOGS = (LOG_DAMAGED, LOG_TRUNCATED, LOG_CONFLICT)
URL_BYTES_MAX = 500
LOST_GENERATIONS = 1 << 20  # more than a store can have forgotten


def check_url(value: str, what: str) -> str:
    """An https (or, for tests, http) URL of sane length."""
    if not value.startswith(("https://", "http://")) or len(value) > URL_BYTES_MAX or not value.isprintable():
        raise InvalidArgument(f"{what}: expected an https URL of at most {URL_BYTES_MAX} characters", field=what)
    return value


class Registration:
    """Gives out broker ids and broker epochs; a new life of a broker is fenced first."""

    def __init__(
        self, config: CoreConfig, fencing: Fencing, reports: Reports, sessions: Sessions, principals: Principals
    ) -> None:
        self._config = config
        self._principals = principals
        self._fencing = fencing
        self._reports = reports
        self._sessions = sessions

    # -- admission ----------------------------------------------------------------------------------

    def admit(self, change: Change, event: BrokerAdmitted) -> None:
        """A broker id for a storage. The same storage gets the same id again: a lost answer costs nothing."""
        if not event.storage_id or len(event.storage_id) > 64 or not event.storage_id.isprintable():
            raise InvalidArgument("storage_id: expected 1 to 64 characters", field="storage_id")
        internal, external = check_url(event.internal, "internal"), check_url(event.external, "external")
        for record in change.brokers():
            if record.meta.storage_id == event.storage_id:
                change.reply(event.reply, Admitted(record.meta.id, change.cluster.cluster_id))
                return
        broker_id = self._new_id(change)
        change.put_broker(BrokerRecord(BrokerMeta(broker_id, internal, external, storage_id=event.storage_id)))
        change.reply(event.reply, Admitted(broker_id, change.cluster.cluster_id))

    def _new_id(self, change: Change) -> int:
        if len(change.brokers()) >= self._config.brokers_max:
            raise Throttled(f"the cluster has {self._config.brokers_max} brokers", limit=self._config.brokers_max)
        broker_id = change.cluster.broker_id + 1
        change.set_cluster(broker_id=broker_id)
        return broker_id

    # -- registration -------------------------------------------------------------------------------

    def register(self, change: Change, event: RegisterReceived) -> None:
        """C2. A new life of a broker is fenced first; the answer then waits for that."""
        message = self._identified(change, event.message)
        event = replace(event, message=message)
        broker_id = message.broker_id
        if not self._sessions.speaks_for(broker_id, event.session):
            raise StaleBrokerEpoch(f"broker {broker_id} has a later session")
        self._sessions.opened(broker_id, event.session)
        if self._regressed(change, event):
            return None
        known = change.broker(broker_id)
        if known is not None and known.meta.storage_id == message.storage_id:
            if message.incarnation < known.meta.incarnation:
                self._rolled_back(change, known, message)
                return self._refuse_rolled_back(change, event, known)
            if message.incarnation == known.meta.incarnation and known.meta.broker_epoch:
                return self._again(change, event, known)
        waiting = self._fencing.registrations.pop(broker_id, None)
        if waiting is not None:
            change.refuse(waiting.reply, StaleBrokerEpoch("a later registration of this broker arrived"))
        if any(broker_id in record.meta.isr for record in change.parts_held(broker_id)):
            self._fencing.registrations[broker_id] = event
            self._fencing.suspect(change, broker_id, REGISTERING)
            return None
        return self.finish(change, event)

    def _identified(self, change: Change, message: Register) -> Register:
        check_url(message.internal, "internal")
        check_url(message.external, "external")
        if message.version_min > PROTOCOL_MAX or message.version_max < PROTOCOL_MIN:
            raise UnsupportedVersion(
                f"the coordinator speaks {PROTOCOL_MIN}..{PROTOCOL_MAX}, "
                f"the broker {message.version_min}..{message.version_max}"
            )
        if message.incarnation < 1 or not message.storage_id:
            raise InvalidArgument("register: storage_id and an incarnation from 1 are needed", field="incarnation")
        level = change.cluster.feature_level
        if message.feature_level < level:
            raise UnsupportedVersion(
                f"feature_level: the cluster runs at {level}, broker {message.broker_id or 'new'} of an older release "
                f"at {message.feature_level} at most: upgrade it",
                cluster=level,
                broker=message.feature_level,
            )
        self._principals.check_level(message.feature_level)
        if message.broker_id:
            return message
        for record in change.brokers():
            if record.meta.storage_id == message.storage_id:
                return replace(message, broker_id=record.meta.id)
        return replace(message, broker_id=self._new_id(change))

    def _regressed(self, change: Change, event: RegisterReceived) -> bool:
        """A broker has seen a coordinator that this store does not know of: it was restored from an old copy.

        Every partition may have changed since. Nothing is elected without recovery, and no coordinator starts again
        under an epoch that brokers would take for old.
        """
        seen = event.message.seen_coord_epoch
        if seen <= change.coord_epoch:
            return False
        floor = seen + 1
        if change.cluster.coord_epoch_floor < floor:
            # Primaries may remember later group generations, too.
            generations = change.cluster.generation_floor + LOST_GENERATIONS
            change.set_cluster(coord_epoch_floor=floor, generation_floor=generations)
            for record in change.parts():
                if not record.frozen:
                    change.put_part(record.meta, frozen=True)
            change.note("frozen", "error", reason="the store is older than what brokers have seen", floor=floor)
        change.refuse(
            event.reply,
            StaleCoordinator(f"this coordinator starts again: its epoch is {change.coord_epoch}, you saw {seen}"),
        )
        change.add(Recampaign(floor))
        return True

    def _rolled_back(self, change: Change, known: BrokerRecord, message: Register) -> None:
        """Its storage is older than it was. While the later life is serving, this is a straggler; else it is true."""
        if not known.meta.fenced:
            return
        if not known.rolled_back:
            change.put_broker(replace(known, rolled_back=True))
            self._exclude_all(change, known.meta.id, remember=False)
            change.note("rolled_back", "error", broker=known.meta.id, incarnation=message.incarnation)

    def _refuse_rolled_back(self, change: Change, event: RegisterReceived, known: BrokerRecord) -> None:
        change.refuse(
            event.reply,
            Fenced(
                f"broker {known.meta.id} registered as incarnation {known.meta.incarnation} before, "
                f"now as {event.message.incarnation}: its storage was rolled back; give it an empty data directory",
                incarnation=known.meta.incarnation,
            ),
        )

    def _again(self, change: Change, event: RegisterReceived, known: BrokerRecord) -> None:
        """The same life registers again (its answer was lost, its session ended): the same epoch, idempotent."""
        message, meta = event.message, known.meta
        moved = replace(meta, internal=message.internal, external=message.external)
        if moved != meta:
            change.put_broker(replace(known, meta=moved))
        self._fencing.heard(meta.id, change.now_ms)
        self.take_reports(change, meta.id, message.replicas, complete=True)
        self._answer(change, event, moved)

    def finish(self, change: Change, event: RegisterReceived) -> None:
        """The second half of a registration, with the broker out of every in-sync set."""
        message, broker_id = event.message, event.message.broker_id
        known = change.broker(broker_id)
        same_storage = known is not None and known.meta.storage_id == message.storage_id
        if known is not None and same_storage and message.incarnation <= known.meta.incarnation:
            return change.refuse(event.reply, StaleBrokerEpoch("a later registration of this broker was accepted"))
        epoch = change.cluster.broker_epoch + 1
        change.set_cluster(broker_epoch=epoch, broker_id=max(broker_id, change.cluster.broker_id))
        rolled_back = known is not None and same_storage and known.rolled_back
        meta = BrokerMeta(
            broker_id,
            message.internal,
            message.external,
            epoch,
            fenced=True,
            storage_id=message.storage_id,
            incarnation=message.incarnation,
            draining=known is not None and known.meta.draining,
        )
        change.put_broker(
            BrokerRecord(meta, rolled_back, message.feature_level, (message.version_min, message.version_max))
        )
        fresh = known is None or known.meta.broker_epoch == 0
        if (not same_storage and not fresh) or rolled_back or message.restart_class == RESTART_FOREIGN:
            self._exclude_all(change, broker_id, remember=False)
        elif message.restart_class == RESTART_OS_CRASH:
            for record in change.parts_held(broker_id):
                if record.meta.flush != FLUSH_FSYNC:
                    self._exclude(change, record.meta.key, broker_id)
        self._fencing.heard_ms[broker_id] = change.now_ms
        self.take_reports(change, broker_id, message.replicas, complete=True)
        change.note("registered", broker=broker_id, incarnation=message.incarnation, restart=message.restart_class)
        self._answer(change, event, meta)
        self._fencing.gate[broker_id] = change.next_revision()
        return None

    def _answer(self, change: Change, event: RegisterReceived, meta: BrokerMeta) -> None:
        cluster = change.cluster
        change.reply(
            event.reply,
            RegisterOk(
                meta.id,
                meta.broker_epoch,
                change.coord_epoch,
                cluster.cluster_id,
                cluster.claim_key,
                self._config.heartbeat_ms,
                change.next_revision(),
                event.message.request,
                self._principals.policy(change),
            ),
        )

    # -- reports of replicas ------------------------------------------------------------------------

    def take_reports(
        self, change: Change, broker_id: int, reports: list[ReplicaReport], *, complete: bool = False
    ) -> None:
        """Remember how replicas stand; freeze what the store has forgotten, exclude what is not complete.

        ``complete``: all replicas of the broker; one that is missing was never opened there and is empty.
        """
        if complete:
            self._reports.arrived(broker_id)
            named = {(report.topic_id, report.partition) for report in reports}
            held = [record.meta.key for record in change.parts_held(broker_id)]
            empty = [ReplicaReport(*key, 0, (0, 0), (-1, -1), (0, 0)) for key in held if key not in named]
            reports = [*reports, *empty]
        for report in reports:
            key = (report.topic_id, report.partition)
            record = change.part(key)
            if record is None or broker_id not in record.meta.replicas:
                continue
            if report.seen_epoch > record.meta.epoch and not record.frozen:
                change.put_part(record.meta, frozen=True)
                change.note(
                    "frozen",
                    "error",
                    topic_id=key[0],
                    partition=key[1],
                    epoch=record.meta.epoch,
                    seen=report.seen_epoch,
                )
            self._reports.take(change, record.meta, broker_id, report)
            if report.log_state in INCOMPLETE_LOGS:
                self._exclude(change, key, broker_id)
                stands = change.part(key)
                assert stands is not None
                change.put_part(stands.meta, touched=True)  # no proposal made in ignorance of it is accepted any more

    def _exclude_all(self, change: Change, broker_id: int, *, remember: bool) -> None:
        for record in change.parts_held(broker_id):
            self._exclude(change, record.meta.key, broker_id, remember=remember)

    def _exclude(self, change: Change, key: tuple[str, int], broker_id: int, *, remember: bool = True) -> None:
        record = change.part(key)
        assert record is not None
        after = exclude(
            record.meta,
            broker_id,
            change.electable,
            lambda b: is_draining(change, b),
            frozen=record.frozen,
            remember=remember,
        )
        if after is not record.meta:
            change.put_part(after)
            change.note("excluded", "warning", topic_id=key[0], partition=key[1], broker=broker_id)
