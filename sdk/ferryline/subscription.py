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
        self._stopping = False
        self._handling = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    def __await__(self) -> Any:
        return asyncio.shield(self._task).__await__()

    async def stop(self) -> None:
        """End after the record that is being handled. Raises what the handler raised."""
        self._stopping = True
        if asyncio.current_task() is self._task:
            return  # the handler itself: it ends when the handler returns
        if not self._handling:
            self._task.cancel()  # it waits for a record: nothing is in its hands
        try:
            await self._task
        except asyncio.CancelledError:
            if not self._task.cancelled():
                raise

    async def _run(self) -> None:
        async for message in self._consumer:
            self._handling = True
            result = self._handler(message)
            if inspect.isawaitable(result):
                await result
            self._handling = False
            if self._stopping:
                self._consumer.finished()
                return
