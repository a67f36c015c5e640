"""The goals of queues and tasks, as ratios within one run: ours with TLS, two copies, flushed. Pure.

A receiver acknowledges record by record in every row that counts. Compared is with the best peer in a usual durable
setting (`Variant.durable`); of tasks with the best peer in any setting, which is how they are usually run. The rest is
for information.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmarks.compare.goals import Verdict
from benchmarks.compare.plan import HEADLINE
from benchmarks.compare.queue_plan import NO_RESULTS, QUEUE_VARIANTS, SUBSCRIBER, TASK_VARIANTS
from benchmarks.compare.stats import Row, Table, best

TIMES = 3.0  # of the best peer
_PEERS = tuple(one for one in QUEUE_VARIANTS if one.system != "ferryline")
_DURABLE = [one.name for one in _PEERS if one.durable and one.one_by_one]
_TASK_PEERS = [one for one in TASK_VARIANTS if one.system != "ferryline"]


def queue_verdicts(table: Table) -> list[Verdict]:
    """Every goal of which both sides were measured."""
    found: list[Verdict] = []
    for workload in ("queue", "queue-drain"):
        rows = table.get((workload, workload), {})
        found += _times(rows, f"{workload}, best durable peer", HEADLINE, _DURABLE)
        for system in ("rabbitmq", "nats", "redis"):
            some = [one.name for one in _PEERS if one.system == system and one.name in _DURABLE]
            found += _times(rows, f"{workload}, {system}", HEADLINE, some, counts=False)
        any_setting = [one.name for one in _PEERS]
        found += _times(rows, f"{workload}, best peer in any setting", HEADLINE, any_setting, counts=False)
    paced = table.get(("queue-pace", "queue-pace"), {})
    for share in ("p50", "p99"):
        found += _latency(paced, share, "best durable peer", _DURABLE)
        found += _latency(paced, share, "best peer in any setting", [one.name for one in _PEERS], counts=False)
    ran = table.get(("tasks", "tasks"), {})
    found += _times(ran, "tasks, best peer", HEADLINE, [one.name for one in _TASK_PEERS])
    durable = [one.name for one in _TASK_PEERS if one.durable]
    found += _times(ran, "tasks, best flushed peer", HEADLINE, durable, counts=False)
    every = [one.name for one in _TASK_PEERS]
    found += _times(ran, "tasks without results, best peer", NO_RESULTS, every, counts=False)
    found += _times(ran, "a subscriber, best peer of tasks", SUBSCRIBER, every, counts=False)
    return found


def _times(rows: Mapping[str, Row], text: str, mine: str, names: list[str], *, counts: bool = True) -> list[Verdict]:
    ours, other = rows.get(mine), best(rows, names)
    if ours is None or other is None:
        return []
    detail = f"{ours.rate.median:,.0f}/s : {other.rate.median:,.0f}/s {other.variant}"
    return [Verdict(text, ours.rate.median / other.rate.median, TIMES, True, detail, counts)]


def _latency(
    rows: Mapping[str, Row], share: str, text: str, names: Iterable[str], *, counts: bool = True
) -> list[Verdict]:
    ours = rows.get(HEADLINE)
    others = [rows[name] for name in names if name in rows]
    if ours is None or not others:
        return []

    def time_of(one: Row) -> float:
        return one.latency_ms[share].median

    other = min(others, key=time_of)
    detail = f"{time_of(ours):.2f} ms : {time_of(other):.2f} ms {other.variant}"
    return [Verdict(f"queue-pace {share}, {text}", time_of(ours) / time_of(other), 1.0, False, detail, counts)]
