"""The state of the partitions of a broker, as Prometheus sees it: one row each, or one for each topic and role where
there are too many of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from prometheus_client.core import GaugeMetricFamily, Metric

from ferryline_broker.traffic import GROUPS_MAX, OTHERS

T = TypeVar("T")
SERIES_MAX = 1_000  # rows shown one by one: partitions, and groups in them; more would hold the loop for long
_LABELS = ("topic", "partition")


class PartitionGauges:
    """State of one partition at the moment of a scrape."""

    __slots__ = (
        "groups",
        "high_watermark",
        "holders",
        "in_sync",
        "lags",
        "letters",
        "log_bytes",
        "log_start",
        "marks",
        "origin",
        "partition",
        "producers",
        "queue_ages_s",
        "queues",
        "replicas",
        "role",
        "secondary_lags",
        "summed_ages_s",
        "topic",
    )

    def __init__(self) -> None:
        self.topic = ""
        self.partition: int | str = 0
        self.role = "idle"
        self.log_start = self.high_watermark = 0
        self.marks = 0  # offsets between them that hold the beginning of an epoch, and no record
        self.log_bytes = 0
        self.in_sync = self.replicas = 0
        self.producers = 0
        self.secondary_lags: dict[int, int] = {}
        self.groups: dict[str, int] = {}  # committed offset, -1 none
        self.lags: dict[str, int] = {}  # group -> records that it has not committed
        self.summed_ages_s: dict[str, float] = {}  # group -> age of the first record that it has not committed
        self.queues: dict[str, dict[str, int]] = {}  # group -> state -> records
        self.holders: dict[str, set[str]] = {}  # group -> members that have leases here
        self.queue_ages_s: dict[str, float] = {}  # group -> age of the first record that is not settled
        self.origin: str | None = None  # the topic whose dead letters these are; "": of several
        self.letters = 0  # dead letters that wait for somebody


def families(parts: list[PartitionGauges], label: Callable[[str], str]) -> Iterator[Metric]:
    """All that is shown of partitions. ``label``: under which name a topic is shown; several may share one."""
    yield from _roles(parts)
    groups = sum(len(part.groups) + len(part.queues) for part in parts)
    few = max(len(parts), groups) <= SERIES_MAX and all(label(part.topic) == part.topic for part in parts)
    yield from _rows(parts if few else by_topic(parts, label))


def _roles(parts: list[PartitionGauges]) -> Iterator[Metric]:
    roles: dict[str, int] = dict.fromkeys(("primary", "secondary", "idle", "stopped"), 0)
    under = 0
    for part in parts:
        roles[part.role] = roles.get(part.role, 0) + 1
        under += part.role == "primary" and part.in_sync < part.replicas
    by_role = GaugeMetricFamily("ferryline_partition_replicas", "Partitions on this broker, by role", labels=["role"])
    for role, count in roles.items():
        by_role.add_metric([role], count)
    yield by_role
    missing = GaugeMetricFamily("ferryline_under_replicated_partitions", "Primaries whose in-sync set is not complete")
    missing.add_metric([], under)
    yield missing


def _rows(parts: list[PartitionGauges]) -> Iterator[Metric]:
    labels = list(_LABELS)
    size = GaugeMetricFamily("ferryline_log_bytes", "Bytes of both logs on disk", labels=labels)
    marks = GaugeMetricFamily("ferryline_high_watermark", "First offset that is not committed", labels=labels)
    queued = GaugeMetricFamily("ferryline_queued_records", "Committed records retained, at the primary", labels=labels)
    in_sync = GaugeMetricFamily("ferryline_in_sync_replicas", "Size of the in-sync set, at the primary", labels=labels)
    producers = GaugeMetricFamily("ferryline_producers", "Producers with dedupe state", labels=labels)
    lags = GaugeMetricFamily(
        "ferryline_secondary_lag_records", "How far a secondary is behind the log end", labels=[*labels, "broker"]
    )
    letters = GaugeMetricFamily(
        "ferryline_dead_letter_records",
        "Dead letters that nobody has redriven or removed; origin: the topic that they come from",
        labels=[*labels, "origin"],
    )
    for part in parts:
        where = [part.topic, str(part.partition)]
        size.add_metric(where, part.log_bytes)
        marks.add_metric(where, part.high_watermark)
        producers.add_metric(where, part.producers)
        if part.role != "primary":
            continue
        queued.add_metric(where, part.high_watermark - part.log_start - part.marks)
        in_sync.add_metric(where, part.in_sync)
        for broker, lag in part.secondary_lags.items():
            lags.add_metric([*where, str(broker)], lag)
        if part.origin is not None:
            letters.add_metric([*where, part.origin], part.letters)
    yield from (size, marks, queued, in_sync, producers, lags, letters)
    yield from _groups([part for part in parts if part.role == "primary"])


def _groups(parts: list[PartitionGauges]) -> Iterator[Metric]:
    labels = ["group", *_LABELS]
    lag = GaugeMetricFamily("ferryline_group_lag_records", "Committed records that a group has not read", labels=labels)
    lag_age = GaugeMetricFamily(
        "ferryline_group_lag_seconds", "Age of the first record that a group has not committed", labels=labels
    )
    records = GaugeMetricFamily(
        "ferryline_queue_records",
        "Records of a queue group by state; unsettled: all that are committed and not terminal",
        labels=[*labels, "state"],
    )
    oldest = GaugeMetricFamily(
        "ferryline_queue_oldest_seconds", "Age of the first record that a queue group has not settled", labels=labels
    )
    for part in parts:
        where = [part.topic, str(part.partition)]
        for group, behind in part.lags.items():
            lag.add_metric([group, *where], behind)
        for group, age in part.summed_ages_s.items():
            lag_age.add_metric([group, *where], age)
        for group, states in part.queues.items():
            for state, count in states.items():
                records.add_metric([group, *where, state], count)
        for group, age in part.queue_ages_s.items():
            oldest.add_metric([group, *where], age)
    yield from (lag, lag_age, records, oldest)


def by_topic(parts: list[PartitionGauges], label: Callable[[str], str] = str) -> list[PartitionGauges]:
    """One row for each topic and role, which stands where the partition stood: sums; of in-sync sets the smallest, of
    secondaries' lags and of ages the largest."""
    rows: dict[tuple[str, str], PartitionGauges] = {}
    for part in parts:
        topic = label(part.topic)
        row = rows.get((topic, part.role))
        if row is None:
            row = rows[topic, part.role] = PartitionGauges()
            row.topic, row.role, row.partition = topic, part.role, part.role
            row.in_sync, row.origin = part.in_sync, part.origin
        _add(row, part)
    for row in rows.values():
        row.lags = _bounded(row.lags, int.__add__)
        row.summed_ages_s = _bounded(row.summed_ages_s, max)
        row.queue_ages_s = _bounded(row.queue_ages_s, max)
        row.queues = _bounded(row.queues, _sums)
    return [rows[key] for key in sorted(rows)]


