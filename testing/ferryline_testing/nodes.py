"""Coordinator and brokers over their process lives: start, stop, kill, power cut."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp

from ferryline.protocol.errors import FerrylineError
from ferryline_broker.log.memory import MemoryStorage
from ferryline_broker.log.node_store import NodeStore
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.store.memory import MemoryDisk, MemoryStore
from ferryline_testing.connecting import NetworkConnector
from ferryline_testing.lives import Life
from ferryline_testing.network import Network
from ferryline_testing.shells import COORDINATOR, MemoryBroker, MemoryCoordinator, url_of
from ferryline_testing.virtual_time import VirtualTime

START_S, STOP_S = 60.0, 30.0  # of virtual time
Tell = Callable[[str, str], None]


class Node:
    """What survives of a process, and its present life if it has one."""

    def __init__(self, name: str, network: Network, clock: VirtualTime, tell: Tell) -> None:
        self.name = name
        self.life: Life | None = None
        self.latest: Life | None = None  # the present one, or the last
        self._network, self._clock, self._tell = network, clock, tell
        self._loop = network.loop
        self._ready = asyncio.Event()
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self.life is not None

    async def start(self) -> None:
        """Returns when it serves. Raises RuntimeError if it ended instead, TimeoutError after a minute."""
        if self.life is not None:
            return
        self.begin()
        await self.started()

    def begin(self) -> None:
        """`start` without waiting for it."""
        life = self.life = self.latest = Life(self.name, role=self.name)
        self._ready, self._stop = asyncio.Event(), asyncio.Event()
        self._task = self._loop.create_task(self._live(life), context=life.context())

    async def started(self) -> None:
        ready = asyncio.ensure_future(self._ready.wait())
        assert self._task is not None
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait([ready, self._task], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise TimeoutError(f"{self.name} does not serve after {START_S:g} s") from None
        finally:
            ready.cancel()
        if not self._ready.is_set():
            raise RuntimeError(f"{self.name} ended while it started; see cluster.story()")

    async def stop(self) -> None:
        """An orderly end; partitions are handed over first."""
        task = self._task
        if self.life is None or task is None:
            return
        self._stop.set()
        await asyncio.wait([task], timeout=STOP_S)
        self.kill()  # whoever does not end in time

    def kill(self) -> None:
        """Now, in the middle of whatever it does."""
        life, self.life = self.life, None
        if life is None:
            return
        if life.paused:
            self._clock.resume(life)
        life.ended_s = self._clock.now_s
        self._clock.holding = True
        self._network.process_ended(life)
        self._clock.drop(life)
        for task in list(life.tasks):
            task.cancel()
        self._lost()

    def pause(self) -> None:
        """It stops where it is, as by SIGSTOP: connections stay, and nobody answers."""
        if self.life is not None:
            self.life.paused = self._clock.holding = True

    def resume(self) -> None:
        if self.life is not None and self.life.paused:
            self.life.paused = False
            self._clock.resume(self.life)

    async def _live(self, life: Life) -> None:
        try:
            ended = await self._run(life)
        except (FerrylineError, OSError) as error:
            ended = f"{type(error).__name__}: {error}"
        finally:
            if self.life is life and not life.dead:
                self.life = None
                self._network.process_ended(life)
                self._lost()
        self._tell(self.name, f"ended: {ended}")

    async def _run(self, life: Life) -> str:
        raise NotImplementedError

    def _lost(self) -> None:
        """The process is gone; keep what it wrote."""


class CoordinatorNode(Node):
    """The one coordinator. ``shell`` is that of the present life."""

    def __init__(self, network: Network, clock: VirtualTime, tell: Tell) -> None:
        super().__init__(COORDINATOR, network, clock, tell)
        self.shell: MemoryCoordinator | None = None
        self._disk = MemoryDisk()
        self._store = MemoryStore(self._disk)

    async def _run(self, life: Life) -> str:
        self._store = MemoryStore(self._disk)
        shell = MemoryCoordinator(self._network, life, self._store)
        try:
            await shell.start()
            self.shell = shell
            self._ready.set()
            failure = await shell.wait(self._stop)
        finally:
            await shell.stop()
        return "stopped" if failure is None else f"failed: {failure}"

    def _lost(self) -> None:
        self.shell = None
        self._store._coord_epoch = 0  # what still runs of it commits nothing

    async def admit(self, storage_id: str, url: str) -> tuple[int, str]:
        """What joining with a token does: (broker id, cluster id)."""
        shell, life = self.shell, self.life
        assert shell is not None
        assert life is not None
        asked: Coroutine[Any, Any, Any] = shell.driver.ask(lambda reply: ev.BrokerAdmitted(reply, storage_id, url, url))
        admitted = await self._loop.create_task(asked, context=life.context())
        return admitted.broker_id, admitted.cluster_id


class BrokerNode(Node):
    """One broker and its disk. ``shell`` is that of the present life."""

    def __init__(
        self, number: int, network: Network, clock: VirtualTime, tell: Tell, coordinator: CoordinatorNode
    ) -> None:
        super().__init__(f"broker-{number}", network, clock, tell)
        self.number = number
        self.shell: MemoryBroker | None = None
        self.disk = MemoryStorage()
        self.joined = asyncio.Event()  # a member of the cluster, from the first start on
        self._coordinator = coordinator
        self._boots = 1

    async def _run(self, life: Life) -> str:
        store = NodeStore.open(self.disk, boot_id=f"boot-{self._boots}", make_storage_id=lambda: f"{self.number:032x}")
        connector = NetworkConnector(self._network, life)
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, connect=2.0), connector=connector
        ) as http:
            if not store.broker_id:
                broker_id, cluster_id = await self._coordinator.admit(store.storage_id, url_of(self.name))
                store.set_identity(cluster_id, broker_id)
            self.joined.set()
            life.cluster_id = store.cluster_id
            assert store.broker_id == self.number, (store.broker_id, self.number)
            shell = self.shell = MemoryBroker(self._network, life, store, http)
            announced = self._loop.create_task(self._announce(shell))
            try:
                status = await shell.serve(self._stop)
            finally:
                announced.cancel()
        return f"status {status}"

    async def _announce(self, shell: MemoryBroker) -> None:
        await shell.announced.wait()
        self._ready.set()

    def _lost(self) -> None:
        """What still runs of it writes to a disk of its own from now on."""
        self.shell = None
        self.disk.crash()
        self.disk = self.disk.copy()

    def power_cut(self, chance: random.Random) -> None:
        """Kill it, and let of what was not flushed only a part survive."""
        self.disk.power_cut(chance)  # before the kill, which settles what is left
        self._boots += 1
        self.kill()
