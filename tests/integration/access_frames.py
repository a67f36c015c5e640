"""One question of each kind of frame, for the matrix of access: what is asked, and what its answer says of access."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ferryline.protocol import messages as m
from ferryline.protocol import queue_messages as q
from ferryline.protocol.access import StoredBytes
from ferryline.protocol.dead_letters import EnsureTopic
from ferryline.protocol.errors import ErrorInfo
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.metadata import MetadataRequest, TopicConfig
from ferryline.protocol.records import encode_batch

YES, UNKNOWN = "yes", "unknown"
GROUP = "matrix"
_ANSWERS: dict[int, Any] = {
    Kind.PRODUCE: m.ProduceAnswer,
    Kind.FETCH: m.FetchAnswer,
    Kind.OFFSETS: m.OffsetsAnswer,
    Kind.CLAIM: m.CommittedAnswer,
    Kind.COMMIT: m.CommittedAnswer,
    Kind.COMMITTED: m.CommittedAnswer,
    Kind.RECEIVE: q.ReceiveAnswer,
    Kind.SETTLE: q.SettleAnswer,
    Kind.KEEP: q.SettleAnswer,
    Kind.QUEUE: q.QueueAnswer,
}


@dataclass(frozen=True)
class Question:
    """``label``: as docs/access.md names it."""

    label: str
    kind: int
    header: Any
    payload: bytes = b""


def broker_questions(topic_id: str, partition: int, partitions: int, broker_id: int) -> list[Question]:
    """Of everything that a broker serves; ``broker_id``: whoever asks as a node. Nothing breaks where it is allowed."""
    at, batch = (topic_id, partition), encode_batch([(b"k", b"v", [])], timestamp_ms=1)
    questions = [
        Question("METADATA", Kind.METADATA, MetadataRequest()),
        Question(
            "PRODUCE", Kind.PRODUCE, m.Produce(10_000, [m.ProduceEntry(*at, partitions, len(batch))]), bytes(batch)
        ),
        Question("FETCH", Kind.FETCH, m.Fetch(0, 1 << 20, [m.FetchEntry(*at, 0)])),
        Question("OFFSETS", Kind.OFFSETS, m.Offsets([m.OffsetsEntry(*at, "end")])),
        Question("CLAIM", Kind.CLAIM, m.Claim(GROUP, "m", [m.ClaimEntry(*at, 1, b"no token")])),
        Question("COMMIT", Kind.COMMIT, m.Commit(GROUP, "", [m.CommitEntry(*at, 0, 0)])),
        Question("COMMIT reset", Kind.COMMIT, m.Commit(GROUP, "", [m.CommitEntry(*at, 0, 0, reset=True)])),
        Question("COMMITTED", Kind.COMMITTED, m.Committed(GROUP, [at])),
        Question("RECEIVE", Kind.RECEIVE, q.Receive(GROUP, "m", [at], 1)),
        Question("SETTLE", Kind.SETTLE, q.Settle(GROUP, "m", [q.SettleEntry(*at, 1, 1, b"no receipt", "ack", [0])])),
        Question("KEEP", Kind.KEEP, q.Keep(GROUP, "m", [q.KeepEntry(*at, [])])),
        Question("REPLICA_FETCH", Kind.REPLICA_FETCH, m.ReplicaFetches(broker_id, 0, [])),
        Question("REPLICA_PROGRESS", Kind.REPLICA_PROGRESS, m.ReplicaProgresses(broker_id, 0, [])),
    ]
    for op in ("groups", "stats", "peek", "explain", "pause", "resume", "purge", "redrive", "delete"):
        questions.append(Question(f"QUEUE {op}", Kind.QUEUE, q.QueueAsk(GROUP, op, [at], 0)))
    return questions


def coordinator_questions(broker_id: int) -> list[Question]:
    """Of everything that a coordinator serves; ``broker_id`` does not run: what is said for it comes late."""
    return [
        Question("METADATA", Kind.METADATA, MetadataRequest()),
        Question("GROUP_HEARTBEAT", Kind.GROUP_HEARTBEAT, m.GroupHeartbeat(GROUP, "m", ["matrix"], leave=True)),
        Question("REGISTER", Kind.REGISTER, m.Register(broker_id, "", 0, m.RESTART_CLEAN, "https://x", "https://x", 0)),
        Question("HEARTBEAT", Kind.HEARTBEAT, m.Heartbeat(broker_id, 0, 0)),
        Question("ALTER_ISR", Kind.ALTER_ISR, m.AlterIsrs([])),
        Question("RESIGN", Kind.RESIGN, m.Resign(broker_id, 0, [])),
        Question("REPORT", Kind.REPORT, m.Report(broker_id, 0, [])),
        Question("ENSURE_TOPIC", Kind.ENSURE_TOPIC, EnsureTopic(broker_id, 0, "matrix", TopicConfig())),
        Question("STORED", Kind.STORED, StoredBytes(broker_id, 0, [])),
    ]


def outcome_of(answer: Frame | None) -> str:
    """What an answer says of access; None: a frame that has no answer was taken."""
    if answer is None:
        return YES
    if answer.is_error:
        return _of(decode_header(answer.header, ErrorInfo))
    kind = _ANSWERS.get(answer.kind)
    if kind is None:
        return YES
    decoded = decode_header(answer.header, kind)
    for result in decoded.deliveries if isinstance(decoded, q.ReceiveAnswer) else decoded.results:
        if result.error is not None and (outcome := _of(result.error)) != YES:
            return outcome
    return YES


def _of(error: ErrorInfo) -> str:
    """Refusals of the gate name the principal; a wrong receipt or claim is FORBIDDEN, too, but was looked at."""
    if error.code == "FORBIDDEN" and "principal" in error.details:
        return "403"
    if error.code in ("BAD_CREDENTIALS", "UNAUTHORIZED"):
        return "401"
    return UNKNOWN if error.code == "UNKNOWN_KIND" else YES
