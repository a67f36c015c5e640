"""Find the active coordinator among those that are known.

All are asked, a little apart, and the first that opens a session is it: standbys refuse at once and say who is active,
a stopped process takes the connection and says nothing, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from ferryline.protocol.errors import ConnectionFailed, CoordinatorStandby, FerrylineError

STAGGER_S = 0.15


class Closable(Protocol):
    """What a session has to offer here."""

    async def close(self) -> None: ...


S = TypeVar("S", bound=Closable)


def hinted(error: BaseException) -> str:
    """URL of the active coordinator, if this refusal names it."""
    active = error.details.get("active") if isinstance(error, CoordinatorStandby) else None
    return active.rstrip("/") if isinstance(active, str) and active.startswith("https://") else ""


async def find_active(urls: Sequence[str], connect: Callable[[str], Awaitable[S]]) -> tuple[str, S]:
    """One round: (URL, session) of the first that opens one. Whatever else was begun is ended.

    Raises the last refusal, or ConnectionFailed, when nobody does.
    """
    waiting = list(dict.fromkeys(urls))
    asked: dict[asyncio.Task[S], str] = {}
    seen: set[str] = set()
    last: FerrylineError = ConnectionFailed("no coordinator is known")
    loop = asyncio.get_running_loop()
    try:
        while waiting or asked:
            if waiting:
                url = waiting.pop(0)
                if url in seen:
                    continue
                seen.add(url)
                asked[loop.create_task(_awaited(connect, url))] = url
            timeout = STAGGER_S if waiting else None
            done, _ = await asyncio.wait(asked, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                url = asked.pop(task)
                error = task.exception()
                if error is None:
                    return url, task.result()
                if not isinstance(error, FerrylineError):
                    raise error
                last = error
                if (hint := hinted(error)) and hint not in seen:
                    waiting.insert(0, hint)
        raise last
    finally:
        for task in asked:
            task.cancel()
        for ended in await asyncio.gather(*asked, return_exceptions=True):
            if not isinstance(ended, BaseException):
                await ended.close()  # it came in the same moment as the one that was taken


async def _awaited(connect: Callable[[str], Awaitable[S]], url: str) -> S:
    return await connect(url)