def _bounded(groups: dict[str, T], together: Callable[[T, T], T]) -> dict[str, T]:
    """The first groups by name, and all others as one."""
    if len(groups) <= GROUPS_MAX:
        return groups
    names = sorted(groups)
    found = {name: groups[name] for name in names[:GROUPS_MAX]}
    rest = groups[names[GROUPS_MAX]]
    for name in names[GROUPS_MAX + 1 :]:
        rest = together(rest, groups[name])
    return {**found, OTHERS: rest}


def _sums(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {state: one.get(state, 0) + other.get(state, 0) for state in {**one, **other}}


def _add(row: PartitionGauges, part: PartitionGauges) -> None:
    row.log_start += part.log_start
    row.high_watermark += part.high_watermark
    row.marks += part.marks
    row.log_bytes += part.log_bytes
    row.producers += part.producers
    row.letters += part.letters
    row.in_sync = min(row.in_sync, part.in_sync)
    if row.origin != part.origin and part.origin is not None:
        row.origin = part.origin if row.origin is None else ""
    for broker, behind in part.secondary_lags.items():
        row.secondary_lags[broker] = max(row.secondary_lags.get(broker, 0), behind)
    for group, lag in part.lags.items():
        row.lags[group] = row.lags.get(group, 0) + lag
    for mine, theirs in ((row.summed_ages_s, part.summed_ages_s), (row.queue_ages_s, part.queue_ages_s)):
        for group, age in theirs.items():
            mine[group] = max(mine.get(group, 0.0), age)
    for group, states in part.queues.items():
        row.queues[group] = _sums(row.queues.get(group, {}), states)
