"""Certificates and the CA changed under load: `python -m tests.integration.rotation_campaign`.

Producers, a consumer group and receivers go on; beside them a client that opens a new connection for every request, to
every node in turn. Meanwhile every certificate is renewed again and again, and the CA is changed, step by step. Not one
request may fail, no session may end, and at the end:

* every node shows a certificate of the new CA, and only that one is trusted: who knows the old one alone is refused;
* with ``--coordinators 2``, which share their CA on etcd: the standby, too; when the active one is killed afterwards it
  takes over, and lets a new broker in, and the killed one comes back with it;
* clients that were there all the time have read the new ca.crt by themselves, and nothing acknowledged was lost.

Prints a JSON line, and exits 1 unless all of that holds.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.cli.rotation import STEPS, Rotation
from ferryline.trust import ssl_context
from tests.integration.ledgers import tell
from tests.integration.takeovers import Watch

TOPIC, QUEUE = "orders", "jobs"
DRAIN_S = 60.0


class Load:
    """Requests of all kinds, counted; whatever fails is kept."""

    def __init__(self, cluster: ProcessCluster, client: fl.Client, ca: Path, rate: float) -> None:
        self._cluster, self._client, self._ca, self._rate = cluster, client, ca, rate
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []
        self.stop = asyncio.Event()
        self.consumed: set[int] = set()
        self.received: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        works = (self._produce(TOPIC), self._produce(QUEUE), self._consume(), self._receive(), self._connect())
        self._tasks = [asyncio.create_task(work) for work in works]

    async def finish(self) -> None:
        """No more is sent; what was sent is read."""
        self.stop.set()
        senders = [*self._tasks[:2], self._tasks[4]]
        await asyncio.wait(senders)
        end = time.monotonic() + DRAIN_S
        while not self._drained:
            if time.monotonic() > end:
                break  # what is missing is counted
            await asyncio.sleep(0.1)
        for task in self._tasks[2:4]:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                self.failed.append(f"ended: {outcome!r}")

    @property
    def _drained(self) -> bool:
        return len(self.consumed) == self.done[f"sent {TOPIC}"] and len(self.received) == self.done[f"sent {QUEUE}"]

    @property
    def missing(self) -> int:
        return sum(self.done[f"sent {name}"] for name in (TOPIC, QUEUE)) - len(self.consumed) - len(self.received)

    async def _produce(self, topic: str) -> None:
        async with self._client.producer() as producer:
            while not self.stop.is_set():
                number = self.done[f"sent {topic}"]
                await producer.send(topic, str(number).encode(), key=f"k{number % 50}")
                self.done[f"sent {topic}"] += 1
                await asyncio.sleep(1 / self._rate)

    async def _consume(self) -> None:
        async with self._client.consumer(TOPIC, group="g") as consumer:
            async for message in consumer:
                self.consumed.add(int(message.value))

    async def _receive(self) -> None:
        async with self._client.receiver(QUEUE, group="q") as receiver:
            async for message in receiver:
                await message.ack()
                self.received.add(int(message.value))

    async def _connect(self) -> None:
        """A handshake for each request, trusting what ca.crt says at the time."""
        while not self.stop.is_set():
            for url in self._cluster.urls:
                try:
                    await get(url, ssl_context(str(self._ca)))
                    self.done["handshakes"] += 1
                except (aiohttp.ClientError, OSError) as error:
                    self.failed.append(f"{url}: {error}")
            await asyncio.sleep(0.02)


async def get(url: str, context: Any) -> None:
    connector = aiohttp.TCPConnector(ssl=context, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http, http.get(f"{url}/healthz") as response:
        response.raise_for_status()


async def refused(urls: list[str], ca: Path) -> int:
    """How many of the servers are refused by who trusts this file alone."""
    count = 0
    for url in urls:
        try:
            await get(url, ssl_context(str(ca)))
        except aiohttp.ClientConnectorCertificateError:
            count += 1
    return count


async def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The whole story, once."""
    several = {"coordinators": options.coordinators, "store": "etcd", "etcd_members": 1}
    cluster = ProcessCluster(root / "cluster", brokers=3, **(several if options.coordinators > 1 else {}))
    await cluster.start()
    try:
        old, ca = root / "old.crt", root / "ca.crt"  # the clients' own copies
        shutil.copy(cluster.ca, old)
        shutil.copy(cluster.ca, ca)
        async with fl.connect(cluster.urls, ca=ca) as client:
            for name in (TOPIC, QUEUE):
                await client.admin.create_topic(name, partitions=3)
            load = Load(cluster, client, ca, options.rate)
            load.start()
            await asyncio.sleep(options.pause)
            rotation = Rotation(client)
            sessions = {broker: client.connections.ready(broker) for broker in client.routing.cluster.brokers}
            shown: set[str] = set()
            leaves = 0
            for _ in range(options.leaves):
                rows = await rotation.renew()
                leaves += len(rows)
                shown |= {row["sha256"] for row in rows}
                await asyncio.sleep(options.pause)
            for step in STEPS:
                rows, pem = await rotation.change_ca(step)
                fresh = ca.with_suffix(".tmp")
                fresh.write_text(pem)
                fresh.replace(ca)
                await asyncio.sleep(options.pause)
            late = await rotation.renew()
            await asyncio.sleep(options.pause)
            kept = sum(session is client.connections.ready(b) for b, session in sessions.items() if session is not None)
            await load.finish()
        if options.coordinators > 1:  # the next one signs with the new CA, too
            async with Watch(cluster) as watch:
                active, epoch = await watch.until_active(0, DRAIN_S)
                await cluster.kill(active)
                await watch.until_active(epoch, DRAIN_S)
            await cluster.add_broker()
            await cluster.restart(active)
        async with fl.connect(cluster.urls, ca=ca) as client:  # somebody who comes later
            await client.admin.cluster()
        issuers = {row["issuer"] for row in late}
        return {
            "requests": sum(load.done.values()),
            **{name.replace(" ", "_"): count for name, count in sorted(load.done.items())},
            "failed": len(load.failed),
            "examples": load.failed[:5],
            "missing": load.missing,
            "certificates": leaves + len(late) + 3 * len(rows),
            "different_leaves": len(shown) == leaves,
            "sessions_kept": f"{kept} of {sum(session is not None for session in sessions.values())}",
            "one_new_ca": len(issuers) == 1 and all(len(row["trusts"]) == 1 for row in late),
            "old_refused": await refused(cluster.urls, old) == len(cluster.urls),
        }
    finally:
        await cluster.kill_all()


def good(result: dict[str, Any]) -> bool:
    """Whether a result is what it has to be."""
    kept, _, had = result["sessions_kept"].partition(" of ")
    changed = result["different_leaves"] and result["one_new_ca"] and result["old_refused"]
    return not result["failed"] and not result["missing"] and changed and kept == had and result["handshakes"] > 0


def options_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=200, help="records a second and topic")
    parser.add_argument("--leaves", type=int, default=10, help="renewals of every certificate")
    parser.add_argument("--coordinators", type=int, default=1, help="several share their CA on etcd")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two changes")
    parser.add_argument("--ledger", type=Path, help="append the results to this file")
    return parser.parse_args(argv)


def main() -> int:
    options, bad = options_of(), 0
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="ferryline-rotation-") as folder:
            result = asyncio.run(run(options, Path(folder)))
        tell({"good": good(result), "coordinators": options.coordinators, **result}, options.ledger)
        bad += not good(result)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
