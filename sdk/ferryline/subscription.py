"""Push: a handler that is called for each record."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ferryline.message import Message

if TYPE_CHECKING:
    from ferryline.consumer import Consumer

Handler = Callable[[Message[Any]], Awaitable[None] | None]


class Subscription:
    """A handler that is called for each record. Await it to learn how it ended; `stop` ends it after the record that
    is being handled."""

    def __init__(self, consumer: Consumer[Any], handler: Handler) -> None:
        self._consumer = consumer
        self._handler = handler
        self._stopping = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def __await__(self) -> Any:
        return asyncio.shield(self._task).__await__()

    async def stop(self) -> None:
        """End after the record that is being handled. Raises what the handler raised."""
        self._stopping.set()
        await self._task

    async def _run(self) -> None:
        stopping = asyncio.get_running_loop().create_task(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                batch = await self._next(stopping)
                for message in batch:
                    result = self._handler(message)
                    if inspect.isawaitable(result):
                        await result
                    # One record at a time is pulled, so that a stop never leaves given but unhandled records behind.
        finally:
            stopping.cancel()

    async def _next(self, stopping: asyncio.Task[bool]) -> list[Message[Any]]:
        pulling = asyncio.get_running_loop().create_task(self._consumer.pull(1, 3600.0))
        await asyncio.wait({pulling, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not pulling.done():
            pulling.cancel()
            await asyncio.wait({pulling})
            return [] if pulling.cancelled() else pulling.result()
        return pulling.result()
