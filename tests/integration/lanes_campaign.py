"""Lanes under fire: `python -m tests.integration.lanes_campaign --records 1000000`.

Keyed records, many receivers in a few processes, nacks with delay, receiver processes killed with -9, a broker killed
with -9 every so often. From the journals of all processes, at the end:

* order: record n of a key is handed out only after an acknowledgement of n - 1 was at least asked for;
* again: nothing is handed out after its acknowledgement had succeeded;
* apart: no two receivers have records of one key at the same time (a killed process has none from its death on);
* lost: everything whose send was acknowledged is acknowledged by a receiver in the end, and the queue says so, too;
* idle: how long a record whose turn had come lay there while some receiver waited, outside of nack delays, fail-overs
  and the leases of killed receivers.

Prints a JSON line, and exits 1 unless order, again, apart and lost are all 0 and nothing was idle for a second.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from tests.integration.lanes_worker import GROUP, TOPIC
from tests.integration.ledgers import tell

FAILOVER_S = 6.0  # after the death of a broker nobody is expected to get anything
SETTLE_S = 120.0  # for the last record to be acknowledged
_NS = 1_000_000_000


class Workers:
    """Receiver processes; one that was killed is followed by another."""

    def __init__(self, folder: Path, url: str, ca: str, options: argparse.Namespace) -> None:
        self.folder, self.url, self.ca, self.options = folder, url, ca, options
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.deaths: dict[str, int] = {}  # process -> when it was killed, ns
        self._count = 0

    def start(self) -> None:
        self._count += 1
        name = f"w{self._count}"
        options = self.options
        command = [sys.executable, "-m", "tests.integration.lanes_worker", "--url", self.url, "--ca", self.ca]
        command += ["--journal", str(self.folder / f"{name}.journal"), "--name", name, "--seed", str(self._count)]
        command += ["--receivers", str(options.receivers // options.processes), "--lease", str(options.lease)]
        command += ["--nacks", str(options.nacks), "--prefetch", str(options.prefetch)]
        with (self.folder / f"{name}.out").open("wb") as out:
            self.running[name] = subprocess.Popen(command, stdout=out, stderr=out)

    def kill_one(self, chance: random.Random) -> None:
        name = chance.choice(sorted(self.running))
        process = self.running.pop(name)
        process.kill()
        process.wait()
        self.deaths[name] = time.monotonic_ns()
        self.start()

    def end(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


class Sent:
    """What the producer knows: ``count[key]`` records of each key are acknowledged; record n of key k since `when`."""

    BATCH = 500

    def __init__(self, keys: int) -> None:
        self.keys = keys
        self.count: dict[str, int] = {}
        self.batches: list[int] = []  # ns of the acknowledgement of each batch, in order

    def acknowledged(self, numbers: range) -> None:
        self.batches.append(time.monotonic_ns())
        for number in numbers:
            self.count[f"k{number % self.keys}"] = number // self.keys + 1

    def when(self, key: str, sequence: int) -> int:
        return self.batches[(sequence * self.keys + int(key[1:])) // self.BATCH]


class Account:
    """Reads the journals in the order of time and counts what must not be."""

    def __init__(self, sent: Sent, workers: Workers, kills: list[int], lease_s: float) -> None:
        self.sent = sent
        self.lease_ns = int(lease_s * _NS)
        self.deaths, self.kills = workers.deaths, kills
        self.found: Counter[str] = Counter()
        self.examples: list[str] = []
        self.asked: dict[str, int] = {}  # key -> highest sequence whose ack was asked for
        self.perhaps: dict[str, int] = {}  # key -> highest sequence whose ack a process asked for that was killed
        self.done: dict[str, int] = {}  # key -> highest sequence whose ack succeeded
        self.holding: dict[str, tuple[str, int]] = {}  # key -> (member, sequence)
        self.free: dict[str, int] = {}  # key -> since when the next one could go out
        self.worst_idle_ms = 0.0

    def bad(self, what: str, line: str) -> None:
        self.found[what] += 1
        if len(self.examples) < 20:
            self.examples.append(f"{what}: {line}")

    def read(self, lines: Iterator[tuple[int, str, str, str, int]]) -> None:
        waiting: dict[str, int] = {}  # member -> since when it has been waiting for records
        before: dict[str, int] = {}  # the same, of its last wait
        for ns, what, member, key, sequence in lines:
            if what == "wait":
                waiting[member] = before[member] = ns
            elif what == "took":
                waiting.pop(member, None)
            elif what == "got":
                self._got(ns, member, key, sequence, min([before[member], *waiting.values()]))
            elif what == "ack?":
                self.asked[key] = max(self.asked.get(key, -1), sequence)
                if member.split(".")[0] in self.deaths:  # it may have died between the acknowledgement and this line
                    self.perhaps[key] = max(self.perhaps.get(key, -1), sequence)
                self._let_go(ns, member, key, sequence)
            elif what == "ack!":
                self.done[key] = max(self.done.get(key, -1), sequence)
                self.found["acked"] += 1
            elif what == "nack?":
                self._let_go(ns + _NS, member, key, sequence)
                self.found["nacked"] += 1
            elif what.startswith("ack-"):
                self.found[what] += 1

    def _got(self, ns: int, member: str, key: str, sequence: int, free_since: int) -> None:
        """``free_since``: somebody has been waiting for records ever since."""
        line = f"{ns} {member} {key} {sequence}"
        self.found["delivered"] += 1
        if sequence <= self.done.get(key, -1):
            self.bad("again", line)
        if sequence > self.asked.get(key, -1) + 1:
            self.bad("order", line)
        holder = self.holding.get(key)
        if holder is not None and holder[0] != member and not self._died(holder[0], ns):
            self.bad("apart", f"{line} while {holder}")
        self.holding[key] = (member, sequence)
        since = max(self.free.pop(key, 0), self.sent.when(key, sequence), free_since)
        if ns > since and not self._excused(since, ns):
            idle_ms = (ns - since) / 1e6
            self.worst_idle_ms = max(self.worst_idle_ms, idle_ms)
            if idle_ms > 1_000:
                self.bad("idle", f"{line} for {idle_ms:.0f} ms")

    def _let_go(self, ns: int, member: str, key: str, sequence: int) -> None:
        if self.holding.get(key, ("", -1))[0] == member:
            del self.holding[key]
        self.free[key] = ns

    def _died(self, member: str, ns: int) -> bool:
        died = self.deaths.get(member.split(".")[0])
        return died is not None and died <= ns

    def _excused(self, since: int, ns: int) -> bool:
        """A broker, or a receiver process whose leases had to end, died in between or shortly before."""
        failover, lease = int(FAILOVER_S * _NS), self.lease_ns + _NS
        return any(since - failover <= kill <= ns for kill in self.kills) or any(
            since - lease <= death <= ns for death in self.deaths.values()
        )

    def verdict(self) -> dict[str, Any]:
        for key, count in self.sent.count.items():
            last = max(self.done.get(key, -1), self.perhaps.get(key, -1))
            self.found["lost"] += max(0, count - 1 - last)
        return {
            "order": self.found["order"],
            "again": self.found["again"],
            "apart": self.found["apart"],
            "lost": self.found["lost"],
            "idle": self.found["idle"],
            "worst_idle_ms": round(self.worst_idle_ms),
            "delivered": self.found["delivered"],
            "acked": self.found["acked"],
            "nacked": self.found["nacked"],
            "failed_acks": {k: v for k, v in self.found.items() if k.startswith("ack-")},
            "examples": self.examples,
        }


def journal_lines(folder: Path) -> Iterator[tuple[int, str, str, str, int]]:
    lines: list[tuple[int, str, str, str, int]] = []
    for path in sorted(folder.glob("*.journal")):
        for line in path.read_text().splitlines():
            ns, what, member, key, sequence = line.split(" ")
            lines.append((int(ns), what, member, key, int(sequence)))
    lines.sort(key=lambda line: line[0])
    return iter(lines)


async def produce(client: fl.Client, options: argparse.Namespace, sent: Sent) -> None:
    """Records round the keys, each with its number within its key, at the rate asked for."""
    began, batch = time.monotonic(), Sent.BATCH
    async with client.producer(linger=0.005) as producer:
        for first in range(0, options.records, batch):
            ahead = first / options.rate - (time.monotonic() - began)
            if ahead > 0:
                await asyncio.sleep(ahead)
            numbers = range(first, min(first + batch, options.records))
            futures = []
            for number in numbers:
                value = b"%d" % (number // options.keys)
                futures.append(producer.send_nowait(TOPIC, value, key=f"k{number % options.keys}"))
            await asyncio.gather(*futures)
            sent.acknowledged(numbers)


async def settled(client: fl.Client) -> bool:
    """Until the queue is empty, or nothing has happened for a long time."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        try:
            left = sum(part.unsettled for part in await client.queue(TOPIC, GROUP).stats())
        except fl.UnknownGroup:
            left = 1  # no receiver has come so far
        if left == 0:
            return True
        await asyncio.sleep(1.0)
    return False


