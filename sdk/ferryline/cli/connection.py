"""From settings to a connected client, for all commands that talk to a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ferryline.cli.settings import Settings
    from ferryline.client import Client

T = TypeVar("T")


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Client]:
    """A client of the chosen cluster. Raises ConnectionFailed when nobody answers within the time-out."""
    import ferryline as fl

    async with fl.connect(
        list(settings.url), ca=settings.ca, token=settings.token or None, timeout=settings.timeout
    ) as client:
        yield client


def run(command: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine on the fastest loop there is."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(command)
    return uvloop.run(command)
