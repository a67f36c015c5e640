"""Raw rounds to medians and spreads. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LATENCIES = ("latency", "end-to-end", "queue-pace")  # what is judged by milliseconds, not by records a second


@dataclass(frozen=True)
class Spread:
    """Of one number over the rounds."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One variant in one measurement. Microseconds of processor and bytes written are per record."""

    workload: str
    what: str
    variant: str
    rounds: int
    records: int
    rate: Spread
    mb_per_s: float
    client_us: Spread
    server_us: Spread
    written: float
    server_rss: float
    client_rss: float
    errors: int
    latency_ms: Mapping[str, Spread] = field(default_factory=dict)
    parts_us: Mapping[str, Spread] = field(default_factory=dict)  # of client_us, by role

    @property
    def total_us(self) -> float:
        """Of all processes; the same number is processor seconds per million records."""
        return self.client_us.median + self.server_us.median


Table = dict[tuple[str, str], dict[str, Row]]


def row(workload: str, what: str, variant: str, rounds: Sequence[Mapping[str, Any]]) -> Row:
    """All rounds of one cell as one row."""

    def per_record(name: str) -> list[float]:
        return [one[name] / max(1, one["records"]) * 1e6 for one in rounds]

    shares, parts = rounds[0].get("latency_ms", {}), rounds[0].get("parts_cpu_s", {})
    return Row(
        workload=workload,
        what=what,
        variant=variant,
        rounds=len(rounds),
        records=int(statistics.median(one["records"] for one in rounds)),
        rate=Spread.of([one["records_per_s"] for one in rounds]),
        mb_per_s=statistics.median(one["mb_per_s"] for one in rounds),
        client_us=Spread.of(per_record("client_cpu_s")),
        server_us=Spread.of(per_record("server_cpu_s")),
        written=statistics.median(per_record("server_written")) / 1e6,
        server_rss=statistics.median(one["server_rss"] for one in rounds),
        client_rss=statistics.median(one["client_rss"] for one in rounds),
        errors=sum(one["errors"] for one in rounds),
        latency_ms={name: Spread.of([one["latency_ms"][name] for one in rounds]) for name in shares},
        parts_us={
            name: Spread.of([one["parts_cpu_s"][name] / max(1, one["records"]) * 1e6 for one in rounds])
            for name in parts
        },
    )


def table(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Rows by (workload, what) and variant, in the order in which they were measured."""
    found: Table = {}
    for key, values in rounds.items():
        workload, what, variant = key.split("|")
        if values:
            found.setdefault((workload, what), {})[variant] = row(workload, what, variant, values)
    return found


def best(rows: Mapping[str, Row], names: Sequence[str]) -> Row | None:
    """The fastest of these, by median rate."""
    present = [rows[name] for name in names if name in rows]
    return max(present, key=lambda one: one.rate.median, default=None)
