"""What a worker is told and what it tells: both travel as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from zlib import crc32

KEY_BYTES = 12
STAMP_BYTES = 20
BATCH_MAX = 2_000
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}


@dataclass(frozen=True)
class Spec:
    """One role of one measurement. The same key and value bytes for every client.

    ``first`` is the number of the first record, ``warm_up`` how many come before the clock starts. A client without
    keys puts the key in front of the value: everybody moves the same bytes.
    """

    client: str
    role: str  # produce, latency, read, pace, receive, submit
    topic: str
    servers: str
    ca: str = ""
    partitions: int = 12
    count: int = 0
    first: int = 0
    warm_up: int = 0
    value_bytes: int = 100
    producers: int = 1
    group: str = ""
    fan_out: bool = False  # several groups read: servers without groups then have a queue for each
    rate: float = 0.0
    stamps: bool = False
    passes: int = 1  # how often everything is read, each time by a new group
    one_by_one: bool = True  # what a receiver takes is acknowledged record by record; otherwise a batch at once
    marks: str = ""  # the file in which a task marks that it ran
    handler: str = ""  # what runs a task, where a system has several kinds
    throughput: bool = True  # settings for throughput; otherwise for latency: nothing lingers
    timeout_s: float = 120.0

    def value(self) -> bytes:
        return (b"ferryline-" * (self.value_bytes // 10 + 1))[: self.value_bytes]

    @property
    def batch(self) -> int:
        """Records a consumer takes at a time: many, but a small part of all, for the first ones are not counted."""
        return max(20, min(BATCH_MAX, self.count // 20))

    def partition_of(self, key: bytes) -> int:
        """Where a client that knows no keys sends a record."""
        return crc32(key) % self.partitions

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Spec:
        return Spec(**json.loads(text))


def group_of(group: str, number: int) -> str:
    """The group of pass ``number`` of a reader."""
    return f"{group}p{number}" if number else group


def key_of(number: int) -> bytes:
    """Distinct for each record, of constant length."""
    return b"%012d" % number


def stamp_of(now_ns: int, pad: bytes) -> bytes:
    """A value of the length of ``pad`` that begins with the time it was sent."""
    return b"%019d " % now_ns + pad[STAMP_BYTES:]


def sent_ns(value: bytes) -> int:
    """When a value was sent; 0 for one without a stamp."""
    head = value[: STAMP_BYTES - 1]
    return int(head) if head.isdigit() else 0


@dataclass(frozen=True)
class Outcome:
    """What one worker found. Times in ns of the monotonic clock, which all processes share; latencies in ms."""

    started_ns: int
    ended_ns: int
    records: int
    value_bytes: int
    cpu_s: float
    rss_bytes: int
    errors: int = 0
    latency_ms: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Outcome:
        return Outcome(**values)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank: the least value that at least ``share`` of all values do not exceed."""
    if not ordered:
        raise ValueError("no values")
    rank = -(-len(ordered) * share // 1)
    return ordered[min(len(ordered), max(1, int(rank))) - 1]


def latencies(times_ns: Sequence[int]) -> dict[str, float]:
    """Percentiles in ms, by nearest rank."""
    ordered = sorted(times_ns)
    return {name: percentile(ordered, share) / 1e6 for name, share in _SHARES.items()} if ordered else {}
