"""Kill -9 at every step of the move to the dead letters: `python -m tests.integration.dead_letter_campaign`.

Receivers reject every third record while brokers die, one after the other: the source's primary after it was asked for
a copy, before and after it was sent, after it was told; the target's primary before and after it appended, and after it
answered. Prints one JSON line, and exits 1 unless every rejected record was copied once, nothing else was copied, and
everything else was acknowledged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from tests.integration.dying_broker.sitecustomize import SOURCE_STEPS, TARGET_STEPS

TOPIC, GROUP, LETTERS = "jobs", "workers", "jobs.dlq"
HOOK = Path(__file__).with_name("dying_broker")
PARTITIONS = 6
STEP_S = 30.0
DRAIN_S = 60.0


@dataclass
class Account:
    """What was sent and what became of it. ``kills``: by step; ``missed``: steps that nobody came to in time."""

    kills: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    sent: int = 0
    dead: int = 0
    acked: int = 0
    copies: int = 0
    twice: int = 0
    lost: int = 0
    wrong: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.missed or self.twice or self.lost or self.wrong) and self.copies == self.dead > 0

    def line(self) -> str:
        return json.dumps({"good": self.good, **self.__dict__, "kills": dict(self.kills)})


class Campaign:
    """One cluster, one stream, and a kill for each step of each round."""

    def __init__(self, cluster: ProcessCluster, folder: Path, rate: float) -> None:
        self.cluster = cluster
        self.account = Account()
        self._folder = folder
        self._rate = rate
        self._stop = asyncio.Event()
        self._acked: set[int] = set()
        self._sent: set[int] = set()

    async def run(self, steps: list[str]) -> Account:
        began = time.monotonic()
        async with fl.connect(self.cluster.urls, ca=self.cluster.ca) as client:
            retry = fl.Retry(attempts=1_000, backoff=fl.exponential(0.01, 0.1))
            await client.admin.create_topic(TOPIC, partitions=PARTITIONS, retry=retry)
            # Spread another way, the dead letters have other primaries than what they come from.
            await client.admin.create_topic("filler", partitions=1)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send(client))
                receivers = [tasks.create_task(self._receive(client)) for _ in range(3)]
                for step in steps:
                    await self._kill_at(step)
                self._stop.set()
                await self._drain(client)
                for receiver in receivers:
                    receiver.cancel()
            await self._count(client)
        self.account.seconds = round(time.monotonic() - began, 1)
        return self.account

    async def _send(self, client: fl.Client) -> None:
        async with client.producer() as producer:
            number = 0
            while not self._stop.is_set():
                await producer.send(TOPIC, {"n": number}, key=f"key-{number % 40}")
                self._sent.add(number)
                number += 1
                await asyncio.sleep(1 / self._rate)

    async def _receive(self, client: fl.Client) -> None:
        """Work until cancelled; what a dying broker did not answer comes again."""
        async with client.receiver(TOPIC, group=GROUP, value=dict, lease=5) as receiver:
            async for message in receiver:
                number = message.value["n"]
                try:
                    if number % 3 == 0:
                        await message.reject(f"number {number}")
                    else:
                        await message.ack()
                        self._acked.add(number)
                except fl.FerrylineError:
                    continue

    async def _kill_at(self, step: str) -> None:
        """Let a broker die at a step, and start it again once the others have taken over."""
        trap = self._folder / step
        trap.touch()
        end = time.monotonic() + STEP_S
        while not (fallen := [s.name for s in self.cluster.local.ended()]):
            if time.monotonic() > end:
                trap.unlink(missing_ok=True)
                self.account.missed.append(step)
                return
            await asyncio.sleep(0.02)
        self.account.kills[step] += 1
        await asyncio.sleep(1.0)  # the others lead now, and the stream goes on
        for name in fallen:
            await self.cluster.restart(name)
        await asyncio.sleep(1.5)  # its copies catch up, so that the next kill leaves somebody in sync

    async def _drain(self, client: fl.Client) -> None:
        queue, end = client.queue(TOPIC, GROUP), time.monotonic() + DRAIN_S
        while time.monotonic() < end:
            try:
                if not sum(part.unsettled for part in await queue.stats()):
                    return
            except fl.FerrylineError:
                pass
            await asyncio.sleep(0.2)

    async def _count(self, client: fl.Client) -> None:
        account = self.account
        found: Counter[int] = Counter()
        async with client.consumer(LETTERS, start="start", value=dict) as consumer:
            while batch := await consumer.pull(1_000, 2.0):
                for message in batch:
                    found[message.value["n"]] += 1
                    account.wrong += message.headers.text("fl-dead-reason") != f"number {message.value['n']}"
        dead = {number for number in self._sent if number % 3 == 0}
        account.sent, account.dead, account.acked = len(self._sent), len(dead), len(self._acked)
        account.copies = sum(found.values())
        account.twice = account.copies - len(found)
        account.lost = len(dead - set(found)) + len(self._sent - dead - self._acked)
        account.wrong += len(set(found) - dead)


async def run_campaign(rounds: int, *, rate: float = 150.0, steps: tuple[str, ...] = ()) -> Account:
    """A cluster of its own, and a kill at each step in each round. The topic is made once, so that step comes once."""
    wanted = list(steps or (*SOURCE_STEPS, *TARGET_STEPS))
    with tempfile.TemporaryDirectory(prefix="ferryline-dead-") as name:
        folder = Path(name) / "die-at"
        folder.mkdir()
        first = [step for step in wanted if step == "made"]
        each = [step for step in wanted if step != "made"]
        for step in first:
            (folder / step).touch()  # before the first record dies
        cluster = ProcessCluster(Path(name), brokers=3, env={"DIE_AT": str(folder), "PYTHONPATH": str(HOOK)})
        try:
            await cluster.start()
            return await Campaign(cluster, folder, rate).run(first + each * rounds)
        finally:
            await cluster.kill_all()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=150.0, help="records a second")
    parser.add_argument(
        "--step", action="append", choices=(*SOURCE_STEPS, *TARGET_STEPS), help="only these; repeatable"
    )
    options = parser.parse_args()
    account = asyncio.run(run_campaign(options.rounds, rate=options.rate, steps=tuple(options.step or ())))
    sys.stdout.write(account.line() + "\n")
    return 0 if account.good else 1


if __name__ == "__main__":
    sys.exit(main())
