"""The cluster that is broken: real processes behind the fault proxy, with everything that can be done to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ferryline.cli.chaos.harm import flip, segments_of
from ferryline.cli.chaos.network import Network
from ferryline.cli.chaos.proxy import Link, Rule
from ferryline.cli.chaos.schedule import ANY, CLIENT, COORDINATOR, NEED_LOSSY, Step
from ferryline.cli.chaos.steps import Steps
from ferryline.cli.driver import ProcessCluster
from ferryline.cli.processes import READY_TIMEOUT_S, ProcessFailed, free_port
from ferryline.protocol.errors import FerrylineError

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.protocol.metadata import PartitionMeta

SWITCHES = "faults.json"  # in the folder of each broker, which is its working directory
DISK = frozenset({"disk-full", "disk-error", "clock"})
SCRUB_BYTES_PER_S = 64 * 1024 * 1024
ROOM = ("--disk-reserve-bytes", "1048576", "--disk-reserve-percent", "0")  # this disk holds other things, too
ADMIN_S = 5.0
SPACE_AGAIN = 75  # status of a broker that had to stop replicas for want of space: it is to be started again
STOP_S = 25.0  # it may be stopped by a SIGSTOP for a part of this
FLIPS = 6  # files at a time
HEARD_S = 3.0  # after a fault of a disk, until what we know of the cluster tells of it
_POLL_S = 0.05


class ProcessBed(Steps):
    """Child processes and the proxy between them. `begin` and `end` of a step are called once each, in this order."""

    def __init__(self, root: Path, *, brokers: int, faults: Iterable[str], env: dict[str, str] | None = None) -> None:
        chosen = set(faults)
        found = {"FERRYLINE_ALLOW_SABOTAGE": "1", **(env or {})}
        if chosen & DISK or chosen & NEED_LOSSY:
            found["FERRYLINE_TEST_FAULTS"] = SWITCHES
        if chosen & NEED_LOSSY:
            found["FERRYLINE_TEST_LOSSY_STORAGE"] = "1"
        self.cluster = ProcessCluster(
            root,
            brokers=brokers,
            env=found,
            broker_args=[*ROOM, "--scrub-bytes-per-s", str(SCRUB_BYTES_PER_S)],
        )
        self.network = Network()
        self.counts: Counter[str] = Counter()
        self.surprises: list[str] = []  # processes that ended without being asked to
        self.admin: Client | None = None
        self._leaving: dict[str, float] = {}  # brokers whose disk was made to fail: they are right to end until then
        self._paused: Counter[str] = Counter()
        self._harmed = ""  # the broker whose disk or files were touched last: no other one before it is whole again
        self._harmed_until = 0.0  # and not before everybody has heard what became of it
        self._draining: set[int] = set()
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
        taken = {service.port for service in local.services.values()}
        links = [Link(COORDINATOR, free_port(taken), local.coordinator.port)]
        local.coordinator.args += ["--advertise", f"https://127.0.0.1:{links[0].port}"]
        for name in local.brokers:
            service = local.services[name]
            inner, outer = (
                Link(name, free_port(taken), service.port),
                Link(name, free_port(taken), service.port, CLIENT),
            )
            links += [inner, outer]
            at = service.args.index("--coordinator") + 1
            service.args[at] = f"https://127.0.0.1:{links[0].port}"
            service.args += ["--advertise-internal", f"https://127.0.0.1:{inner.port}"]
            service.args += ["--advertise-external", f"https://127.0.0.1:{outer.port}"]
        await self.network.start(links)
        await self._start_one(COORDINATOR)
        for name in self.local_brokers:
            await self._spawn(name)
        for name in self.local_brokers:
            await self._ready(name, READY_TIMEOUT_S)
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

    async def _start_one(self, name: str) -> None:
        await self._spawn(name)
        await self._ready(name, READY_TIMEOUT_S)

    async def _ready(self, name: str, within_s: float) -> None:
        end = time.monotonic() + within_s
        while not self.cluster.local.is_ready(name):
            if time.monotonic() > end:
                tail = self.cluster.local.services[name].log_tail()
                raise ProcessFailed(f"{name} was not ready within {within_s:g} s\n{tail}")
            await asyncio.sleep(_POLL_S)

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

    async def _kill(self, name: str, kind: str) -> None:
        if self.cluster.local.services[name].running:
            await self.cluster.kill(name)
            self.counts[kind] += 1

    async def _begin_kill(self, step: Step) -> None:
        await self._kill(step.target, "kill")

    async def _end_kill(self, step: Step) -> None:
        await self._spawn(step.target)

    async def _begin_kill_start(self, step: Step) -> None:
        await self._kill(step.target, "kill")
        await self._spawn(step.target)

    async def _end_kill_start(self, step: Step) -> None:
        await self._kill(step.target, "kill in start")
        await self._spawn(step.target)

    async def _begin_coordinator(self, step: Step) -> None:
        await self._kill(COORDINATOR, "coordinator")

    _end_coordinator = _end_kill

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
            await asyncio.sleep(_POLL_S)
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

    # -- disks, clocks, files ------------------------------------------------------------------------

    def _switch(self, name: str, **switches: object) -> None:
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
        await asyncio.to_thread(self._switch, step.target, **switches)
        self.counts[step.kind] += 1

    async def _end_disk_error(self, step: Step) -> None:
        await asyncio.to_thread(self._switch, step.target, write="", sync="")
        if not self.cluster.local.services[step.target].running:
            await self._spawn(step.target)
        self._leaving[step.target] = time.monotonic() + STOP_S  # it hands over before it ends

    _end_disk_full = _end_disk_error  # the broker sees by itself that there is space again

    async def _begin_clock(self, step: Step) -> None:
        self._switch(step.target, wall_ms=step.amount)
        self.counts["clock"] += 1

    async def _end_clock(self, step: Step) -> None:
        await asyncio.to_thread(self._switch, step.target, wall_ms=0)

    def _parts_of(self, name: str) -> list[PartitionMeta]:
        client, broker = self.admin, self.cluster.broker_id(name)
        parts = client.routing.cluster.partitions.values() if client is not None else []
        return [part for part in parts if broker in part.replicas]

    def _may_be_harmed(self, name: str, for_s: float) -> bool:
        """Whether each partition on this broker is in sync on another one, too, whose disk is as it should be.

        A copy on a disk that failed counts for nothing until it was fetched again: one disk after the other.
        """
        if self._harmed and self._harmed != name:
            before = self.cluster.broker_id(self._harmed)
            heard = time.monotonic() > self._harmed_until
            if not heard or not all(before in part.isr for part in self._parts_of(self._harmed)):
                return False
        broker, mine = self.cluster.broker_id(name), self._parts_of(name)
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
            await asyncio.sleep(_POLL_S)
        segments = segments_of(self.cluster.local.data_dir(step.target))
        for path in draw.sample(segments, min(FLIPS, len(segments))):
            os.truncate(path, draw.randrange(path.stat().st_size))
            self.counts["truncate"] += 1

    _end_truncate = _end_kill

    def _counted_on(self, name: str) -> bool:
        broker = self.cluster.broker_id(name)
        return any(broker in part.isr or broker in part.elr for part in self._parts_of(name))

    # -- moves ---------------------------------------------------------------------------------------

    async def _begin_move(self, step: Step) -> None:
        broker = self.cluster.broker_id(step.target)
        if self._draining or not broker or self.admin is None:
            return
        self._draining.add(broker)
        with contextlib.suppress(FerrylineError):  # nobody to ask now: a drain that did not happen
            await self.admin.admin.drain_broker(broker, timeout=ADMIN_S)
            self.counts["move"] += 1

    async def _end_move(self, step: Step) -> None:
        await self._take_back(self.cluster.broker_id(step.target), ADMIN_S)

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
        for name in [COORDINATOR, *self.local_brokers]:
            if name != COORDINATOR and (self.cluster.local.services[name].folder / SWITCHES).exists():
                self._switch(name, write="", sync="", wall_ms=0)
            await self.cluster.resume(name)
            if not self.cluster.local.services[name].running:
                await self._spawn(name)
        for name in [COORDINATOR, *self.local_brokers]:
            await self._ready(name, within_s)
        end = time.monotonic() + within_s
        for broker in sorted(self._draining):
            while not await self._take_back(broker, ADMIN_S):
                if time.monotonic() > end:
                    raise ProcessFailed(f"broker {broker} could not be taken back")
                await asyncio.sleep(_POLL_S)

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
