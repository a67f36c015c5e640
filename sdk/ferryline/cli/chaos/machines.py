"""Faults of the machines below the brokers: disks that fail or fill up, files that are harmed, clocks that jump."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from typing import TYPE_CHECKING

from ferryline.cli.chaos.harm import flip, segments_of
from ferryline.cli.chaos.schedule import Step
from ferryline.cli.chaos.steps import Steps
from ferryline.cli.driver import ProcessCluster

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.protocol.metadata import PartitionMeta

SWITCHES = "faults.json"  # in the folder of each broker, which is its working directory
STOP_S = 25.0  # it may be stopped by a SIGSTOP for a part of this
FLIPS = 6  # files at a time
HEARD_S = 3.0  # after a fault of a disk, until what we know of the cluster tells of it
POLL_S = 0.05


class Machines(Steps):
    """The share of a bed that harms what brokers stand on. One broker's files at a time, never the last good copy."""

    def __init__(self, cluster: ProcessCluster) -> None:
        self.cluster = cluster
        self.counts: Counter[str] = Counter()
        self.admin: Client | None = None
        self._leaving: dict[str, float] = {}  # brokers whose disk was made to fail: they are right to end until then
        self._ids: dict[str, int] = {}
        self._harmed = ""  # the broker whose disk or files were touched last: no other one before it is whole again
        self._harmed_until = 0.0  # and not before everybody has heard what became of it

    def broker_id(self, name: str) -> int:
        """As the broker said when it was ready last; it keeps its id, and nobody waits for it after each start."""
        self._ids[name] = self.cluster.broker_id(name) or self._ids.get(name, 0)
        return self._ids[name]

    async def _spawn(self, name: str) -> None:
        raise NotImplementedError

    async def _kill(self, name: str, kind: str) -> None:
        raise NotImplementedError

    async def _end_kill(self, step: Step) -> None:
        await self._spawn(step.target)

    def _switch(self, name: str, **switches: object) -> None:
        """On the thread of the loop: two switches of one broker at a time would overwrite each other."""
        path = self.cluster.local.services[name].folder / SWITCHES
        held = json.loads(path.read_bytes()) if path.exists() else {}
        temp = path.with_suffix(".new")
        temp.write_text(json.dumps({**held, **switches}))
        temp.rename(path)

    async def _begin_disk_full(self, step: Step) -> None:
        """Harms nothing that is on it: it may come over every broker at once."""
        await self._fail_disk(step, write="ENOSPC")

    async def _begin_disk_error(self, step: Step) -> None:
        if self._may_be_harmed(step.target, step.for_s):
            await self._fail_disk(step, **{step.other: "EIO"})

    async def _fail_disk(self, step: Step, **switches: str) -> None:
        self._leaving[step.target] = time.monotonic() + step.for_s + STOP_S
        self._switch(step.target, **switches)
        self.counts[step.kind] += 1

    async def _end_disk_error(self, step: Step) -> None:
        self._switch(step.target, write="", sync="")
        if not self.cluster.local.services[step.target].running:
            await self._spawn(step.target)
        self._leaving[step.target] = time.monotonic() + STOP_S  # it hands over before it ends

    _end_disk_full = _end_disk_error  # the broker sees by itself that there is space again

    async def _begin_clock(self, step: Step) -> None:
        self._switch(step.target, wall_ms=step.amount)
        self.counts["clock"] += 1

    async def _end_clock(self, step: Step) -> None:
        self._switch(step.target, wall_ms=0)

    def _parts_of(self, name: str) -> list[PartitionMeta]:
        client, broker = self.admin, self.broker_id(name)
        parts = client.routing.cluster.partitions.values() if client is not None else []
        return [part for part in parts if broker in part.replicas]

    def _may_be_harmed(self, name: str, for_s: float) -> bool:
        """Whether each partition on this broker is in sync on another one, too, whose disk is as it should be.

        A copy on a disk that failed counts for nothing until it was fetched again: one disk after the other.
        """
        if self._harmed and self._harmed != name:
            before = self.broker_id(self._harmed)
            heard = time.monotonic() > self._harmed_until
            if not heard or not all(before in part.isr for part in self._parts_of(self._harmed)):
                return False
        broker, mine = self.broker_id(name), self._parts_of(name)
        if not mine or not all(set(part.isr) - {broker} for part in mine):
            return False
        self._harmed, self._harmed_until = name, time.monotonic() + for_s + HEARD_S
        return True

    async def _begin_flip(self, step: Step) -> None:
        draw = random.Random(step.amount)
        segments = segments_of(self.cluster.local.data_dir(step.target))
        if not segments or not self._may_be_harmed(step.target, step.for_s):
            return
        for path in draw.sample(segments, min(FLIPS, len(segments))):
            flip(path, draw)
            self.counts["flip"] += 1

    async def _begin_truncate(self, step: Step) -> None:
        draw = random.Random(step.amount)
        if not self._may_be_harmed(step.target, step.for_s):
            return
        await self._kill(step.target, "kill")
        end = time.monotonic() + 5.0
        while self._counted_on(step.target):  # it could lead again before anybody has seen what it lost
            if time.monotonic() > end:
                return
            await asyncio.sleep(POLL_S)
        segments = segments_of(self.cluster.local.data_dir(step.target))
        for path in draw.sample(segments, min(FLIPS, len(segments))):
            os.truncate(path, draw.randrange(path.stat().st_size))
            self.counts["truncate"] += 1

    _end_truncate = _end_kill

    def _counted_on(self, name: str) -> bool:
        broker = self.broker_id(name)
        return any(broker in part.isr or broker in part.elr for part in self._parts_of(name))
