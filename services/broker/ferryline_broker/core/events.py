"""What happens to the cores of a broker, and what they want done: events in, effects out.

Effects are carried out in the order given. `PersistEpoch`, `Truncate` and `ResetLog` are durable before the next effect
is carried out; `Append` has reached the page cache. `Flush` is asynchronous: its completion is the event `Flushed`.
If the disk refuses any of them, the remaining effects of the list are dropped and `StorageFailed` follows.

``token`` is the driver's handle for whoever waits: each token is answered exactly once, by Answer* or `Refuse`.
``log`` is RECORDS (0) or STATE (1).
"""

from __future__ import annotations

from typing import Any

import msgspec

from ferryline.protocol.messages import (
    AlterIsr,
    AlterIsrResult,
    Heartbeat,
    HeartbeatOk,
    Register,
    RegisterOk,
    ReplicaData,
    ReplicaFetch,
    ReplicaProgress,
    ReplicaReport,
    ResignEntry,
)
from ferryline.protocol.metadata import MetadataAnswer, MetadataRequest, PartitionMeta, RetryPolicy
from ferryline.protocol.records import BatchHeader

Bytes = bytes | bytearray | memoryview
Key = tuple[str, int]  # (topic_id, partition)


class Event(msgspec.Struct, frozen=True, gc=False):
    """Base of all events."""

    def story(self) -> Any:
        """What the ring buffer of last events keeps: never payload bytes."""
        return self


class Effect(msgspec.Struct, frozen=True, gc=False):
    """Base of all effects."""


# -- events of one partition ------------------------------------------------------------------------


class Tick(Event):
    """A deadline passed (or may have)."""


class PassEnded(Event):
    """Answer to AwaitPassEnd: what came in together has been handled."""


class MetaReceived(Event):
    """The coordinator's record of this partition. May be late, repeated, reordered.

    ``live``: broker epochs of the brokers that are neither fenced nor stopping.
    """

    part: PartitionMeta
    broker_epoch: int  # own, as registered
    coord_epoch: int
    live: dict[int, int]


class Produced(Event):
    """A client's batch; its CRC and size were checked. ``data`` belongs to the core now (it is stamped in place)."""

    token: int
    data: bytearray
    header: BatchHeader
    timeout_ms: int

    def story(self) -> Any:
        h = self.header
        return ("Produced", self.token, h.producer_id, h.producer_epoch, h.base_sequence, h.record_count, h.size)


class Claimed(Event):
    """A group member takes over this partition; the token's MAC was checked."""

    token: int
    group: str
    member: str
    generation: int
    timeout_ms: int = 30_000


class CommitAsked(Event):
    token: int
    group: str
    member: str
    generation: int
    offset: int
    metadata: str = ""
    reset: bool = False
    timeout_ms: int = 30_000


class CommittedAsked(Event):
    """Read a group's committed offset; answered once everything appended so far is committed."""

    token: int
    group: str
    timeout_ms: int = 30_000


class GroupForgotten(Event):
    """The group was deleted: drop its offsets."""

    token: int
    group: str
    timeout_ms: int = 30_000


class BarrierAsked(Event):
    """Linearizable read: AnswerBarrier when this primaryship has committed something newer than the question."""

    token: int
    timeout_ms: int = 30_000


class FetchReceived(Event):
    """Primary side. ``session`` identifies the connection it came on; order within a session is kept."""

    session: int
    sender: int
    sender_epoch: int  # broker epoch
    fetch: ReplicaFetch


class ProgressReceived(Event):
    session: int
    sender: int
    sender_epoch: int
    progress: ReplicaProgress


class LogBatches(msgspec.Struct, frozen=True, gc=False):
    """Payload of one log in a `DataReceived`: positions and headers of the batches in ``data``; CRCs were checked."""

    data: Bytes
    headers: list[tuple[int, BatchHeader]]


class DataReceived(Event):
    """Secondary side: an answer to a fetch."""

    sender: int
    data: ReplicaData
    batches: tuple[LogBatches, LogBatches]

    def story(self) -> Any:
        return ("DataReceived", self.sender, self.data)


