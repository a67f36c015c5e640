"""Poisoned keys and the others: `python -m tests.integration.parking_campaign`.

The same records twice, in turns, each time on a topic of its own: without poison, and with one key in a hundred whose
first record is rejected and parked (`on_dead="park"`). Compares how fast the other records are finished; then
repairs the handler, redrives what is parked, and checks that the records of every key were finished in order, once.
Prints a JSON line; exits 1 if the ratio is below 0.95, or anything was lost or out of order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.cli.driver import ProcessCluster

GROUP = "parking"
DEADLINE_S = 120.0


class Run:
    """One topic, its records, and what was finished when. ``poisoned`` keys are rejected until ``repaired``."""

    def __init__(self, client: fl.Client, topic: str, options: argparse.Namespace, share: float) -> None:
        self.client, self.topic, self.options = client, topic, options
        self.keys = options.keys
        self.poisoned = {f"k{number}" for number in range(0, self.keys, round(1 / share))} if share else set()
        self.repaired = False
        self.handed: dict[str, list[int]] = {}  # in this order
        self.finished: dict[str, set[int]] = {}
        self.others = self.rejected = 0
        self.done = asyncio.Event()

    async def prepare(self) -> None:
        options = self.options
        retry = fl.Retry(3, on_dead="park")
        await self.client.admin.create_topic(self.topic, partitions=options.partitions, replication=2, retry=retry)
        async with self.client.producer() as producer:
            for first in range(0, options.records, 2_000):
                await asyncio.gather(
                    *(
                        producer.send_nowait(self.topic, b"%d" % (number // self.keys), key=f"k{number % self.keys}")
                        for number in range(first, min(first + 2_000, options.records))
                    )
                )

    async def drain(self) -> float:
        """Records of the good keys a second."""
        expected = self.options.records * (self.keys - len(self.poisoned)) // self.keys
        began = time.monotonic()
        tasks = [asyncio.create_task(self._receive(expected)) for _ in range(self.options.receivers)]
        async with asyncio.timeout(DEADLINE_S):
            await self.done.wait()
        seconds = time.monotonic() - began
        await self._end(tasks)
        return expected / seconds

    async def redrive(self) -> int:
        """Repair, redrive, and finish the rest."""
        self.repaired = True
        self.done.clear()
        found = await self.client.queue(self.topic, GROUP).redrive()
        tasks = [asyncio.create_task(self._receive(self.options.records)) for _ in range(self.options.receivers)]
        async with asyncio.timeout(DEADLINE_S):
            await self.done.wait()
        await self._end(tasks)
        return found.count

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, expected: int) -> None:
        async with self.client.receiver(self.topic, group=GROUP, prefetch=self.options.prefetch) as receiver:
            while True:
                good = []
                for message in await receiver.receive(max_records=self.options.prefetch, max_wait=1.0):
                    key = (message.key or b"").decode()
                    if key in self.poisoned and not self.repaired:
                        self.rejected += 1
                        await message.reject("poison")
                    else:
                        good.append((key, message))
                        self.handed.setdefault(key, []).append(int(message.value))
                outcomes = await receiver.ack_many([message for _, message in good])
                for (key, message), error in zip(good, outcomes, strict=True):
                    if error is None:
                        self.finished.setdefault(key, set()).add(int(message.value))
                        self.others += 1
                if self.others >= expected:
                    self.done.set()

    def verdict(self) -> tuple[int, int]:
        """(records that were never finished, keys whose records were handed out of order or twice)."""
        lost = disorder = 0
        for number in range(self.keys):
            expected = list(range(-(-(self.options.records - number) // self.keys)))
            lost += len(set(expected) - self.finished.get(f"k{number}", set()))
            disorder += self.handed.get(f"k{number}", []) != expected
        return lost, disorder


async def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ferryline-parking-", dir=options.dir) as name:
        cluster = ProcessCluster(Path(name), brokers=3)
        await cluster.start()
        rates: dict[str, list[float]] = {"without": [], "with": []}
        lost = disorder = redriven = rejected = 0
        try:
            async with fl.connect(",".join(cluster.urls), ca=str(cluster.ca)) as client:
                for number in range(options.rounds):
                    order = [("without", 0.0), ("with", options.share)]
                    for kind, share in order if number % 2 == 0 else reversed(order):
                        one = Run(client, f"parking-{number}-{kind}", options, share)
                        await one.prepare()
                        rates[kind].append(await one.drain())
                        if share:
                            redriven += await one.redrive()
                            rejected += one.rejected
                        missing, wrong = one.verdict()
                        lost, disorder = lost + missing, disorder + wrong
        finally:
            await cluster.kill_all()
    ratios = [b / a for a, b in zip(rates["without"], rates["with"], strict=True)]
    return {
        "records": options.records,
        "keys": options.keys,
        "share": options.share,
        "rates": {kind: [round(one) for one in found] for kind, found in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(one, 3) for one in ratios],
        "rejected": rejected,
        "redriven": redriven,
        "lost": lost,
        "out_of_order": disorder,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=0.01, help="of the keys that are poisoned")
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--receivers", type=int, default=8)
    parser.add_argument("--prefetch", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where the data goes; default: the folder for temporary files")
    result = asyncio.run(run(parser.parse_args()))
    sys.stdout.write(json.dumps(result) + "\n")
    return 1 if result["ratio"] < 0.95 or result["lost"] or result["out_of_order"] else 0


if __name__ == "__main__":
    sys.exit(main())
