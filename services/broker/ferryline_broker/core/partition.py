"""One replica on one broker: the funnel that every event goes through. Pure.

`PartitionCore` decides which role the coordinator's records give this replica and hands events to the `Primary` or
`Secondary` of the present epoch. A new epoch is a new object, so nothing of an old primaryship can leak into the next.

::

            MetaReceived: primary = self, epoch > seen          MetaReceived: other primary
    idle ------------------------------------------> primary -----------------------------> secondary
      ^        no primary known / not a replica         |   conflict, storage, assertion        |
      +-------------------------------------------------+-----------> stopped <-----------------+
"""

from __future__ import annotations

from collections import deque
from typing import Any, get_args

from ferryline.protocol.messages import (
    LOG_CONFLICT,
    LOG_DAMAGED,
    LOG_OK,
    LOG_TRUNCATED,
    RECORDS,
    STATE,
    ReplicaData,
    ReplicaReport,
)
from ferryline.protocol.metadata import NO_BROKER, RESTORING, PartitionMeta, check_partition
from ferryline_broker.core.events import (
    AlterIsrAnswered,
    DataCorrupt,
    DataReceived,
    DeleteReplica,
    DiskFull,
    Effect,
    Event,
    FetchReceived,
    Flushed,
    HandOverAsked,
    Imported,
    Key,
    LogStartAdvanced,
    MetaReceived,
    PassEnded,
    PeerDown,
    PeerUp,
    PersistEpoch,
    Produced,
    ProducersRebuilt,
    ProgressReceived,
    RefreshMetadata,
    Refuse,
    RetryChanged,
    RoleChanged,
    SendData,
    StateReplayed,
    StorageFailed,
    Tick,
)
from ferryline_broker.core.full import OutOfSpace
from ferryline_broker.core.group_asks import GroupEvent
from ferryline_broker.core.primary import Primary
from ferryline_broker.core.queue_events import DeadMoved, WindowRead
from ferryline_broker.core.queues import QueueEvent
from ferryline_broker.core.reading import ReadVerdict, check_read
from ferryline_broker.core.replica import (
    ROLE_IDLE,
    ROLE_PRIMARY,
    ROLE_SECONDARY,
    ROLE_STOPPED,
    LogOpened,
    OpenedReplica,
    Replica,
    ReplicaConfig,
)
from ferryline_broker.core.secondary import Secondary

__all__ = ["LogOpened", "OpenedReplica", "PartitionCore", "ReadVerdict", "ReplicaConfig"]

STORY_EVENTS = 200
_ASKED: frozenset[Any] = frozenset((Produced, *get_args(GroupEvent), *get_args(QueueEvent)))