class DataCorrupt(Event):
    """The primary sent bytes that fail their CRC (rule F5)."""

    sender: int
    epoch: int
    fetch_id: int


class Flushed(Event):
    """Everything below ``end`` of ``log`` is on disk, and below ``state_end`` of the state log; -1: nothing new."""

    log: int
    end: int
    state_end: int = -1


class AlterIsrAnswered(Event):
    result: AlterIsrResult


class PeerUp(Event):
    """A session to broker ``peer`` is open: ask again at once instead of waiting for the retry."""

    peer: int


class PeerDown(Event):
    """The session with ``peer`` ended; what was outstanding on it will not be answered."""

    peer: int


class HandOverAsked(Event):
    """Give up the primaryship after committing everything (rule C10).

    ``stopping``: resign at the deadline even if something is still uncommitted.
    """

    stopping: bool = False


class StorageFailed(Event):
    """``ends``: only of a full disk, where both logs end on it. Then everything acknowledged is safe."""

    log: int
    reason: str
    ends: tuple[int, int] | None = None


class DiskFull(Event):
    """Records are refused while ``full``; state entries still go through (rule L12). ``detail`` is for whoever asks."""

    full: bool
    detail: str = "free disk space is below the reserve"


class RetryChanged(Event):
    """How queues of this topic retry, as its settings say now."""

    retry: RetryPolicy


class LogStartAdvanced(Event):
    """Retention moved the start of a log."""

    log: int
    log_start: int


class Imported(Event):
    """Batches of a backup that continue ``log``; an empty log begins at ``start`` instead, behind a record of
    ``epoch_before`` (-1: of none). Only while the partition is being restored: the shell has checked it."""

    log: int
    start: int
    epoch_before: int
    data: Bytes
    headers: list[tuple[int, BatchHeader]]

    def story(self) -> Any:
        return ("Imported", self.log, self.start, self.epoch_before, len(self.data))


class StateReplayed(Event):
    """Answer to ReplayState: (offset, epoch, value) of every non-control state record below the log end."""

    entries: list[tuple[int, int, bytes]]

    def story(self) -> Any:
        return ("StateReplayed", len(self.entries))


class ProducersRebuilt(Event):
    """Answer to RebuildProducers."""

    table: Any  # ProducerTable


# -- effects of one partition -----------------------------------------------------------------------


class Append(Effect):
    """Append stamped batches. ``headers`` are (position, header) with final base offsets and epochs."""

    log: int
    data: Bytes
    headers: list[tuple[int, BatchHeader]]


class Flush(Effect):
    """Make everything appended so far durable (group commit), then report Flushed."""

    log: int


class Truncate(Effect):
    """Cut the log at ``offset`` and make that durable."""

    log: int
    offset: int


class ResetLog(Effect):
    """Empty the log and let it begin at ``offset`` (rule F6). ``epoch``: of the record before it, -1 if not known."""

    log: int
    offset: int
    epoch: int = -1


class AdvanceStart(Effect):
    """Everything below ``offset`` may be deleted, whole segments at a time."""

    log: int
    offset: int


class PersistEpoch(Effect):
    """Raise seen_epoch, durably, before anything is done in that epoch."""

    epoch: int


class ReplayState(Effect):
    """Read the state log from its start to its end and report StateReplayed, before any other event."""


class RebuildProducers(Effect):
    """Build the ProducerTable from snapshot and log headers and report ProducersRebuilt, before any other event."""


class AnswerProduce(Effect):
    token: int
    base_offset: int
    epoch: int


class GroupOffset(msgspec.Struct, frozen=True, gc=False):
    """What a group has committed here; offset -1 if nothing."""

    offset: int = -1
    offset_epoch: int = -1
    generation: int = 0
    metadata: str = ""


class AnswerGroup(Effect):
    """Answer to Claimed, CommitAsked, CommittedAsked and GroupForgotten."""

    token: int
    state: GroupOffset


class AnswerBarrier(Effect):
    token: int


class Refuse(Effect):
    """``code`` is one of the error tree; its class says whether the refusal is definite."""

    token: int
    code: str
    message: str = ""
    primary: int = 0
    epoch: int = 0


