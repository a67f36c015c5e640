"""Metrics of a broker. What moves per batch is a plain number on a small object, read when Prometheus asks.

A labelled counter costs a dict look-up and a lock per increment: on the produce path, more than the header check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ferryline_service.metrics import ServiceMetrics

SERIES_MAX = 1_000  # partitions shown one by one; more are shown by topic, or a scrape would hold the loop for long
_LATENCY_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class TopicCounts:
    """Traffic of one topic on this broker."""

    __slots__ = ("bytes_in", "bytes_out", "records_in", "records_out")

    def __init__(self) -> None:
        self.records_in = self.bytes_in = self.records_out = self.bytes_out = 0


class Sample(Protocol):
    """What one hosted partition shows; implemented by the driver's `Replica`."""

    def gauges(self) -> PartitionGauges: ...


class PartitionGauges:
    """State of one partition at the moment of a scrape."""

    __slots__ = (
        "groups",
        "high_watermark",
        "in_sync",
        "log_bytes",
        "log_start",
        "partition",
        "producers",
        "queues",
        "replicas",
        "role",
        "secondary_lags",
        "summed_lags",
        "topic",
    )

    def __init__(self) -> None:
        self.topic = ""
        self.partition: int | str = 0
        self.role = "idle"
        self.log_start = self.high_watermark = 0
        self.log_bytes = 0
        self.in_sync = self.replicas = 0
        self.producers = 0
        self.secondary_lags: dict[int, int] = {}
        self.groups: dict[str, int] = {}  # committed offset, -1 none
        self.summed_lags: dict[str, int] | None = None  # of several partitions
        self.queues: dict[str, dict[str, int]] = {}  # group -> state -> records

    def group_lags(self) -> dict[str, int]:
        """Records that each group has not committed."""
        if self.summed_lags is not None:
            return self.summed_lags
        return {group: self.high_watermark - max(at, self.log_start) for group, at in self.groups.items()}


