"""Records that have arrived and wait to be handed out, and whoever waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from ferryline.core.leases import WAITING, Lease, LeaseTable
from ferryline.protocol.errors import FerrylineError
from ferryline.queues.message import QueueMessage


class Buffer:
    """First in, first out. ``expired(lease)`` is told of a lease that ended before its records were handed out.

    ``error`` is raised once, by whoever comes next, after the records that are here.
    """

    def __init__(self, table: LeaseTable, expired: Callable[[Lease], None]) -> None:
        self.error: FerrylineError | None = None
        self.closed = False
        self._messages: deque[QueueMessage[Any]] = deque()
        self._table = table
        self._expired = expired
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[asyncio.Future[bool], None] = {}
        self.callers = 0  # calls that want records and have not looked yet

    @property
    def wanted(self) -> bool:
        """Somebody wants records, and none are here."""
        return not self._messages and bool(self.callers or self._waiters)

    def put(self, messages: list[QueueMessage[Any]]) -> None:
        self._messages.extend(messages)
        self._wake(len(messages))

    def fail(self, error: FerrylineError) -> None:
        self.error = error
        self._wake(1)

    def close(self) -> None:
        """Nobody waits any more. What is here is not handed out."""
        self.closed = True
        self._messages.clear()
        self._wake(len(self._waiters))

    def one(self) -> QueueMessage[Any] | None:
        """The next record that is still ours. Raises the error, if there is one and no record is here."""
        found = self.some(1)
        return found[0] if found else None

    def some(self, limit: int) -> list[QueueMessage[Any]]:
        """Up to ``limit`` records. Raises the error only when there is no record before it."""
        found: list[QueueMessage[Any]] = []
        messages, hand_out, now_ms = self._messages, self._table.hand_out, int(self._loop.time() * 1000)
        while messages and len(found) < limit:
            message = messages.popleft()
            lease: Lease = message._source.lease
            if hand_out(lease, message._at, now_ms):
                found.append(message)
            elif lease.states[message._at] == WAITING:
                self._expired(lease)
        if not found and self.error is not None:
            error, self.error = self.error, None
            raise error
        return found

    def last(self, count: int) -> list[QueueMessage[Any]]:
        """Take back up to ``count`` of the records that would be handed out last."""
        found: list[QueueMessage[Any]] = []
        while len(found) < count and self._messages:
            message = self._messages.pop()
            if message._source.lease.states[message._at] == WAITING:
                found.append(message)
        return found

    async def news(self, timeout: float | None) -> bool:
        """Wait until there may be something. Returns False when ``timeout`` seconds passed without."""
        if self._messages or self.error is not None or self.closed:
            return True
        if timeout is not None and timeout <= 0:
            return False
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self._waiters[waiter] = None
        timer = self._loop.call_later(timeout, _resolve, waiter, False) if timeout is not None else None
        try:
            return await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._wake(1)  # it was this one's turn: somebody else takes it
            raise
        finally:
            self._waiters.pop(waiter, None)
            if timer is not None:
                timer.cancel()

    def _wake(self, count: int) -> None:
        """Wake as many as there is something for: hundreds may wait."""
        for waiter in list(self._waiters)[:count]:
            del self._waiters[waiter]
            _resolve(waiter, True)


def _resolve(waiter: asyncio.Future[bool], value: bool) -> None:
    if not waiter.done():
        waiter.set_result(value)
