"""Workers that block, are replaced and are killed: `python -m tests.integration.workers_campaign`.

Three parts on one cluster. *blocking*: a handler stands in ``time.sleep`` for four leases, beside an idle worker of the
same group; nobody else may get its record, and the log must name the file and line. *rolling*: all workers are
replaced one after the other, again and again, while records come; every record must be handled exactly once. *killing*:
workers are killed with -9 under the same load; a record may be handled twice only if a worker that was killed had it
in hand, and must then say that it was delivered before. Records of a key are handled in order throughout.
Prints a JSON line for each part; exits 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.cli.service import die_with_parent
from tests.integration.ledgers import tell
from tests.polling import POLL_SECONDS

GROUP, CONCURRENCY = "crew", 8
DEADLINE_S = 600.0  # generous: starting ten processes takes minutes where others keep the machine busy
KEYS = 400
# Of each step a worker appends a line of its own to the journal: ns of the clock that all share, what, record, attempt.
MODULE = """
import asyncio, os, random, time
import ferryline as fl

app = fl.App(name="crew", lease={lease})
journal = os.open("journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

def note(what, number, attempt):
    os.write(journal, f"{{time.monotonic_ns()}} {{os.getpid()}} {{what}} {{number}} {{attempt}}\\n".encode())

@app.subscriber("{topic}", group="crew", lease={lease})
async def handle(number: int, message: fl.QueueMessage[int]) -> None:
    note("began", number, message.delivery_count)
    {work}
    note("ended", number, message.delivery_count)
"""


@dataclass(frozen=True)
class Line:
    """One line of the journal."""

    ns: int
    pid: int
    what: str
    number: int
    attempt: int


class Crew:
    """Worker processes of one app, in a folder of their own."""

    def __init__(self, cluster: ProcessCluster, folder: Path, topic: str, work: str, lease: float) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "crew.py").write_text(MODULE.format(topic=topic, work=work, lease=lease))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
        self._env = clean | {"FERRYLINE_URL": cluster.url, "FERRYLINE_CA": str(cluster.ca), "HOME": str(folder)}
        self._logs: list[Path] = []
        self._starting: dict[Path, subprocess.Popen[bytes]] = {}
        self.workers: list[subprocess.Popen[bytes]] = []

    def spawn(self) -> None:
        command = [sys.executable, "-m", "ferryline.cli", "worker", "run", "crew:app", "--here"]
        command += ["--concurrency", str(CONCURRENCY)]
        self._logs.append(self.folder / f"log-{len(self._logs)}")
        with self._logs[-1].open("w") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self._env, stdout=log, stderr=log,
                preexec_fn=die_with_parent(signal.SIGKILL),
            )  # fmt: skip
        self.workers.append(process)
        self._starting[self._logs[-1]] = process

    async def ready(self) -> None:
        """All that were started are at work."""
        await until(lambda: all(self._at_work(log) for log in list(self._starting)), "workers start")

    def _at_work(self, log: Path) -> bool:
        """A worker that found no cluster in time, on a busy machine, ends: another one takes its place, as it would
        under whatever watches workers."""
        found, process = "at work on" in log.read_text(), self._starting[log]
        if found or process.poll() is not None:
            del self._starting[log]
        if not found and process.poll() is not None:
            self.workers.remove(process)
            self.spawn()
        return found

    async def replace(self, worker: subprocess.Popen[bytes], number: int) -> None:
        """End one with a signal, and start another one in its place."""
        worker.send_signal(number)
        await until(lambda: worker.poll() is not None, f"worker {worker.pid} ends")
        if number == signal.SIGTERM and worker.returncode != 0:
            raise RuntimeError(f"worker {worker.pid} ended with {worker.returncode}")
        self.workers.remove(worker)
        self.spawn()
        await self.ready()

    def end(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()

    @property
    def journal(self) -> list[Line]:
        path = self.folder / "journal"
        rows = (line.split() for line in path.read_text().splitlines()) if path.exists() else iter(())
        return [Line(int(ns), int(pid), what, int(number), int(tried)) for ns, pid, what, number, tried in rows]

    @property
    def log(self) -> str:
        return "".join(log.read_text() for log in self._logs)


async def until(condition: Callable[[], object], what: str, within_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        await asyncio.sleep(POLL_SECONDS)


# -- a handler that blocks -----------------------------------------------------------------------------


async def blocking(client: fl.Client, cluster: ProcessCluster, folder: Path, lease: float, s: float) -> dict[str, Any]:
    """One worker stands still with its record; another one of the same group has nothing to do."""
    await client.admin.create_topic("blocked", partitions=1)
    crew = Crew(cluster, folder, "blocked", f"time.sleep({s:g})", lease)
    try:
        crew.spawn()
        await crew.ready()
        async with client.producer() as producer:
            await producer.send("blocked", 0, key="k")
        await until(lambda: crew.journal, "the record is in hand")
        crew.spawn()
        await crew.ready()
        await until(lambda: len(crew.journal) > 1, "the handler returns", s + DEADLINE_S)
        await drained(client, "blocked")
    finally:
        crew.end()
    place = re.search(r"has not come round.*?crew\.py:(\d+)", crew.log, re.DOTALL)
    source = (crew.folder / "crew.py").read_text().splitlines()
    named = source[int(place.group(1)) - 1].strip() if place else ""
    handled = [(line.what, line.attempt) for line in crew.journal]
    good = handled == [("began", 1), ("ended", 1)] and named.startswith("time.sleep(")
    return {"part": "blocking", "lease_s": lease, "blocked_s": s, "handled": handled, "line": named, "good": good}


async def drained(client: fl.Client, topic: str) -> None:
    """Nothing is left to do."""
    queue, end = client.queue(topic, GROUP), time.monotonic() + DEADLINE_S
    while True:
        try:
            if not sum(part.unsettled for part in await queue.stats()):
                return
        except fl.errors.UnknownGroup:
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"{topic} is not drained: {await queue.stats()}")
        await asyncio.sleep(0.1)


# -- workers that are replaced, or killed --------------------------------------------------------------


class Load:
    """Records of ``KEYS`` keys at a rate, until it is stopped. The value of a record is its number."""

    def __init__(self, client: fl.Client, topic: str, rate: float) -> None:
        self.client, self.topic, self.rate = client, topic, rate
        self.sent = 0
        self.stored: set[int] = set()
        self._stopped = False

    async def run(self) -> None:
        async with self.client.producer() as producer:
            began = time.monotonic()
            while not self._stopped:
                due = int((time.monotonic() - began) * self.rate)
                await asyncio.gather(*(self._send(producer, number) for number in range(self.sent, due)))
                self.sent = max(self.sent, due)
                await asyncio.sleep(0.02)

    async def _send(self, producer: fl.Producer, number: int) -> None:
        try:
            await producer.send(self.topic, number, key=f"k{number % KEYS}")
        except fl.FerrylineError:  # on a busy machine no broker may answer in time: nothing is promised of this one
            return
        self.stored.add(number)

    def stop(self) -> None:
        self._stopped = True


async def under_load(
    client: fl.Client, cluster: ProcessCluster, folder: Path, options: argparse.Namespace, *, kills: int
) -> dict[str, Any]:
    """Replace workers while records come: ``options.rounds`` times all of them, or ``kills`` of them with -9."""
    topic = "killed" if kills else "rolled"
    await client.admin.create_topic(topic, partitions=12)
    lease = 5.0 if kills else 30.0
    crew = Crew(cluster, folder, topic, "await asyncio.sleep(random.uniform(0.005, 0.06))", lease)
    load, killed, began = Load(client, topic, options.rate), dict[int, int](), time.monotonic()
    chance = random.Random(options.seed)
    try:
        for _ in range(options.workers):
            crew.spawn()
        await crew.ready()
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(load.run())
            for _ in range(0 if kills else options.rounds):
                workers = list(crew.workers)
                for first in range(0, len(workers), options.together):
                    together = workers[first : first + options.together]
                    await asyncio.gather(*(crew.replace(worker, signal.SIGTERM) for worker in together))
            for _ in range(kills):
                victim = chance.choice(crew.workers)
                killed[victim.pid] = time.monotonic_ns()
                await crew.replace(victim, signal.SIGKILL)
                await asyncio.sleep(chance.uniform(0.0, 1.0))
            load.stop()
            await loading
        await drained(client, topic)
    finally:
        crew.end()
    found = verdict(crew.journal, load.stored, killed)
    good = not any(found[name] for name in ("lost", "out_of_order", "unmarked", "not_in_hand"))
    good &= bool(found["twice"]) if kills else not found["twice"]
    what = {"part": "killing", "kills": kills} if kills else {"part": "rolling", "restarts": options.rounds}
    what |= {"workers": options.workers, "rate": options.rate, "seconds": round(time.monotonic() - began, 1)}
    return what | found | {"good": good}


def verdict(journal: list[Line], stored: set[int], killed: dict[int, int]) -> dict[str, Any]:
    """``killed``: when each worker was, by pid.

    ``twice``: deliveries of records after the first one. ``unmarked``: those that did not say that they were;
    ``not_in_hand``: those of a record that the last worker that began it had finished a second before it was killed, or
    that was not killed at all.
    """
    began: dict[int, list[Line]] = defaultdict(list)
    ended: dict[tuple[int, int], int] = {}
    for line in sorted(journal, key=lambda line: line.ns):
        if line.what == "began":
            began[line.number].append(line)
        else:
            ended[line.number, line.pid] = line.ns
    again = [(before, line) for lines in began.values() for before, line in itertools.pairwise(lines)]
    unmarked = sum(line.attempt < 2 for _, line in again)
    not_in_hand = 0
    for before, _ in again:
        at = killed.get(before.pid)
        done = ended.get((before.number, before.pid))
        not_in_hand += at is None or (done is not None and done < at - 1_000_000_000)
    in_hand = Counter(before.pid for before, _ in again)
    return {
        "stored": len(stored),
        "handled": len(began),
        "lost": sum(not any((number, line.pid) in ended for line in began[number]) for number in stored),
        "twice": len(again),
        "unmarked": unmarked,
        "not_in_hand": not_in_hand,
        "most_of_one": max(in_hand.values(), default=0),
        "out_of_order": disorder(began),
    }


def disorder(began: dict[int, list[Line]]) -> int:
    """Records whose handling began before that of the one before them in their key, or whose key went back."""
    return sum(
        lines[0].ns < began[number - KEYS][-1].ns for number, lines in began.items() if number - KEYS in began
    )  # fmt: skip


async def told(part: Coroutine[Any, Any, dict[str, Any]], ledger: Path | None) -> dict[str, Any]:
    found = await part
    tell(found, ledger)
    return found


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="ferryline-workers-", dir=options.dir) as name:
        cluster = ProcessCluster(Path(name) / "cluster", brokers=3)
        try:
            await cluster.start()
            async with fl.connect(cluster.url, ca=cluster.ca) as client, asyncio.TaskGroup() as tasks:
                parts = []
                if options.blocked:
                    parts.append(blocking(client, cluster, Path(name) / "blocking", options.lease, options.blocked))
                if options.rounds:
                    parts.append(under_load(client, cluster, Path(name) / "rolling", options, kills=0))
                if options.kills:
                    parts.append(under_load(client, cluster, Path(name) / "killing", options, kills=options.kills))
                return [await one for one in [tasks.create_task(told(part, options.ledger)) for part in parts]]
        finally:
            await cluster.kill_all()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    made.add_argument("--lease", type=float, default=30.0, help="of the handler that blocks, s")
    made.add_argument("--blocked", type=float, default=120.0, help="how long it blocks, s; 0: not at all")
    made.add_argument("--workers", type=int, default=10)
    made.add_argument("--rounds", type=int, default=20, help="how often all workers are replaced")
    made.add_argument("--together", type=int, default=1, help="workers that are replaced at the same time")
    made.add_argument("--kills", type=int, default=20, help="workers that are killed with -9")
    made.add_argument("--rate", type=float, default=200.0, help="records a second")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--ledger", type=Path, help="append the lines to this file")
    made.add_argument("--dir", help="where the data goes; default: the folder for temporary files")
    return made


def main() -> int:
    options = parser().parse_args()
    found = asyncio.run(run(options))
    return 0 if all(one["good"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
