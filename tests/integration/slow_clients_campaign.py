"""Thousands of connections that send or read next to nothing, beside honest clients: ``python -m
tests.integration.slow_clients_campaign``.

Three brokers and a coordinator as processes. Honest clients send one record at a time at a fixed rate through the SDK,
each confirmed. Turns without and with the slow ones alternate. Slow ones are of five kinds, in equal parts, spread over
all services: a head and a body that grow by a byte now and then, a TLS handshake that is never finished, a session that
never says HELLO, and a reader that takes a byte now and then of an answer of a MB. Whoever is cut off comes again.

It must show that the p99 of honest clients stays under twice its normal and that the memory of services is flat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.cli.tlsinfo import address

HEAD = b"POST /v1/topics HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
UPGRADE = (
    b"GET /v1/session HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
DRIP_S = 5.0
PAUSE_S = 2.0  # before a slow one that was cut off comes again
TOPIC = "honest"


@dataclass
class Slow:
    """The slow ones: how many are there now, and how often one was cut off."""

    urls: list[str]
    context: ssl.SSLContext
    open: int = 0
    cut: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self, count: int) -> None:
        kinds = (self._head, self._body, self._handshake, self._silent, self._reader)
        for number in range(count):
            url = self.urls[number % len(self.urls)]
            self.tasks.append(asyncio.create_task(self._again(kinds[number // len(self.urls) % len(kinds)], url)))

    async def _again(self, kind: Callable[[str], Awaitable[None]], url: str) -> None:
        await asyncio.sleep(random.random() * 5)
        while True:
            self.open += 1
            try:
                await kind(url)
            except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
                pass
            finally:
                self.open -= 1
            self.cut += 1
            await asyncio.sleep(PAUSE_S)

    @contextlib.asynccontextmanager
    async def _connected(self, url: str) -> Any:
        host, port = address(url)
        reader, writer = await asyncio.open_connection(host, port, ssl=self.context, server_hostname=host, limit=1024)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _drip(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A byte a second, until the other side ends it."""
        while not reader.at_eof() and not writer.transport.is_closing():
            writer.write(b"a")
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRIP_S):
                    if not await reader.read(512):
                        return

    async def _head(self, url: str) -> None:
        async with self._connected(url) as (reader, writer):
            writer.write(HEAD + b"X-Slow: ")
            await self._drip(reader, writer)

    async def _body(self, url: str) -> None:
        async with self._connected(url) as (reader, writer):
            writer.write(HEAD + b'Content-Length: 5000000\r\n\r\n{"name": "')
            await self._drip(reader, writer)

    async def _handshake(self, url: str) -> None:
        reader, writer = await asyncio.open_connection(*address(url))
        try:
            writer.write(b"\x16\x03\x01\x02\x00")  # the beginning of a record
            await reader.read()
        finally:
            writer.transport.abort()

    async def _silent(self, url: str) -> None:
        async with self._connected(url) as (reader, writer):
            writer.write(UPGRADE)
            await reader.readuntil(b"\r\n\r\n")
            await reader.read()

    async def _reader(self, url: str) -> None:
        async with self._connected(url) as (reader, writer):
            writer.write(b"GET /v1/topics/large/partitions/0/records?secondary=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while await reader.read(1):  # noqa: ASYNC110 - nothing is polled
                await asyncio.sleep(DRIP_S)


async def attack(urls: list[str], ca: str, count: int) -> None:
    """As a process of its own: hold ``count`` slow connections and tell of them every second, until stdin ends."""
    slow = Slow(urls, ssl.create_default_context(cafile=ca))
    slow.start(count)
    loop = asyncio.get_running_loop()
    over = loop.run_in_executor(None, sys.stdin.read)
    while not over.done():
        print(json.dumps({"open": slow.open, "cut": slow.cut}), flush=True)
        await asyncio.wait([over], timeout=1.0)
    os._exit(0)  # two thousand connections end with the process


class Attackers:
    """That process. It stands for other machines, so it gives way to the services and to honest clients on this one."""

    def __init__(self, urls: list[str], ca: str, count: int) -> None:
        command = [sys.executable, "-m", "tests.integration.slow_clients_campaign", "--slow", str(count)]
        self._process = subprocess.Popen(
            ["nice", "-n", "10", *command, "--attack", ",".join(urls), "--ca", ca],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=False,
        )  # fmt: skip
        self._told = {"open": 0, "cut": 0}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._told = json.loads(line)

    def told(self) -> dict[str, int]:
        return self._told

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await asyncio.to_thread(self._process.wait, 30)
        self._reader.join(5)


async def honest(client: fl.Client, seconds: float, rate: float) -> list[float]:
    """Confirm latencies in ms of single records at a fixed rate; late ones count from when they were due."""
    found: list[float] = []

    async def one(producer: fl.Producer, due: float) -> None:
        await producer.send(TOPIC, b"x" * 100, key=str(random.random()))
        found.append((time.perf_counter() - due) * 1000)

    async with client.producer(linger=0.0) as producer, asyncio.TaskGroup() as group:
        due, end = time.perf_counter(), time.perf_counter() + seconds
        while due < end:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            group.create_task(one(producer, due))
            due += 1 / rate
    return found


def memory(cluster: ProcessCluster) -> dict[str, float]:
    """Resident MiB of each service."""
    found = {}
    for name, service in cluster.local.services.items():
        assert service.process is not None
        found[name] = round(psutil.Process(service.process.pid).memory_info().rss / 2**20, 1)
    return found


def percentile(values: list[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 2)


async def campaign(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    cluster = ProcessCluster(root, brokers=3)
    await cluster.start()
    turns: list[dict[str, Any]] = []
    try:
        async with fl.connect(cluster.urls, ca=str(cluster.ca)) as client:
            await client.admin.create_topic(TOPIC, partitions=6, replication=2)
            await client.admin.create_topic("large", partitions=1, replication=3)
            async with client.producer() as producer:
                await producer.send("large", b"x" * 1_000_000)
            await honest(client, 3, args.rate)
            for number in range(args.turns):
                for count in (0, args.slow):
                    slow = Attackers(cluster.urls, str(cluster.ca), count) if count else None
                    await asyncio.sleep(args.settle if count else 1)
                    before = memory(cluster)
                    latencies = await honest(client, args.seconds, args.rate)
                    turn = {
                        "turn": number, "slow": count, **(slow.told() if slow else {}), "sent": len(latencies),
                        "p50_ms": percentile(latencies, 0.5), "p99_ms": percentile(latencies, 0.99),
                        "max_ms": percentile(latencies, 1.0), "mib_before": before, "mib_after": memory(cluster),
                    }  # fmt: skip
                    turns.append(turn)
                    print(json.dumps(turn), file=sys.stderr, flush=True)
                    if slow:
                        await slow.stop()
    finally:
        await cluster.kill_all()
    alone = statistics.median(turn["p99_ms"] for turn in turns if not turn["slow"])
    beside = statistics.median(turn["p99_ms"] for turn in turns if turn["slow"])
    grown = [
        turn["mib_after"][name] - turn["mib_before"][name]
        for turn in turns
        if turn["slow"]
        for name in turn["mib_after"]
    ]
    return {
        "slow": args.slow, "p99_alone_ms": alone, "p99_beside_ms": beside, "ratio": round(beside / alone, 2),
        "worst_growth_mib": round(max(grown), 1), "turns": turns,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", type=int, default=2000, help="slow connections at a time")
    parser.add_argument("--turns", type=int, default=3, help="of both kinds")
    parser.add_argument("--seconds", type=float, default=20, help="of one turn")
    parser.add_argument("--settle", type=float, default=15, help="seconds until the slow ones are all there")
    parser.add_argument("--rate", type=float, default=100, help="honest records a second")
    parser.add_argument("--out", type=Path, help="write the result here, too")
    parser.add_argument("--attack", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ca", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, args.slow * 2 + 1000)), hard))
    if args.attack:
        asyncio.run(attack(args.attack.split(","), args.ca, args.slow))
        return 0
    with tempfile.TemporaryDirectory(prefix="ferryline-slow-") as root:
        result = asyncio.run(campaign(args, Path(root)))
    print(json.dumps({name: value for name, value in result.items() if name != "turns"}))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["ratio"] < 2 else 1


if __name__ == "__main__":
    sys.exit(main())
