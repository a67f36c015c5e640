"""`MetaStore` in memory, shared by several coordinators of one test, with faults to inject."""

from __future__ import annotations

import asyncio
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