class PartitionCore:
    """`handle` is the only way in; it returns what is to be done, in order."""

    def __init__(self, key: Key, broker_id: int, config: ReplicaConfig, opened: OpenedReplica) -> None:
        self.replica = Replica(key, broker_id, config, opened)
        self.primary: Primary | None = None
        self.secondary: Secondary | None = None
        self.stopped = ""
        self.full: OutOfSpace | None = None  # stopped, for the disk is full
        self.story: deque[tuple[int, Any]] = deque(maxlen=STORY_EVENTS)
        self._role = ROLE_IDLE
        if opened.log_state == LOG_DAMAGED and not opened.repairing:
            self.stopped = "damaged at start"
            self._role = ROLE_STOPPED

    # -- what the driver may look at ----------------------------------------------------------------

    @property
    def key(self) -> Key:
        return self.replica.key

    @property
    def role(self) -> str:
        return self._role

    @property
    def epoch(self) -> int:
        return self.replica.part.epoch if self.replica.part else self.replica.seen_epoch

    @property
    def part(self) -> PartitionMeta | None:
        return self.replica.part

    @property
    def isr(self) -> tuple[int, ...]:
        if self.primary:
            return self.primary.isr
        return self.replica.part.isr if self.replica.part else ()

    @property
    def maximal_isr(self) -> frozenset[int]:
        return self.primary.maximal_isr if self.primary else frozenset()

    @property
    def ready(self) -> bool:
        return self.primary is not None and self.primary.ready

    @property
    def log_start(self) -> list[int]:
        return self.replica.log_start

    @property
    def log_end(self) -> list[int]:
        return self.replica.log_end

    @property
    def flushed(self) -> list[int]:
        return self.replica.flushed

    @property
    def high_watermark(self) -> list[int]:
        return self.replica.high_watermark

    def report(self) -> ReplicaReport:
        return self.replica.report()

    def retention_limit(self, now_ms: int) -> int:
        """Nothing at or above this record offset may be deleted (rule L11)."""
        if self.primary is None:
            return self.replica.log_start[RECORDS]  # a secondary follows its primary's log start
        return self.primary.retained_from(now_ms)

    def queue_ready(self, group: str) -> int:
        """Records of a queue group that could be leased now, as far as its window has been filled."""
        primary = self.primary
        return primary.queues.ready(group) if primary is not None and primary.queues is not None else 0

    def queue_waited_for(self, group: str, ordering: str, now_ms: int) -> bool:
        """Whether a request to lease would find nothing, and somebody else's was told the same a moment ago."""
        primary = self.primary
        return primary is not None and primary.queues is not None and primary.queues.waited_for(group, ordering, now_ms)

    def check_read(self, offset: int, offset_epoch: int = -1, secondary: bool = False) -> ReadVerdict:
        """See `reading.check_read`."""
        role = ROLE_PRIMARY if self.full is not None and self.full.leads else self._role
        return check_read(self.replica, role, self.epoch, offset, offset_epoch, secondary)

    def next_deadline_ms(self) -> int | None:
        if self.stopped:
            return self.full.next_deadline_ms() if self.full is not None else None
        if self.primary:
            return self.primary.next_deadline_ms()
        return self.secondary.next_deadline_ms() if self.secondary else None

    # -- the funnel ---------------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        """Decide. Raises AssertionError (with the story in ``self.story``) only if an invariant broke."""
        self.story.append((now_ms, event.story()))
        replica = self.replica
        self._dispatch(event, now_ms)
        if self.secondary is not None and self.secondary.failed and not self.stopped:
            self._stop(self.secondary.failed)
        replica.check()
        out, replica.out = replica.out, []
        return out

    def _dispatch(self, event: Any, now_ms: int) -> None:
        if type(event) in _ASKED:
            self._asked(event, now_ms)
        elif isinstance(event, MetaReceived):
            self._meta(event, now_ms)
        elif isinstance(event, FetchReceived):
            self._fetch(event, now_ms)
        elif isinstance(event, Flushed):
            self._flushed(event, now_ms)
        elif isinstance(event, AlterIsrAnswered):
            self._alter_answered(event, now_ms)
        elif isinstance(event, StorageFailed):
            self._storage_failed(event, now_ms)
        elif isinstance(event, DiskFull):
            self.replica.disk_full = event.detail if event.full else ""
        elif isinstance(event, RetryChanged):
            self.replica.retry = event.retry
        elif isinstance(event, LogStartAdvanced):
            self.replica.advance_start(event.log, event.log_start)
        elif isinstance(event, ProducersRebuilt):
            self.replica.producers = event.table
        elif isinstance(event, Imported):
            self._imported(event)
        elif self.primary is not None:
            self._primary_event(self.primary, event, now_ms)
        elif self.secondary is not None:
            self._secondary_event(self.secondary, event, now_ms)
        elif self.full is not None:
            self.full.tick(now_ms)

    def _primary_event(self, primary: Primary, event: Event, now_ms: int) -> None:
        if isinstance(event, ProgressReceived):
            primary.progress(event, now_ms)
        elif isinstance(event, PassEnded):
            primary.pass_ended(now_ms)
        elif isinstance(event, StateReplayed):
            primary.replayed(event.entries)
        elif isinstance(event, HandOverAsked):
            primary.hand_over(event, now_ms)
        elif isinstance(event, PeerDown):
            primary.peer_down(event.peer)
        elif isinstance(event, Tick):
            primary.tick(now_ms)

    def _secondary_event(self, secondary: Secondary, event: Event, now_ms: int) -> None:
        if isinstance(event, DataReceived):
            secondary.answered(event, now_ms)
        elif isinstance(event, DataCorrupt):
            secondary.corrupt(event, now_ms)
        elif isinstance(event, PeerUp):
            if event.peer == secondary.primary:
                secondary.peer_up(now_ms)
        elif isinstance(event, PeerDown):
            if event.peer == secondary.primary:
                secondary.peer_down(now_ms)
        elif isinstance(event, Tick):
            secondary.tick(now_ms)

    def _asked(self, event: Produced | GroupEvent | QueueEvent, now_ms: int) -> None:
        if isinstance(event, (WindowRead, DeadMoved)):  # nobody waits for an answer
            if self.primary is not None:
                self.primary.queue(event, now_ms)
        elif self.full is not None and self.full.leads:
            self.full.refuse(event.token)
        elif self.primary is None:
            part = self.replica.part
            known = (part.primary, part.epoch) if part and not self.stopped else (NO_BROKER, 0)
            message = f"this broker is {self._role} of the partition"
            self.replica.out.append(Refuse(event.token, "NOT_PRIMARY", message, *known))
        elif isinstance(event, Produced):
            self.primary.produce(event, now_ms)
        elif isinstance(event, QueueEvent):
            self.primary.queue(event, now_ms)
        else:
            self.primary.group(event, now_ms)

    # -- roles --------------------------------------------------------------------------------------

    def _meta(self, event: MetaReceived, now_ms: int, *, told: bool = True) -> None:
        replica, part = self.replica, event.part
        assert part.key == replica.key
        if event.coord_epoch < replica.coord_epoch:
            return  # a stale coordinator is harmless (rule C9)
        replica.coord_epoch = event.coord_epoch
        replica.broker_epoch = event.broker_epoch
        replica.live = event.live
        if (replica.part is not None and part.version <= replica.part.version) or part.epoch < replica.seen_epoch:
            if self.primary is not None:
                self.primary.live_changed(now_ms)  # who is alive may have changed
            elif part == replica.part and replica.broker_id not in part.replicas:
                replica.out.append(DeleteReplica(replica.key))  # known from an answer; now the node knows, too
            return
        check_partition(part)
        assert replica.part is None or part.epoch >= replica.part.epoch, (part, replica.part)
        replica.part = part
        if replica.broker_id in part.isr and not self.stopped:
            replica.repairing = False
            if replica.log_state == LOG_TRUNCATED:  # it has fetched what it had lost; saying so again would exclude it
                replica.log_state = LOG_OK
        if replica.broker_id not in part.replicas:
            if not self.stopped:
                self._become_idle(part, "not a replica of this partition any more")
            if told:  # by the node, or it would not open it again; also if stopped: its files must not stay for ever
                replica.out.append(DeleteReplica(replica.key))
        elif self.stopped:
            return
        elif part.primary == replica.broker_id:
            self._primary_meta(part, now_ms)
        elif part.primary == NO_BROKER:
            self._become_idle(part, "no primary")
        elif self.secondary is None or self.secondary.epoch != part.epoch:
            self._become_secondary(part, now_ms)
        else:
            self.secondary.updated(now_ms)

    def _primary_meta(self, part: PartitionMeta, now_ms: int) -> None:
        replica = self.replica
        if self.primary is not None and self.primary.epoch == part.epoch:
            self.primary.committed(part, now_ms)
            return
        if part.epoch <= replica.seen_epoch:
            # An epoch belongs to one process life: this one began before the restart, with another memory of
            # what was committed. The coordinator raises it when it sees the new incarnation.
            self._become_idle(part, "epoch of an earlier process life")
            return
        self._leave("another epoch began here", part)
        self._persist(part.epoch)
        self.primary = Primary(replica, part, now_ms)
        self._role = ROLE_PRIMARY
        replica.out.append(RoleChanged(ROLE_PRIMARY, part.epoch))
        self.primary.begin(now_ms)

    def _become_secondary(self, part: PartitionMeta, now_ms: int) -> None:
        """Rule F1: nothing is cut yet; the first fetch of the epoch finds out whether anything must be."""
        self._leave("another broker became primary", part)
        self._persist(part.epoch)
        self.secondary = Secondary(self.replica, part.epoch, part.primary)
        self._role = ROLE_SECONDARY
        self.replica.out.append(RoleChanged(ROLE_SECONDARY, part.epoch))
        self.secondary.fetch(now_ms)

    def _become_idle(self, part: PartitionMeta, reason: str) -> None:
        self._leave(reason, part)
        self._persist(part.epoch)
        if self._role != ROLE_IDLE:
            self.replica.out.append(RoleChanged(ROLE_IDLE, part.epoch, reason))
        self._role = ROLE_IDLE

    def _persist(self, epoch: int) -> None:
        if epoch > self.replica.seen_epoch:
            self.replica.seen_epoch = epoch
            self.replica.out.append(PersistEpoch(epoch))

    def _leave(self, reason: str, part: PartitionMeta | None) -> None:
        if self.primary is not None:
            primary, epoch = (part.primary, part.epoch) if part else (NO_BROKER, 0)
            self.primary.step_down("COMMIT_UNKNOWN", reason, primary, epoch)
        self.primary = None
        self.secondary = None

    def _stop(self, reason: str) -> None:
        self._leave(reason, None)
        self.stopped = reason
        self._role = ROLE_STOPPED
        self.replica.out.append(RoleChanged(ROLE_STOPPED, self.epoch, reason))

    def abandon(self, reason: str) -> list[Effect]:
        """After an AssertionError: stop this partition, answer whoever waits, let another replica lead."""
        self.replica.out = []
        self._stop(reason)
        self.replica.stop(LOG_CONFLICT)
        out, self.replica.out = self.replica.out, []
        return out

    # -- single events ------------------------------------------------------------------------------

    def _fetch(self, event: FetchReceived, now_ms: int) -> None:
        """Rule L3: settle whose epoch is older before anything else."""
        fetch, replica = event.fetch, self.replica
        newest = max(fetch.epoch, fetch.positions[RECORDS].last_epoch, fetch.positions[STATE].last_epoch)
        if self.primary is None or newest > self.primary.epoch:
            self._refuse_fetch(event, "NOT_PRIMARY")
            if newest > self.epoch:
                replica.out.append(RefreshMetadata())
                if self.primary is not None:
                    # Somebody lives in a later epoch: this primaryship is over, whatever the coordinator says next.
                    self._leave("a later epoch exists", None)
                    self._role = ROLE_IDLE
                    replica.out.append(RoleChanged(ROLE_IDLE, self.epoch, "a later epoch exists"))
        elif fetch.epoch < self.primary.epoch:
            self._refuse_fetch(event, "STALE_EPOCH")
        elif replica.part is None or event.sender not in replica.part.replicas:
            self._refuse_fetch(event, "UNKNOWN_PARTITION")
        else:
            self.primary.fetch(event, now_ms)

    def _refuse_fetch(self, event: FetchReceived, code: str) -> None:
        fetch = event.fetch
        data = ReplicaData(*self.replica.key, fetch.epoch, fetch.fetch_id, None, code)
        self.replica.out.append(SendData(event.session, event.sender, data))

    def _flushed(self, event: Flushed, now_ms: int) -> None:
        news = self._note_flushed(event.log, event.end)
        if not (self._note_flushed(STATE, event.state_end) or news):
            return
        if self.primary is not None:
            self.primary.advance(now_ms)
        elif self.secondary is not None:
            self.secondary.flushed(now_ms)

    def _note_flushed(self, log: int, end: int) -> bool:
        replica = self.replica
        end = min(end, replica.log_end[log])
        if end <= replica.flushed[log]:
            return False
        replica.flushed[log] = end
        return True

    def _imported(self, event: Imported) -> None:
        """Nobody leads and nobody follows: these bytes are claimed by no epoch but those that they carry."""
        replica, log = self.replica, event.log
        assert replica.part is not None, event
        assert replica.part.recovery_epoch == RESTORING, replica.part
        assert self._role == ROLE_IDLE, self._role
        if replica.log_end[log] != event.start:
            assert replica.epochs[log].tail_epoch == -1, f"{self.key} log {log} ends at {replica.log_end[log]}"
            replica.reset(log, event.start, event.epoch_before)
        if event.headers:
            replica.append(log, event.data, event.headers)
            replica.flush(log)

    def _alter_answered(self, event: AlterIsrAnswered, now_ms: int) -> None:
        """The answer's record is as good as one from the metadata; a bare refusal is the primary's business."""
        result, replica = event.result, self.replica
        if result.coord_epoch < replica.coord_epoch:
            return
        if result.part is not None and (replica.part is None or result.part.version > replica.part.version):
            meta = MetaReceived(result.part, replica.broker_epoch, result.coord_epoch, replica.live)
            self._meta(meta, now_ms, told=False)
        elif self.primary is not None:
            self.primary.alter_answered(result, now_ms)

    def _storage_failed(self, event: StorageFailed, now_ms: int) -> None:
        """Rule L10: never trust that file again in this process life. A full disk has harmed nothing (`full.py`)."""
        if not self.stopped:
            led = self.primary is not None
            self._stop(f"storage of log {event.log} failed: {event.reason}")
            if event.ends is None:
                self.replica.stop(LOG_DAMAGED)
            else:
                self.full = OutOfSpace(self.replica, led, event.reason, event.ends, now_ms)
