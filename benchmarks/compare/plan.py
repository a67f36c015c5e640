"""What is measured: the variants, the workloads, and how many records each takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.compare.peers import Variant

_FERRYLINE = {
    ("fsync", 1): "written and flushed (fdatasync) on the only copy",
    ("fsync", 2): "written and flushed (fdatasync) on both copies",
    ("fsync", 3): "written and flushed (fdatasync) on all three copies",
    ("replicated", 1): "in the page cache of the only copy",
    ("replicated", 2): "in the page cache of both copies",
    ("replicated", 3): "in the page cache of all three copies",
}
_KAFKA_2, _KAFKA_3 = {"min.insync.replicas": "1"}, {"min.insync.replicas": "2"}
_FLUSH = {"flush.messages": "1"}  # the topic's name for log.flush.interval.messages
_MAJORITY = "written and flushed (fdatasync) to the write-ahead log of a majority, 2 of 3"
_NATS = "written to the page cache of {}; flushed every two minutes"


def _ferryline(flush: str, copies: int, *, main: bool = False) -> Variant:
    name = f"ferryline r{copies} {flush}"
    topic = {"flush": flush}
    durable = flush == "fsync" and copies > 1
    return Variant(
        name,
        "ferryline",
        "ferryline",
        _FERRYLINE[flush, copies] + ", TLS",
        copies,
        flush == "fsync",
        "ferryline",
        topic,
        main,
        durable,
    )


def _kafka(name: str, client: str, ack: str, copies: int, topic: dict[str, str], *, main: bool = False) -> Variant:
    short = "confluent" if client == "confluent-kafka" else client
    flushed = "flush.messages" in topic
    peer = "kafka-1" if copies == 1 else "kafka-3"
    slow = client == "aiokafka"
    durable = copies > 1
    return Variant(
        f"kafka {name} {short}", peer, client, ack, copies, flushed, "kafka", topic, main, durable, slow=slow
    )


def _kafka_all(client: str) -> list[Variant]:
    isr = "in the page cache of {} in-sync replicas (acks=all)"
    best = client == "confluent-kafka"
    return [
        _kafka("r2", client, isr.format("both"), 2, _KAFKA_2, main=best),
        _kafka("r3", client, isr.format("all three") + ", min.insync.replicas=2", 3, _KAFKA_3, main=best),
        _kafka("r2 flush=1", client, "flushed on both in-sync replicas (acks=all)", 2, _KAFKA_2 | _FLUSH, main=best),
        _kafka("r1", client, "in the page cache of the only copy (acks=all)", 1, {}),
    ]


VARIANTS: tuple[Variant, ...] = (
    _ferryline("fsync", 2, main=True),
    _ferryline("replicated", 2, main=True),
    _ferryline("fsync", 3),
    _ferryline("replicated", 3),
    _ferryline("fsync", 1),
    _ferryline("replicated", 1),
    *_kafka_all("confluent-kafka"),
    _kafka_all("aiokafka")[0],
    Variant("rabbitmq 3 aio-pika", "rabbitmq-3", "aio-pika", _MAJORITY, 3, True, "rabbitmq", slow=True),
    Variant("rabbitmq 3 pika", "rabbitmq-3", "pika", _MAJORITY, 3, True, "rabbitmq", main=True, slow=True),
    Variant(
        "rabbitmq 1 pika",
        "rabbitmq-1",
        "pika",
        "written and flushed (fdatasync) to the write-ahead log of the only copy",
        1,
        True,
        "rabbitmq",
        durable=False,
        slow=True,
    ),
    Variant(
        "nats r3",
        "nats-3",
        "nats-py",
        _NATS.format("a majority, 2 of 3"),
        3,
        False,
        "nats",
        main=True,
        slow=True,
    ),
    Variant("nats r1", "nats-1", "nats-py", _NATS.format("the only copy"), 1, False, "nats", durable=False, slow=True),
    Variant(
        "redis always",
        "redis-always",
        "redis-py",
        "in memory and flushed to the append-only file of the only copy",
        1,
        True,
        "redis",
        main=True,
    ),
    Variant(
        "redis everysec",
        "redis-everysec",
        "redis-py",
        "in memory of the only copy; the append-only file is flushed every second",
        1,
        False,
        "redis",
        durable=False,
    ),
)
HEADLINE = "ferryline r2 fsync"
SYSTEMS = ("kafka", "rabbitmq", "nats", "redis")


WARM_UP_MAX_S = 90.0  # seconds of warming up one server; a JVM on two busy cores needs more


@dataclass(frozen=True)
class Workload:
    """``records`` for fast clients at scale 1; slow ones get ``slow`` of them. ``central``: with every variant."""

    name: str
    kind: str  # produce (and consume what was produced), latency, end-to-end, fan-out, backlog
    records: int
    value_bytes: int = 100
    partitions: int = 12
    producers: int = 1
    readers: int = 1
    rate: float = 0.0
    passes: int = 1  # of the consumer; what a slow client consumes may be gone after one
    central: bool = False
    single: bool = False  # one row for each system
    slow: float = 0.1
    turn: str = "throughput"  # workloads of one turn run one after another while a server is awake
    systems: frozenset[str] = field(
        default_factory=lambda: frozenset({"ferryline", "kafka", "rabbitmq", "nats", "redis"})
    )
    left_out: str = ""  # why some systems are
    scales: bool = True  # whether a budget may change the count

    def count(self, variant: Variant, scale: float) -> int:
        """Records of one measurement; at least 200."""
        share = self.slow if variant.slow else 1.0
        return max(200, int(self.records * share * (scale if self.scales else min(1.0, scale))))


_PARTITIONED = frozenset({"ferryline", "kafka"})
_ONE_QUEUE = "what orders records there is one queue, stream or key, not partitions of one topic"

WORKLOADS: tuple[Workload, ...] = (
    Workload("100B", "produce", 300_000, 100, passes=3, central=True),
    Workload("1KiB", "produce", 60_000, 1024, passes=5, central=True),
    Workload("16KiB", "produce", 6_000, 16_384, passes=5, slow=0.3),
    Workload("one-at-a-time", "latency", 600, central=True, slow=1.0, turn="latency"),
    Workload("end-to-end", "end-to-end", 4_000, rate=1_000.0, slow=1.0, turn="latency", scales=False),
    Workload("fan-out-5", "fan-out", 60_000, readers=5, slow=0.1, turn="streams"),
    Workload("backlog", "backlog", 150_000, rate=1_000.0, slow=0.1, turn="streams"),
    *(
        Workload(
            f"partitions-{number}",
            "produce-only",
            200_000,
            partitions=number,
            turn="many",
            single=True,
            systems=_PARTITIONED,
            left_out=_ONE_QUEUE,
        )
        for number in (1, 12, 200)
    ),
    *(
        Workload(f"producers-{number}", "produce-only", 100_000, producers=number, turn="many", single=True)
        for number in (1, 10, 50)
    ),
)
# what --workloads may say -> the workloads it means
GROUPS: dict[str, tuple[str, ...]] = {
    "produce": ("100B", "1KiB", "16KiB"),
    "consume": ("100B", "1KiB", "16KiB"),
    "partitions": ("partitions-1", "partitions-12", "partitions-200"),
    "producers": ("producers-1", "producers-10", "producers-50"),
}


@dataclass(frozen=True)
class Cell:
    """One workload on one variant."""

    workload: Workload
    variant: Variant

    @property
    def name(self) -> str:
        return f"{self.workload.name} / {self.variant.name}"


def chosen_workloads(names: Iterable[str]) -> list[Workload]:
    """The workloads of these names, or of these groups; all for none. Raises ValueError."""
    wanted: set[str] = set()
    known = {one.name for one in WORKLOADS}
    for name in names:
        if name not in known and name not in GROUPS:
            raise ValueError(f"{name!r} is no workload; known: {', '.join([*GROUPS, *sorted(known)])}")
        wanted.update(GROUPS.get(name, (name,)))
    return [one for one in WORKLOADS if not wanted or one.name in wanted]


def cells(workloads: Iterable[Workload], systems: Iterable[str], variants: Iterable[Variant] = VARIANTS) -> list[Cell]:
    """Central workloads with all rows of these systems, others with the main ones, `single` ones with one a system."""
    wanted, found = set(systems), []
    for workload in workloads:
        seen: set[str] = set()
        for variant in variants:
            if variant.system not in wanted & workload.systems or not (workload.central or variant.main):
                continue
            if not (workload.single and variant.system in seen):
                found.append(Cell(workload, variant))
            seen.add(variant.system)
    return found
