"""Polling with a deadline, instead of a sleep that guesses."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

POLL_SECONDS = 0.02
# "At once", where a machine may be slow: far below what would be waited for in vain (requests 30 s, leases 30 s, ...).
SOON_S = 10.0
WITHIN_S = 30.0  # for what must come, sooner or later


class Deadline:
    """When polling gives up, and the last thing that was wrong."""

    def __init__(self, within_s: float, what: str) -> None:
        self.within_s, self.what = within_s, what
        self.end = time.monotonic() + within_s
        self.wrong: AssertionError | None = None

    def check(self) -> None:
        """Raises what was wrong last once the time is over."""
        if time.monotonic() >= self.end:
            pytest.fail(f"not within {self.within_s:g} s: {self.what}" + (f"\n{self.wrong}" if self.wrong else ""))


async def poll(condition: Callable[[], Any | Awaitable[Any]], *, within_s: float = WITHIN_S, what: str = "") -> Any:
    """Call ``condition`` until it is true, and return its value; an AssertionError counts as false."""
    deadline = Deadline(within_s, what or inspect.getsource(condition).strip())
    while True:
        try:
            value = condition()
            if inspect.isawaitable(value):
                value = await value
            if value:
                return value
        except AssertionError as wrong:
            deadline.wrong = wrong
        deadline.check()
        await asyncio.sleep(POLL_SECONDS)


def poll_blocking(condition: Callable[[], Any], *, within_s: float = WITHIN_S, what: str = "") -> Any:
    """`poll` for tests without an event loop."""
    deadline = Deadline(within_s, what or inspect.getsource(condition).strip())
    while True:
        try:
            if value := condition():
                return value
        except AssertionError as wrong:
            deadline.wrong = wrong
        deadline.check()
        time.sleep(POLL_SECONDS)
