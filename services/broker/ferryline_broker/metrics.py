"""Metrics of a broker. What moves per batch is a plain number on a small object, read when Prometheus asks.

A labelled counter costs a dict look-up and a lock per increment: on the produce path, more than the header check.
docs/metrics.md has the table of all of them; a test compares it with what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ferryline_broker.clock import now_ms
from ferryline_broker.partition_metrics import SERIES_MAX, PartitionGauges, by_topic, families
from ferryline_broker.traffic import GroupCounts, TopicCounts, Topics
from ferryline_service.histogram import Buckets, Histograms, family_of
from ferryline_service.metrics import ServiceMetrics

__all__ = ["SERIES_MAX", "BrokerMetrics", "PartitionGauges", "TopicCounts", "by_topic"]
TOPICS_MAX = 200  # shown by name, if nobody says otherwise


class BrokerMetrics(ServiceMetrics):
    """The broker's own metrics beside those that every service has.

    ``exists``: whether there is a topic of that name; the counts of one that is gone go with its last partition here.
    """

    def __init__(self, topics_max: int = TOPICS_MAX) -> None:
        super().__init__("broker")
        self.topics = Topics(topics_max)
        self.disk_free_bytes = 0
        self.disk_total_bytes = 0
        self.disk_full = False
        self.fenced = True
        self.produce_bytes_in_flight = 0
        self.parked_fetches = 0
        self.loop_lag_s = 0.0  # the longest since the last scrape
        self.partitions: Callable[[], list[PartitionGauges]] = list
        self.exists: Callable[[str], bool] = lambda _: True
        self.produce_seconds = Buckets()
        self.fetch_seconds = Buckets()
        self.flush_seconds = Buckets()
        self.commit_seconds = Buckets()
        named = {
            "ferryline_produce_seconds": ("From the frame to the acknowledgement of a batch", self.produce_seconds),
            "ferryline_fetch_seconds": (
                "From the frame to the answer of a fetch, parked time included",
                self.fetch_seconds,
            ),
            "ferryline_flush_seconds": ("One group commit: fdatasync of every log that is due", self.flush_seconds),
            "ferryline_commit_seconds": (
                "From the append at the primary until all in-sync replicas have it; one batch of a partition at a time",
                self.commit_seconds,
            ),
        }
        self.registry.register(Histograms(named))
        self.registry.register(_BrokerCollector(self))

    def topic(self, name: str) -> TopicCounts:
        return self.topics.of(name)


class _BrokerCollector(Collector):
    def __init__(self, metrics: BrokerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        parts = metrics.partitions()
        held = {part.topic for part in parts}
        for name in [name for name in metrics.topics.counts if name not in held and not metrics.exists(name)]:
            metrics.topics.forget(name)
        for part in parts:
            metrics.topics.of(part.topic)
        rows = metrics.topics.rows()
        yield from self._traffic(rows)
        yield from self._queues(rows, parts)
        yield from families(parts, metrics.topics.label)
        yield from self._node()

    def _traffic(self, rows: dict[str, TopicCounts]) -> Iterator[Metric]:
        for field, text in (
            ("records_in", "Records appended by producers"),
            ("bytes_in", "Bytes appended by producers"),
            ("records_out", "Records handed to readers"),
            ("bytes_out", "Bytes handed to readers"),
        ):
            family = CounterMetricFamily(f"ferryline_{field}", text, labels=["topic"])
            for name, counts in rows.items():
                family.add_metric([name], getattr(counts, field))
            yield family

    def _queues(self, rows: dict[str, TopicCounts], parts: list[PartitionGauges]) -> Iterator[Metric]:
        labels = ["group", "topic"]
        groups = [([group, topic], one) for topic, counts in rows.items() for group, one in counts.groups.items()]
        for field, name, text in (
            ("leased", "queue_leased_records", "Records handed to receivers of a queue group"),
            ("leased_again", "queue_redelivered_records", "Those of them that had been handed out before"),
            ("acked", "queue_acknowledged_records", "Records acknowledged"),
            ("failed", "queue_failed_records", "Attempts that receivers gave up: again later, or dead"),
            ("rejected", "queue_rejected_records", "Records that receivers rejected: dead at once"),
            ("dead", "queue_dead_letters", "Records copied to the dead letters"),
        ):
            family = CounterMetricFamily(f"ferryline_{name}", text, labels=labels)
            for values, one in groups:
                family.add_metric(values, getattr(one, field))
            yield family
        yield family_of(
            "ferryline_queue_handling_seconds",
            "From the lease of a record to its acknowledgement",
            labels,
            [(values, one.seconds) for values, one in groups],
        )
        yield self._receivers(labels, groups, parts)

    def _receivers(
        self, labels: list[str], groups: list[tuple[list[str], GroupCounts]], parts: list[PartitionGauges]
    ) -> Metric:
        now, holders = now_ms(), dict[tuple[str, str], set[str]]()
        for part in parts:
            for group, members in part.holders.items():
                holders.setdefault((group, self._metrics.topics.label(part.topic)), set()).update(members)
        live = GaugeMetricFamily(
            "ferryline_queue_receivers",
            "Receivers that have asked this broker within 30 s, or hold leases of it",
            labels=labels,
        )
        for (group, topic), one in groups:
            live.add_metric([group, topic], one.live(now, holders.get((group, topic), frozenset())))
        return live

    def _node(self) -> Iterator[Metric]:
        metrics = self._metrics
        lag, metrics.loop_lag_s = metrics.loop_lag_s, 0.0
        for name, text, value in (
            ("disk_free_bytes", "Free bytes on the data file system", metrics.disk_free_bytes),
            ("disk_total_bytes", "Size of the data file system", metrics.disk_total_bytes),
            ("disk_full", "1 while records are refused for lack of space", int(metrics.disk_full)),
            ("broker_fenced", "1 while the coordinator does not count on this broker", int(metrics.fenced)),
            ("produce_bytes_in_flight", "Produced bytes not yet settled", metrics.produce_bytes_in_flight),
            ("parked_fetches", "Fetches that wait for data", metrics.parked_fetches),
            ("loop_lag_seconds", "Longest delay of the event loop since the last scrape", lag),
            (
                "metrics_topics_left_out",
                "Topics that are counted together as (others), see metrics_topics_max",
                metrics.topics.left_out,
            ),
        ):
            family = GaugeMetricFamily(f"ferryline_{name}", text)
            family.add_metric([], value)
            yield family
