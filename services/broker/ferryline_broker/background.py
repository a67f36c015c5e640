"""What a broker does beside its traffic, each in one task of its own."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod


class Background(ABC):
    """Goes on from `start` until `close`, which return at once. Nobody waits for its end:
    whatever `_run` does between two awaits is whole by itself."""

    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        assert self._task is None, f"{type(self).__name__} is running"
        self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Before `start`, and a second time, it does nothing."""
        if self._task is not None:
            self._task.cancel()

    @abstractmethod
    async def _run(self) -> None:
        """For ever. An error that it lets out ends it for good, so what may go wrong is caught and logged there."""
