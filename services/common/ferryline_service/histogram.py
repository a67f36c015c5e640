"""A histogram that costs two additions, also for many values at once; it is read when Prometheus asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

QUICK_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SLOW_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)


class Buckets:
    """Counts by upper bound, which is part of its bucket. Used from one thread."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float] = QUICK_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """``count`` values that are equal."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def count(self) -> int:
        return sum(self._counts)

    def take(self, other: Buckets) -> None:
        """Add what another one with the same bounds has counted."""
        assert self._bounds == other._bounds, "histograms of different bounds do not add up"
        self._counts = [mine + more for mine, more in zip(self._counts, other._counts, strict=True)]
        self._sum += other._sum

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        below, rows = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            below += count
            rows.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(below)))
        family.add_metric(labels, buckets=rows, sum_value=self._sum)


class Histograms(Collector):
    """Some histograms without labels, or with those of their service: name -> (meaning, buckets)."""

    def __init__(self, named: Mapping[str, tuple[str, Buckets]], labels: Mapping[str, str] | None = None) -> None:
        self._named = named
        self._labels = labels or {}

    def collect(self) -> Iterator[Metric]:
        for name, (text, buckets) in self._named.items():
            family = HistogramMetricFamily(name, text, labels=list(self._labels))
            buckets.add_to(family, list(self._labels.values()))
            yield family


def family_of(
    name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], Buckets]]
) -> HistogramMetricFamily:
    """One family with a row for each set of labels."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, buckets in rows:
        buckets.add_to(family, values)
    return family
