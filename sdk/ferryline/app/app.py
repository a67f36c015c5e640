"""The application: subscribers, tasks and schedules, declared in a module and run by workers.

::

    app = fl.App(name="shop")

    @app.subscriber("orders", group="billing", concurrency=16, retry=fl.Retry(5, backoff=fl.exponential(1, 60)))
    async def bill(order: Order, message: fl.Message[Order]) -> None: ...

    @app.task(queue="media", timeout=60, retry=fl.Retry(3))
    async def resize(url: str, width: int) -> str: ...

    @app.schedule("*/5 * * * *", tz="Europe/Berlin")
    async def tidy() -> None: ...

``ferryline worker run module:app`` runs it; `App.run` does the same in this process. Who only submits tasks connects
with ``async with app``. docs/workers.md tells the rest.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast, overload

from ferryline.app.handler import Handler, Middleware
from ferryline.app.job import Job
from ferryline.app.providers import APP, Factory, Providers
from ferryline.app.queue import TaskQueue
from ferryline.app.schedule import Schedule, schedule_of
from ferryline.app.statuses import ID_SEPARATOR
from ferryline.app.subscriber import Subscriber
from ferryline.app.task import Task
from ferryline.options import check_seconds
from ferryline.protocol.errors import ClientClosed, InvalidArgument
from ferryline.protocol.limits import check_name
from ferryline.protocol.queue_messages import ORDER_KEY
from ferryline.queues.options import LEASE_S_MAX, LEASE_S_MIN
from ferryline.retry import Retry

if TYPE_CHECKING:
    from ferryline.app.worker import Worker
    from ferryline.client import Client
    from ferryline.producer import Producer

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
Hook = Callable[[], Any]
RUNNING_AFTER_S_MAX = 3600.0


class TaskDecorator(Protocol):
    """Makes a task of a function, and keeps its types."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]]) -> Task[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R]) -> Task[P, R]: ...


