"""A local cluster for programs that run an event loop: `LocalCluster` with awaitable waits.

`ferryline demo` and the tests use it; the Cluster protocol of tests/integration describes it from the tests' side.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ferryline.cli.processes import COORDINATOR, READY_TIMEOUT_S, LocalCluster, ProcessFailed

__all__ = ["COORDINATOR", "ProcessCluster"]

_POLL_S = 0.02


class ProcessCluster:
    """`LocalCluster` without blocking the loop. Children start on the thread of the loop and live as long as it."""

    def __init__(
        self,
        root: Path,
        *,
        brokers: int = 3,
        env: Mapping[str, str] | None = None,
        coordinator_args: Sequence[str] = (),
        broker_args: Sequence[str] = (),
        coordinators: int = 1,
        store: str = "sqlite",
        etcd_members: int = 3,
    ) -> None:
        self.local = LocalCluster(
            root,
            brokers=brokers,
            env=env,
            coordinator_args=coordinator_args,
            broker_args=broker_args,
            coordinators=coordinators,
            store=store,
            etcd_members=etcd_members,
        )

    @property
    def url(self) -> str:
        return self.local.url

    @property
    def urls(self) -> list[str]:
        return self.local.urls

    @property
    def ca(self) -> Path:
        return self.local.ca

    @property
    def coordinators(self) -> list[str]:
        return self.local.coordinators

    @property
    def brokers(self) -> list[str]:
        return self.local.brokers

    async def start(self) -> None:
        self.local.prepare()
        for stage in self.local.stages:
            for name in stage:
                self.local.spawn(name)
            for name in stage:
                await self._ready(name)

    async def stop(self) -> None:
        for group in (self.brokers, self.coordinators):
            results = await asyncio.gather(*(self._resume_and_terminate(name) for name in group))
            for name, status in zip(group, results, strict=True):
                if status is None:
                    self.local.kill(name)
        for name in self.local.stages[0]:
            self.local.kill(name)  # as `LocalCluster.stop`

    async def add_broker(self) -> str:
        name = self.local.add_broker()
        await self.restart(name)
        return name

    async def kill(self, name: str) -> None:
        self.local.kill(name)

    async def kill_all(self) -> None:
        self.local.kill_all()

    async def pause(self, name: str) -> None:
        self.local.pause(name)

    async def resume(self, name: str) -> None:
        self.local.resume(name)

    async def terminate(self, name: str, timeout_s: float = 15.0) -> int | None:
        self.local.terminate(name)
        end = time.monotonic() + timeout_s
        while self.local.services[name].running:
            if time.monotonic() > end:
                return None
            await asyncio.sleep(_POLL_S)
        return self.local.wait_ended(name, 0.1)

    async def restart(self, name: str) -> None:
        self.local.spawn(name)
        await self._ready(name)

    def broker_id(self, name: str) -> int:
        return self.local.broker_id(name)

    def name_of(self, broker_id: int) -> str:
        return self.local.name_of(broker_id)

    def url_of(self, name: str) -> str:
        return self.local.services[name].url

    def logs(self, name: str) -> str:
        return self.local.logs(name)

    async def _resume_and_terminate(self, name: str) -> int | None:
        self.local.terminate(name)
        self.local.resume(name)  # a stopped process would never see the signal
        return await self.terminate(name)

    async def _ready(self, name: str) -> None:
        end = time.monotonic() + READY_TIMEOUT_S
        while not self.local.is_ready(name):
            if time.monotonic() > end:
                raise ProcessFailed(f"{name} was not ready in time\n{self.local.services[name].log_tail()}")
            await asyncio.sleep(_POLL_S)
