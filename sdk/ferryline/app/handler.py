"""A function that is called for records, and one call of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from ferryline.app.context import Context
from ferryline.app.providers import Providers
from ferryline.app.signatures import CONTEXT, HEADERS, MESSAGE, PROVIDED, VALUE, Signature, is_async, read_signature
from ferryline.options import check_seconds
from ferryline.protocol.errors import InvalidArgument, SerializationFailed
from ferryline.retry import Retry

if TYPE_CHECKING:
    from ferryline.queues.message import QueueMessage

TIMEOUT_S_MAX = 86_400.0
_OURS = tuple(os.path.dirname(file) + os.sep for file in (__file__, asyncio.__file__, concurrent.futures.__file__))
CallNext = Callable[[Any], Awaitable[Any]]
Middleware = Callable[[Any, CallNext], Awaitable[Any]]


class Handler:
    """A function, what it takes, how it is retried and how long it may take."""

    is_task = False

    def __init__(self, function: Callable[..., Any], *, name: str, retry: Retry | None, timeout: float | None) -> None:
        if not callable(function):
            raise InvalidArgument(f"{name}: {function!r:.80} cannot be called")
        if retry is not None and not isinstance(retry, Retry):
            raise InvalidArgument(f"{name}: retry: expected fl.Retry(...)", field="retry")
        self.function = function
        self.name = name
        self.retry = retry
        self.timeout = None if timeout is None else check_seconds(timeout, "timeout", 0.001, TIMEOUT_S_MAX)
        self.runs_async = is_async(function)
        self.signature = Signature([], None, None)

    @property
    def what(self) -> str:
        """How messages speak of it."""
        return f"{'task' if self.is_task else 'subscriber'} {self.name}"

    def resolve(self, providers: Providers) -> None:
        """Look at what the function takes. Raises InvalidArgument, naming what nobody can provide."""
        self.signature = read_signature(self.function, self.what, providers.by_type, task=self.is_task)

    def arguments(self, message: QueueMessage[Any]) -> dict[str, Any]:
        """What comes from the value of a record. Raises SerializationFailed when it does not fit."""
        return {parameter.name: message.value for parameter in self.signature.named(VALUE)}


class Call:
    """One attempt at one record.

    ``hopeless`` is set when the record is at fault. ``lingering``: threads that could not be stopped. ``stored``: the
    outcome of storing its result, None where there is none to store; ``keeps_result``: whether it should be.
    """

    __slots__ = ("context", "handler", "hopeless", "keeps_result", "lingering", "message", "stored")

    def __init__(self, handler: Handler, message: QueueMessage[Any], context: Context) -> None:
        self.handler = handler
        self.message = message
        self.context = context
        self.hopeless = False
        self.lingering: list[asyncio.Future[Any]] = []
        self.stored: asyncio.Future[Any] | None = None
        self.keeps_result = True

    def known(self, signature: Signature) -> dict[str, Any]:
        """What a signature gets of the record itself."""
        values: dict[str, Any] = {}
        for parameter in signature.parameters:
            if parameter.source == MESSAGE:
                values[parameter.name] = self.message
            elif parameter.source == HEADERS:
                values[parameter.name] = self.message.headers
            elif parameter.source == CONTEXT:
                values[parameter.name] = self.context
        return values

    async def run(self, providers: Providers, middleware: list[Middleware], threads: Threads) -> Any:
        """Call the handler, through all middleware, the first one outermost; returns what comes out of it.

        Raises what comes out of it, and TimeoutError, naming the limit.
        """
        step: CallNext = partial(self._end_of_chain, providers, threads)
        for around in reversed(middleware):
            step = partial(_through, around, step)
        limit = self.handler.timeout
        if limit is None:
            return await step(self.message)
        try:
            async with asyncio.timeout(limit) as clock:
                return await step(self.message)
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise TimeoutError(f"{self.handler.what} took longer than {limit:g} s") from error

    async def _end_of_chain(self, providers: Providers, threads: Threads, _: Any) -> Any:
        handler = self.handler
        try:
            values = handler.arguments(self.message)
        except SerializationFailed:
            self.hopeless = True
            raise
        values |= self.known(handler.signature)
        provided = handler.signature.named(PROVIDED)
        if not provided:
            return await self._call(values, threads)
        async with AsyncExitStack() as stack:
            for parameter in provided:
                values[parameter.name] = await providers.get(parameter.type, stack, self.known)
            return await self._call(values, threads)

    async def _call(self, values: dict[str, Any], threads: Threads) -> Any:
        if self.handler.runs_async:
            return await self.handler.function(**values)
        return await threads.run(self.handler.function, values, self.lingering)


def _through(around: Middleware, step: CallNext, message: Any) -> Awaitable[Any]:
    return around(message, step)


class Threads:
    """Where handlers run that are no coroutines. Started when the first one comes."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._pool: ThreadPoolExecutor | None = None

    async def run(
        self, function: Callable[..., Any], values: dict[str, Any], lingering: list[asyncio.Future[Any]]
    ) -> Any:
        """What the function returns. If this is cancelled, the thread goes on: it is left in ``lingering``."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._count, f"ferryline-{self._name}")
        context = contextvars.copy_context()
        future = asyncio.get_running_loop().run_in_executor(self._pool, partial(context.run, function, **values))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_heard)
            lingering.append(future)
            raise

    def close(self) -> None:
        """Take no more; what runs goes on."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def from_handler(error: Exception) -> Exception:
    """The same error, whose traceback begins where ours ends: at the first middleware, or the handler."""
    place, first = error.__traceback__, error.__traceback__
    while place is not None and place.tb_frame.f_code.co_filename.startswith(_OURS):
        place = place.tb_next
    return error.with_traceback(place or first)


def _heard(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
