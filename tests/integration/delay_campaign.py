"""Priorities and delays: `python -m tests.integration.delay_campaign`.

Priority: a backlog with random priorities is drained; within a partition no record may come before one of a higher
priority. Delay: records that are due over half a minute, while one broker is restarted and another killed with -9; each
must be finished once, none may be early, and 99 % at most 250 ms late. Prints a JSON line; exits 1 if that fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.cli.checker import percentile
from ferryline.cli.driver import ProcessCluster

DEADLINE_S = 120.0
LATE_MS_MAX = 250.0


async def backlog(client: fl.Client, options: argparse.Namespace, chance: random.Random) -> dict[str, Any]:
    """How many records came before one of a higher priority that lay in the same partition."""
    await client.admin.create_topic("priorities", partitions=options.partitions, replication=2)
    async with client.producer() as producer:
        for _ in range(options.backlog // 2_000):
            futures = [
                producer.send("priorities", b"x", key=b"%d" % chance.getrandbits(40), priority=level)
                for level in (chance.randrange(10) for _ in range(2_000))
            ]
            await asyncio.gather(*futures)
    lowest: dict[int, int] = {}
    inversions = received = 0
    async with client.receiver("priorities", group="g", prefetch=1_000) as receiver, asyncio.timeout(DEADLINE_S):
        while received < options.backlog:
            messages = await receiver.receive(max_records=1_000, max_wait=5.0)
            for message in messages:
                inversions += message.priority > lowest.get(message.partition, 9)
                lowest[message.partition] = min(lowest.get(message.partition, 9), message.priority)
            received += len(messages)
            await receiver.ack_many(messages)
    return {"backlog": received, "inversions": inversions}


class Delays:
    """Sends records that are due later, and notes when each was handed out."""

    def __init__(self, client: fl.Client, options: argparse.Namespace, chance: random.Random) -> None:
        self.client, self.options, self.chance = client, options, chance
        self.due: dict[int, float] = {}  # number -> wall clock, s
        self.late_ms: dict[int, float] = {}  # when it was first handed out, against when it was due
        self.finished: set[int] = set()
        self.again = 0
        self.all_finished = asyncio.Event()

    async def send(self) -> None:
        await self.client.admin.create_topic("delays", partitions=self.options.partitions, replication=2)
        async with self.client.producer() as producer:
            for first in range(0, self.options.delayed, 500):
                futures = []
                for number in range(first, first + 500):
                    delay = 8.0 + self.chance.random() * self.options.spread
                    self.due[number] = time.time() + delay
                    futures.append(producer.send("delays", b"%d" % number, key=b"%d" % number, delay=delay))
                await asyncio.gather(*futures)

    async def receive(self) -> None:
        async with self.client.receiver("delays", group="g", prefetch=500, lease=5) as receiver:
            while True:
                messages = await receiver.receive(max_records=500, max_wait=1.0)
                now = time.time()
                for message in messages:
                    self.late_ms.setdefault(int(message.value), (now - self.due[int(message.value)]) * 1_000)
                outcomes = await receiver.ack_many(messages)
                for message, error in zip(messages, outcomes, strict=True):
                    if error is None:
                        self.again += int(message.value) in self.finished
                        self.finished.add(int(message.value))
                if len(self.finished) == len(self.due):
                    self.all_finished.set()

    async def run(self, cluster: ProcessCluster) -> dict[str, Any]:
        await self.send()
        receiving = [asyncio.create_task(self.receive()) for _ in range(3)]
        first, second = self.chance.sample(cluster.brokers, 2)
        await asyncio.sleep(8.0 + self.options.spread / 4)
        await cluster.terminate(first)
        await cluster.restart(first)
        await asyncio.sleep(self.options.spread / 4)
        await cluster.kill(second)
        await asyncio.sleep(1.0)
        await cluster.restart(second)
        async with asyncio.timeout(DEADLINE_S):
            await self.all_finished.wait()
        await asyncio.sleep(1.0)
        for task in receiving:
            task.cancel()
        await asyncio.gather(*receiving, return_exceptions=True)
        late = sorted(self.late_ms.values())
        return {
            "delayed": len(self.due),
            "finished": len(self.finished),
            "again": self.again,
            "early": sum(one < 0 for one in late),
            "late_ms": {f"p{share}": round(percentile(late, share / 100), 1) for share in (50, 99)}
            | {"max": round(late[-1])},
        }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="ferryline-delay-", dir=options.dir) as name:
        cluster = ProcessCluster(Path(name), brokers=3)
        await cluster.start()
        try:
            async with fl.connect(",".join(cluster.urls), ca=str(cluster.ca)) as client:
                found = await backlog(client, options, chance)
                return found | await Delays(client, options, chance).run(cluster)
        finally:
            await cluster.kill_all()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--delayed", type=int, default=10_000)
    parser.add_argument("--spread", type=float, default=30.0, help="seconds over which they are due")
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", help="where the data goes; default: the folder for temporary files")
    found = asyncio.run(run(parser.parse_args()))
    sys.stdout.write(json.dumps(found) + "\n")
    bad = found["inversions"] or found["early"] or found["again"] or found["finished"] < found["delayed"]
    return 1 if bad or found["late_ms"]["p99"] > LATE_MS_MAX else 0


if __name__ == "__main__":
    sys.exit(main())
