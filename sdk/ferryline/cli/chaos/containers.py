"""The other bed: containers of a compose project that is up, found by their labels, broken by the docker command.

Kills, pauses and restarts need a docker daemon only. Cuts need root on the machine of the daemon: they are packet
filters in the network namespaces of the containers. Nothing is done to containers of another project.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferryline.cli.chaos.schedule import ANY, CLIENT, COORDINATOR, Step
from ferryline.cli.chaos.steps import Steps
from ferryline.cli.processes import ProcessFailed
from ferryline.protocol.errors import FerrylineError

if TYPE_CHECKING:
    from ferryline.client import Client

POSSIBLE = frozenset({"kill", "coordinator", "restart", "pause", "cut", "one-way", "move"})
ADMIN_S = 5.0
COMMAND_S = 60.0
LABEL = "com.docker.compose"
_POLL_S = 0.1


def docker(*args: str) -> str:
    """Output of a docker command. Raises ProcessFailed."""
    return command("docker", *args)


def command(*args: str) -> str:
    """Output of a command. Raises ProcessFailed with what it said."""
    try:
        done = subprocess.run(args, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProcessFailed(f"{args[0]}: {error}") from None
    if done.returncode:
        raise ProcessFailed(f"{' '.join(args)}: {done.stderr.strip()[:500]}")
    return done.stdout


class DockerBed(Steps):
    """Containers of one project. Names are ``coordinator`` and ``broker-<number>``, as compose numbers them."""

    def __init__(self, project: str, ca: str = "") -> None:
        self.project = project
        self.counts: Counter[str] = Counter()
        self.surprises: list[str] = []
        self.admin: Client | None = None
        self._given_ca = ca
        self._ids: dict[str, str] = {}
        self._draining: set[int] = set()
        self._cuts: list[tuple[str, list[str]]] = []  # (container, filter) in force

    # -- what is there -------------------------------------------------------------------------------

    def find(self) -> list[str]:
        """Look for the containers; names of the brokers. Raises ProcessFailed when there is no cluster."""
        form = f'{{{{.ID}}}} {{{{.Label "{LABEL}.service"}}}} {{{{.Label "{LABEL}.container-number"}}}}'
        listed = docker("ps", "--no-trunc", "--filter", f"label={LABEL}.project={self.project}", "--format", form)
        for line in listed.splitlines():
            number, service, instance = line.split(" ")
            if service == COORDINATOR:
                self._ids[COORDINATOR] = number
            elif service == "broker":
                self._ids[f"broker-{instance}"] = number
        if COORDINATOR not in self._ids:
            raise ProcessFailed(f"no container of a project {self.project!r} runs a coordinator; is the cluster up?")
        return self.brokers

    @property
    def brokers(self) -> list[str]:
        return sorted((name for name in self._ids if name != COORDINATOR), key=lambda name: int(name.split("-")[1]))

    def _inspect(self, name: str) -> dict[str, Any]:
        return dict(json.loads(docker("inspect", self._ids[name]))[0])

    def _address(self, name: str) -> str:
        networks = self._inspect(name)["NetworkSettings"]["Networks"].values()
        return next((str(network["IPAddress"]) for network in networks if network["IPAddress"]), "")

    @property
    def urls(self) -> list[str]:
        published = self._inspect(COORDINATOR)["NetworkSettings"]["Ports"]["8443/tcp"][0]["HostPort"]
        addresses = [self._address(name) for name in self.brokers]
        return [f"https://127.0.0.1:{published}", *(f"https://{address}:9443" for address in addresses if address)]

    @property
    def ca(self) -> str:
        if self._given_ca:
            return self._given_ca
        for mount in self._inspect(self.brokers[0])["Mounts"]:
            if mount["Destination"] == "/public":
                return str(Path(mount["Source"]) / "ca.crt")
        raise ProcessFailed("the CA of the cluster is not to be found; give it with --ca")

    def _broker_id(self, name: str) -> int:
        """From the READY line of its last start; 0 when there is none."""
        ready = [line for line in docker("logs", self._ids[name]).splitlines() if line.startswith("READY ")]
        return int(json.loads(ready[-1][6:]).get("broker_id", 0)) if ready else 0

    def logs(self) -> dict[str, bytes]:
        """What each container wrote."""
        found = {}
        for name, number in self._ids.items():
            done = subprocess.run(["docker", "logs", number], capture_output=True, check=False, timeout=COMMAND_S)
            found[name] = done.stderr
        return found

    # -- steps ---------------------------------------------------------------------------------------

    async def _do(self, *args: str) -> str:
        return await asyncio.to_thread(docker, *args)

    async def _running(self, name: str) -> bool:
        state = await asyncio.to_thread(self._inspect, name)
        return bool(state["State"]["Running"]) and not state["State"]["Paused"]

    async def _begin_kill(self, step: Step) -> None:
        if await self._running(step.target):
            await self._do("update", "--restart=no", self._ids[step.target])  # down until we say so
            await self._do("kill", "--signal=KILL", self._ids[step.target])
            self.counts["coordinator" if step.target == COORDINATOR else "kill"] += 1

    async def _end_kill(self, step: Step) -> None:
        await self._start(step.target)

    _begin_coordinator = _begin_kill
    _end_coordinator = _end_kill

    async def _begin_kill_start(self, step: Step) -> None:
        await self._begin_kill(step)
        await self._start(step.target)

    async def _end_kill_start(self, step: Step) -> None:
        await self._begin_kill(step)
        await self._start(step.target)

    async def _start(self, name: str) -> None:
        await self._do("start", self._ids[name])
        await self._do("update", "--restart=unless-stopped", self._ids[name])

    async def _begin_restart(self, step: Step) -> None:
        if await self._running(step.target):
            self.counts["restart"] += 1
            await self._do("restart", "--time=20", self._ids[step.target])

    async def _begin_pause(self, step: Step) -> None:
        if await self._running(step.target):
            await self._do("pause", self._ids[step.target])
            self.counts["pause"] += 1

    async def _end_pause(self, step: Step) -> None:
        with contextlib.suppress(ProcessFailed):  # killed meanwhile
            await self._do("unpause", self._ids[step.target])

    async def _begin_cut(self, step: Step) -> None:
        """Drop what comes in at either side (at the far side only, for one way)."""
        pairs = [(step.other, step.target)] if step.kind == "one-way" else []
        if step.kind == "cut":
            pairs = [(step.other, step.target), (step.target, step.other)]
        for at, source in pairs:
            for name in self._nodes(at):
                for sender in self._nodes(source):
                    await self._filter(name, sender)
        self.counts[step.kind] += 1

    def _nodes(self, name: str) -> list[str]:
        if name == ANY:
            return sorted(self._ids)
        return [] if name == CLIENT else [name]  # clients are outside: a broker's filters would cut its neighbours

    async def _filter(self, name: str, sender: str) -> None:
        address = await asyncio.to_thread(self._address, sender)
        pid = str((await asyncio.to_thread(self._inspect, name))["State"]["Pid"])
        if not address or pid == "0" or name == sender:
            return
        rule = ["INPUT", "--source", address, "--jump", "DROP"]
        await asyncio.to_thread(command, "nsenter", "--net", f"--target={pid}", "iptables", "--insert", *rule)
        self._cuts.append((name, rule))

    async def _end_cut(self, step: Step) -> None:
        """All cuts end together: a filter lives as long as its container's process, which may have changed."""
        cuts, self._cuts = self._cuts, []
        for name, rule in cuts:
            pid = str((await asyncio.to_thread(self._inspect, name))["State"]["Pid"])
            with contextlib.suppress(ProcessFailed):  # gone with the container's network
                await asyncio.to_thread(command, "nsenter", "--net", f"--target={pid}", "iptables", "--delete", *rule)

    _begin_one_way = _begin_cut
    _end_one_way = _end_cut

    async def _begin_move(self, step: Step) -> None:
        broker = await asyncio.to_thread(self._broker_id, step.target)
        if not broker or self._draining or self.admin is None:
            return
        self._draining.add(broker)
        with contextlib.suppress(FerrylineError):  # nobody to ask now: a drain that did not happen
            await self.admin.admin.drain_broker(broker, timeout=ADMIN_S)
            self.counts["move"] += 1

    async def _end_move(self, step: Step) -> None:
        for broker in sorted(self._draining):
            if self.admin is not None:
                with contextlib.suppress(FerrylineError):
                    await self.admin.admin.undrain_broker(broker, timeout=ADMIN_S)
                    self._draining.discard(broker)

    # -- healing -------------------------------------------------------------------------------------

    async def heal(self, within_s: float) -> None:
        """Mend whatever is broken, start what does not run. Raises ProcessFailed when something does not come back."""
        await self._end_cut(Step(0.0, "cut", ANY))
        for name in sorted(self._ids):
            state = (await asyncio.to_thread(self._inspect, name))["State"]
            if state["Paused"]:
                await self._do("unpause", self._ids[name])
            elif not state["Running"]:
                await self._start(name)
        end = time.monotonic() + within_s
        for name in sorted(self._ids):
            while not await self._healthy(name):
                if time.monotonic() > end:
                    raise ProcessFailed(f"{name} is not healthy within {within_s:g} s")
                await asyncio.sleep(_POLL_S)
        while self._draining:
            await self._end_move(Step(0.0, "move", ANY))
            if time.monotonic() > end:
                raise ProcessFailed(f"brokers {sorted(self._draining)} could not be taken back")

    async def _healthy(self, name: str) -> bool:
        state = (await asyncio.to_thread(self._inspect, name))["State"]
        return bool(state.get("Health", {}).get("Status") == "healthy")
