"""Dashboards and alerts on a real cluster and a real Prometheus: `python -m tests.integration.monitoring_campaign`.

A cluster of three brokers works for a minute, with producers, log consumers, queue receivers, dead letters and parked
records. Then every query of every dashboard and every recording rule must have had data; every metric that they name
must be served or recorded. After that each alert is made to fire by what it is there for, and to end where that can be
mended; durations in the rules are divided by ``--by``, their expressions are those that are shipped.

As root, the third broker has a small file system of its own, which is filled; else its disk says that it is full
because a file tells it to (`ferryline_broker.faulty`). Writes benchmarks/results/monitoring.json; exits 1 if anything
is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from tests.integration.certificates import shorten_authority
from tests.integration.monitored_load import KEEPERS, LANES, Load
from tests.integration.prometheus import REPOSITORY, Prometheus, filled_in, panels, rules
from tests.integration.quota_campaign import Key

RESULT = REPOSITORY / "benchmarks" / "results" / "monitoring.json"
SWITCHES = "faults.json"
FAULTS = {"FERRYLINE_ALLOW_SABOTAGE": "1", "FERRYLINE_TEST_FAULTS": SWITCHES}
BROKER_ARGS = ("--disk-reserve-bytes", "16777216", "--disk-reserve-percent", "0", "--disk-check-ms", "200")
MIB = 1024 * 1024
DISK_MIB, FILL_MIB = 192, 4
FIRES_WITHIN_S = 180.0
LIMIT = 10  # requests a second, of a principal that wants more
ACCESS = """
[[principals]]
name = "root"
grants = [
    {{resource = "cluster", actions = ["manage"]}},
    {{resource = "topic", actions = ["manage"]}},
    {{resource = "group", actions = ["manage"]}},
]
keys = [{root}]

[[principals]]
name = "prometheus"
grants = [{{resource = "cluster", actions = ["read"]}}]
keys = [{prometheus}]

