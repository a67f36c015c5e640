"""`MetaStore` in memory, shared by several coordinators of one test, with faults to inject."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence

from ferryline_coordinator.store.interface import Committed, Loaded, Outcome, Primaryship


class Crashed(Exception):
    """The process of this store's owner ended here."""


class MemoryDisk:
    """What survives: share one among the stores of successive (or rival) coordinators."""

    def __init__(self) -> None:
        self.records: dict[str, tuple[bytes, int]] = {}
        self.revision = 0
        self.coord_epoch = 0
        self.campaigned = asyncio.Event()


class MemoryStore:
    """``fault``, asked before each commit, answers with one of

    ""                 nothing happens
    "unknown-before"   outcome UNKNOWN, nothing was written
    "unknown-after"    outcome UNKNOWN, all was written
    "crash-before"     raises Crashed, nothing was written
    "crash-after"      raises Crashed, all was written
    """

    def __init__(self, disk: MemoryDisk | None = None, fault: Callable[[], str] | None = None) -> None:
        self.disk = disk if disk is not None else MemoryDisk()
        self.fault = fault
        self._coord_epoch = 0

    async def campaign(self, at_least: int = 0) -> Primaryship:
        disk = self.disk
        disk.coord_epoch = max(disk.coord_epoch + 1, at_least)
        disk.revision += 1
        self._coord_epoch = disk.coord_epoch
        disk.campaigned.set()
        disk.campaigned = asyncio.Event()
        return Primaryship(disk.coord_epoch, disk.revision)

    async def load(self, at_least: int) -> Loaded:
        assert self.disk.revision >= at_least
        return Loaded(self.disk.revision, dict(self.disk.records))

    async def commit(
        self, puts: Mapping[str, bytes], deletes: Sequence[str], guards: Sequence[tuple[str, int]] = ()
    ) -> Committed:
        await asyncio.sleep(0)  # as every real store, it lets others run
        disk = self.disk
        fault = self.fault() if self.fault is not None else ""
        if fault == "crash-before":
            raise Crashed
        if fault == "unknown-before":
            return Committed(Outcome.UNKNOWN)
        if self._coord_epoch != disk.coord_epoch or not self._coord_epoch:
            return Committed(Outcome.LOST)
        if any(disk.records.get(key, (b"", 0))[1] != version for key, version in guards):
            return Committed(Outcome.CONFLICT)
        disk.revision += 1
        for key in deletes:
            disk.records.pop(key, None)
        for key, value in puts.items():
            disk.records[key] = (bytes(value), disk.revision)
        if fault == "crash-after":
            raise Crashed
        return Committed(Outcome.UNKNOWN) if fault == "unknown-after" else Committed(Outcome.OK, disk.revision)

    def holds(self) -> bool:
        return self._coord_epoch != 0

    def active(self) -> str:
        return ""

    async def members(self) -> list[str] | None:
        return None

    async def resign(self) -> None:
        self._coord_epoch = 0

    async def watch(self) -> None:
        while self._coord_epoch == self.disk.coord_epoch and self._coord_epoch:
            await self.disk.campaigned.wait()

    async def close(self) -> None:
        await self.resign()


class FaultyStore(MemoryStore):
    """What a store behind a network does to a coordinator, drawn from a seed.

    Commits end as UNKNOWN, written or not; a rival campaigns in between, so that primaryship is lost; the copy that is
    read lags behind, and is not shown where it is older than what was asked for.
    """

    def __init__(self, disk: MemoryDisk, seed: int, *, unknown: float = 0.2, lost: float = 0.1) -> None:
        super().__init__(disk, self._draw)
        self._random = random.Random(seed)
        self._unknown, self._lost = unknown, lost
        self._old: list[Loaded] = []
        self.stale_refused = 0

    def _draw(self) -> str:
        chance = self._random.random()
        if chance < self._lost:
            self.disk.coord_epoch += 1  # a rival, which commits nothing
            self.disk.revision += 1
            return ""
        return self._random.choice(["unknown-before", "unknown-after"]) if chance < self._lost + self._unknown else ""

    async def load(self, at_least: int) -> Loaded:
        self._old.append(await super().load(at_least))
        while True:
            shown = self._random.choice(self._old)
            if shown.revision >= at_least:
                return shown
            self.stale_refused += 1
