"""MetaStore in memory, for tests: shared by several coordinators, with outcomes that a test may spoil."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping

from ferryline_coordinator.store.interface import Committed, Outcome, Primaryship, Row


class MemoryBacking:
    """The durable side. ``spoil``: what happens to coming commits, in order: "ok", "unknown-written" or
    "unknown-not-written"."""

    def __init__(self) -> None:
        self.epoch = 0
        self.revision = 0
        self.rows: dict[str, tuple[bytes, int]] = {}
        self.spoil: deque[str] = deque()
        self.campaigned = asyncio.Event()


class MemoryStore:
    """One coordinator's access to a `MemoryBacking`. Campaigning takes primaryship away from whoever had it."""

    def __init__(self, backing: MemoryBacking | None = None) -> None:
        self.backing = backing or MemoryBacking()
        self._epoch = 0

    async def campaign(self, floor: int = 0) -> Primaryship:
        backing = self.backing
        backing.epoch = self._epoch = max(backing.epoch + 1, floor)
        backing.campaigned.set()
        backing.campaigned = asyncio.Event()
        return Primaryship(self._epoch)

    async def load(self, at_least: int = 0) -> list[Row]:
        assert self.backing.revision >= at_least
        return [Row(key, value, version) for key, (value, version) in sorted(self.backing.rows.items())]

    async def commit(
        self, puts: Mapping[str, bytes], deletes: Iterable[str] = (), guards: Iterable[tuple[str, int]] = ()
    ) -> Committed:
        backing = self.backing
        fate = backing.spoil.popleft() if backing.spoil else "ok"
        if fate == "unknown-not-written":
            return Committed(Outcome.UNKNOWN)
        if not self._epoch or backing.epoch != self._epoch:
            return Committed(Outcome.LOST)
        for key, version in guards:
            if backing.rows.get(key, (b"", 0))[1] != version:
                return Committed(Outcome.CONFLICT)
        backing.revision += 1
        for key in deletes:
            backing.rows.pop(key, None)
        for key, value in puts.items():
            backing.rows[key] = (value, backing.revision)
        if fate == "unknown-written":
            return Committed(Outcome.UNKNOWN)
        return Committed(Outcome.OK, backing.revision)

    async def resign(self) -> None:
        self._epoch = 0

    async def changed(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self.backing.campaigned.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        self._epoch = 0
