"""Rounds: each measurement in a fresh process, the clients taking turns, medians at the end.

Turns, because a shared machine drifts: what disturbs one client for a while disturbs the other one too.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ferryline.cli.bench.load import Load
from ferryline.cli.drill import healed
from ferryline.cli.failures import FAILED, Failed

if TYPE_CHECKING:
    from ferryline.client import Client

SCENARIOS = ("produce", "consume", "latency", "end-to-end")
RATES = ("produce", "consume")  # compared by records a second; the others by latency
MARGIN_S = 60.0


@dataclass
class Series:
    """All rounds of one client in one scenario."""

    rounds: list[dict[str, Any]] = field(default_factory=list)

    def values(self, scenario: str) -> list[float]:
        if scenario in RATES:
            return [float(one["records_per_s"]) for one in self.rounds]
        return [float(one["latency_ms"]["p50"]) for one in self.rounds]

    def summary(self, scenario: str) -> dict[str, Any]:
        """Median and range over the rounds; for latencies the medians of each percentile too."""
        values = self.values(scenario)
        found: dict[str, Any] = {
            "median": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "errors": sum(int(one["errors"]) for one in self.rounds),
        }
        if scenario not in RATES:
            for name in self.rounds[0]["latency_ms"]:
                found[name] = statistics.median(float(one["latency_ms"][name]) for one in self.rounds)
        return found


class Bench:
    """Runs scenarios against one cluster, beside confluent-kafka if asked to."""

    def __init__(self, load: Load, rounds: int, *, compare: bool, tell: Callable[[str], None]) -> None:
        self.load = load
        self._rounds = rounds
        self._compare = compare
        self._tell = tell
        self._number = 0

    def run(self, scenarios: list[str]) -> dict[str, Any]:
        """Results by scenario: each client's rounds, summaries, and the ratio of the medians."""
        return {scenario: self._scenario(scenario) for scenario in scenarios}

    def _scenario(self, scenario: str) -> dict[str, Any]:
        clients = ["ferryline"]
        if self._compare and scenario != "end-to-end":
            clients.append("confluent")
        series = {client: Series() for client in clients}
        for number in range(self._rounds):
            # Who begins takes turns too.
            for client in clients if number % 2 == 0 else reversed(clients):
                self._tell(f"{scenario}: {client}, round {number + 1} of {self._rounds}")
                series[client].rounds.append(self._one(client, scenario))
        found: dict[str, Any] = {
            client: {**one.summary(scenario), "rounds": one.rounds} for client, one in series.items()
        }
        if "confluent" in found:
            found["ratio"] = found["ferryline"]["median"] / found["confluent"]["median"]
        return found

    def _one(self, client: str, scenario: str) -> dict[str, Any]:
        load = self._load_of(scenario)
        if client == "confluent":
            return self._confluent(scenario, load)
        topic = asyncio.run(self._topic(load))
        load = replace(load, topic=topic)
        try:
            if scenario == "consume":
                _work("ferryline", "produce", replace(load, warm_up=0))
            return _work("ferryline", scenario.replace("-", "_"), load)
        finally:
            asyncio.run(self._forget(load))

    def _load_of(self, scenario: str) -> Load:
        if scenario in RATES:
            return self.load
        return replace(self.load, records=min(self.load.records, 5_000), warm_up=min(self.load.warm_up, 500))

    def _confluent(self, scenario: str, load: Load) -> dict[str, Any]:
        if scenario != "consume":
            return _work("confluent", scenario, load)
        with subprocess.Popen(
            _command("confluent", "serve", load), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            try:
                line = server.stdout.readline()
                if not line:
                    raise Failed("the mock cluster did not start", FAILED)
                return _work("confluent", "consume", replace(load, url=json.loads(line)["addresses"]))
            finally:
                server.stdin.close()

    # -- topics --------------------------------------------------------------------------------------

    def _connect(self, load: Load) -> Client:
        import ferryline as fl

        return fl.connect(load.url, ca=load.ca or None, token=load.token or None)

    async def _topic(self, load: Load) -> str:
        """A fresh topic, with all its copies in sync."""
        self._number += 1
        name = f"{load.topic}-{self._number}"
        async with self._connect(load) as client:
            await client.admin.create_topic(name, partitions=load.partitions, replication=load.replication)
            if await healed(client, name, load.partitions, load.replication, 30.0):
                return name
        raise Failed(f"topic {name} did not get all its copies in sync", FAILED, remedy="ferryline doctor")

    async def _forget(self, load: Load) -> None:
        async with self._connect(load) as client:
            await client.admin.delete_topic(load.topic)


def _command(client: str, what: str, load: Load) -> list[str]:
    return [sys.executable, "-m", "ferryline.cli.bench.worker", client, what, json.dumps(asdict(load))]


def _work(client: str, what: str, load: Load) -> dict[str, Any]:
    """One measurement in its own process. Raises Failed with the end of its stderr."""
    try:
        done = subprocess.run(
            _command(client, what, load), capture_output=True, timeout=load.timeout_s + MARGIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{client} {what}: no result within {load.timeout_s + MARGIN_S:.0f} s", FAILED) from None
    if done.returncode:
        raise Failed(f"{client} {what} failed:\n{done.stderr.decode(errors='replace')[-2000:]}", FAILED)
    return dict(json.loads(done.stdout.splitlines()[-1]))
