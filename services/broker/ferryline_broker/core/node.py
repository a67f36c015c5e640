"""The broker as a member of the cluster: register, heartbeat, follow the metadata, stop. Pure.

Rules of this file:

* Nothing is acted on before this process life is registered: metadata older than the registration is ignored, because a
  record of the previous life could make this broker believe in an epoch that it has forgotten (rule C2).
* ``coord_epoch`` never falls: a coordinator that was replaced is not listened to (rule C9).
* A replica is deleted only where the coordinator says so: a deleted topic by id, or a newer record without this broker.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from ferryline.protocol.messages import LOG_DAMAGED, Heartbeat, Register
from ferryline.protocol.metadata import NO_BROKER, ClusterMetadata, MetadataAnswer, PartitionMeta
from ferryline_broker.core.events import (
    ConfirmRegistered,
    CoordinatorDown,
    CoordinatorUp,
    DeleteReplica,
    DiskFull,
    Effect,
    Event,
    HandOverAsked,
    HeartbeatAnswered,
    Key,
    MetadataReceived,
    MetaReceived,
    NodeDiskFull,
    OpenReplica,
    PersistCoordEpoch,
    RegisterAnswered,
    Registered,
    ReplicaOpened,
    RequestMetadata,
    ResetCoordinatorSession,
    SendHeartbeat,
    SendRegister,
    StopAsked,
    StopNow,
    TellReplica,
    Tick,
)

STORY_EVENTS = 200
FATAL_REFUSALS = ("UNSUPPORTED_VERSION", "CLUSTER_MISMATCH", "STORAGE_ROLLED_BACK")


class NodeConfig(msgspec.Struct, frozen=True):
    """Times in ms."""

    heartbeat_ms: int = 500
    register_retry_ms: int = 500
    metadata_wait_ms: int = 30_000
    metadata_retry_ms: int = 200
    request_ms: int = 2_000  # an unanswered registration or heartbeat is sent again after this
    stop_ms: int = 5_000


class NodeIdentity(msgspec.Struct):
    """Who this process is, from the data directory. ``replicas``: log_state of every replica found there."""

    broker_id: int  # 0: not registered yet
    storage_id: str
    incarnation: int
    restart_class: str
    internal: str
    external: str
    seen_coord_epoch: int = 0
    cluster_id: str = ""
    replicas: dict[Key, str] = {}


class NodeCore:
    """`handle` is the only way in."""

    def __init__(self, config: NodeConfig, identity: NodeIdentity) -> None:
        self.config = config
        self.identity = identity
        self.metadata = ClusterMetadata()
        self.broker_id = identity.broker_id
        self.broker_epoch = 0
        self.coord_epoch = identity.seen_coord_epoch
        self.registered = False
        self.fenced = True
        self.stopping = False
        self.stopped = False
        self.open: dict[Key, str] = dict(identity.replicas)
        self._asked = 0  # registrations that were sent
        self._untold: dict[Key, int] = {}  # found damaged -> how many had been sent by then: none of them tells of it
        self.story: deque[tuple[int, Any]] = deque(maxlen=STORY_EVENTS)
        self._connected = False
        self._register_due: int | None = None
        self._heartbeat_due: int | None = None
        self._metadata_due: int | None = None
        self._stop_due: int | None = None
        self._min_revision = 0
        self._live: dict[int, int] = {}
        self._disk = DiskFull(False)
        self.out: list[Effect] = []

    def next_deadline_ms(self) -> int | None:
        due = (self._register_due, self._heartbeat_due, self._metadata_due, self._stop_due)
        return min((d for d in due if d is not None), default=None)

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        self.story.append((now_ms, event.story()))
        match event:
            case Tick():
                self._tick(now_ms)
            case CoordinatorUp():
                self._connected = True
                self._register(now_ms)
            case CoordinatorDown():
                self._connected = False
                self._register_due = self._heartbeat_due = self._metadata_due = None
                self.registered = False
                self._maybe_stop_alone()
            case RegisterAnswered():
                self._register_answered(event, now_ms)
            case HeartbeatAnswered():
                self._heartbeat_answered(event, now_ms)
            case MetadataReceived():
                self._metadata_received(event.answer, now_ms)
            case ReplicaOpened():
                self._replica_opened(event, now_ms)
            case NodeDiskFull():
                self._disk = event.disk
                for key in sorted(self.open):
                    self.out.append(TellReplica(key, event.disk))
            case StopAsked():
                self._stop_asked(now_ms)
        out, self.out = self.out, []
        return out

    # -- registration and heartbeats ----------------------------------------------------------------

    def _register(self, now_ms: int) -> None:
        identity = self.identity
        self.registered = False
        self._asked += 1
        self._heartbeat_due = self._metadata_due = None
        self._register_due = now_ms + self.config.request_ms
        self.out.append(
            SendRegister(
                Register(
                    self.broker_id,
                    identity.storage_id,
                    identity.incarnation,
                    identity.restart_class,
                    identity.internal,
                    identity.external,
                    self.coord_epoch,
                    request=self._asked,
                )
            )
        )

    def _register_answered(self, event: RegisterAnswered, now_ms: int) -> None:
        answer = event.answer
        if not self._connected:
            return
        if answer is None:
            if event.error in FATAL_REFUSALS:
                self._stop_now(False, f"registration refused: {event.error}: {event.message}")
            else:
                self._register_due = now_ms + self.config.register_retry_ms
            return
        if not self._heed(answer.coord_epoch):
            return
        if answer.broker_epoch < self.broker_epoch:
            return  # a late answer of an earlier request
        self.broker_id = answer.broker_id
        self.broker_epoch = answer.broker_epoch
        self.registered = True
        self._register_due = None
        self._min_revision = max(self._min_revision, answer.revision)
        self.out.append(ConfirmRegistered(answer.broker_id, answer.cluster_id, answer.coord_epoch, answer.claim_key))
        self.out.append(Registered(self.broker_id, self.fenced))
        self._untold = {key: asked for key, asked in self._untold.items() if asked >= answer.request}
        if self._untold:
            self._register(now_ms)  # found damaged while that registration was under way: see `_replica_opened`
            return
        self._request_metadata(0, now_ms)
        self._heartbeat(now_ms)

    def _heed(self, coord_epoch: int) -> bool:
        """Raise the seen coordinator epoch, durably; False if this coordinator was replaced."""
        if coord_epoch < self.coord_epoch:
            self._connected = False
            self.registered = False
            self.out.append(ResetCoordinatorSession(f"coordinator epoch {coord_epoch} is below {self.coord_epoch}"))
            return False
        if coord_epoch > self.coord_epoch:
            self.coord_epoch = coord_epoch
            self.out.append(PersistCoordEpoch(coord_epoch))
        return True

    def _heartbeat(self, now_ms: int) -> None:
        self._heartbeat_due = now_ms + self.config.heartbeat_ms
        want = "stop" if self.stopping else "run"
        self.out.append(
            SendHeartbeat(
                Heartbeat(
                    self.broker_id,
                    self.broker_epoch,
                    self.identity.incarnation,
                    want,
                    self.coord_epoch,
                    self.metadata.revision,
                    self._disk.full,
                )
            )
        )

    def _heartbeat_answered(self, event: HeartbeatAnswered, now_ms: int) -> None:
        answer = event.answer
        if not self.registered:
            return
        if answer is None:
            if event.error in ("STALE_BROKER_EPOCH", "UNKNOWN_BROKER"):
                self._register(now_ms)
            return
        if not self._heed(answer.coord_epoch):
            return
        if answer.fenced != self.fenced:
            self.fenced = answer.fenced
            self.out.append(Registered(self.broker_id, self.fenced))
        if answer.revision > self.metadata.revision and self._metadata_due is not None:
            # There is news, so the parked request will be answered now; if it is not, its answer was lost.
            self._metadata_due = min(self._metadata_due, now_ms + self.config.request_ms)
        if self.stopping and answer.stop_allowed:
            self._stop_now(True, "everything was handed over")

    # -- metadata -----------------------------------------------------------------------------------

    def _request_metadata(self, wait_ms: int, now_ms: int) -> None:
        self._metadata_due = now_ms + wait_ms + self.config.request_ms  # asked again if the answer is lost
        self.out.append(RequestMetadata(self.metadata.request(wait_ms)))

    def _metadata_received(self, answer: MetadataAnswer | None, now_ms: int) -> None:
        if not self.registered:
            return
        if answer is None:
            self._metadata_due = now_ms + self.config.metadata_retry_ms
            return
        if not self._heed(answer.coord_epoch):
            return
        if answer.revision < self._min_revision:
            self._metadata_due = now_ms + self.config.metadata_retry_ms
            return
        if self.metadata.apply(answer):
            self._applied(answer, now_ms)
        self._request_metadata(self.config.metadata_wait_ms, now_ms)

    def _applied(self, answer: MetadataAnswer, now_ms: int) -> None:
        live = {b.id: b.broker_epoch for b in self.metadata.brokers.values() if not b.fenced and not b.stopping}
        live_changed, self._live = live != self._live, live
        deleted = set(answer.deleted_topics)
        for key in sorted(self.open) if deleted else ():
            if key[0] in deleted:
                self.out.append(DeleteReplica(key))
                del self.open[key]
        changed = {part.key for part in answer.partitions}
        partitions = self.metadata.partitions
        if live_changed:  # costs time in proportion to the cluster; the others only to what changed
            changed.update(key for key, part in partitions.items() if part.primary == self.broker_id)
        for key in sorted(changed):
            part = partitions.get(key)
            if part is not None:
                self._tell(key, part)
        if self.stopping:
            self._maybe_stopped()
        if self._heartbeat_due is not None and self.fenced:
            self._heartbeat(now_ms)  # unfencing waits for the revision that was just applied

    def _tell(self, key: Key, part: PartitionMeta) -> None:
        mine = self.broker_id in part.replicas
        if not mine and key not in self.open:
            return
        state = self.open.get(key)
        if mine and state is None:
            self.out.append(OpenReplica(key, part.flush))
            self.open[key] = ""
        elif mine and state == LOG_DAMAGED and self._may_refetch(part):
            self.out.append(OpenReplica(key, part.flush, quarantine=True))
            self.open[key] = ""
        meta = MetaReceived(part, self.broker_epoch, self.coord_epoch, self._live)
        self.out.append(TellReplica(key, meta))
        if self.stopping and part.primary == self.broker_id:
            self.out.append(TellReplica(key, HandOverAsked(stopping=True)))  # elected by somebody else's hand-over
        if not mine:
            del self.open[key]

    def _may_refetch(self, part: PartitionMeta) -> bool:
        """Nobody counts on this copy any more and a complete one serves: set the files aside and fetch again."""
        counted = self.broker_id in part.isr or self.broker_id in part.elr
        return not counted and part.primary not in (self.broker_id, NO_BROKER)

    def _replica_opened(self, event: ReplicaOpened, now_ms: int) -> None:
        self.open[event.key] = event.log_state
        if event.log_state == LOG_DAMAGED:
            # Our copy of the record may be old, and the newest one may count on this replica: setting its files aside
            # now could lose what was acknowledged. The registration tells of the damage; the record that follows it
            # is newer than every proposal that was made in ignorance of it (see `_tell`).
            self._untold[event.key] = self._asked
            if self.registered:
                self._register(now_ms)
        if self._disk.full:
            self.out.append(TellReplica(event.key, self._disk))

    # -- stopping -----------------------------------------------------------------------------------

    def _stop_asked(self, now_ms: int) -> None:
        if self.stopping:
            return
        self.stopping = True
        self._stop_due = now_ms + self.config.stop_ms
        for key, part in sorted(self.metadata.partitions.items()):
            if part.primary == self.broker_id:
                self.out.append(TellReplica(key, HandOverAsked(stopping=True)))
        if self.registered:
            self._heartbeat(now_ms)
        self._maybe_stop_alone()

    def _maybe_stop_alone(self) -> None:
        if self.stopping and not self._connected:
            self._stop_now(True, "no coordinator to hand over to")

    def _maybe_stopped(self) -> None:
        if not any(self.broker_id in part.isr for part in self.metadata.partitions.values()):
            self._stop_now(True, "everything was handed over")

    def _stop_now(self, clean: bool, reason: str) -> None:
        if not self.stopped:
            self.stopped = True
            self._register_due = self._heartbeat_due = self._metadata_due = self._stop_due = None
            self.out.append(StopNow(clean, reason))

    # -- time ---------------------------------------------------------------------------------------

    def _tick(self, now_ms: int) -> None:
        if self._register_due is not None and now_ms >= self._register_due:
            self._register(now_ms)
        if self._heartbeat_due is not None and now_ms >= self._heartbeat_due:
            self._heartbeat(now_ms)
        if self._metadata_due is not None and now_ms >= self._metadata_due:
            self._request_metadata(0, now_ms)
        if self._stop_due is not None and now_ms >= self._stop_due:
            self._stop_now(True, "stopped before everything was handed over")


__all__ = ["NodeConfig", "NodeCore", "NodeIdentity"]
