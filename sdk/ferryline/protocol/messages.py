"""Headers of frames: what is asked and what is answered, one struct each.

Structs travel as MessagePack arrays: fields are appended, never moved or removed; a field added later has a default,
so both sides of a rolling upgrade read each other. Times in ms, sizes in bytes. Payload order follows the order of
the entries in the header; ``size`` says how many payload bytes belong to an entry.

Limits: FRAME_ENTRIES_MAX entries in a list, FRAME_BYTES_MAX in a frame (checked by the receiver).
"""

from __future__ import annotations

import msgspec

from ferryline.protocol.access import AccessPolicy
from ferryline.protocol.errors import ErrorInfo
from ferryline.protocol.metadata import PartitionMeta

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
# What a whole cluster may use only once all of it can: a cluster runs at one level, which `ferryline cluster upgrade
# --finish` raises. 1: the first release. 2: access policies, entries of restored state logs.
FEATURE_LEVEL = 2  # highest that this release can run at
FEATURE_ACCESS = FEATURE_RESTORE = 2

RECORDS, STATE = 0, 1  # the two logs of a replica

ROLE_CLIENT = "client"
ROLE_BROKER = "broker"


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of all headers."""


# -- session ----------------------------------------------------------------------------------------


class Hello(Message):
    """First frame of a session. The other side refuses (UNSUPPORTED_VERSION, CLUSTER_MISMATCH) or answers HelloOk."""

    version_min: int = PROTOCOL_MIN
    version_max: int = PROTOCOL_MAX
    role: str = ROLE_CLIENT
    cluster_id: str = ""  # "" when not known yet
    broker_id: int = 0  # of the caller, role broker
    broker_epoch: int = 0
    client: str = ""  # free text for logs: program and version
    feature_level: int = FEATURE_LEVEL


class HelloOk(Message):
    version: int
    cluster_id: str
    server: str = ""  # "coordinator" or "broker"
    broker_id: int = 0
    feature_level: int = FEATURE_LEVEL


# -- produce ----------------------------------------------------------------------------------------


class ProduceEntry(Message):
    """One batch for one partition. ``partitions`` is the count the key was hashed with."""

    topic_id: str
    partition: int
    partitions: int
    size: int


class Produce(Message):
    """Acks are always "all": answered when committed. ``timeout_ms`` bounds the wait for the commit."""

    timeout_ms: int
    entries: list[ProduceEntry]


class ProduceResult(Message):
    """Outcome of entry ``index``. ``base_offset`` is -1 with an error."""

    index: int
    base_offset: int = -1
    epoch: int = 0
    error: ErrorInfo | None = None


class ProduceAnswer(Message):
    """Outcomes as they become known: several answers (FLAG_MORE on all but the last) may carry one request's."""

    results: list[ProduceResult]


# -- fetch ------------------------------------------------------------------------------------------


class FetchEntry(Message):
    """Read from ``offset``. ``offset_epoch``: epoch of the record before it as the reader knows it, -1 unknown."""

    topic_id: str
    partition: int
    offset: int
    offset_epoch: int = -1
    bytes_max: int = 1024 * 1024


class Fetch(Message):
    """Parks up to ``wait_ms`` until at least one entry has data or an error. Only committed records are returned."""

    wait_ms: int
    bytes_max: int
    entries: list[FetchEntry]
    secondary: bool = False  # True: also a secondary may answer, up to its own high watermark (rule F7)


class FetchResult(Message):
    """``size`` payload bytes of whole batches; the first may begin below the asked offset: skip those records."""

    topic_id: str
    partition: int
    high_watermark: int = -1
    log_start: int = -1
    size: int = 0
    error: ErrorInfo | None = None


class FetchAnswer(Message):
    results: list[FetchResult]


class OffsetsEntry(Message):
    topic_id: str
    partition: int
    at: str  # "start", "end" (high watermark), "latest" (linearizable end), "time"
    timestamp_ms: int = 0  # for "time": first offset whose timestamp is not below; high watermark if none
    counted_from: int = -1  # for "end": how many records are there from this offset on? -1: nobody asks


class Offsets(Message):
    entries: list[OffsetsEntry]


class OffsetsResult(Message):
    """``records``: committed ones from ``counted_from`` on; -1: not asked for, or by a broker that does not know."""

    topic_id: str
    partition: int
    offset: int = -1
    log_start: int = -1
    high_watermark: int = -1
    error: ErrorInfo | None = None
    records: int = -1


class OffsetsAnswer(Message):
    results: list[OffsetsResult]


# -- groups, at the primary of each partition -------------------------------------------------------


