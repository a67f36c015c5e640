"""A worker: everything that an app declares, running in this process."""

from __future__ import annotations

import asyncio
import inspect
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ferryline.app.context import Stop
from ferryline.app.depth import Depth
from ferryline.app.handler import Handler
from ferryline.app.line import Line
from ferryline.app.metrics import MetricsPage, WorkerMetrics
from ferryline.app.queue import GROUP, HEADER_TASK, TaskQueue
from ferryline.app.reports import Reports
from ferryline.app.subscriber import CONCURRENCY_MAX, Subscriber
from ferryline.options import check_seconds
from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import check_range
from ferryline.protocol.queue_messages import ORDER_KEY

if TYPE_CHECKING:
    from ferryline.app.app import App, Hook
    from ferryline.queues.message import QueueMessage

log = logging.getLogger("ferryline.app")

MAX_PROCESSING_S = 3600.0
GATHER_S = 0.003  # acknowledgements of a stream of records leave together
_SLACK_S = 60.0  # a record is given up as stuck only well after its handler's own timeout


class Worker:
    """Runs subscribers, tasks and schedules of a connected app, from `start` to `stop`; or use it with ``async with``.

    ``concurrency``: how many records each subscriber or queue of tasks works on at once, if it does not say so itself.
    ``grace``: seconds that `stop` waits for the work in hand.
    """

    def __init__(self, app: App, *, concurrency: int = 16, grace: float = 30.0) -> None:
        self._app = app
        self._concurrency = check_range(concurrency, "concurrency", 1, CONCURRENCY_MAX)
        self._grace = check_seconds(grace, "grace", 0.0, 3600.0)
        self.metrics = WorkerMetrics()
        self._stop = Stop()
        self._lines: list[Line] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._schedules: list[asyncio.Task[None]] = []
        self._opened = False

    async def __aenter__(self) -> Worker:
        try:
            await self.start()
        except BaseException:
            await self.stop(0.0)
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Begin to take records. Raises InvalidArgument for what cannot run, UnknownTopic, and what hooks raise."""
        app = self._app
        if not app.handlers:
            raise InvalidArgument(f"app {app.name}: it declares no subscriber and no task")
        for queue in app.queues.values():
            await queue.ensure()
        for subscriber in app.subscribers:
            meta = await app.client.learn_topic(subscriber.topic)
            subscriber.check_topic(meta.config)
        self._opened = True
        await app.providers.open()
        await run_hooks(app.start_hooks)
        for subscriber in app.subscribers:
            await self._begin(self._subscriber_line(subscriber))
        for queue in app.queues.values():
            await self._begin(self._queue_line(queue))
        self._schedules = [asyncio.create_task(schedule.run()) for schedule in app.schedules]

    async def stop(self, grace: float | None = None) -> None:
        """Take no more, let the work in hand end for at most ``grace`` seconds, hand back what is left; then the hooks.

        What was not begun goes to other workers at once.
        """
        limit = self._grace if grace is None else check_seconds(grace, "grace", 0.0, 3600.0)
        self._stop.asked = True
        for task in self._schedules:
            task.cancel()
        results = await asyncio.gather(*(line.stop(limit) for line in self._lines), return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                log.warning("stopping: %s", result)
        ending = [*self._tasks, *self._schedules]
        for task in self._tasks:
            task.cancel()
        if ending:
            await asyncio.wait(ending)
        self._lines, self._tasks, self._schedules = [], [], []
        if self._opened:
            self._opened = False
            try:
                await run_hooks(self._app.stop_hooks)
            finally:
                await self._app.providers.close()

    async def failed(self) -> None:
        """Returns never; raises what ends a line: a topic that was deleted, an ordering that the group has not."""
        running = [*self._tasks, *self._schedules]
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        raise InvalidArgument("a line has ended by itself")

    @property
    def lines(self) -> list[Line]:
        """What records are taken from."""
        return list(self._lines)

    async def _begin(self, line: Line) -> None:
        self._lines.append(line)
        await line.receiver.start()
        self._tasks.append(asyncio.create_task(line.run()))

    def _subscriber_line(self, subscriber: Subscriber) -> Line:
        app = self._app
        concurrency = subscriber.concurrency or self._concurrency
        receiver = app.client.receiver(
            subscriber.topic,
            group=subscriber.group,
            value=subscriber.signature.value,
            lease=subscriber.lease,
            prefetch=subscriber.prefetch or 2 * concurrency,
            gather=GATHER_S,
            ordering=subscriber.ordering,
            start=subscriber.start,
            max_processing=_max_processing([subscriber]),
        )

        def attempts() -> int:
            meta = app.client.routing.topic(subscriber.topic)
            return meta.config.retry.attempts if meta is not None else 0

        return Line(
            app, receiver, subscriber.name, lambda _: subscriber, concurrency=concurrency, ordering=subscriber.ordering,
            attempts=attempts, stop=self._stop, metrics=self.metrics,
            depth=Depth(concurrency, 2 * concurrency) if subscriber.prefetch is None else None,
        )  # fmt: skip

    def _queue_line(self, queue: TaskQueue) -> Line:
        tasks = queue.tasks
        receiver = self._app.client.receiver(
            queue.topic, group=GROUP, prefetch=self._concurrency, lease=self._app.lease,
            max_processing=_max_processing([*tasks.values()]), gather=GATHER_S,
        )  # fmt: skip

        def find(message: QueueMessage[Any]) -> Handler | None:
            return tasks.get(message.headers.text(HEADER_TASK))

        return Line(
            self._app, receiver, queue.topic, find, concurrency=self._concurrency, ordering=ORDER_KEY,
            attempts=lambda: queue.attempts, stop=self._stop, metrics=self.metrics,
            reports=Reports(queue, self._app.producer, running_after=self._app.running_after),
            depth=Depth(self._concurrency, self._concurrency),
        )  # fmt: skip


def _max_processing(handlers: list[Handler]) -> float:
    longest = max((handler.timeout or 0.0 for handler in handlers), default=0.0)
    return max(MAX_PROCESSING_S, longest + _SLACK_S)


@asynccontextmanager
async def _page(worker: Worker, port: int | None) -> AsyncIterator[None]:
    """Serve the worker's metrics meanwhile, if a port was given."""
    if port is None:
        yield
        return
    page = MetricsPage(worker.metrics, port)
    await page.start()
    try:
        yield
    finally:
        await page.close()


async def run_hooks(hooks: list[Hook]) -> None:
    """Call each, sync or async, one after the other."""
    for hook in hooks:
        found = hook()
        if inspect.isawaitable(found):
            await found


def run_until_signal(app: App, *, concurrency: int, grace: float, metrics_port: int | None = None) -> None:
    """What `App.run` says."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(work(app, concurrency=concurrency, grace=grace, metrics_port=metrics_port))
        return
    uvloop.run(work(app, concurrency=concurrency, grace=grace, metrics_port=metrics_port))


async def work(app: App, *, concurrency: int, grace: float, metrics_port: int | None = None) -> None:
    """Connect and work until SIGTERM or SIGINT, or until a line fails."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    try:
        async with app, Worker(app, concurrency=concurrency, grace=grace) as worker, _page(worker, metrics_port):
            log.info("app %s: at work on %s", app.name, ", ".join(line.name for line in worker.lines))
            failing = asyncio.create_task(worker.failed())
            stopping = asyncio.create_task(asked.wait())
            await asyncio.wait([failing, stopping], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if failing.done():
                failing.result()
            failing.cancel()
            log.info("app %s: stopping", app.name)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
