"""Prometheus metrics of a service: one registry, /metrics, and the counters every service has.

What is counted per frame is a plain list of integers, read when Prometheus asks: a counter object with its lock costs
more than the rest of dispatching a small frame.
"""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ferryline.protocol.frames import Kind

_KIND_NAMES = {int(kind): kind.name for kind in Kind}


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
        self.errors: dict[str, int] = {}
        ProcessCollector(registry=self.registry)
        self.registry.register(_Counts(self))
        self.request_seconds = Histogram(
            "ferryline_http_request_seconds", "Duration of REST requests", ["service"], registry=self.registry
        ).labels(service)
        self.sessions = Gauge("ferryline_sessions", "Open sessions", ["service"], registry=self.registry).labels(
            service
        )

    def request(self, kind: str) -> None:
        self.requests[kind] = self.requests.get(kind, 0) + 1

    def error(self, code: str) -> None:
        self.errors[code] = self.errors.get(code, 0) + 1

    def routes(self) -> list[web.RouteDef]:
        async def metrics(_: web.Request) -> web.Response:
            return web.Response(body=generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

        return [web.get("/metrics", metrics)]


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
