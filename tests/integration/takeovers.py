"""Take-overs of several coordinators on etcd: who is active, how long the change took, and whether anything went back.

`Watch` asks every coordinator itself, many times a second, what the metadata is. An answer that shows less than was
known before the question is a regression, whoever gave it: caches of clients, which cannot go back, are left out.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import aiohttp

from ferryline.protocol.errors import FerrylineError

if TYPE_CHECKING:
    from ferryline.cli.driver import ProcessCluster
    from ferryline.client import Client

POLL_S = 0.05
CHANGE_S = 0.1
REGISTER = "register"  # a topic whose setting is changed all the time: each acknowledged change must stay


@dataclass
class Seen:
    """What was known at some moment: coordinator epoch and revision, and per partition its epoch and version."""

    cluster: tuple[int, int] = (0, -1)
    parts: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)


class Watch:
    """Use with ``async with``. ``regressions`` says what went back; ``active`` who is active now, "" if nobody."""

    def __init__(self, cluster: ProcessCluster) -> None:
        self.cluster = cluster
        self.regressions: list[str] = []
        self.answers = 0
        self.refusals: dict[str, int] = {}  # by code
        self.seen = Seen()
        self._tasks: list[asyncio.Task[None]] = []
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Watch:
        context = ssl.create_default_context(cafile=str(self.cluster.ca))
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context, limit=0))
        self._tasks = [asyncio.create_task(self._watch(name)) for name in self.cluster.coordinators]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.close()
        await asyncio.sleep(0)

    async def get(self, name: str, path: str, timeout_s: float = 1.0) -> tuple[int, dict[str, Any]]:
        """(status, body) of a coordinator's answer; (0, {}) when there is none."""
        try:
            async with self._http.get(
                self.cluster.url_of(name) + path, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as response:
                return response.status, await response.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return 0, {}

    async def metric(self, name: str, metric: str) -> float:
        """One metric of a coordinator; 0 if it has none or does not answer."""
        try:
            async with self._http.get(
                self.cluster.url_of(name) + "/metrics", timeout=aiohttp.ClientTimeout(total=2.0)
            ) as response:
                lines = (await response.text()).splitlines()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0.0
        return next((float(line.split()[-1]) for line in lines if line.split(" ")[0] == metric), 0.0)

    async def active(self) -> tuple[str, int]:
        """(name, coordinator epoch) of the coordinator that says it is active; ("", 0) if none does."""
        asked = [self.get(name, "/healthz", 0.5) for name in self.cluster.coordinators]
        found = [
            (name, int(body["coord_epoch"]))
            for name, (status, body) in zip(self.cluster.coordinators, await asyncio.gather(*asked), strict=True)
            if status == 200 and body.get("active")
        ]
        return max(found, key=lambda entry: entry[1], default=("", 0))

    async def until_active(self, above: int, within_s: float) -> tuple[str, int]:
        """The next coordinator, of an epoch above ``above``."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            name, epoch = await self.active()
            if epoch > above:
                return name, epoch
            await asyncio.sleep(POLL_S)
        raise AssertionError(f"no coordinator above epoch {above} within {within_s:g} s")

    async def _watch(self, name: str) -> None:
        while True:
            before = Seen(self.seen.cluster, dict(self.seen.parts))
            status, body = await self.get(name, "/v1/metadata")
            if status == 200:
                self._judge(name, before, body)
            elif status:
                code = str(body.get("code", status))
                self.refusals[code] = self.refusals.get(code, 0) + 1
            await asyncio.sleep(POLL_S)

    def _judge(self, name: str, before: Seen, body: dict[str, Any]) -> None:
        self.answers += 1
        cluster = (int(body["coord_epoch"]), int(body["revision"]))
        if cluster < before.cluster:
            self.regressions.append(f"{name} showed {cluster} after {before.cluster}")
        self.seen.cluster = max(self.seen.cluster, cluster)
        for part in body["partitions"]:
            key = (part["topic_id"], int(part["partition"]))
            shown = (int(part["epoch"]), int(part["version"]))
            known = before.parts.get(key, (0, 0))
            if shown[0] < known[0] or shown[1] < known[1]:
                self.regressions.append(f"{name} showed {key} at {shown} after {known}")
            self.seen.parts[key] = max(self.seen.parts.get(key, (0, 0)), shown)


class Changes:
    """Changes one setting again and again. Each number that was acknowledged must be there, or a later one."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.acknowledged = 0
        self.made = 0
        self.errors: dict[str, int] = {}
        self.times: list[tuple[float, float]] = []  # when each acknowledged change was asked for, and acknowledged
        self._number = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.client.admin.create_topic(REGISTER, partitions=1, replication=2)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._number += 1
            asked = time.monotonic()
            try:
                await self.client.admin._change(
                    "PATCH", f"/v1/topics/{REGISTER}", {"config": {"retention_ms": 1_000_000 + self._number}}, 5.0
                )
            except FerrylineError as error:
                self.errors[error.code] = self.errors.get(error.code, 0) + 1
            else:
                self.acknowledged = self._number
                self.made += 1
                self.times.append((asked, time.monotonic()))
            await asyncio.sleep(CHANGE_S)

    async def after(self, moment: float, within_s: float) -> float:
        """Seconds from ``moment`` to the first change that was asked for and acknowledged after it, or waited through.

        One that was on its way and acknowledged within a moment tells nothing about what came after.
        """
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            later = [ended for asked, ended in self.times[-200:] if asked > moment or ended > moment + 1.0]
            if later:
                return later[0] - moment
            await asyncio.sleep(0.02)
        raise AssertionError(f"no change was acknowledged within {within_s:g} s; {self.errors}")

    async def kept(self) -> bool:
        """Whether what was acknowledged last is there, or something later."""
        topic = await self.client.admin.describe_topic(REGISTER)
        return topic.config.retention_ms >= 1_000_000 + self.acknowledged
