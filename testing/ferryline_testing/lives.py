"""Which process of the cluster code runs for: each process life has a context of its own, which everything inherits
that it starts (tasks, timers, callbacks of its connections)."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

NEVER = float("inf")


class Life:
    """One life of one process. Code without a life is the test's own.

    ``paused``: none of its timers fires and nothing reaches it. ``ended_s``: when it was killed; what it still does is
    heard by nobody, and its timers are dropped a little later.
    """

    __slots__ = ("cluster_id", "ended_s", "name", "paused", "role", "tasks")

    def __init__(self, name: str, role: str = "") -> None:
        self.name = name
        self.role = role  # what its certificate would prove; "" for a client
        self.cluster_id = ""
        self.paused = False
        self.ended_s = NEVER
        self.tasks: dict[asyncio.Future[Any], None] = {}  # unfinished, oldest first

    @property
    def dead(self) -> bool:
        return self.ended_s != NEVER

    def context(self) -> contextvars.Context:
        """For whatever this process starts with."""
        context = contextvars.copy_context()
        context.run(HERE.set, self)
        return context

    def certificate(self) -> dict[str, Any] | None:
        """What TLS would have proved to the other side, in the form of ``ssl.SSLSocket.getpeercert``."""
        if not self.role or not self.cluster_id:
            return None
        return {"subjectAltName": (("DNS", f"{self.role}.{self.cluster_id}"),)}

    def finished(self, task: asyncio.Future[Any]) -> None:
        """A task is done. What went wrong in a process that was killed is of no interest."""
        self.tasks.pop(task, None)
        if self.dead and not task.cancelled():
            task.exception()


HERE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("ferryline_testing_here", default=None)