class ClaimEntry(Message):
    topic_id: str
    partition: int
    generation: int
    token: bytes  # MAC by the coordinator over (group, topic_id, partition, member, generation)


class Claim(Message):
    """Take over partitions for a member: fences every lower generation and reads the committed offset in one step."""

    group: str
    member: str
    entries: list[ClaimEntry]


class CommittedResult(Message):
    """``offset`` is -1 when the group has committed nothing here yet. ``generation`` of the last claim, 0 none.

    ``lag``: committed records that the group has not read; -1 from a broker that does not tell. The difference of two
    offsets would be more after a fail-over: where an epoch begins stands a mark, which is no record.
    """

    topic_id: str
    partition: int
    offset: int = -1
    offset_epoch: int = -1
    generation: int = 0
    metadata: str = ""
    log_start: int = -1
    high_watermark: int = -1
    error: ErrorInfo | None = None
    lag: int = -1


class CommittedAnswer(Message):
    """Answer to Claim, Commit and Committed."""

    results: list[CommittedResult]


ANY_GENERATION = -1  # an operator moves a group that has no members


class CommitEntry(Message):
    """``offset`` is the next to read. Monotonic unless ``reset``. Generation 0: only while nobody has claimed;
    `ANY_GENERATION`, from nodes only: whoever has."""

    topic_id: str
    partition: int
    generation: int
    offset: int
    metadata: str = ""
    reset: bool = False


class Commit(Message):
    """Answered when committed in the state log."""

    group: str
    member: str
    entries: list[CommitEntry]


class Committed(Message):
    group: str
    entries: list[tuple[str, int]]  # (topic_id, partition)


class GroupPartition(Message):
    topic_id: str
    partition: int
    generation: int
    token: bytes = b""


class GroupHeartbeat(Message):
    """Declarative: the member says what it is subscribed to and what it holds; the answer says what it should hold.

    Joining is the first heartbeat, leaving has ``leave`` set. A partition missing from ``owned`` is released.
    """

    group: str
    member: str
    topics: list[str]
    owned: list[GroupPartition] = []
    instance_id: str = ""  # static membership: a restarted member with the same one keeps its partitions
    session_ms: int = 45_000
    leave: bool = False
    sequence: int = 0  # rises with each heartbeat of a member; an overtaken one changes nothing


class GroupAssignment(Message):
    """``assigned``: hold these (with token, to claim). ``revoked``: finish, commit and leave these out of ``owned``."""

    member: str
    assigned: list[GroupPartition]
    revoked: list[GroupPartition] = []
    heartbeat_ms: int = 3_000
    coord_epoch: int = 0
    sequence: int = 0  # of the heartbeat that this answers


# -- replication: streams between the brokers of a partition ----------------------------------------


class LogPosition(Message):
    """Where a secondary's log stands. ``last_epoch`` is the epoch of its last batch, -1 if the log is empty."""

    fetch_offset: int
    last_epoch: int
    flushed: int


class ReplicaFetch(Message):
    """S -> P, at most one outstanding per partition. ``positions``: one for RECORDS, one for STATE.

    ``fetch_id`` rises per (secondary, partition) and is echoed. ``version``: of the partition record that the secondary
    knew; a copy that was deleted and made again is told apart by it.
    """

    topic_id: str
    partition: int
    epoch: int
    fetch_id: int
    positions: tuple[LogPosition, LogPosition]
    version: int = 0


class ReplicaFetches(Message):
    broker_id: int
    broker_epoch: int
    fetches: list[ReplicaFetch]


class ReplicaProgress(Message):
    """S -> P: a flush ended while a fetch is parked. Counts only after a fetch of this epoch and session passed."""

    topic_id: str
    partition: int
    epoch: int
    flushed: tuple[int, int]
    version: int = 0


class ReplicaProgresses(Message):
    broker_id: int
    broker_epoch: int
    progress: list[ReplicaProgress]


class LogData(Message):
    """Answer for one log. ``diverging``: (epoch, end) up to which both sides may agree; then there is no data.

    ``start_epoch``: of the record before ``log_start``, -1 if it is not known.
    """

    fetch_offset: int  # echo
    last_epoch: int  # echo
    high_watermark: int
    log_start: int
    size: int = 0
    diverging: tuple[int, int] | None = None
    start_epoch: int = -1


class ReplicaData(Message):
    """P -> S. ``error`` is a code of the error tree (NOT_PRIMARY, STALE_EPOCH, ...); then ``logs`` is empty.

    ``version``: of the partition record that the primary knew.
    """

    topic_id: str
    partition: int
    epoch: int
    fetch_id: int
    logs: tuple[LogData, LogData] | None = None
    error: str = ""
    version: int = 0


