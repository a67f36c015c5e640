"""The cluster that is broken: real processes behind the fault proxy, with everything that can be done to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path

from ferryline.cli.chaos.machines import POLL_S, STOP_S, SWITCHES, Machines
from ferryline.cli.chaos.network import Network
from ferryline.cli.chaos.proxy import Rule
from ferryline.cli.chaos.schedule import ACTIVE, ALL_ETCD, ANY, CLIENT, COORDINATOR, NEED_LOSSY, Step
from ferryline.cli.chaos.wiring import active_among, wire
from ferryline.cli.driver import ProcessCluster
from ferryline.cli.processes import READY_TIMEOUT_S, ProcessFailed
from ferryline.protocol.errors import FerrylineError

DISK = frozenset({"disk-full", "disk-error", "clock"})
SCRUB_BYTES_PER_S = 64 * 1024 * 1024
ROOM = ("--disk-reserve-bytes", "1048576", "--disk-reserve-percent", "0")  # this disk holds other things, too
ADMIN_S = 5.0
SPACE_AGAIN = 75  # status of a broker that had to stop replicas for want of space: it is to be started again


class ProcessBed(Machines):
    """Child processes and the proxy between them. `begin` and `end` of a step are called once each, in this order."""

    def __init__(
        self,
        root: Path,
        *,
        brokers: int,
        faults: Iterable[str],
        env: dict[str, str] | None = None,
        coordinators: int = 1,
    ) -> None:
        chosen = set(faults)
        found = {"FERRYLINE_ALLOW_SABOTAGE": "1", **(env or {})}
        if chosen & DISK or chosen & NEED_LOSSY:
            found["FERRYLINE_TEST_FAULTS"] = SWITCHES
        if chosen & NEED_LOSSY:
            found["FERRYLINE_TEST_LOSSY_STORAGE"] = "1"
        cluster = ProcessCluster(
            root,
            brokers=brokers,
            env=found,
            broker_args=[*ROOM, "--scrub-bytes-per-s", str(SCRUB_BYTES_PER_S)],
            coordinators=coordinators,
            store="sqlite" if coordinators == 1 else "etcd",
        )
        super().__init__(cluster)
        self.network = Network()
        self.surprises: list[str] = []  # processes that ended without being asked to
        self._paused: Counter[str] = Counter()
        self._draining: set[int] = set()
        self._meant: dict[int, Step] = {}  # steps that go on, with the names of those they were done to
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def local_brokers(self) -> list[str]:
        return self.cluster.brokers

    @property
    def urls(self) -> list[str]:
        return self.cluster.urls

    @property
    def ca(self) -> str:
        return str(self.cluster.ca)

    # -- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the proxy, then the cluster behind it. Raises ProcessFailed."""
        local = self.cluster.local
        local.prepare()
        await self.network.start(wire(local))
        for stage in local.stages:
            for name in stage:
                await self._spawn(name)
            for name in stage:
                await self._ready(name, READY_TIMEOUT_S)
        for name in self.local_brokers:
            assert self.broker_id(name), f"{name} was ready without an id"
        self._watch = asyncio.create_task(self._watch_processes())

    async def close(self) -> None:
        """End everything at once."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
        await self.cluster.kill_all()
        self.network.close()

    async def _spawn(self, name: str) -> None:
        local = self.cluster.local
        local.spawn(name)
        pids = {one: service.pid for one, service in local.services.items() if service.running}
        await self.network.pids({**pids, CLIENT: os.getpid()})

    async def _ready(self, name: str, within_s: float) -> None:
        end = time.monotonic() + within_s
        while not self.cluster.local.is_ready(name):
            if time.monotonic() > end:
                tail = self.cluster.local.services[name].log_tail()
                raise ProcessFailed(f"{name} was not ready within {within_s:g} s\n{tail}")
            await asyncio.sleep(POLL_S)

    async def _watch_processes(self) -> None:
        """A process that ends by itself is a finding, unless its disk was made to fail; it is started again, as any
        supervisor would."""
        while True:
            await asyncio.sleep(0.3)
            for service in list(self.cluster.local.ended()):
                code = service.process.returncode if service.process is not None else None
                if code != SPACE_AGAIN and time.monotonic() > self._leaving.get(service.name, 0.0):
                    self.surprises.append(f"{service.name} ended with status {code}\n{service.log_tail(8)}")
                service.asked_to_end = True
                await asyncio.sleep(0.5)
                if not service.running and not self._stopping:
                    await self._spawn(service.name)

    # -- steps ---------------------------------------------------------------------------------------

    async def begin(self, step: Step) -> None:
        """As `Steps`. Who is active is looked up now, and what was begun with one coordinator ends with it."""
        await super().begin(await self._named(step))

    async def end(self, step: Step) -> None:
        await super().end(self._meant.pop(id(step), step))

    async def _named(self, step: Step) -> Step:
        meant = step
        if ACTIVE in (step.target, step.other):
            active = await self._active()
            other = active if step.other == ACTIVE else step.other
            meant = replace(step, target=active if step.target == ACTIVE else step.target, other=other)
        self._meant[id(step)] = meant
        return meant

    async def _active(self) -> str:
        """The active coordinator; another one that runs while none is."""
        local = self.cluster.local
        running = [name for name in local.coordinators if local.services[name].running]
        ports = [(name, local.services[name].port) for name in running]
        return await asyncio.to_thread(active_among, ports, local.ca) or next(iter(running), COORDINATOR)

    async def _kill(self, name: str, kind: str) -> None:
        if self.cluster.local.services[name].running:
            await self.cluster.kill(name)
            self.counts[kind] += 1

    async def _begin_kill(self, step: Step) -> None:
        await self._kill(step.target, "kill")

    async def _begin_kill_start(self, step: Step) -> None:
        await self._kill(step.target, "kill")
        await self._spawn(step.target)

    async def _end_kill_start(self, step: Step) -> None:
        await self._kill(step.target, "kill in start")
        await self._spawn(step.target)

    async def _begin_coordinator(self, step: Step) -> None:
        await self._kill(step.target, "coordinator")

    _end_coordinator = Machines._end_kill

    def _members(self, step: Step) -> list[str]:
        return self.cluster.local.stages[0] if step.target == ALL_ETCD else [step.target]

    async def _begin_etcd(self, step: Step) -> None:
        self.counts["all of etcd"] += step.target == ALL_ETCD
        for name in self._members(step):
            await self._kill(name, "etcd")

    async def _end_etcd(self, step: Step) -> None:
        for name in self._members(step):
            await self._spawn(name)

    async def _begin_power(self, step: Step) -> None:
        names = self.local_brokers if step.target == ANY else [step.target]
        services = [self.cluster.local.services[name] for name in names]
        self.counts["power"] += sum(service.running for service in services)
        self.counts["power cut of all brokers"] += step.target == ANY
        for service in services:  # all at once: nobody sees another one's end
            service.asked_to_end = True
            service.send_signal(signal.SIGKILL)
        for name in names:
            await self.cluster.kill(name)

    async def _end_power(self, step: Step) -> None:
        for name in self.local_brokers if step.target == ANY else [step.target]:
            await self._spawn(name)

    async def _begin_restart(self, step: Step) -> None:
        service = self.cluster.local.services[step.target]
        process = service.process
        if process is None or service.asked_to_end or not service.running:
            return  # down, or on its way
        self.counts["restart"] += 1
        self.cluster.local.terminate(step.target)
        end = time.monotonic() + STOP_S
        while process.poll() is None:
            if time.monotonic() > end:
                self.surprises.append(f"{step.target} did not end within {STOP_S:g} s of SIGTERM")
                process.kill()
                process.wait()
                break
            await asyncio.sleep(POLL_S)
        await self._spawn(step.target)

    async def _begin_pause(self, step: Step) -> None:
        if self.cluster.local.services[step.target].running:
            self._paused[step.target] += 1
            await self.cluster.pause(step.target)
            self.counts["pause"] += 1

    async def _end_pause(self, step: Step) -> None:
        self._paused[step.target] -= 1
        if self._paused[step.target] <= 0:
            await self.cluster.resume(step.target)

    # -- the network ---------------------------------------------------------------------------------

    @staticmethod
    def _rules(step: Step) -> list[Rule]:
        there = Rule(step.target, step.other, step.kind != "delay", step.amount if step.kind == "delay" else 0)
        back = Rule(step.other, step.target, there.cut, there.delay_ms)
        return [there] if step.kind == "one-way" else [there, back]

    async def _begin_cut(self, step: Step) -> None:
        await self.network.add(*self._rules(step))
        self.counts[step.kind] += 1

    async def _end_cut(self, step: Step) -> None:
        await self.network.remove(*self._rules(step))

    _begin_one_way = _begin_delay = _begin_cut
    _end_one_way = _end_delay = _end_cut

    async def _begin_half_open(self, step: Step) -> None:
        await self.network.half_open(step.target, step.other)
        self.counts["half-open"] += 1

    async def _begin_reset(self, step: Step) -> None:
        await self.network.reset(step.target, step.other)
        self.counts["reset"] += 1

    # -- moves ---------------------------------------------------------------------------------------

    async def _begin_move(self, step: Step) -> None:
        broker = self.broker_id(step.target)
        if self._draining or not broker or self.admin is None:
            return
        self._draining.add(broker)
        with contextlib.suppress(FerrylineError):  # nobody to ask now: a drain that did not happen
            await self.admin.admin.drain_broker(broker, timeout=ADMIN_S)
            self.counts["move"] += 1

    async def _end_move(self, step: Step) -> None:
        await self._take_back(self.broker_id(step.target), ADMIN_S)

    async def _take_back(self, broker: int, within_s: float) -> bool:
        if broker not in self._draining or self.admin is None:
            return True
        try:
            await self.admin.admin.undrain_broker(broker, timeout=within_s)
        except FerrylineError:
            return False
        self._draining.discard(broker)
        return True

    # -- healing -------------------------------------------------------------------------------------

    async def heal(self, within_s: float) -> None:
        """Mend whatever is broken, start what does not run. Raises ProcessFailed when something does not come back."""
        await self.network.clear()
        self._paused.clear()
        names = list(self.cluster.local.services)
        for name in names:
            if name in self.local_brokers and (self.cluster.local.services[name].folder / SWITCHES).exists():
                self._switch(name, write="", sync="", wall_ms=0)
            await self.cluster.resume(name)
            if not self.cluster.local.services[name].running:
                await self._spawn(name)
        for name in names:
            await self._ready(name, within_s)
        end = time.monotonic() + within_s
        for broker in sorted(self._draining):
            while not await self._take_back(broker, ADMIN_S):
                if time.monotonic() > end:
                    raise ProcessFailed(f"broker {broker} could not be taken back")
                await asyncio.sleep(POLL_S)

    def logs(self) -> dict[str, bytes]:
        """What each service wrote to stderr."""
        found = {name: service.log_path for name, service in self.cluster.local.services.items()}
        return {name: path.read_bytes() for name, path in found.items() if path.exists()}


@contextlib.asynccontextmanager
async def running(bed: ProcessBed) -> AsyncIterator[ProcessBed]:
    """Start the bed and end it whatever happens."""
    try:
        await bed.start()
        yield bed
    finally:
        await bed.close()
