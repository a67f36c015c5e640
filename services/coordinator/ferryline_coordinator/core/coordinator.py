"""The coordinator's core: one funnel through which everything that happens goes (`events.py` says how to drive it)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.messages import FEATURE_LEVEL
from ferryline.protocol.metadata import TopicMeta
from ferryline_coordinator.core import upgrade
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.elections import can_elect, elect
from ferryline_coordinator.core.events import (
    Abandoned,
    AccessFileRead,
    AlterIsrsReceived,
    BindingAdded,
    BindingRemoved,
    BrokerAdmitted,
    BrokerForgotten,
    CoordinatorsKnown,
    Decision,
    DrainSet,
    Event,
    ExchangeCreated,
    ExchangeDeleted,
    Founded,
    GroupDeleted,
    GroupHeartbeatReceived,
    HeartbeatReceived,
    KeyAdded,
    KeyRemoved,
    LevelRaised,
    MetadataAsked,
    PartitionsAdded,
    PrincipalAltered,
    PrincipalCreated,
    PrincipalDeleted,
    ProbeEnded,
    RecoveryAsked,
    Refuse,
    RegisterReceived,
    ReportReceived,
    ResignReceived,
    RestoreBegun,
    RestoreEnded,
    SessionClosed,
    SessionOpened,
    StoredTold,
    Tick,
    TopicAltered,
    TopicCreated,
    TopicDeleted,
    TopicEnsured,
)
from ferryline_coordinator.core.exchanges import Exchanges
from ferryline_coordinator.core.fencing import Fencing, is_draining, note_elected
from ferryline_coordinator.core.groups import Groups
from ferryline_coordinator.core.membership import Membership
from ferryline_coordinator.core.moves import Moves
from ferryline_coordinator.core.partitions import Partitions
from ferryline_coordinator.core.polls import Polls
from ferryline_coordinator.core.principals import Principals
from ferryline_coordinator.core.records import BrokerRecord, ClusterRecord, PartRecord, TopicGone
from ferryline_coordinator.core.recovery import Recovery, Reports
from ferryline_coordinator.core.registration import Registration
from ferryline_coordinator.core.restoring import Restoring
from ferryline_coordinator.core.sessions import Sessions
from ferryline_coordinator.core.state import CoordinatorState
from ferryline_coordinator.core.topics import Topics

STORY_EVENTS = 500


class CoreBroken(AssertionError):
    """An invariant did not hold. ``story`` holds the last events, oldest first."""

    def __init__(self, cause: AssertionError, story: list[tuple[int, Event]]) -> None:
        super().__init__(f"{cause!r} after {len(story)} events, the last being {story[-1] if story else None}")
        self.story = story


class CoordinatorCore:
    """Decides everything that the coordinator decides. Pure: time and identifiers come with the events.

    `load` once, then `handle` and `apply` in turns, and `handle(Tick())` at `next_deadline_ms`.
    """

    def __init__(self, config: CoreConfig | None = None) -> None:
        self.config = config or CoreConfig()
        self.state = CoordinatorState(self.config.changes_max)
        self.coord_epoch = 0
        self.story: deque[tuple[int, Event]] = deque(maxlen=STORY_EVENTS)
        self.fencing = Fencing(self.config)
        self.reports = Reports()
        self.sessions = Sessions()
        self.principals = Principals(self.config)
        self.registration = Registration(self.config, self.fencing, self.reports, self.sessions, self.principals)
        self.membership = Membership(self.config, self.fencing, self.reports, self.sessions)
        self.partitions = Partitions(self.sessions, self.registration)
        self.topics = Topics(self.config)
        self.exchanges = Exchanges(self.config)
        self.recovery = Recovery(self.config, self.reports)
        self.restoring = Restoring(self.config)
        self.moves = Moves(self.config)
        self.groups = Groups(self.config, self.state)
        self.polls = Polls(self.config, self.state, 0)
        self._now_ms = 0

    def load(self, records: Iterable[tuple[str, bytes]], coord_epoch: int, now_ms: int) -> None:
        """Replay a store. Sessions, heartbeats and probes of an earlier coordinator are not part of it."""
        assert coord_epoch > 0
        assert self.coord_epoch == 0, "a core is loaded once"
        self.state.load(records)
        upgrade.check_known(self.state.cluster)
        self.coord_epoch = coord_epoch
        self.polls = Polls(self.config, self.state, coord_epoch)
        self._now_ms = now_ms
        for broker_id in sorted(self.state.brokers):
            self.fencing.heard_ms[broker_id] = now_ms  # nobody is fenced before one full fence_ms has passed
            self.fencing.gate[broker_id] = self.state.revision
        self.groups.load(now_ms)
        self.moves.changed(now_ms)

    @property
    def founded(self) -> bool:
        return self.state.cluster is not None

    def handle(self, event: Event, now_ms: int) -> Decision:
        """What follows from ``event``. Durable state is as before until `apply`."""
        self.story.append((now_ms, event))
        try:
            return self._decide(event, now_ms)
        except AssertionError as broken:
            raise CoreBroken(broken, list(self.story)) from broken

    def apply(self, decision: Decision) -> None:
        """Take over what a decision makes durable: before the next `handle`, before or after its commit."""
        if not decision.durable:
            return
        try:
            self.state.apply(decision)
        except AssertionError as broken:
            raise CoreBroken(broken, list(self.story)) from broken

    def close(self) -> Decision:
        """The coordinator is about to stop: everybody who waits is answered."""
        return Decision((), (), tuple(self.polls.close()))

    def next_deadline_ms(self) -> int | None:
        """When to send a Tick at the latest; None: when something happens."""
        if not self.founded:
            return None
        unfenced = [broker_id for broker_id, record in self.state.brokers.items() if not record.meta.fenced]
        due = [
            self.fencing.next_deadline_ms(unfenced),
            self.moves.next_deadline_ms(),
            self.polls.next_deadline_ms(),
            self.groups.next_deadline_ms(),
        ]
        if unfenced or self.groups.members():
            due.append(self._now_ms + self.config.heartbeat_ms)  # so that our own absence is noticed
        return min((ms for ms in due if ms is not None), default=None)

    # -- inside -------------------------------------------------------------------------------------

    def _decide(self, event: Event, now_ms: int) -> Decision:
        self._notice_absence(now_ms)
        if isinstance(event, Founded):
            return self._found(event)
        assert self.founded, "the first event of a new cluster is Founded"
        if isinstance(event, MetadataAsked):
            return Decision((), (), tuple(self.polls.ask(event, now_ms)))
        if isinstance(event, Abandoned):
            self.polls.abandon(event.reply)
            return Decision()
        change = Change(self.state, now_ms, self.coord_epoch)
        try:
            self._dispatch(change, event)
        except FerrylineError as error:
            reply = getattr(event, "reply", None)
            assert reply is not None, event
            change = Change(self.state, now_ms, self.coord_epoch)  # what was begun is dropped
            change.add(Refuse(reply, error.info()))
        self.fencing.advance(change, self.registration)
        self.moves.look(change)
        self._elect_waiting(change)
        return self._finish(change)

    def _elect_waiting(self, change: Change) -> None:
        """Whatever this decision did: nobody waits for a primary while there is a candidate."""
        for record in change.written_parts():
            if not record.frozen and can_elect(record.meta, change.electable):
                after = elect(record.meta, change.electable, lambda b: is_draining(change, b))
                note_elected(change, [change.put_part(after)])

    def _finish(self, change: Change) -> Decision:
        decision = change.finish()
        if not change.visible:
            return decision
        replaced = any(isinstance(record, BrokerRecord | PartRecord | TopicMeta) for record in decision.puts)
        if replaced or decision.deletes:
            self.moves.changed(change.now_ms)
        if any(isinstance(record, TopicMeta | TopicGone) for record in decision.puts):
            self.groups.topics_changed()
        # Answers of this decision go before the news of it: whoever asked may wait for metadata right after.
        effects = (*decision.effects, *self.polls.publish(decision))
        return Decision(decision.puts, decision.deletes, effects)

    def _notice_absence(self, now_ms: int) -> None:
        """A coordinator that was itself away (stopped, starved) cannot blame others for its silence."""
        if now_ms - self._now_ms > max(1_000, 2 * self.config.heartbeat_ms):
            self.fencing.everybody_heard(sorted(self.state.brokers), now_ms)
            self.groups.grace(now_ms)
        self._now_ms = now_ms

    def _found(self, event: Founded) -> Decision:
        if self.founded:
            return Decision()
        return Decision((ClusterRecord(event.cluster_id, event.claim_key, feature_level=FEATURE_LEVEL),))

    def _dispatch(self, change: Change, event: Event) -> None:
        match event:
            case Tick():
                self._tick(change)
            case HeartbeatReceived():
                self.membership.heartbeat(change, event)
            case AlterIsrsReceived():
                self.partitions.alter(change, event)
            case GroupHeartbeatReceived():
                self.groups.heartbeat(change, event)
            case SessionOpened():
                self.sessions.opened(event.broker_id, event.session)
            case SessionClosed():
                self.membership.session_closed(change, event.broker_id, event.session)
            case ProbeEnded():
                self.fencing.probe_ended(event)
            case RegisterReceived():
                self.registration.register(change, event)
            case ResignReceived():
                self.partitions.resign(change, event)
            case ReportReceived():
                self.partitions.report(change, event)
            case _:
                self._command(change, event)

    def _command(self, change: Change, event: Event) -> None:
        match event:
            case TopicCreated():
                self.topics.create(change, event)
            case TopicAltered():
                self.topics.alter(change, event)
            case TopicEnsured(_, session, message):
                self.sessions.checked(change, message.broker_id, message.broker_epoch, session)
                self.topics.ensure(change, event)
            case StoredTold(_, session, told):
                self.sessions.checked(change, told.broker_id, told.broker_epoch, session)
                self.principals.stored(change, event)
            case PartitionsAdded():
                self.topics.add_partitions(change, event)
            case TopicDeleted():
                self.topics.delete(change, event)
                self.exchanges.topic_deleted(change, event.name)
            case ExchangeCreated():
                self.exchanges.create(change, event)
            case ExchangeDeleted():
                self.exchanges.delete(change, event)
            case BindingAdded():
                self.exchanges.bind(change, event)
            case BindingRemoved():
                self.exchanges.unbind(change, event)
            case DrainSet():
                self.membership.drain(change, event)
            case BrokerAdmitted():
                self.registration.admit(change, event)
            case BrokerForgotten():
                self.membership.forget(change, event)
            case RecoveryAsked():
                self.recovery.asked(change, event)
            case LevelRaised():
                upgrade.finish(change, event)
            case RestoreBegun():
                self.restoring.begin(change, event)
                self.principals.restored(change)
            case RestoreEnded():
                self.restoring.end(change, event)
            case GroupDeleted():
                self.groups.delete(change, event)
            case AccessFileRead(file):
                self.principals.read(change, file)
            case PrincipalCreated():
                self.principals.create(change, event)
            case PrincipalAltered():
                self.principals.alter(change, event)
            case PrincipalDeleted():
                self.principals.delete(change, event)
            case KeyAdded():
                self.principals.add_key(change, event)
            case KeyRemoved():
                self.principals.remove_key(change, event)
            case CoordinatorsKnown(urls):
                if change.cluster.coordinators != urls:
                    change.set_cluster(coordinators=urls)
            case _:
                raise AssertionError(f"unknown event {event!r}")

    def _tick(self, change: Change) -> None:
        now_ms = change.now_ms
        for effect in self.polls.expire(now_ms):
            change.add(effect)
        self.fencing.probes_expired(now_ms)
        self.fencing.look_for_silence(change)
        self.groups.expire(change)
        self.recovery.automatic(change)