class App:
    """Handlers by topic, and the connection that they share. Declare everything before it is started.

    ``url``, ``ca``, ``token`` and ``timeout`` are as of `connect`; where they are left out, the environment says.
    ``lease``: seconds until what a killed worker had in hand goes to others; a living one renews it. ``name`` is the
    group of subscribers without one, and begins the names of queues that are not named. ``results``: whether results
    of tasks are kept, where they do not say. ``running_after``: seconds after which a task that still runs is written
    down as running; most have ended by then.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        name: str = "app",
        ca: str | os.PathLike[str] | None = None,
        token: str | None = None,
        timeout: float = 30.0,
        lease: float = 30.0,
        results: bool = True,
        running_after: float = 0.05,
    ) -> None:
        self.name = check_name(name, "name")
        self.results = bool(results)
        self.running_after = check_seconds(running_after, "running_after", 0.0, RUNNING_AFTER_S_MAX)
        self.lease = check_seconds(lease, "lease", LEASE_S_MIN, LEASE_S_MAX)
        self.subscribers: list[Subscriber] = []
        self.queues: dict[str, TaskQueue] = {}
        self.tasks: dict[str, Task[Any, Any]] = {}
        self.schedules: list[Schedule] = []
        self.middleware: list[Middleware] = []
        self.providers = Providers()
        self.start_hooks: list[Hook] = []
        self.stop_hooks: list[Hook] = []
        self._connection: dict[str, Any] = {"urls": url, "ca": ca, "token": token, "timeout": timeout}
        self._client: Client | None = None
        self._producer: Producer | None = None
        self._connection_end = AsyncExitStack()

    # -- declaring ---------------------------------------------------------------------------------

    def subscriber(
        self,
        topic: str,
        *,
        group: str | None = None,
        concurrency: int | None = None,
        prefetch: int | None = None,
        retry: Retry | None = None,
        timeout: float | None = None,
        ordering: str = ORDER_KEY,
        lease: float | None = None,
        start: str = "start",
        value: Any = None,
    ) -> Callable[[F], F]:
        """Call the function below for each record of a topic, as a queue of ``group``.

        ``concurrency``: how many at once in each process (default: what the worker is told); records of one key come
        one after the other. ``prefetch``: how many records may be here (default: twice that). ``retry``: attempts and
        waits of this subscriber; without it the topic's policy holds. ``timeout``: seconds that one attempt may take.
        ``value``: the type of values, where the annotation should not say it. The rest is as of ``client.receiver``.
        """

        def declare(function: F) -> F:
            self.subscribers.append(
                Subscriber(
                    function, topic, group=group or self.name, concurrency=concurrency, prefetch=prefetch, retry=retry,
                    timeout=timeout, ordering=ordering, lease=lease or self.lease, start=start, value=value,
                )
            )  # fmt: skip
            return function

        return declare

    def task(
        self,
        *,
        queue: str | None = None,
        name: str | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
        results: bool | None = None,
    ) -> TaskDecorator:
        """Make a task of the function below, whose calls stand in ``queue`` (default: ``<app>.tasks``).

        Its name (default: the function's) is what a record says to be called, so it should not change. ``timeout``:
        seconds that one attempt may take. ``retry``: attempts and waits. ``results=False``: nobody asks what it returns
        or when it was done, so nothing is written of a job that succeeds (default: as the app says).
        """

        def declare(function: Callable[..., Any]) -> Task[Any, Any]:
            return self._task(function, queue or f"{self.name}.tasks", name, timeout, retry, results)

        return cast(TaskDecorator, declare)

    def schedule(
        self,
        cron: str | None = None,
        *,
        every: float | None = None,
        tz: str = "UTC",
        queue: str | None = None,
        name: str | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
    ) -> Callable[[Callable[..., Any]], Task[Any, Any]]:
        """Run the function below, or a task, at the times of a cron expression in time zone ``tz``, or ``every`` so
        many seconds: each time once, however many workers there are. Arguments need defaults.

        What is no task becomes one, in ``queue`` (default: ``<app>.schedules``); the rest is as of `task`.
        """
        times = schedule_of(cron, every, tz)

        def declare(function: Callable[..., Any]) -> Task[Any, Any]:
            task = function if isinstance(function, Task) else None
            if task is None:
                task = self._task(function, queue or f"{self.name}.schedules", name, timeout, retry)
            elif (queue, name, timeout, retry) != (None, None, None, None):
                raise InvalidArgument(f"{task.what}: say queue, name, timeout and retry where the task is declared")
            self.schedules.append(Schedule(task, times))
            return task

        return declare

    def provide(self, kind: type[Any], factory: Factory, *, scope: str = APP) -> None:
        """Give handlers a thing for each parameter that is annotated with ``kind``: what ``factory`` returns or yields.

        ``scope``: "app" makes it once for each process, "message" for each attempt.
        """
        self.providers.add(kind, factory, scope)

    def use(self, middleware: Middleware) -> Middleware:
        """Call ``await middleware(message, call_next)`` around each attempt; the first one that is used is outermost.

        What ``await call_next(message)`` raises is what the handler raised. Also good as a decorator.
        """
        self.middleware.append(middleware)
        return middleware

    def on_start(self, hook: F) -> F:
        """Call the function, sync or async, when a worker has connected, before the first record. A decorator."""
        self.start_hooks.append(hook)
        return hook

    def on_stop(self, hook: F) -> F:
        """Call the function, sync or async, when a worker ends, after the last record. A decorator."""
        self.stop_hooks.append(hook)
        return hook

    @property
    def handlers(self) -> list[Handler]:
        """Everything that is called for records."""
        return [*self.subscribers, *self.tasks.values()]

    def check(self) -> None:
        """See whether what was declared can run. Raises InvalidArgument, naming what cannot. Connects to nothing."""
        self.providers.resolve()
        for handler in self.handlers:
            handler.resolve(self.providers)
        for schedule in self.schedules:
            schedule.check()

    def _task(
        self, function: Callable[..., Any], queue: str, name: str | None, timeout: float | None, retry: Retry | None,
        results: bool | None = None,
    ) -> Task[Any, Any]:  # fmt: skip
        chosen = name or str(getattr(function, "__name__", ""))
        if chosen in self.tasks:
            raise InvalidArgument(f"task {chosen}: there is one of this name already; say name=", field="name")
        held = self.queues.get(queue) or TaskQueue(self, queue)
        kept = self.results if results is None else bool(results)
        task: Task[Any, Any] = Task(held, function, name=chosen, retry=retry, timeout=timeout, keeps_results=kept)
        self.queues[queue] = held
        held.tasks[chosen] = self.tasks[chosen] = task
        return task

    # -- connecting --------------------------------------------------------------------------------

    async def __aenter__(self) -> App:
        """Connect: from now on tasks can be submitted and asked for. Works on nothing."""
        from ferryline.client import connect

        async with AsyncExitStack() as stack:
            client = connect(**self._connection, name=self.name)
            stack.push_async_callback(client.close)
            await stack.enter_async_context(self.connected(client))
            self._connection_end = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        end, self._connection_end = self._connection_end, AsyncExitStack()
        await end.aclose()

    @asynccontextmanager
    async def connected(self, client: Client) -> AsyncIterator[App]:
        """``async with app.connected(client)``: over a client that is there already, and stays the caller's."""
        if self._client is not None:
            raise InvalidArgument(f"app {self.name}: it is connected already")
        self.check()
        self._client = client
        try:
            await client.start()
            async with client.producer() as producer:
                self._producer = producer
                try:
                    yield self
                finally:
                    for queue in self.queues.values():
                        await queue.close()
        finally:
            self._client = self._producer = None

    @property
    def client(self) -> Client:
        """The connection that everything here shares. Raises ClientClosed while there is none."""
        if self._client is None:
            raise ClientClosed(f"app {self.name}: it is not connected: `async with app`, or `ferryline worker run`")
        return self._client

    @property
    def producer(self) -> Producer:
        """For records that handlers send. Raises ClientClosed while the app is not connected."""
        if self._producer is None:
            raise ClientClosed(f"app {self.name}: it is not connected: `async with app`, or `ferryline worker run`")
        return self._producer

    def job(self, job_id: str, *, queue: str | None = None) -> Job[Any]:
        """A job by its id, whoever submitted it. ``queue`` is needed only for an id that somebody chose, when there are
        several queues. Nothing is asked before a method is called."""
        task = self.tasks.get(job_id.rpartition(ID_SEPARATOR)[0])
        if queue is None and task is not None:
            return task.queue.job(job_id)
        if queue is None and len(self.queues) == 1:
            return next(iter(self.queues.values())).job(job_id)
        if queue is None or queue not in self.queues:
            known = ", ".join(sorted(self.queues)) or "there is none"
            raise InvalidArgument(f"queue: which one is job {job_id!r:.80} in? {known}", field="queue")
        return self.queues[queue].job(job_id)

    # -- running -----------------------------------------------------------------------------------

    def worker(self, *, concurrency: int = 16, grace: float = 30.0) -> Worker:
        """A worker in this process, for ``async with``; the app must be connected. Options as of `Worker`."""
        from ferryline.app.worker import Worker

        return Worker(self, concurrency=concurrency, grace=grace)

    def run(self, *, concurrency: int = 16, grace: float = 30.0, metrics_port: int | None = None) -> None:
        """Connect and work until SIGTERM or SIGINT; then take nothing more, let the work in hand end for at most
        ``grace`` seconds, and hand back what is left. Blocks.

        ``metrics_port``: serve what the worker did to Prometheus, on loopback only; the next free one if it is taken.
        """
        from ferryline.app.worker import run_until_signal

        run_until_signal(self, concurrency=concurrency, grace=grace, metrics_port=metrics_port)
