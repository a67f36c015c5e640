"""What a handler may ask about the record that it is called for: `Context`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ferryline.app.app import App
    from ferryline.queues.message import QueueMessage

T = TypeVar("T")


class Context:
    """One attempt at one record. A handler gets it by a parameter that is annotated with `Context`.

    ``attempt`` counts from 1, ``attempts`` is how many there may be. ``name`` is that of the handler, ``job_id`` that
    of the job, "" where the handler is no task. ``stopping`` is true once the worker wants to end: long work may
    then stop where it can go on later, and raise.
    """

    __slots__ = ("_loop", "app", "attempt", "attempts", "job_id", "message", "name", "stop")

    def __init__(
        self, app: App, message: QueueMessage[Any], *, name: str, attempt: int, attempts: int, job_id: str, stop: Stop,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self.app = app
        self.message = message
        self.name = name
        self.attempt = attempt
        self.attempts = attempts
        self.job_id = job_id
        self.stop = stop
        self._loop = loop

    @property
    def stopping(self) -> bool:
        """Whether the worker is about to end."""
        return self.stop.asked

    def wait(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """For handlers that run in threads: run ``work`` on the app's loop, and wait for what it returns.

        Raises TimeoutError after ``timeout`` seconds.
        """
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)


class Stop:
    """Whether a worker was asked to stop; shared by everything that it runs."""

    __slots__ = ("asked",)

    def __init__(self) -> None:
        self.asked = False
