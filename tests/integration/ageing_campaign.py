"""The lowest priority behind a backlog of the highest: `python -m tests.integration.ageing_campaign`.

A backlog of priority 9 lies there, some records of priority 0 are sent behind it, and more of priority 9 come as fast
as one receiver works. The low ones must come no later than the configured bound after the receiver began, though the
backlog alone would take much longer; until then, none of them may come. Prints a JSON line; exits 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from tests.integration.ledgers import tell

TOPIC, GROUP = "ageing", "g"
SLACK_S = 3.0  # for a lease of many records at a time, and a busy machine; the backlog takes ten times the bound


async def fill(producer: fl.Producer, count: int, level: int) -> None:
    for first in range(0, count, 2_000):
        size = min(2_000, count - first)
        await asyncio.gather(
            *(producer.send(TOPIC, b"x", key=f"{level}-{first + n}", priority=level) for n in range(size))
        )


async def measure(client: fl.Client, options: argparse.Namespace) -> dict[str, Any]:
    await client.admin.create_topic(TOPIC, partitions=options.partitions, replication=2)
    waits: list[float] = []
    received = 0
    async with client.producer() as producer:
        await fill(producer, options.backlog, 9)
        await fill(producer, options.low, 0)
        async with client.receiver(TOPIC, group=GROUP, prefetch=options.rate // 10) as receiver:
            began = time.monotonic()
            while len(waits) < options.low and time.monotonic() - began < options.give_up:
                messages = await receiver.receive(options.rate // 10, 1.0)
                now = time.monotonic() - began
                waits += [now for message in messages if message.priority == 0]
                received += len(messages)
                await asyncio.gather(receiver.ack_many(messages), fill(producer, len(messages), 9))
                await asyncio.sleep(max(0.0, began + received / options.rate - time.monotonic()))
    seconds = time.monotonic() - began
    bound_s = options.bound_ms / 1_000
    found = {
        "backlog": options.backlog,
        "bound_s": bound_s,
        "low": len(waits),
        "first_s": round(min(waits, default=-1.0), 2),
        "last_s": round(max(waits, default=-1.0), 2),
        "rate": round(received / seconds),
        "backlog_alone_s": round(options.backlog / (received / seconds), 1),
    }
    in_time = len(waits) == options.low and bound_s - 0.5 <= min(waits) and max(waits) <= bound_s + SLACK_S
    return found | {"good": in_time and found["backlog_alone_s"] > 2 * bound_s}


async def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ferryline-ageing-", dir=options.dir) as name:
        env = {"FERRYLINE_BROKER_PRIORITY_WAIT_MS": str(options.bound_ms)}
        cluster = ProcessCluster(Path(name), brokers=3, env=env)
        try:
            await cluster.start()
            async with fl.connect(cluster.url, ca=cluster.ca) as client:
                return await measure(client, options)
        finally:
            await cluster.kill_all()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--low", type=int, default=100)
    parser.add_argument("--rate", type=int, default=2_000, help="records a second that the receiver works on")
    parser.add_argument("--bound-ms", type=int, default=5_000)
    parser.add_argument("--give-up", type=float, default=60.0, help="seconds")
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--ledger", type=Path, help="append the line to this file")
    parser.add_argument("--dir", help="where the data goes; default: the folder for temporary files")
    options = parser.parse_args()
    found = asyncio.run(run(options))
    tell(found, options.ledger)
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
