"""The same seed, the same events: in one process and in another, whatever the hash seed of Python."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ferryline as fl


async def story(seed: int) -> str:
    """Sends, a group, a queue and weather; what happened and what came of it."""
    topics = {"orders": 3, "jobs": {"partitions": 2, "retry": fl.Retry(3, backoff=fl.exponential(1, 10))}}
    faults = fl.testing.Faults(every=(2, 6), lasting=(1, 5))
    told: list[str] = []
    async with fl.testing.Cluster(seed=seed, topics=topics, faults=faults) as cluster:
        async with cluster.client(timeout=120) as client, client.producer() as producer:
            reading = asyncio.create_task(_read(cluster, client, told))
            working = asyncio.create_task(_work(cluster, client, told))
            for number in range(30):
                await producer.send("orders", b"%d" % number, key=f"k{number % 5}")
                await producer.send("jobs", b"%d" % number, key=f"k{number % 5}", delay=float(number % 3))
                await cluster.advance(seconds=1)
            await cluster.calm()
            await cluster.advance(hours=1)
            for task in (reading, working):
                task.cancel()
            await asyncio.wait([reading, working])
        return "\n".join([cluster.story(), *told])


async def _read(cluster: fl.testing.Cluster, client: fl.Client, told: list[str]) -> None:
    async with client.consumer("orders", group="g") as consumer:
        async for message in consumer:
            told.append(
                f"{cluster.now()} read {message.partition}/{message.offset} {message.raw!r} {message.timestamp}"
            )


async def _work(cluster: fl.testing.Cluster, client: fl.Client, told: list[str]) -> None:
    async with client.receiver("jobs", group="q") as receiver:
        async for message in receiver:
            told.append(f"{cluster.now()} job {message.partition}/{message.offset} attempt {message.delivery_count}")
            await (message.ack() if message.offset % 4 else message.nack())


def in_a_process_of_its_own(seed: int, hash_seed: str) -> str:
    code = (
        "import asyncio, logging; logging.disable(50); import test_testing_seed as t; print(asyncio.run(t.story(%d)))"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    run = [sys.executable, "-c", code % seed]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def differing(one: str, other: str) -> list[tuple[str, str]]:
    return [pair for pair in zip(one.splitlines(), other.splitlines(), strict=False) if pair[0] != pair[1]][:5]


async def test_one_seed_tells_one_story_within_a_process() -> None:
    first, second = await story(4), await story(4)
    assert first == second, differing(first, second)
    assert "read" in first
    assert "attempt 2" in first


def test_one_seed_tells_one_story_in_every_process() -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(in_a_process_of_its_own, (4, 4), ("1", "2"))
    assert first == second, differing(first, second)
    assert first.count("\n") > 150


async def test_another_seed_tells_another_story() -> None:
    one, other = await story(4), await story(5)
    assert one != other
