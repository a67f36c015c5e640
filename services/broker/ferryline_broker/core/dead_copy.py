"""The copy of a dead record for the dead letters, and the topic that takes it. Pure.

The copy is the whole record with the story of its death. What the story may take is bounded; the record itself is cut
only where no batch could carry it, and then its header ``fl-truncated`` says by how much.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from ferryline.protocol.dead_letters import (
    ADDED,
    DROPPED,
    HEADER_ATTEMPTS,
    HEADER_EXCEPTION,
    HEADER_GROUP,
    HEADER_HISTORY,
    HEADER_ORIGIN_ID,
    HEADER_ORIGIN_OFFSET,
    HEADER_ORIGIN_PARTITION,
    HEADER_ORIGIN_TIMESTAMP,
    HEADER_ORIGIN_TOPIC,
    HEADER_REASON,
    HEADER_TRUNCATED,
)
from ferryline.protocol.limits import BATCH_BYTES_MAX, RECORD_BYTES_CEILING
from ferryline.protocol.metadata import ON_DEAD_PARK, RetryPolicy, TopicConfig
from ferryline.protocol.queue_messages import HEADER_ID
from ferryline.protocol.records import DecodedRecord, encode_batch
from ferryline_broker.core.queue_events import MoveDead

RETENTION_MS = 14 * 86_400_000  # longer than topics have by default: somebody has to come and look
REASON_BYTES = 1024
EXCEPTION_BYTES = 8 * 1024
HISTORY_BYTES = 32 * 1024
STORY_BYTES = 64 * 1024  # all that is added to a record, names and framing included
_OMITTED_BYTES = 24  # {"omitted":1000}, and a comma
_CUT = "..."
_IDENTITY = (
    HEADER_ORIGIN_TOPIC,
    HEADER_ORIGIN_PARTITION,
    HEADER_ORIGIN_OFFSET,
    HEADER_ORIGIN_TIMESTAMP,
    HEADER_GROUP,
)
# The others are for a record that came in a compressed batch; two, because what one packs too well looks like a bomb.
_CODECS = ("none", "zstd", "gzip")
Pairs = list[tuple[str, bytes | None]]


class Origin(msgspec.Struct, frozen=True):
    """Where a dead record stands."""

    topic_id: str
    topic: str
    partition: int


def config_of(source: TopicConfig) -> TopicConfig:
    """Settings of a topic that is made for the dead letters of ``source``: as safe as that, and as wide, so that each
    partition has a partition of its own there. What dies there is parked: nothing takes the dead letters of it."""
    return TopicConfig(
        partitions=source.partitions,
        replication=source.replication,
        min_isr=source.min_isr,
        flush=source.flush,
        retention_ms=RETENTION_MS,
        max_record_bytes=min(RECORD_BYTES_CEILING, source.max_record_bytes + STORY_BYTES),
        retry=RetryPolicy(on_dead=ON_DEAD_PARK),
    )


def producer_of(topic_id: str, partition: int, group: str) -> int:
    """Producer id of the copies of one queue in one partition: the same from every primary, so the target can tell a
    repetition. 63 bits, far from the ids that clients draw and from each other."""
    digest = hashlib.blake2b(f"{topic_id}/{partition}/{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def copy_of(origin: Origin, record: DecodedRecord, move: MoveDead, now_ms: int) -> bytes:
    """The batch to produce: the same bytes for the same arguments.

    ``now_ms`` becomes its time stamp: retention of the dead letters counts from the death.
    """
    story = _story(origin, record, move)
    own = [(name, held) for name, held in record.headers if name not in ADDED and name not in DROPPED]
    producer = (producer_of(origin.topic_id, origin.partition, move.group), move.producer_epoch, move.sequence)
    row = (record.key, record.value, own + story)
    for codec in _CODECS:
        data = encode_batch([row], timestamp_ms=now_ms, codec=codec, producer=producer)
        if len(data) <= BATCH_BYTES_MAX:
            return bytes(data)
    row = _cut(record.key, record.value, own, story, BATCH_BYTES_MAX - STORY_BYTES)
    return bytes(encode_batch([row], timestamp_ms=now_ms, producer=producer))


def is_copy(found: DecodedRecord, origin: Origin, record: DecodedRecord, move: MoveDead) -> bool:
    """Whether ``found`` was made of this record, by this group; of an attempt that told another story, too."""
    told = {name: value for name, value in found.headers if name in _IDENTITY}
    meant = {name: value for name, value in _story(origin, record, move) if name in _IDENTITY}
    whole = found.value == record.value or any(name == HEADER_TRUNCATED for name, _ in found.headers)
    return whole and told == meant


def _story(origin: Origin, record: DecodedRecord, move: MoveDead) -> Pairs:
    """The headers that say where the record comes from and why it is here."""
    history = move.history
    found: Pairs = [
        (HEADER_ORIGIN_TOPIC, origin.topic.encode()),
        (HEADER_ORIGIN_PARTITION, b"%d" % origin.partition),
        (HEADER_ORIGIN_OFFSET, b"%d" % move.offset),
        (HEADER_ORIGIN_TIMESTAMP, b"%d" % record.timestamp),
        (HEADER_GROUP, move.group.encode()),
        (HEADER_REASON, shortened(move.reason, REASON_BYTES)),
        (HEADER_ATTEMPTS, b"%d" % move.attempts),
        (HEADER_HISTORY, history_json(history, HISTORY_BYTES)),
    ]
    if history and history[-1][2]:
        found.append((HEADER_EXCEPTION, shortened(history[-1][2], EXCEPTION_BYTES)))
    # The first id is the sender's own; one that came with a redrive is ours.
    ids = [held for wanted in (HEADER_ID, HEADER_ORIGIN_ID) for name, held in record.headers if name == wanted]
    if ids:
        found.append((HEADER_ORIGIN_ID, ids[-1]))
    return found


def history_json(history: list[tuple[int, str, str]], bytes_max: int) -> bytes:
    """Attempts as JSON, oldest first. Where they do not fit, the oldest lose their details, then are only counted."""
    kept: list[bytes] = []
    left = bytes_max - _OMITTED_BYTES
    for number, (attempt, reason, detail) in enumerate(reversed(history)):
        entry = _entry(attempt=attempt, reason=reason, detail=detail)
        if len(entry) > left:
            entry = _entry(attempt=attempt, reason=reason, detail_bytes=len(detail.encode()))
        if len(entry) > left:
            kept.append(_entry(omitted=len(history) - number))
            break
        kept.append(entry)
        left -= len(entry) + 1
    return b"[" + b",".join(reversed(kept)) + b"]"


def _entry(**fields: Any) -> bytes:
    return msgspec.json.encode(fields)


def shortened(text: str, bytes_max: int) -> bytes:
    """UTF-8 of ``text``; if that is over ``bytes_max``, of its beginning, with three dots at its end."""
    encoded = text.encode()
    if len(encoded) <= bytes_max:
        return encoded
    return (encoded[: bytes_max - len(_CUT)].decode(errors="ignore") + _CUT).encode()


def _cut(
    key: bytes | None, value: bytes | None, own: Pairs, story: Pairs, bytes_max: int
) -> tuple[bytes | None, bytes | None, Pairs]:
    """The key, the record's own headers if they fit, and as much of the value as does."""
    whole = _size(key, value, own)
    key = key[:bytes_max] if key is not None else None
    if _size(key, None, own) > bytes_max:
        own = []
    value = value[: bytes_max - _size(key, None, own)] if value is not None else None
    return key, value, [*own, *story, (HEADER_TRUNCATED, b"%d" % (whole - _size(key, value, own)))]


def _size(key: bytes | None, value: bytes | None, headers: Pairs) -> int:
    """Bytes of a record, as limits count them, with room for its framing."""
    framing = 10  # two lengths of at most 5 bytes
    return (
        len(key or b"")
        + len(value or b"")
        + sum(len(name.encode()) + len(held or b"") + framing for name, held in headers)
    )