[[principals]]
name = "limited"
grants = [{{resource = "topic", actions = ["read"]}}]
quota = {{requests = {limit}}}
keys = [{limited}]
"""
Do = Callable[[], Awaitable[None]]


class Campaign:
    """What is found goes into ``result``; ``wrong`` is everything that should not have been."""

    def __init__(
        self, cluster: ProcessCluster, prometheus: Prometheus, client: fl.Client, load: Load, limited: Key
    ) -> None:
        self.cluster = cluster
        self.prometheus = prometheus
        self.client = client
        self.load = load
        self._limited = limited
        self._pressing: asyncio.Task[None] | None = None
        self.wrong: list[str] = []
        self.alerts: dict[str, dict[str, Any]] = {}
        self._authority = b""

    # -- data ---------------------------------------------------------------------------------------

    async def look_at_panels(self, within_s: float) -> dict[str, int]:
        """How many queries each dashboard has, all of which must have had data."""
        counts: dict[str, int] = {}
        interval = f"{max(4, int(within_s / 10))}s"
        for dashboard, title, expression in panels():
            counts[dashboard] = counts.get(dashboard, 0) + 1
            if not await self.prometheus.seen(filled_in(expression, interval), within_s):
                self.wrong.append(f"{dashboard}, {title}: no data for {expression}")
        return counts

    async def look_at_rules(self, within_s: float) -> int:
        names = [rule["record"] for kind, rule in rules() if kind == "record"]
        for name in names:
            if not await self.prometheus.seen(name, within_s):
                self.wrong.append(f"recording rule {name}: no data")
        return len(names)

    # -- alerts -------------------------------------------------------------------------------------

    async def fires(self, what: str, *names: str, by: Do, within_s: float = FIRES_WITHIN_S) -> None:
        """``by`` makes these alerts fire, none of which does so before. ``what``: how to say that in a table."""
        before = {labels["alertname"] for labels in await self.prometheus.firing()}
        for name in names:
            if name in before:
                self.wrong.append(f"{name} fires before there is a reason")
        began = time.monotonic()
        await by()
        missing = set(names)
        while missing and time.monotonic() - began < within_s:
            for labels in await self.prometheus.firing():
                if labels["alertname"] in missing:
                    missing.discard(labels["alertname"])
                    after = round(time.monotonic() - began, 1)
                    self.alerts[labels["alertname"]] = {"what": what, "fired_after_s": after, "labels": labels}
                    sys.stderr.write(f"  {labels['alertname']}: after {after} s, {labels}\n")
            await asyncio.sleep(0.2)
        self.wrong += [f"{name} did not fire" for name in sorted(missing)]

    async def ends(self, *names: str, by: Do, within_s: float = FIRES_WITHIN_S) -> None:
        """``by`` mends it: these alerts end."""
        began = time.monotonic()
        await by()
        left = set(names)
        while left and time.monotonic() - began < within_s:
            firing = {labels["alertname"] for labels in await self.prometheus.firing()}
            for name in sorted(left - firing):
                left.discard(name)
                if name in self.alerts:
                    self.alerts[name]["ended_after_s"] = round(time.monotonic() - began, 1)
            await asyncio.sleep(0.2)
        self.wrong += [f"{name} did not end" for name in sorted(left)]

    async def redrive_lanes(self) -> None:
        await self.load.stop("keepers")
        await self.client.queue(LANES, KEEPERS).purge()

    async def stop_rejecting(self) -> None:
        self.load.rejecting = False

    async def start_rejecting(self) -> None:
        self.load.rejecting = True

    async def resume(self, part: str) -> None:
        self.load.start(part)

    async def press(self, token: str) -> None:
        """Somebody asks ten times as often as `LIMIT`, and does not wait as told."""
        self._pressing = asyncio.create_task(self._press(token))

    async def _press(self, token: str) -> None:
        context = ssl.create_default_context(cafile=str(self.cluster.ca))
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(headers=headers) as http:
            while True:
                async with http.get(f"{self.cluster.url}/v1/topics", ssl=context) as answer:
                    await answer.read()
                await asyncio.sleep(0.1 / LIMIT)

    async def stop_pressing(self) -> None:
        if self._pressing is not None:
            self._pressing.cancel()

    async def every_alert(self, disk: Disk) -> None:
        """One after the other, the death of the coordinator last: without it nothing else is told."""
        load = self.load
        await self.fires("a record was rejected in a topic that parks", "FerrylineParkedLanes", by=load.poison)
        await self.ends("FerrylineParkedLanes", by=self.redrive_lanes)
        await self.fires("every tenth record was rejected", "FerrylineDeadLettersGrowing", by=self.start_rejecting)
        await self.ends("FerrylineDeadLettersGrowing", by=self.stop_rejecting)
        await self.fires("the consumers were stopped", "FerrylineLagGrowing", by=lambda: load.stop("consumers"))
        await self.ends("FerrylineLagGrowing", by=lambda: self.resume("consumers"))
        await self.fires("the receivers were stopped", "FerrylineQueueGrowing", by=lambda: load.stop("receivers"))
        await self.ends("FerrylineQueueGrowing", by=lambda: self.resume("receivers"))
        await self.fires(
            "a file grew on the disk of a broker, and then was removed",
            "FerrylineDiskFilling",
            "FerrylineDiskFull",
            "FerrylineErrorRate",
            by=disk.fill,
        )
        await self.ends("FerrylineDiskFilling", "FerrylineDiskFull", "FerrylineErrorRate", by=disk.empty)
        await self.fires(
            "the authority's certificate was replaced by one that ends in 7 days",
            "FerrylineCertificateExpiring",
            by=self.shorten_certificate,
        )
        await self.ends("FerrylineCertificateExpiring", by=self.restore_certificate)
        await self.fires(
            "a principal asked ten times as often as its quota allows",
            "FerrylineQuotaRefusals",
            by=lambda: self.press(self._limited.token),
        )
        await self.ends("FerrylineQuotaRefusals", by=self.stop_pressing)
        await self.fires("somebody tried tokens", "FerrylineTokensRefused", by=lambda: self.press(Key().token))
        await self.ends("FerrylineTokensRefused", by=self.stop_pressing)
        names = (
            "FerrylineBrokerDown", "FerrylineTargetDown", "FerrylineUnderReplicated", "FerrylineOfflinePartitions",
        )  # fmt: skip
        await self.fires("kill -9 of a broker", *names, by=lambda: self.cluster.kill("broker-2"))
        await self.ends(*names, by=lambda: self.cluster.restart("broker-2"))
        await self.fires(
            "kill -9 of the coordinator", "FerrylineCoordinatorDown", by=lambda: self.cluster.kill("coordinator")
        )
        await self.ends("FerrylineCoordinatorDown", by=lambda: self.cluster.restart("coordinator"))

    async def shorten_certificate(self) -> None:
        """Services renew their own certificates; that of the authority is left to people."""
        self._authority = shorten_authority(self.cluster.ca.parent, days=7)

    async def restore_certificate(self) -> None:
        self.cluster.ca.write_bytes(self._authority)


class Disk:
    """What the third broker has its data on, and a way to fill it."""

    def __init__(self, cluster: ProcessCluster, *, own: bool) -> None:
        self.own = own
        self._cluster = cluster
        self._folder = cluster.local.data_dir("broker-3")
        self._filler = self._folder.parent / "data" / "filler"

    async def fill(self) -> None:
        """Somebody else's file grows, far into what the broker keeps in reserve for the state of queues and groups."""
        if not self.own:
            (self._folder.parent / SWITCHES).write_text(json.dumps({"write": "ENOSPC", "path": "/records/"}))
            return
        with self._filler.open("ab", buffering=0) as file:
            while shutil.disk_usage(self._folder).free > 2 * FILL_MIB * MIB:
                file.write(bytes(FILL_MIB * MIB))
                await asyncio.sleep(0.5)

    async def empty(self) -> None:
        if self.own:
            self._filler.unlink()
        else:
            (self._folder.parent / SWITCHES).unlink()
        # A replica that had to stop for want of space is opened again by a new process only; a supervisor starts it.
        await asyncio.sleep(2.0)
        if not self._cluster.local.services["broker-3"].running:
            await self._cluster.restart("broker-3")


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[bool]:
    """A file system of `DISK_MIB` at ``folder``, if it is wanted; False where we may not make one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if not wanted or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.asynccontextmanager
async def campaign(
    folder: Path, *, by: float, interval_ms: int, own_disk: bool = True
) -> AsyncIterator[tuple[Campaign, Disk]]:
    """A cluster with load, and a Prometheus that looks at it."""
    root, keys = folder / "cluster", {name: Key() for name in ("root", "prometheus", "limited")}
    access = folder / "access.toml"
    access.write_text(ACCESS.format(limit=LIMIT, **{name: key.toml for name, key in keys.items()}))
    with small_disk(root / "broker-3" / "data", own_disk) as own:
        cluster = ProcessCluster(
            root,
            brokers=3,
            broker_args=BROKER_ARGS,
            coordinator_args=["--access", str(access)],
            env={} if own else FAULTS,
        )
        await cluster.start()
        try:
            async with (
                Prometheus(
                    folder / "prometheus",
                    cluster.local,
                    by=by,
                    interval_ms=interval_ms,
                    token=keys["prometheus"].token,
                ) as prometheus,
                fl.connect(cluster.urls, ca=cluster.ca, token=keys["root"].token) as client,
                Load(client) as load,
            ):
                yield Campaign(cluster, prometheus, client, load, keys["limited"]), Disk(cluster, own=own)
        finally:
            await cluster.kill_all()


async def whole(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The result of everything."""
    async with campaign(folder, by=options.by, interval_ms=1000) as (run, disk):
        await run.load.poison()  # so that every panel has something to show
        run.load.rejecting = True
        await asyncio.sleep(options.seconds)
        run.load.rejecting = False
        queries = await run.look_at_panels(options.seconds)
        recorded = await run.look_at_rules(options.seconds)
        sys.stderr.write(f"{sum(queries.values())} queries, {recorded} recording rules looked at: {run.wrong}\n")
        await run.ends("FerrylineParkedLanes", "FerrylineDeadLettersGrowing", by=run.redrive_lanes)
        await run.resume("keepers")
        await run.every_alert(disk)
        wanted = {rule["alert"] for kind, rule in rules() if kind == "alert"}
        return {
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
            "seconds": options.seconds,
            "durations_divided_by": options.by,
            "disk": "own file system" if disk.own else "switch",
            "queries": queries,
            "recording_rules": recorded,
            "alerts": dict(sorted(run.alerts.items())),
            "alerts_not_tried_here": sorted(wanted - run.alerts.keys()),
            "wrong": run.wrong,
        }


def main() -> int:
    """Exit status 1: something had no data, or did not fire."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of work before the panels are looked at")
    parser.add_argument("--by", type=float, default=60.0, help="durations in the rules are divided by this")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ferryline-monitoring-") as folder:
        result = asyncio.run(whole(options, Path(folder)))
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
