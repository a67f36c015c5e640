"""How fast `ferryline.testing` is: start, end, a message, and three days in which nothing happens.

::

    python -m benchmarks.cluster_in_process [--runs 15]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from time import perf_counter

import ferryline as fl


async def _once(times: dict[str, list[float]]) -> None:
    began = perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = perf_counter()
        times.setdefault(name, []).append((now - began) * 1000)
        began = now

    async with fl.testing.Cluster(brokers=3, seed=len(times), topics={"orders": 3}) as cluster:
        lap("start: 3 brokers, a topic")
        async with cluster.client() as client, client.producer() as producer:
            lap("client and producer")
            await producer.send("orders", b"first", key="a")
            lap("first send")
            for number in range(100):
                await producer.send("orders", b"%d" % number, key="a")
            lap("100 sends, one at a time")
            await cluster.advance(days=3)
            lap("advance(days=3)")
            began = perf_counter()
        lap("close client")
    lap("end")


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m benchmarks.cluster_in_process", description="ferryline.testing")
    made.add_argument("--runs", type=int, default=15)
    times: dict[str, list[float]] = {}
    for _ in range(made.parse_args().runs):
        asyncio.run(_once(times))
    for name, taken in times.items():
        sys.stdout.write(
            f"{name:28} median {statistics.median(taken):8.2f} ms   first {taken[0]:8.2f}   worst {max(taken):8.2f}\n"
        )


if __name__ == "__main__":
    main()
