"""Prometheus metrics of a service: one registry, /metrics, and the counters every service has.

What is counted per frame is a plain list of integers, read when Prometheus asks: a counter object with its lock costs
more than the rest of dispatching a small frame.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable, Iterator
from time import perf_counter

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ferryline.protocol.frames import Kind
from ferryline_service.histogram import Buckets, Histograms

KINDS_MAX = 500  # of requests; methods of HTTP are invented by whoever asks, and each would be a series
# Shown from the start: the first increase of a counter that was not there before is no increase to Prometheus.
_SHOWN = ("INTERNAL", "STORAGE_FAILED", "FORBIDDEN", "BAD_CREDENTIALS", "THROTTLED", "QUOTA_EXCEEDED")
_KIND_NAMES = {int(kind): kind.name for kind in Kind}
_VERSION = importlib.metadata.version("ferryline-service")


class ServiceMetrics:
    """Registry with the metrics that coordinator and broker share; each adds its own to ``registry``.

    ``frames[kind]`` counts frames on sessions, ``requests`` REST requests by method and route, ``errors`` error answers
    of both by code.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self.frames = [0] * 256
        self.requests: dict[str, int] = {}
        self.errors: dict[str, int] = dict.fromkeys(_SHOWN, 0)
        self.audit: Callable[[], tuple[int, int]] = lambda: (0, 0)  # lines of the audit log: written, lost
        self.sessions = Level()
        self.scrape_s = 0.0  # that the last scrape held the loop, all together
        self.request_seconds = Buckets()
        self.certificates: Callable[[], dict[str, float]] = dict  # name -> seconds until it ends
        ProcessCollector(registry=self.registry)
        self.registry.register(_Counts(self))
        requests = {"ferryline_http_request_seconds": ("Duration of REST requests", self.request_seconds)}
        self.registry.register(Histograms(requests, {"service": service}))

    def request(self, kind: str) -> None:
        count = self.requests.get(kind)
        if count is None and len(self.requests) >= KINDS_MAX:
            kind = "other"
            count = self.requests.get(kind)
        self.requests[kind] = (count or 0) + 1

    def error(self, code: str) -> None:
        self.errors[code] = self.errors.get(code, 0) + 1

    def routes(self) -> list[web.RouteDef]:
        async def metrics(_: web.Request) -> web.Response:
            return web.Response(body=await self.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})

        return [web.get("/metrics", metrics)]

    async def page(self) -> bytes:
        """Everything in Prometheus' text format, with a turn for the loop after each metric: a thousand partitions take
        tenths of a second."""
        made, held_s, began = [], 0.0, perf_counter()
        for family in self.registry.collect():
            made.append(generate_latest(_Only(family)))
            held_s += perf_counter() - began
            await asyncio.sleep(0)
            began = perf_counter()
        self.scrape_s = held_s
        return b"".join(made)


class _Only:
    """Stands for a registry with one metric."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        return [self._family]


class Level:
    """A number that goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def set(self, value: int) -> None:
        self.value = value


class _Counts(Collector):
    def __init__(self, metrics: ServiceMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        requests = CounterMetricFamily("ferryline_requests", "Requests, by what was asked", labels=["service", "kind"])
        for number, count in enumerate(metrics.frames):
            if count:
                requests.add_metric([metrics.service, _KIND_NAMES.get(number, "unknown")], count)
        for kind, count in metrics.requests.items():
            requests.add_metric([metrics.service, kind], count)
        yield requests
        errors = CounterMetricFamily("ferryline_errors", "Error answers, by code", labels=["service", "code"])
        for code, count in metrics.errors.items():
            errors.add_metric([metrics.service, code], count)
        yield errors
        written, lost = metrics.audit()
        for name, about, count in (
            ("ferryline_audit_records", "Lines of the audit log", written),
            ("ferryline_audit_lost", "Lines of the audit log that could not be written", lost),
        ):
            audit = CounterMetricFamily(name, about, labels=["service"])
            audit.add_metric([metrics.service], count)
            yield audit
        sessions = GaugeMetricFamily("ferryline_sessions", "Open sessions", labels=["service"])
        sessions.add_metric([metrics.service], metrics.sessions.value)
        yield sessions
        ends = GaugeMetricFamily(
            "ferryline_certificate_expires_in_seconds",
            "Time until a certificate of this service ends",
            labels=["service", "certificate"],
        )
        for name, left in metrics.certificates().items():
            ends.add_metric([metrics.service, name], left)
        yield ends
        scrape = GaugeMetricFamily(
            "ferryline_scrape_seconds", "What the scrape before this one took of the event loop", labels=["service"]
        )
        scrape.add_metric([metrics.service], metrics.scrape_s)
        yield scrape
        info = GaugeMetricFamily("ferryline_build_info", "1, with the version", labels=["service", "version"])
        info.add_metric([metrics.service, _VERSION], 1)
        yield info