class SendFetch(Effect):
    to: int
    fetch: ReplicaFetch


class SendProgress(Effect):
    to: int
    progress: ReplicaProgress


class AwaitPassEnd(Effect):
    """Report PassEnded when everything that came in together with the present event has been handled, and before
    anything is sent: what is appended until then travels in one answer to a secondary."""


class SendData(Effect):
    """Answer a secondary on ``session``. The driver reads ``reads[log]`` = (from, below, bytes_max) and fills in sizes.

    ``reads[log]`` is None when that log has nothing to send.
    """

    session: int
    to: int
    data: ReplicaData
    reads: tuple[tuple[int, int, int] | None, tuple[int, int, int] | None] = (None, None)


class SendAlterIsr(Effect):
    proposal: AlterIsr


class SendResign(Effect):
    entry: ResignEntry


class SendReport(Effect):
    report: ReplicaReport


class WakeReaders(Effect):
    """The high watermark of ``log`` moved to ``high_watermark``: parked reads may go on."""

    log: int
    high_watermark: int


class RoleChanged(Effect):
    """For logs, metrics and parked reads. ``role`` is one of the ROLE_* names of `replica.py`."""

    role: str
    epoch: int
    reason: str = ""


class RefreshMetadata(Effect):
    """Somebody knows a later epoch than this broker: ask the coordinator now."""


# -- events of the broker as a whole (NodeCore) ------------------------------------------------------


class CoordinatorUp(Event):
    """A session with the coordinator is open (HELLO done)."""


class CoordinatorDown(Event):
    pass


class RegisterAnswered(Event):
    answer: RegisterOk | None  # None: refused
    error: str = ""
    message: str = ""


class HeartbeatAnswered(Event):
    answer: HeartbeatOk | None
    error: str = ""


class MetadataReceived(Event):
    """Answer to RequestMetadata; None when the request failed (ask again)."""

    answer: MetadataAnswer | None

    def story(self) -> Any:
        return ("MetadataReceived", None if self.answer is None else (self.answer.coord_epoch, self.answer.revision))


class StopAsked(Event):
    """SIGTERM: hand everything over, then leave."""


class ReplicaOpened(Event):
    """Answer to OpenReplica."""

    key: Key
    log_state: str


class NodeDiskFull(Event):
    disk: DiskFull


# -- effects of the broker as a whole ----------------------------------------------------------------


class SendRegister(Effect):
    """Send this registration; the driver fills ``replicas`` with the reports of all replicas on disk."""

    register: Register


class ConfirmRegistered(Effect):
    """Registration is confirmed: store broker id, cluster id and coordinator epoch; clear lossy_pending."""

    broker_id: int
    cluster_id: str
    coord_epoch: int
    claim_key: bytes


class PersistCoordEpoch(Effect):
    """Durable before acting on anything of that coordinator."""

    coord_epoch: int


class SendHeartbeat(Effect):
    heartbeat: Heartbeat


class RequestMetadata(Effect):
    request: MetadataRequest


class OpenReplica(Effect):
    """Open the replica, creating it if it is not on disk, then report ReplicaOpened. ``quarantine``: set the damaged
    files aside first and begin empty, marked as repairing."""

    key: Key
    flush: str
    quarantine: bool = False


class DeleteReplica(Effect):
    """An explicit, versioned command of the coordinator: stop the replica and remove its files."""

    key: Key


class TellReplica(Effect):
    """Feed ``event`` to the core of that partition."""

    key: Key
    event: Event


class ResetCoordinatorSession(Effect):
    """Close the session and connect again (the coordinator does not know this broker any more)."""

    reason: str


class Registered(Effect):
    """For logs and readiness: this broker is registered (and ``fenced`` or serving)."""

    broker_id: int
    fenced: bool


class StopNow(Effect):
    """Everything is handed over (or the time for it is up): write the clean-stop marker and exit."""

    clean: bool
    reason: str = ""


# Effects that write to the disk of a replica: when one fails, nobody knows what is there.
WRITES = frozenset((Append, Truncate, ResetLog, AdvanceStart, PersistEpoch))
