"""What a worker did, counted for Prometheus: `WorkerMetrics`, and the small page that `ferryline worker run
--metrics-port` serves. Plain text, made when somebody asks; the SDK needs no metrics library for that."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator

from aiohttp import web

from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.queue_messages import ACK, NACK, REJECT

log = logging.getLogger("ferryline.app")

BOUNDS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)
PORTS_MAX = 256  # processes of one worker that take ports one after the other
UNKNOWN = "(unknown)"  # stands for the handler of records that name a task which this worker has not
CONTENT_TYPE = "text/plain; version=0.0.4"


class HandlerCounts:
    """Calls of one handler, a subscriber or a task."""

    __slots__ = ("buckets", "failed", "handled", "in_flight", "rejected", "seconds")

    def __init__(self) -> None:
        self.handled = self.failed = self.rejected = self.in_flight = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(BOUNDS_S) + 1)

    def took(self, seconds: float) -> None:
        self.seconds += seconds
        self.buckets[bisect_left(BOUNDS_S, seconds)] += 1

    def ended(self, action: str) -> None:
        if action == ACK:
            self.handled += 1
        elif action == NACK:
            self.failed += 1
        elif action == REJECT:
            self.rejected += 1


class WorkerMetrics:
    """Counts of all handlers of a worker; they begin with its process."""

    def __init__(self) -> None:
        self._handlers: dict[tuple[str, str], HandlerCounts] = {}

    def of(self, queue: str, handler: str) -> HandlerCounts:
        """The counts of ``handler`` for records of topic ``queue``."""
        counts = self._handlers.get((queue, handler))
        if counts is None:
            counts = self._handlers[queue, handler] = HandlerCounts()
        return counts

    def text(self) -> str:
        """The page, in Prometheus' text format."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        rows = [(_labels(*names), counts) for names, counts in sorted(self._handlers.items())]
        for name, kind, text in TABLE:
            yield f"# HELP {name} {text}"
            yield f"# TYPE {name} {kind}"
            field = name.removeprefix("ferryline_worker_").removesuffix("_total")
            for labels, counts in rows:
                if kind != "histogram":
                    yield f"{name}{{{labels}}} {getattr(counts, field)}"
                    continue
                below = 0
                for bound, count in zip((*BOUNDS_S, "+Inf"), counts.buckets, strict=True):
                    below += count
                    yield f'{name}_bucket{{{labels},le="{bound}"}} {below}'
                yield f"{name}_count{{{labels}}} {below}"
                yield f"{name}_sum{{{labels}}} {counts.seconds}"


LABELS = ("handler", "queue")
TABLE = (
    ("ferryline_worker_handled_total", "counter", "Records that a handler was done with, and that were acknowledged"),
    ("ferryline_worker_failed_total", "counter", "Attempts that failed: again later, or dead after the last"),
    ("ferryline_worker_rejected_total", "counter", "Records that a handler rejected: dead at once"),
    ("ferryline_worker_in_flight", "gauge", "Records that a handler is working on"),
    ("ferryline_worker_handling_seconds", "histogram", "How long a handler took, whatever came of it"),
)


def _labels(queue: str, handler: str) -> str:
    named = handler.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'handler="{named}",queue="{queue}"'


class MetricsPage:
    """Serves GET /metrics on loopback. Several processes with the same ``port`` take the next ones that are free."""

    def __init__(self, metrics: WorkerMetrics, port: int) -> None:
        self.port = port
        self._metrics = metrics
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Raises InvalidArgument when no port is to be had."""
        app = web.Application()
        app.router.add_get("/metrics", self._page)
        self._runner = runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        for port in range(self.port, min(self.port + PORTS_MAX, 65536)):
            try:
                await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
            except OSError:
                continue
            self.port = runner.addresses[0][1]
            log.info("metrics: http://127.0.0.1:%d/metrics", self.port)
            return
        await self.close()
        raise InvalidArgument(f"metrics port: none is free from {self.port} on", field="metrics_port")

    async def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(text=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})
