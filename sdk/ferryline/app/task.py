"""A task: a function whose calls are records of a queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from ferryline.app.arguments import Arguments, Results
from ferryline.app.handler import Handler
from ferryline.app.job import Job
from ferryline.app.providers import Providers
from ferryline.app.signatures import ARGUMENT, named, unparseable
from ferryline.protocol.errors import ClientClosed, FerrylineError, InvalidArgument
from ferryline.protocol.limits import check_name
from ferryline.retry import Retry

if TYPE_CHECKING:
    from ferryline.app.queue import TaskQueue
    from ferryline.queues.message import QueueMessage

P = ParamSpec("P")
R = TypeVar("R")
OPTIONS = ("key", "delay", "priority", "id")  # of submit: no task can have arguments of these names


class Task(Handler, Generic[P, R]):
    """Made by ``@app.task``. `submit` runs it on some worker; calling it runs the function here and now, as it is."""

    is_task = True

    def __init__(
        self,
        queue: TaskQueue,
        function: Callable[P, Any],
        *,
        name: str,
        retry: Retry | None,
        timeout: float | None,
        keeps_results: bool = True,
    ) -> None:
        super().__init__(function, name=check_name(name, "task"), retry=retry, timeout=timeout)
        self.queue = queue
        self.keeps_results = keeps_results
        self._codecs: tuple[Arguments, Results] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Task {self.name} in {self.queue.topic}>"

    async def submit(
        self,
        *args: Any,
        key: str | bytes | None = None,
        delay: float | None = None,
        priority: int | None = None,
        id: str | None = None,
        **kwargs: Any,
    ) -> Job[R]:
        """Have it called on some worker, with these arguments. Returns once the call is committed.

        Calls with one ``key`` run one after the other. ``delay``: not before so many seconds. ``priority``: 0 to 9, the
        highest first. ``id``: that of the job; for five minutes a second call with the same one does nothing, and its
        job is the first one. Raises InvalidArgument for arguments that the function would not take; else what
        ``producer.send`` raises: after OutcomeUnknown, ``error.details["job"]`` is the id to ask for.
        """
        data = self.codecs[0].encode(args, kwargs)
        job = await self.queue.submit(self, data, key=key, delay=delay, priority=priority, job_id=id)
        return cast("Job[R]", job)

    async def submit_many(
        self,
        calls: Iterable[tuple[Any, ...] | Mapping[str, Any]],
        *,
        key: str | bytes | None = None,
        delay: float | None = None,
        priority: int | None = None,
    ) -> list[Job[R] | FerrylineError]:
        """Have it called for each of ``calls``: a tuple of arguments, or a mapping of them by name. They travel
        together, which is many times as fast as one `submit` after the other.

        Returns once each was committed or not: its job or its error, in order. The options are as of `submit`, the same
        for all. Raises InvalidArgument for arguments that the function would not take, before anything is sent.
        """
        data = [self._encoded(one) for one in calls]
        return await self.queue.submit_many(self, data, key=key, delay=delay, priority=priority)

    def _encoded(self, call: object) -> bytes:
        if isinstance(call, Mapping):
            return self.codecs[0].encode((), dict(call))
        if not isinstance(call, (tuple, list)):
            raise InvalidArgument(f"calls: {call!r:.80} is no tuple of arguments, and no mapping", field="calls")
        return self.codecs[0].encode(tuple(call), {})

    # -- for workers -------------------------------------------------------------------------------

    @property
    def codecs(self) -> tuple[Arguments, Results]:
        """How arguments and results travel; known once the app has started."""
        if self._codecs is None:
            raise ClientClosed(f"{self.what}: the app is not connected: `async with app`")
        return self._codecs

    @property
    def results(self) -> Results:
        return self.codecs[1]

    def resolve(self, providers: Providers) -> None:
        """As of `Handler`; also for arguments and results that are not JSON."""
        super().resolve(providers)
        taken = [one.name for one in self.signature.named(ARGUMENT) if one.name in OPTIONS]
        if taken:
            raise InvalidArgument(f"{self.what}: parameter {taken[0]!r} is an option of submit; give it another name")
        if part := unparseable(self.signature.returns, nested_models=True):
            raise InvalidArgument(f"{self.what}: its result {named(self.signature.returns)}: {part} is not JSON")
        returns = self.signature.returns
        self._codecs = Arguments(self.what, self.function, self.signature), Results(self.what, returns)

    def arguments(self, message: QueueMessage[Any]) -> dict[str, Any]:
        """Those of a record. Raises SerializationFailed."""
        return self.codecs[0].decode(message.raw)
