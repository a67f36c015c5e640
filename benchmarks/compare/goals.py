"""The goals as ratios within one run: ours with TLS, two copies, flushed; theirs in a usual durable setting. Pure.

What counts as a usual durable setting of a peer is `Variant.durable`: acknowledged by at least two copies, or flushed.
A row is compared with the best peer among those; with the best of any setting for information only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.compare.plan import HEADLINE, VARIANTS
from benchmarks.compare.stats import Table, best


@dataclass(frozen=True)
class Verdict:
    """``value`` against ``goal``; ``more`` is better, or less. ``detail`` says what was compared."""

    goal_text: str
    value: float
    goal: float
    more: bool
    detail: str
    counts: bool = True  # False: for information

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.more else self.value <= self.goal

    def __str__(self) -> str:
        if not self.counts:
            said = "for information"
        elif self.met:
            said = "met"
        else:
            said = f"MISSED by {abs(self.value - self.goal) / self.goal:.0%}"
        sign = ">=" if self.more else "<="
        return f"{self.goal_text}: {self.value:.2f} ({self.detail}); goal {sign} {self.goal:g}: {said}"


def names(*systems: str, durable: bool = True) -> list[str]:
    return [one.name for one in VARIANTS if one.system in systems and (one.durable or not durable)]


def verdicts(table: Table) -> list[Verdict]:
    """Every goal of which both sides were measured."""
    found: list[Verdict] = []
    for size in ("100B", "1KiB"):
        for what in ("produce", "consume"):
            found += _throughput(table, size, what)
    for workload, what in (("one-at-a-time", "latency"), ("end-to-end", "end-to-end")):
        for share in ("p50", "p99"):
            for system in ("kafka", "rabbitmq"):
                found += _latency(table, workload, what, share, system)
    for size in ("100B", "1KiB"):
        found += _cost(table, size)
    return found + _partitions(table)


def _throughput(table: Table, size: str, what: str) -> list[Verdict]:
    rows = table.get((size, what), {})
    ours = rows.get(HEADLINE)
    if ours is None:
        return []
    found = []

    def against(text: str, candidates: Iterable[str], goal: float, *, counts: bool = True) -> None:
        other = best(rows, list(candidates))
        if other is not None:
            ratio = ours.rate.median / other.rate.median
            detail = f"{ours.rate.median:,.0f}/s : {other.rate.median:,.0f}/s {other.variant}"
            found.append(Verdict(f"{what} {size}, {text}", ratio, goal, True, detail, counts))

    against("best durable peer", names("kafka", "rabbitmq", "nats", "redis"), 1.0)
    against("RabbitMQ", names("rabbitmq", durable=False), 10.0)
    against("NATS", names("nats", durable=False), 10.0)
    against("best peer in any setting", names("kafka", "rabbitmq", "nats", "redis", durable=False), 1.0, counts=False)
    return found


def _latency(table: Table, workload: str, what: str, share: str, system: str) -> list[Verdict]:
    rows = table.get((workload, what), {})
    ours = rows.get(HEADLINE)
    others = [rows[name] for name in names(system) if name in rows and share in rows[name].latency_ms]
    if ours is None or not others:
        return []
    other = min(others, key=lambda one: one.latency_ms[share].median)
    mine, theirs = ours.latency_ms[share].median, other.latency_ms[share].median
    detail = f"{mine:.2f} ms : {theirs:.2f} ms {other.variant}"
    return [Verdict(f"{workload} {share}, {system}", mine / theirs, 1.0, False, detail)]


def _cost(table: Table, size: str) -> list[Verdict]:
    """Processor seconds per million records produced and consumed once, all processes."""

    def total(variant: str) -> float | None:
        both = [table.get((size, what), {}).get(variant) for what in ("produce", "consume")]
        return None if None in both else sum(one.total_us for one in both if one is not None)

    ours = total(HEADLINE)
    others = {name: cost for name in names("kafka") if (cost := total(name)) is not None}
    if ours is None or not others:
        return []
    name = min(others, key=lambda one: others[one])
    detail = f"{ours:.2f} s : {others[name]:.2f} s per million {name}"
    return [Verdict(f"processor time {size}, Kafka", ours / others[name], 1.0, False, detail)]


def _partitions(table: Table) -> list[Verdict]:
    many, few = (table.get((f"partitions-{number}", "produce"), {}).get(HEADLINE) for number in (200, 12))
    if many is None or few is None:
        return []
    detail = f"{many.rate.median:,.0f}/s : {few.rate.median:,.0f}/s"
    return [
        Verdict("200 active partitions, 12 active partitions", many.rate.median / few.rate.median, 0.7, True, detail)
    ]
