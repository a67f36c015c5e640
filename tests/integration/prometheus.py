"""A real Prometheus beside a test cluster, with the configuration and the rules that are shipped.

Only what depends on the place is replaced in the configuration (addresses, files), and only durations in the rules:
`scaled` divides what stands in brackets and after ``for:``. Expressions stay as they are.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from ferryline.cli.processes import LocalCluster, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "docker_volumes" / "prometheus"
DASHBOARDS = REPOSITORY / "docker_volumes" / "grafana" / "dashboards"
_DURATION = re.compile(r"(\[|\bfor: )(\d+)([smh])\b")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_READY_S = 30.0


def scaled(rules: str, by: float) -> str:
    """Rules whose durations are shorter ``by`` so much, but no shorter than a second."""

    def shorter(found: re.Match[str]) -> str:
        ms = max(1000, round(int(found[2]) * _SECONDS[found[3]] * 1000 / by))
        return f"{found[1]}{ms}ms"

    return _DURATION.sub(shorter, rules)


def rules() -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, rule) of every rule that is shipped; kind is "alert" or "record"."""
    for path in sorted(SHIPPED.glob("*.rules.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                yield ("alert" if "alert" in rule else "record"), rule


def panels() -> Iterator[tuple[str, str, str]]:
    """(dashboard, panel, expression) of every query of every dashboard, as they stand in the files."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield path.stem, panel["title"], target["expr"]


def filled_in(expression: str, rate_interval: str = "1m") -> str:
    """What Grafana sends when every variable is "All"."""
    return re.sub(r"\$(topic|group|instance)\b", ".*", expression.replace("$__rate_interval", rate_interval))


class Prometheus:
    """One process, with its data in ``folder``. ``by``: durations of the rules are that much shorter.

    ``token``: what it shows to the cluster; one without access control looks at none.
    """

    def __init__(
        self, folder: Path, cluster: LocalCluster, *, by: float, interval_ms: int = 1000, token: str = "none"
    ) -> None:
        self.url = f"http://127.0.0.1:{free_port(set())}"
        self._folder = folder
        self._cluster = cluster
        self._by = by
        self._interval_ms = interval_ms
        self.token = token
        self._process: subprocess.Popen[bytes] | None = None
        self._http: aiohttp.ClientSession | None = None

    # -- life ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Prometheus:
        self._write()
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )
        self._http = aiohttp.ClientSession()
        end = time.monotonic() + _READY_S
        while True:
            try:
                await self._get("/api/v1/status/buildinfo")
                return self
            except aiohttp.ClientError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise RuntimeError(f"prometheus does not answer\n{self.log[-3000:]}") from None
            await asyncio.sleep(0.05)

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "token").write_text(self.token)
        interval = f"{self._interval_ms}ms"
        config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
        for job in config["scrape_configs"]:
            names = self._cluster.coordinators if job["job_name"] == "coordinator" else self._cluster.brokers
            job["tls_config"]["ca_file"] = str(self._cluster.ca)
            job["authorization"]["credentials_file"] = str(self._folder / "token")
            job.pop("dns_sd_configs", None)
            targets = [self._cluster.services[name].url.removeprefix("https://") for name in names]
            job["static_configs"] = [{"targets": targets}]
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for path in SHIPPED.glob("*.rules.yml"):
            (self._folder / path.name).write_text(scaled(path.read_text(), self._by))

    # -- asking -------------------------------------------------------------------------------------

    async def _get(self, path: str, **params: str) -> Any:
        assert self._http is not None
        async with self._http.get(self.url + path, params=params) as answer:
            body = await answer.json()
            if body["status"] != "success":
                raise ValueError(f"{params}: {body.get('error')}")
            return body["data"]

    async def values(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What an expression gives now."""
        found = await self._get("/api/v1/query", query=expression)
        return [(row["metric"], float(row["value"][1])) for row in found["result"]]

    async def seen(self, expression: str, within_s: float = 60.0) -> int:
        """How many series the expression had within the last time, with at least one number each."""
        now = time.time()
        found = await self._get(
            "/api/v1/query_range",
            query=expression,
            start=f"{now - within_s:.3f}",
            end=f"{now:.3f}",
            step=f"{self._interval_ms / 1000}",
        )
        return sum(any(math.isfinite(float(value)) for _, value in row["values"]) for row in found["result"])

    async def firing(self) -> list[dict[str, str]]:
        """Labels of the alerts that fire."""
        found = await self._get("/api/v1/alerts")
        return [alert["labels"] for alert in found["alerts"] if alert["state"] == "firing"]

    async def targets_up(self) -> int:
        return int(sum(value for _, value in await self.values("up")))
