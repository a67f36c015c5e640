"""What is measured of queues and tasks (`make bench-compare ARGS=--only-queues`): rows, workloads, counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from benchmarks.compare.peers import Variant
from benchmarks.compare.plan import VARIANTS, Cell, Workload

_LOG = {one.name: one for one in VARIANTS}
_PER_RECORD = "each record by itself, "
_OURS = _PER_RECORD + "each answered: committed, {} on both copies; they travel together"
_AMQP = _PER_RECORD + "no answer; prefetch 500"
_XACK = _PER_RECORD + "each answered, {}; up to 2,000 XACKs travel in a pipeline"


def _queue(like: str, settles: str, **changes: object) -> Variant:
    return replace(_LOG[like], settles=settles, **changes)  # type: ignore[arg-type]


QUEUE_VARIANTS: tuple[Variant, ...] = (
    _queue("ferryline r2 fsync", _OURS.format("flushed")),
    _queue("ferryline r2 replicated", _OURS.format("in the page cache")),
    _queue("rabbitmq 3 aio-pika", _AMQP),
    _queue("rabbitmq 3 pika", _AMQP),
    _queue(
        "nats r3",
        _PER_RECORD + "explicit, no answer; pulled 500 at a time, pushed at a fixed rate",
        topic={"ack_policy": "explicit"},
    ),
    _queue("redis always", _XACK.format("flushed")),
    _queue("redis everysec", _XACK.format("in memory")),
    _queue(
        "redis always",
        "**one XACK for a batch** of up to 2,000, answered, flushed",
        name="redis always, batch XACK",
        one_by_one=False,
    ),
)


def _tasks(name: str, peer: str, client: str, settles: str, *, late: bool = True) -> Variant:
    like = _LOG["redis always" if peer == "redis-always" else "redis everysec"]
    topic = {"acks_late": "1" if late else ""}
    return replace(like, name=name, client=client, settles=settles, topic=topic, slow=True)


_EARLY, _LATE = "acknowledged before it runs: lost with its worker", "acknowledged after it ran"
SUBSCRIBER = "ferryline r2 fsync, subscriber"
NO_RESULTS = "ferryline r2 fsync, no results"
TASK_VARIANTS: tuple[Variant, ...] = (
    replace(
        _LOG["ferryline r2 fsync"],
        settles="acknowledged after it ran, when its result is stored; each committed and flushed on both copies",
    ),
    replace(
        _LOG["ferryline r2 fsync"],
        name=NO_RESULTS,
        topic={"flush": "fsync", "handler": "no-results"},
        settles="acknowledged after it ran, flushed on both copies; results=False: what it returns is not stored",
    ),
    replace(
        _LOG["ferryline r2 fsync"],
        name=SUBSCRIBER,
        topic={"flush": "fsync", "handler": "subscriber"},
        settles="acknowledged after it ran, flushed on both copies; a handler of a topic: no id, no status, no result",
    ),
    _tasks("celery", "redis-everysec", "celery", _EARLY, late=False),
    _tasks("celery acks_late", "redis-everysec", "celery", _LATE),
    _tasks("celery acks_late, always", "redis-always", "celery", _LATE),
    _tasks("dramatiq", "redis-everysec", "dramatiq", _LATE),
    _tasks("dramatiq, always", "redis-always", "dramatiq", _LATE),
)

QUEUE_WORKLOADS: tuple[Workload, ...] = (
    # Enough for a second at least: of a third of one, the first and the last batch would be a part that shows.
    Workload("queue", "queue", 500_000, slow=0.02, turn="queue"),
    Workload("queue-drain", "queue-drain", 500_000, slow=0.02, turn="queue"),
    Workload("queue-pace", "queue-pace", 2_500, rate=1_000.0, slow=1.0, turn="queue-pace", scales=False),
    Workload("tasks", "tasks", 8_000, readers=0, slow=0.4, turn="tasks"),
)


def chosen_queue_workloads(names: Iterable[str]) -> list[Workload]:
    """The workloads of these names; all for none. Raises ValueError."""
    wanted, known = set(names), {one.name for one in QUEUE_WORKLOADS}
    if unknown := wanted - known:
        raise ValueError(f"{', '.join(sorted(unknown))} is no workload; known: {', '.join(sorted(known))}")
    return [one for one in QUEUE_WORKLOADS if not wanted or one.name in wanted]


def queue_cells(workloads: Iterable[Workload], systems: Iterable[str], starts: tuple[str, ...] = ()) -> list[Cell]:
    """Every row of these systems whose name begins with one of ``starts``. How a batch is acknowledged changes nothing
    at a fixed rate."""
    wanted = set(systems)
    return [
        Cell(workload, variant)
        for workload in workloads
        for variant in (TASK_VARIANTS if workload.kind == "tasks" else QUEUE_VARIANTS)
        if variant.system in wanted
        and (not starts or variant.name.startswith(starts))
        and (variant.one_by_one or workload.kind != "queue-pace")
    ]