class BrokerMetrics(ServiceMetrics):
    """The broker's own metrics beside those that every service has."""

    def __init__(self) -> None:
        super().__init__("broker")
        self.topics: dict[str, TopicCounts] = {}  # by topic name
        self.disk_free_bytes = 0
        self.disk_full = False
        self.fenced = True
        self.produce_bytes_in_flight = 0
        self.parked_fetches = 0
        self.partitions: Callable[[], list[PartitionGauges]] = list
        self.produce_seconds = Histogram(
            "ferryline_produce_seconds",
            "From the frame to the acknowledgement of a batch",
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.fetch_seconds = Histogram(
            "ferryline_fetch_seconds",
            "From the frame to the answer of a fetch, parked time included",
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.flush_seconds = Histogram(
            "ferryline_flush_seconds",
            "One group commit: fdatasync of every log that is due",
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.registry.register(_BrokerCollector(self))

    def topic(self, name: str) -> TopicCounts:
        counts = self.topics.get(name)
        if counts is None:
            counts = self.topics[name] = TopicCounts()
        return counts


class _BrokerCollector(Collector):
    def __init__(self, metrics: BrokerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._traffic()
        yield from self._node()
        yield from self._partitions(self._metrics.partitions())

    def _traffic(self) -> Iterator[Metric]:
        for field, text in (
            ("records_in", "Records appended by producers"),
            ("bytes_in", "Bytes appended by producers"),
            ("records_out", "Records handed to readers"),
            ("bytes_out", "Bytes handed to readers"),
        ):
            family = CounterMetricFamily(f"ferryline_{field}", text, labels=["topic"])
            for name, counts in self._metrics.topics.items():
                family.add_metric([name], getattr(counts, field))
            yield family

    def _node(self) -> Iterator[Metric]:
        metrics = self._metrics
        for name, text, value in (
            ("disk_free_bytes", "Free bytes on the data file system", metrics.disk_free_bytes),
            ("disk_full", "1 while records are refused for lack of space", int(metrics.disk_full)),
            ("broker_fenced", "1 while the coordinator does not count on this broker", int(metrics.fenced)),
            ("produce_bytes_in_flight", "Produced bytes not yet settled", metrics.produce_bytes_in_flight),
            ("parked_fetches", "Fetches that wait for data", metrics.parked_fetches),
        ):
            family = GaugeMetricFamily(f"ferryline_{name}", text)
            family.add_metric([], value)
            yield family

    def _partitions(self, partitions: list[PartitionGauges]) -> Iterator[Metric]:
        labels = ["topic", "partition"]
        roles: dict[str, int] = dict.fromkeys(("primary", "secondary", "idle", "stopped"), 0)
        under = 0
        for part in partitions:
            roles[part.role] = roles.get(part.role, 0) + 1
            under += part.role == "primary" and part.in_sync < part.replicas
        size = GaugeMetricFamily("ferryline_log_bytes", "Bytes of both logs on disk", labels=labels)
        marks = GaugeMetricFamily("ferryline_high_watermark", "First offset that is not committed", labels=labels)
        queued = GaugeMetricFamily(
            "ferryline_queued_records", "Committed records retained, at the primary", labels=labels
        )
        in_sync = GaugeMetricFamily(
            "ferryline_in_sync_replicas", "Size of the in-sync set, at the primary", labels=labels
        )
        producers = GaugeMetricFamily("ferryline_producers", "Producers with dedupe state", labels=labels)
        lags = GaugeMetricFamily(
            "ferryline_secondary_lag_records", "How far a secondary is behind the log end", labels=[*labels, "broker"]
        )
        group_lag = GaugeMetricFamily(
            "ferryline_group_lag_records", "High watermark minus committed offset", labels=["group", *labels]
        )
        queues = GaugeMetricFamily(
            "ferryline_queue_records",
            "Records of a queue group by state; unsettled: all that are committed and not terminal",
            labels=["group", *labels, "state"],
        )
        for part in partitions if len(partitions) <= SERIES_MAX else by_topic(partitions):
            where = [part.topic, str(part.partition)]
            size.add_metric(where, part.log_bytes)
            marks.add_metric(where, part.high_watermark)
            producers.add_metric(where, part.producers)
            if part.role != "primary":
                continue
            queued.add_metric(where, part.high_watermark - part.log_start)
            in_sync.add_metric(where, part.in_sync)
            for broker, lag in part.secondary_lags.items():
                lags.add_metric([*where, str(broker)], lag)
            for group, lag in part.group_lags().items():
                group_lag.add_metric([group, *where], lag)
            for group, states in part.queues.items():
                for state, records in states.items():
                    queues.add_metric([group, *where, state], records)
        by_role = GaugeMetricFamily("ferryline_partitions", "Partitions on this broker, by role", labels=["role"])
        for role, count in roles.items():
            by_role.add_metric([role], count)
        missing = GaugeMetricFamily(
            "ferryline_under_replicated_partitions", "Primaries whose in-sync set is not complete"
        )
        missing.add_metric([], under)
        yield from (by_role, missing, size, marks, queued, in_sync, producers, lags, group_lag, queues)


def by_topic(partitions: list[PartitionGauges]) -> list[PartitionGauges]:
    """One row for each topic and role, which stands where the partition stood: sums; of in-sync sets the smallest, of
    secondaries' lags the largest."""
    rows: dict[tuple[str, str], PartitionGauges] = {}
    for part in partitions:
        row = rows.get((part.topic, part.role))
        if row is None:
            row = rows[part.topic, part.role] = PartitionGauges()
            row.topic, row.role, row.partition = part.topic, part.role, part.role
            row.in_sync, row.summed_lags = part.in_sync, {}
        row.log_start += part.log_start
        row.high_watermark += part.high_watermark
        row.log_bytes += part.log_bytes
        row.producers += part.producers
        row.in_sync = min(row.in_sync, part.in_sync)
        for broker, lag in part.secondary_lags.items():
            row.secondary_lags[broker] = max(row.secondary_lags.get(broker, 0), lag)
        lags = row.summed_lags
        assert lags is not None
        for group, lag in part.group_lags().items():
            lags[group] = lags.get(group, 0) + lag
        for group, states in part.queues.items():
            summed = row.queues.setdefault(group, {})
            for state, records in states.items():
                summed[state] = summed.get(state, 0) + records
    return [rows[key] for key in sorted(rows)]