async def run(options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(options.seed)
    sent = Sent(options.keys)
    kills: list[int] = []
    with tempfile.TemporaryDirectory(prefix="ferryline-lanes-", dir=options.dir) as name:
        folder = Path(name)
        bug = {"FERRYLINE_ALLOW_SABOTAGE": "1", "FERRYLINE_SABOTAGE": options.sabotage} if options.sabotage else None
        cluster = ProcessCluster(folder / "cluster", brokers=3, env=bug)
        await cluster.start()
        url, ca = ",".join(cluster.urls), str(cluster.ca)
        workers = Workers(folder, url, ca, options)
        try:
            async with fl.connect(url, ca=ca) as client:
                await client.admin.create_topic(TOPIC, partitions=options.partitions, retry=fl.Retry(1_000))
                for _ in range(options.processes):
                    workers.start()
                producing = asyncio.create_task(produce(client, options, sent))
                began = next_kill = next_death = time.monotonic()
                while not producing.done():
                    await asyncio.sleep(0.2)
                    now = time.monotonic()
                    if now - next_kill >= options.kill_every:
                        victim = chance.choice(cluster.brokers)
                        kills.append(time.monotonic_ns())
                        await cluster.kill(victim)
                        await asyncio.sleep(1.0)
                        await cluster.restart(victim)
                        next_kill = time.monotonic()
                    if time.monotonic() - next_death >= options.worker_kill_every:
                        workers.kill_one(chance)
                        next_death = time.monotonic()
                await producing
                seconds = time.monotonic() - began
                drained = await settled(client)
                await asyncio.sleep(2.0)  # for the last answers to be written down
            workers.end()
            account = Account(sent, workers, kills, options.lease)
            account.read(journal_lines(folder))
            return {
                "records": options.records,
                "keys": options.keys,
                "receivers": options.receivers,
                "partitions": options.partitions,
                "broker_kills": len(kills),
                "receiver_kills": len(workers.deaths),
                "seconds": round(seconds),
                "drained": drained,
                **account.verdict(),
            }
        finally:
            workers.end()
            await cluster.kill_all()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--receivers", type=int, default=64)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--prefetch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3_000, help="records a second")
    parser.add_argument("--lease", type=float, default=5.0, help="seconds")
    parser.add_argument("--nacks", type=float, default=0.05)
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds between kills of brokers")
    parser.add_argument("--worker-kill-every", type=float, default=13.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sabotage", default="", help="no-lanes or forget-acks: must exit 1")
    parser.add_argument("--dir", help="where the data goes; default: the folder for temporary files")
    parser.add_argument("--ledger", type=Path, help="append the result to this file")
    options = parser.parse_args()
    result = asyncio.run(run(options))
    tell(result, options.ledger)
    broken = any(result[name] for name in ("order", "again", "apart", "lost", "idle")) or not result["drained"]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
