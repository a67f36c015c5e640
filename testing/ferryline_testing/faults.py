"""Faults by a seed: which process fails, how, when and for how long."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ferryline_testing.cluster import Cluster

KINDS = ("kill", "power_cut", "pause", "partition", "coordinator")


@dataclass(frozen=True, kw_only=True)
class Faults:
    """A schedule of faults. One at a time: with replication 2 no acknowledged record may be lost to any of it.

    ``seed``: None takes the cluster's. ``every`` and ``lasting``: the least and the most seconds between two faults,
    and of one fault. The others are weights; 0 turns a kind off. ``coordinator`` kills and starts the coordinator.
    """

    seed: int | None = None
    every: tuple[float, float] = (5.0, 20.0)
    lasting: tuple[float, float] = (1.0, 15.0)
    kill: float = 1.0
    power_cut: float = 1.0
    pause: float = 1.0
    partition: float = 1.0
    coordinator: float = 0.5

    def __post_init__(self) -> None:
        for name in ("every", "lasting"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: ({low}, {high}) is no range of positive seconds")
        if min(self._weights()) < 0 or not any(self._weights()):
            raise ValueError("weights: at least one kind of fault must have a weight above 0, and none one below")

    def _weights(self) -> list[float]:
        return [getattr(self, kind) for kind in KINDS]

    def draw(self, chance: random.Random) -> str:
        """The kind of the next fault."""
        return chance.choices(KINDS, self._weights())[0]


class Weather:
    """Carries a schedule out until it is told to stop, and mends what it broke before it does."""

    def __init__(self, cluster: Cluster, faults: Faults, seed: int) -> None:
        self._cluster, self._faults = cluster, faults
        self._chance = random.Random(f"{seed if faults.seed is None else faults.seed}/faults")
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Returns once the fault that lasts is over."""
        self._stop.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while await self._wait(self._faults.every):
            kind, number = self._faults.draw(self._chance), self._chance.randint(1, self._cluster.size)
            mend = self._break(kind, number)
            await self._wait(self._faults.lasting)
            await mend()

    async def _wait(self, between: tuple[float, float]) -> bool:
        """False as soon as it is to stop."""
        try:
            async with asyncio.timeout(self._chance.uniform(*between)):
                await self._stop.wait()
        except TimeoutError:
            return True
        return False

    def _break(self, kind: str, number: int) -> Callable[[], asyncio.Future[None]]:
        cluster = self._cluster

        async def heal() -> None:
            cluster.heal()

        async def resume() -> None:
            cluster.resume(number)

        async def start() -> None:
            await cluster.start("coordinator" if kind == "coordinator" else number)

        if kind == "pause":
            cluster.pause(number)
            mend = resume
        elif kind == "partition":
            others = [other for other in ("coordinator", *range(1, cluster.size + 1)) if other != number]
            cluster.partition(number, self._chance.choice(others), one_way=self._chance.random() < 0.3)
            mend = heal
        else:
            if kind == "power_cut":
                cluster.power_cut(number)
            else:
                cluster.kill("coordinator" if kind == "coordinator" else number)
            mend = start
        return lambda: asyncio.ensure_future(mend())
