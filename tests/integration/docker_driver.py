"""The other driver of `Cluster`: the containers of a compose project, found by their labels.

Needs the images (`make images`). Signals go to containers of this project only.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import docker

if TYPE_CHECKING:
    from docker.models.containers import Container

    from tests.integration.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
COORDINATOR = "coordinator"
READY_TIMEOUT_S = 60.0
_POLL_S = 0.1
T = TypeVar("T")


class DockerCluster:
    """One compose project of its own, with its own volumes below ``volumes``.

    Names are ``coordinator`` and ``broker-<number>``, the number being the one that compose gave the container.
    ``port``: of the coordinator on this machine, 0 for a free one, another one each time its container is made.
    ``environment``: for compose; ``services``: what is started, everything without a profile if empty.
    """

    def __init__(
        self,
        project: str,
        volumes: Path,
        *,
        brokers: int = 3,
        port: int = 0,
        environment: dict[str, str] | None = None,
        services: tuple[str, ...] = (),
    ) -> None:
        self.project = project
        self.environment = {
            "FERRYLINE_VOLUMES": str(volumes),
            "FERRYLINE_PORT": str(port),
            **(environment or {}),
        }
        self._volumes = volumes
        self._count = brokers
        self._services = services
        self._client = docker.from_env()

    # -- what is there -------------------------------------------------------------------------------

    def _containers(self) -> dict[str, Container]:
        found: dict[str, Container] = {}
        label = f"com.docker.compose.project={self.project}"
        for container in self._client.containers.list(all=True, filters={"label": label}):
            service = container.labels.get("com.docker.compose.service")
            number = container.labels.get("com.docker.compose.container-number", "1")
            if service == COORDINATOR:
                found[COORDINATOR] = container
            elif service == "broker":
                found[f"broker-{number}"] = container
        return found

    def container(self, name: str) -> Container:
        """As it is now. Raises KeyError."""
        container = self._containers()[name]
        container.reload()
        return container

    @property
    def url(self) -> str:
        return self.url_of(COORDINATOR)

    @property
    def urls(self) -> list[str]:
        return [self.url_of(name) for name in [COORDINATOR, *self.brokers] if self._address(name)]

    @property
    def ca(self) -> Path:
        return self._volumes / "public" / "ca.crt"

    @property
    def brokers(self) -> list[str]:
        return sorted((name for name in self._containers() if name != COORDINATOR), key=lambda n: int(n.split("-")[1]))

    def _address(self, name: str) -> str:
        networks: dict[str, Any] = self.container(name).attrs["NetworkSettings"]["Networks"]
        return next((str(network["IPAddress"]) for network in networks.values() if network["IPAddress"]), "")

    def url_of(self, name: str) -> str:
        """By the address of the container: its certificate names it."""
        if name == COORDINATOR:
            return f"https://127.0.0.1:{self._port()}"
        return f"https://{self._address(name)}:9443"

    def _port(self) -> int:
        ports = self.container(COORDINATOR).attrs["NetworkSettings"]["Ports"]["8443/tcp"]
        return int(ports[0]["HostPort"])

    def broker_id(self, name: str) -> int:
        return int(self._ready(name).get("broker_id", 0))

    def name_of(self, broker_id: int) -> str:
        for name in self.brokers:
            if self.broker_id(name) == broker_id:
                return name
        raise KeyError(f"no broker {broker_id} here")

    def _ready(self, name: str) -> dict[str, Any]:
        """The last READY line of a container; {} when there is none."""
        lines = self.container(name).logs(stdout=True, stderr=False).decode(errors="replace").splitlines()
        ready = [line for line in lines if line.startswith("READY ")]
        return dict(json.loads(ready[-1][6:])) if ready else {}

    def logs(self, name: str) -> str:
        return str(self.container(name).logs().decode(errors="replace"))

    # -- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._volumes.mkdir(parents=True, exist_ok=True)
        await self._compose("up", "--detach", "--scale", f"broker={self._count}", *self._services)
        for name in [COORDINATOR, *self.brokers]:
            await self._healthy(name)

    async def stop(self) -> None:
        await self._compose("down", "--timeout", "15")
        self._client.close()

    async def add_broker(self) -> str:
        return (await self.scale(self._count + 1))[0]

    async def scale(self, count: int) -> list[str]:
        """Have this many brokers, at least as many as now. Returns the names of the new ones."""
        before, self._count = set(self.brokers), count
        await self._compose("up", "--detach", "--no-recreate", "--scale", f"broker={count}", *self._services)
        new = sorted(set(self.brokers) - before)
        for name in new:
            await self._healthy(name)
        return new

    async def kill(self, name: str) -> None:
        container = self.container(name)
        await self._off_loop(lambda: container.update(restart_policy={"Name": "no"}))
        await self._off_loop(lambda: container.kill("SIGKILL"))
        await self._off_loop(container.wait)

    async def kill_all(self) -> None:
        await asyncio.gather(*(self.kill(name) for name in self._containers()))

    async def pause(self, name: str) -> None:
        await self._off_loop(self.container(name).pause)

    async def resume(self, name: str) -> None:
        await self._off_loop(self.container(name).unpause)

    async def terminate(self, name: str, timeout_s: float = 15.0) -> int | None:
        container = self.container(name)
        await self._off_loop(lambda: container.update(restart_policy={"Name": "no"}))
        await self._off_loop(lambda: container.kill("SIGTERM"))
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            container.reload()
            if container.status == "exited":
                return int(container.attrs["State"]["ExitCode"])
            await asyncio.sleep(_POLL_S)
        return None

    async def restart(self, name: str) -> None:
        await self._off_loop(self.container(name).start)
        await self._healthy(name)

    # -- inside --------------------------------------------------------------------------------------

    @staticmethod
    async def _off_loop(call: Callable[[], T]) -> T:
        return await asyncio.to_thread(call)

    async def _healthy(self, name: str) -> None:
        end = time.monotonic() + READY_TIMEOUT_S
        while True:
            container = self.container(name)
            if container.attrs["State"].get("Health", {}).get("Status") == "healthy" and self._ready(name):
                return
            if time.monotonic() > end:
                raise TimeoutError(f"{name} is not healthy: {container.status}\n{self.logs(name)[-2000:]}")
            await asyncio.sleep(_POLL_S)

    async def _compose(self, *args: str) -> None:
        await self.run("scripts/compose", "--project-name", self.project, *args)

    async def run(self, *command: str, **environment: str) -> str:
        """Output of a script of this tree, told where this cluster is. Raises RuntimeError with what it said."""
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=ROOT,
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
        return done.stdout


if TYPE_CHECKING:

    def _fits(cluster: DockerCluster) -> Cluster:
        """mypy says so if the driver stops being what the tests expect."""
        return cluster