class ReplicaDatas(Message):
    broker_id: int
    answers: list[ReplicaData]


# -- broker -> coordinator --------------------------------------------------------------------------

RESTART_CLEAN = "clean"
RESTART_PROCESS_CRASH = "process_crash"
RESTART_OS_CRASH = "os_crash"
RESTART_FOREIGN = "foreign"

LOG_OK = "ok"
LOG_DAMAGED = "damaged"
LOG_TRUNCATED = "truncated_below_checkpoint"
LOG_CONFLICT = "conflict"


class ReplicaReport(Message):
    """How one replica on a broker stands, told at registration and for recovery."""

    topic_id: str
    partition: int
    seen_epoch: int
    log_end: tuple[int, int]
    tail_epoch: tuple[int, int]
    high_watermark: tuple[int, int]
    log_state: str = LOG_OK


class Register(Message):
    """``broker_id`` 0 asks for a new id. ``incarnation`` was raised and fsynced before this was sent. ``request`` rises
    with each registration of a process life: what is found after one was sent is not in it."""

    broker_id: int
    storage_id: str
    incarnation: int
    restart_class: str
    internal: str
    external: str
    seen_coord_epoch: int
    replicas: list[ReplicaReport] = []
    version_min: int = PROTOCOL_MIN
    version_max: int = PROTOCOL_MAX
    feature_level: int = FEATURE_LEVEL
    request: int = 0


class RegisterOk(Message):
    """``claim_key`` checks the tokens of group claims. Assignments follow in the metadata. ``request``: which
    registration of this process life is answered. ``access``: who may do what, None: everybody everything; later ones
    follow as frames of kind ACCESS."""

    broker_id: int
    broker_epoch: int
    coord_epoch: int
    cluster_id: str
    claim_key: bytes = b""
    heartbeat_ms: int = 500
    revision: int = 0  # metadata revision after this registration; the broker acts on nothing older
    request: int = 0
    access: AccessPolicy | None = None


class Heartbeat(Message):
    """``want`` is "run" or "stop". ``revision`` is the metadata the broker has applied; unfencing waits for it.

    ``report`` lists replicas whose log_state changed since the last heartbeat.
    """

    broker_id: int
    broker_epoch: int
    incarnation: int
    want: str = "run"
    coord_epoch: int = 0
    revision: int = -1
    disk_full: bool = False


class HeartbeatOk(Message):
    """``stop_allowed``: everything was handed over, a stopping broker may exit."""

    fenced: bool
    coord_epoch: int
    revision: int
    stop_allowed: bool = False


class IsrMember(Message):
    broker_id: int
    broker_epoch: int


class AlterIsr(Message):
    """``request_id`` rises per (broker_epoch, partition) and is never used twice."""

    topic_id: str
    partition: int
    broker_id: int
    broker_epoch: int
    coord_epoch: int
    epoch: int
    version: int
    request_id: int
    new_isr: list[IsrMember]


class AlterIsrs(Message):
    proposals: list[AlterIsr]


class AlterIsrResult(Message):
    """``accepted`` or a definite refusal; ``part`` is the coordinator's present record (None: no such partition)."""

    topic_id: str
    partition: int
    request_id: int
    accepted: bool
    coord_epoch: int
    part: PartitionMeta | None
    error: str = ""


class AlterIsrsAnswer(Message):
    results: list[AlterIsrResult]


class ResignEntry(Message):
    """The primary gives up a partition after a hand-over, or because its storage failed."""

    topic_id: str
    partition: int
    epoch: int
    reason: str = "handover"  # "handover": everything committed; "damaged": not a candidate any more


class Resign(Message):
    broker_id: int
    broker_epoch: int
    entries: list[ResignEntry]


class HandoverEntry(Message):
    """``target`` is the replica that should take over; it is in the in-sync set."""

    topic_id: str
    partition: int
    epoch: int
    target: int


class Handover(Message):
    """Coordinator -> broker, no answer: hand these primaryships over (rule C10). The broker answers by RESIGN.

    An entry whose epoch is not the present one, or that names a partition of another primary, is ignored.
    """

    entries: list[HandoverEntry]


class Report(Message):
    """Replicas whose state changed (damaged, conflict) or was asked for by recovery."""

    broker_id: int
    broker_epoch: int
    replicas: list[ReplicaReport]


class Done(Message):
    """An answer that says only: done."""

    coord_epoch: int = 0
