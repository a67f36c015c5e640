"""Workers on a real cluster: in this process, and as the program that a user starts."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

import ferryline as fl
from ferryline.app.queue import GROUP
from ferryline.cli.processes import LocalCluster
from ferryline.queue_admin import Queue
from tests.polling import poll

pytestmark = pytest.mark.process

QUICK = fl.exponential(0.05, 0.2)

# What the program runs. It tells what it did in a file, one JSON line for each.
MODULE = """
import asyncio, json, os, time
import ferryline as fl

app = fl.App(name="{name}", lease=5)

def tell(**what):
    with open("told", "a") as file:
        file.write(json.dumps({{"pid": os.getpid(), "at": time.time(), **what}}) + "\\n")

@app.task(queue="{name}.jobs", retry=fl.Retry(3, backoff=fl.exponential(0.05, 0.1)))
async def work(n: int, seconds: float = 0.0) -> int:
    tell(began=n)
    await asyncio.sleep(seconds)
    tell(ended=n)
    return n

@app.task(queue="{name}.jobs")
def stuck(seconds: float) -> None:
    tell(began="stuck")
    time.sleep(seconds)

@app.task(queue="{name}.jobs")
async def block(seconds: float) -> None:
    tell(began="block")
    time.sleep(seconds)

@app.on_stop
async def stop():
    tell(stopped=True)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    made = LocalCluster(tmp_path_factory.mktemp("workers"), brokers=2)
    made.start()
    yield made
    made.kill_all()


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.url, ca=cluster.ca) as client:
        yield client


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Program:
    """`ferryline worker run` in a folder of its own."""

    def __init__(self, folder: Path, env: dict[str, str], name: str) -> None:
        self.folder = folder
        self.env = env
        self.name = name
        self.source(MODULE.format(name=name))
        self.process: subprocess.Popen[str] | None = None

    def source(self, text: str) -> None:
        (self.folder / "jobs.new").write_text(text)
        (self.folder / "jobs.new").replace(self.folder / "jobs.py")  # whoever watches it never sees half of it

    def start(self, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ferryline.cli", "worker", "run", "jobs:app", *args]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=log, text=True)
        return self.process

    @property
    def told(self) -> list[dict[str, Any]]:
        path = self.folder / "told"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def workers(self) -> list[int]:
        """Pids of the processes that work."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if _lives(child)]

    async def ended(self, within_s: float = 60) -> int:
        assert self.process is not None
        await poll(lambda: self.process.poll() is not None, within_s=within_s, what="the program ends")  # type: ignore[union-attr]
        return int(self.process.returncode)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            workers = psutil.Process(self.process.pid).children()
            self.process.kill()
            self.process.wait()
            for worker in workers:  # they end by themselves, unless a handler blocks them
                try:
                    worker.kill()
                except psutil.NoSuchProcess:
                    continue


@pytest.fixture
def program(cluster: LocalCluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Program]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
    env = clean | {"HOME": str(tmp_path), "FERRYLINE_URL": cluster.url, "FERRYLINE_CA": str(cluster.ca)}
    env |= {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    made = Program(tmp_path, env, f"w{time.time_ns() % 10**10}")
    yield made
    made.end()
    request.node.add_report_section("call", "log of the worker", made.log if (tmp_path / "log").exists() else "")


@asynccontextmanager
async def submitter(program: Program, client: fl.Client) -> AsyncIterator[dict[str, fl.Task[Any, Any]]]:
    """The same app, connected here only to submit."""
    scope: dict[str, Any] = {}
    exec(compile(MODULE.format(name=program.name), "jobs.py", "exec"), scope)
    app: fl.App = scope["app"]
    async with app.connected(client):
        yield app.tasks


# -- in this process -----------------------------------------------------------------------------------


async def test_a_subscriber_acks_retries_and_gives_up(client: fl.Client) -> None:
    await client.admin.create_topic("orders", partitions=3)
    app, tried = fl.App(name="billing"), Counter[int]()

    @app.subscriber("orders", retry=fl.Retry(3, backoff=QUICK))
    async def handle(order: dict[str, int]) -> None:
        tried[order["n"]] += 1
        if order["n"] % 10 == 0:
            raise ValueError(f"no stock for {order['n']}")

    async with app.connected(client), app.worker():
        for n in range(50):
            await app.producer.send("orders", {"n": n}, key=f"k{n}")
        await poll(lambda: tried.total() == 60, what="45 once, 5 three times")

        async def letters() -> list[Any]:
            if client.routing.topic("orders.dlq") is None:
                return []
            found = [letter async for letter in client.dead_letters("orders").browse()]
            return found if len(found) == 5 else []

        found = await poll(letters, what="5 dead letters")
        assert {letter.reason for letter in found} == {f"ValueError: no stock for {n}" for n in range(0, 50, 10)}
    parts = await Queue(client, "orders", "billing").stats()
    assert sum(part.unsettled for part in parts) == 0


async def test_a_handler_that_blocks_the_loop_loses_nothing_and_is_named(
    client: fl.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """1. leases of four seconds  2. a handler blocks the loop for nine  3. nobody else gets the record  4. the log says
    where it stood.
    """
    await client.admin.create_topic("blocked", partitions=1)
    app, attempts = fl.App(name="blocking"), []

    @app.subscriber("blocked", lease=4)
    async def handle(context: fl.Context) -> None:
        attempts.append(context.attempt)
        time.sleep(9)  # noqa: ASYNC251  (this line is looked for below)

    caplog.set_level(logging.WARNING)
    async with app.connected(client), app.worker(), client.receiver("blocked", group="blocking") as other:
        await app.producer.send("blocked", b"x", key="k")
        taken = await other.receive(1, 0.5)
        for message in taken:  # whoever of the two came first: the worker is to have it
            await message.release()
        await other.close()
        await poll(lambda: attempts, within_s=60)
        async with client.receiver("blocked", group="blocking") as third:
            assert not await third.receive(1, 5)
    assert attempts == [1]
    [told] = [record.getMessage() for record in caplog.records if "has not come round" in record.getMessage()]
    source, first = Path(__file__).read_text().splitlines(), told.split(f"{__file__}:")[1]
    assert "time.sleep(9)" in source[int(first.split()[0]) - 1]


async def test_a_worker_that_stops_gives_back_long_before_its_leases_end(client: fl.Client) -> None:
    await client.admin.create_topic("stopping", partitions=2)
    app = fl.App(name="stopping")

    @app.subscriber("stopping", concurrency=4, prefetch=100)
    async def handle(order: dict[str, int]) -> None:
        await asyncio.sleep(1000)

    async with app.connected(client):
        for n in range(50):
            await app.producer.send("stopping", {"n": n})
        worker = app.worker(grace=0)
        await worker.start()
        await poll(lambda: worker.lines[0].receiver.unsettled == 50, within_s=60)
        async with client.receiver("stopping", group="stopping", prefetch=100) as other:
            assert not await other.receive(1, 0.2)  # now it is parked at both brokers
            began = time.monotonic()
            stopping = asyncio.create_task(worker.stop())
            back: list[fl.QueueMessage[Any]] = []
            while len(back) < 50:
                back += await other.receive(50, 1)
                assert time.monotonic() - began < 20.0, f"{len(back)} of 50"
            assert {message.delivery_count for message in back} == {1}
            await stopping
            await other.ack_many(back)


async def test_tasks_return_fail_and_time_out(client: fl.Client) -> None:
    app = fl.App(name="tasks")

    @app.task(queue="media", timeout=2, retry=fl.Retry(2, backoff=QUICK))
    async def resize(url: str, width: int = 5) -> str:
        if url == "slow":
            await asyncio.sleep(60)
        if url == "bad":
            raise ValueError("not an image")
        return f"{url}:{width}"

    @app.task(queue="media", timeout=2, retry=fl.Retry(1))
    def in_a_thread(seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    async with app.connected(client), app.worker(concurrency=4):
        assert await (await resize.submit("a", width=7)).result(60) == "a:7"
        assert await (await in_a_thread.submit(0.0)).result(60) == "done"
        job = await resize.submit("bad")
        assert [str(status) async for status in job.watch()][-2:] == [
            "running (attempt 2 of 2)",
            "dead: ValueError: not an image",
        ]
        for late in (await resize.submit("slow"), await in_a_thread.submit(4.0)):
            with pytest.raises(fl.JobFailed, match="took longer than 2 s"):
                await late.result(60)


# -- the program ---------------------------------------------------------------------------------------


async def test_sigterm_finishes_what_is_in_hand_and_hands_back_the_rest(program: Program, client: fl.Client) -> None:
    async with submitter(program, client) as tasks:
        jobs = [await tasks["work"].submit(n, 3.0) for n in range(10)]
        process = program.start("--concurrency", "2", "--grace", "10")
        await poll(lambda: len([one for one in program.told if "began" in one]) == 2, within_s=60)
        process.send_signal(signal.SIGTERM)
        assert await program.ended() == 0
        told = Counter(name for one in program.told for name in one)
        assert (told["began"], told["ended"], told["stopped"]) == (2, 2, 1)
        states = Counter([(await job.status()).state for job in jobs])
        assert states == {fl.JobState.DONE: 2, fl.JobState.QUEUED: 8}
        parts = await Queue(client, f"{program.name}.jobs", GROUP).stats()
        assert sum(part.leased for part in parts) == 0


async def test_a_thread_that_does_not_end_holds_nothing_up(program: Program, client: fl.Client) -> None:
    async with submitter(program, client) as tasks:
        job = await tasks["stuck"].submit(60.0)
        process = program.start("--grace", "0.5")
        await poll(lambda: program.told, within_s=60)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert await program.ended() == 0
        assert time.monotonic() - began < 30
        assert (await job.status()).state is fl.JobState.QUEUED


async def test_a_second_signal_ends_what_does_not_hear_the_first(program: Program, client: fl.Client) -> None:
    async with submitter(program, client) as tasks:
        await tasks["block"].submit(60.0)
        process = program.start("--grace", "60")
        await poll(lambda: program.told, within_s=60)
        process.send_signal(signal.SIGTERM)
        await poll(lambda: "stopping" in program.log)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert await program.ended(30) == 0
        assert "stopped" not in str(program.told)


async def test_workers_end_with_the_program_that_watches_them(program: Program) -> None:
    process = program.start("--autoscale", "2")
    await poll(lambda: len(program.workers()) == 2, within_s=60)
    workers = program.workers()
    process.kill()
    await poll(lambda: not any(psutil.pid_exists(pid) for pid in workers), within_s=60)


async def test_a_worker_that_is_killed_is_replaced_and_its_job_runs_again(program: Program, client: fl.Client) -> None:
    async with submitter(program, client) as tasks:
        program.start()
        await poll(program.workers, within_s=60)
        job = await tasks["work"].submit(1, 2.0)
        await poll(lambda: program.told, within_s=60)
        [first] = program.workers()
        os.kill(first, signal.SIGKILL)
        assert await job.result(60) == 1  # after its lease
        assert {one["pid"] for one in program.told if "ended" in one} == set(program.workers())
        assert first not in program.workers()


async def test_a_program_that_keeps_dying_is_started_later_and_later(program: Program) -> None:
    program.source("import os\nos._exit(9)\n")
    process = program.start()
    said = [f"another one starts in {wait} s" for wait in (1, 2, 4)]
    await poll(lambda: all(words in program.log for words in said), within_s=60, what="one, two, four seconds")
    assert program.log.count("ended with status 9") >= 3
    process.send_signal(signal.SIGTERM)
    assert await program.ended() == 0


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import ferryline as fl\napp = 5\nshop = fl.App()\n", "jobs:shop is"),
        ("import ferryline as fl\napp = fl.App()\n@app.subscriber('t')\ndef f(a: int, b: str): ...\n", "'b': str"),
        ("import ferryline as fl\napp = fl.App()\n", "no subscriber and no task"),
    ],
)
async def test_an_app_that_cannot_run_ends_the_program_with_usage(program: Program, source: str, named: str) -> None:
    program.source(source)
    program.start()
    assert await program.ended() == 2
    assert named in program.log


async def test_a_change_of_the_source_replaces_the_workers(program: Program, client: fl.Client) -> None:
    async with submitter(program, client) as tasks:
        program.start("--reload")
        assert await (await tasks["work"].submit(1)).result(30) == 1
        before = program.workers()
        program.source(MODULE.format(name=program.name).replace("return n", "return n + 100"))
        await poll(lambda: program.workers() and not set(program.workers()) & set(before), within_s=60)
        assert await (await tasks["work"].submit(1)).result(30) == 101
        program.source("this is no Python")
        await poll(lambda: "SyntaxError" in program.log, within_s=60)
        program.source(MODULE.format(name=program.name))
        assert await (await tasks["work"].submit(2)).result(60) == 2


async def test_a_backlog_brings_processes_and_silence_ends_them(program: Program, client: fl.Client) -> None:
    """None at first; three for forty jobs of a second each; none again some seconds after the last."""
    async with submitter(program, client) as tasks:
        program.start("--autoscale", "0:3", "--concurrency", "1", "--drain", "3")
        for n in range(40):
            await tasks["work"].submit(n, 1.0)
        await poll(lambda: len(program.workers()) == 3, within_s=60)
        await poll(lambda: not program.workers(), within_s=60)
    assert Counter(one["ended"] for one in program.told if "ended" in one) == Counter(range(40))


async def test_a_schedule_fires_once_with_two_workers(program: Program, client: fl.Client) -> None:
    program.source(
        MODULE.format(name=program.name)
        + "\n@app.schedule(every=1)\nasync def tick(context: fl.Context) -> None:\n    tell(tick=context.job_id)\n"
    )
    process = program.start("--autoscale", "2")

    def ticks() -> list[dict[str, Any]]:
        return [one for one in program.told if "tick" in one]

    await poll(lambda: len(ticks()) >= 6, within_s=40)
    assert len(program.workers()) == 2
    process.send_signal(signal.SIGTERM)
    assert await program.ended() == 0
    assert {one["tick"][:7] for one in ticks()} == {"tick@20"}  # by the time that was due
    assert set(Counter(one["tick"] for one in ticks()).values()) == {1}
    due = [datetime.fromisoformat(one["tick"].removeprefix("tick@")).timestamp() for one in ticks()]
    assert all(one["at"] >= moment for one, moment in zip(ticks(), due, strict=True)), "none before its time"


def test_show_says_what_an_app_declares(program: Program) -> None:
    command = [sys.executable, "-m", "ferryline.cli", "worker", "show", "jobs:app", "-o", "json"]
    done = subprocess.run(command, cwd=program.folder, env=program.env, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert [(row["kind"], row["name"], row["attempts"]) for row in rows] == [
        ("task", "work", 3),
        ("task", "stuck", None),
        ("task", "block", None),
    ]


Args = list[str]
REFUSED: list[tuple[Args, str]] = [
    (["--autoscale", "3:1"], "MIN <= MAX"),
    (["--autoscale", "x"], "MIN:MAX"),
    (["--autoscale", "0:0"], "MAX at least 1"),
    (["--here", "--reload"], "--here"),
]


@pytest.mark.parametrize(("args", "named"), REFUSED)
async def test_options_that_make_no_sense_are_refused(program: Program, args: Args, named: str) -> None:
    program.start(*args)
    assert await program.ended() == 2
    assert named in program.log


async def test_every_process_serves_what_its_handlers_did_on_a_port_of_its_own(
    client: fl.Client, program: Program, free_port: Callable[[], int]
) -> None:
    port = free_port()
    program.start("--autoscale", "2", "--metrics-port", str(port))
    await poll(lambda: program.log.count("/metrics") == 2, within_s=60, what="both say where")
    ports = [int(found) for found in re.findall(r"metrics: http://127\.0\.0\.1:(\d+)/metrics", program.log)]
    assert len(set(ports)) == 2
    assert min(ports) >= port
    async with submitter(program, client) as tasks, aiohttp.ClientSession() as http:
        jobs = [await tasks["work"].submit(number) for number in range(5)]
        assert [await job.result(timeout=30) for job in jobs] == list(range(5))

        async def handled() -> float:
            total = 0.0
            for one in ports:
                async with http.get(f"http://127.0.0.1:{one}/metrics") as answer:
                    text = await answer.text()
                total += sum(map(float, re.findall(r"^ferryline_worker_handled_total{.*} (\d+)$", text, re.MULTILINE)))
            return total

        async def all_five() -> bool:
            return await handled() == 5

        await poll(all_five, within_s=60, what="five were handled")
