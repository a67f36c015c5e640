"""FalconQ's surface on a real cluster, with real curl: what its programs rely on, over lost answers and kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.drill import healed
from ferryline.cli.processes import LocalCluster, Service, free_port

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
]
ROOT = Path(__file__).resolve().parents[2]
READY_S = 30.0
OVERDUE_S = 10.5  # queues that do not ask strictly let a record that has waited for 10 s go first


class Falcon:
    """One gateway process, and curl."""

    def __init__(self, cluster: LocalCluster, folder: Path, partitions: int = 1) -> None:
        args = ["falconq", "--port", str(free_port(set())), "--data-dir", str(folder / "data")]
        args += ["--partitions", str(partitions), "--url", ",".join(cluster.urls), "--ca", str(cluster.ca)]
        self.service = Service("falconq", "ferryline.cli", folder, 0, args)
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}

    def start(self) -> Falcon:
        self.service.spawn(self._env, signal.SIGKILL)
        end = time.monotonic() + READY_S
        while not self.service.read_ready():
            assert time.monotonic() < end, self.service.log_tail()
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        self.service.send_signal(signal.SIGKILL)
        if self.service.process is not None:
            self.service.process.wait()

    def curl(self, path: str, *args: str) -> tuple[int, Any]:
        command = ["curl", "-sS", "--max-time", "60", "-w", "\n%{http_code}", self.service.url + path, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
        body, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(body)

    def unwritten(self) -> list[Path]:
        """Positions whose answer perhaps never left."""
        return list((self.service.folder / "data").glob("*.out"))

    def publish(self, topic: str, message: Any, priority: str = "low", **fields: Any) -> Any:
        body = json.dumps({"message": message, "priority": priority, **fields})
        status, answer = self.curl(f"/topic/{topic}/publish", "-d", body)
        assert status == 201, answer
        return answer

    def consume(self, topic: str, consumer: str = "c", batch: int = 10, **query: Any) -> Any:
        extra = "".join(f"&{name}={value}" for name, value in query.items())
        status, answer = self.curl(f"/topic/{topic}/consume?consumerID={consumer}&batch={batch}{extra}")
        assert status == 200, answer
        return answer

    def messages(self, topic: str, *args: Any, **query: Any) -> list[Any]:
        return [one["message"] for one in self.consume(topic, *args, **query)["messages"]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    made = LocalCluster(tmp_path_factory.mktemp("falconq"), brokers=3)
    made.start()
    yield made
    made.kill_all()


@pytest.fixture
def start(cluster: LocalCluster, tmp_path: Path) -> Iterator[Callable[..., Falcon]]:
    started: list[Falcon] = []

    def begin(folder: str = "falconq", **options: Any) -> Falcon:
        falcon = Falcon(cluster, tmp_path / folder, **options)
        started.append(falcon)
        return falcon.start()

    yield begin
    for falcon in started:
        falcon.kill()


@pytest.fixture
def falcon(start: Callable[..., Falcon]) -> Falcon:
    return start()


def test_the_example_runs(falcon: Falcon) -> None:
    command = ["sh", str(ROOT / "examples/falconq.sh"), falcon.service.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_high_comes_before_low_also_when_it_was_published_last(falcon: Falcon) -> None:
    for number in range(3):
        falcon.publish("order", f"low {number}")
    assert falcon.messages("order", batch=1) == ["low 0"]
    for number in range(2):
        falcon.publish("order", f"high {number}", "high")
    assert falcon.messages("order", batch=3) == ["high 0", "high 1", "low 1"]
    falcon.publish("order", "high 2", "high")
    assert falcon.messages("order") == ["high 2", "low 2"]
    assert falcon.messages("order") == []


@pytest.mark.slow
def test_high_comes_before_low_also_when_the_low_ones_have_waited_for_long(
    falcon: Falcon, eventually_blocking: Any
) -> None:
    for number in range(3):
        falcon.publish("patience", f"low {number}")
    assert falcon.messages("patience", batch=1) == ["low 0"]
    seen = time.monotonic()
    eventually_blocking(lambda: time.monotonic() - seen > OVERDUE_S, within_s=2 * OVERDUE_S, what="they are overdue")
    falcon.publish("patience", "high", "high")
    assert falcon.messages("patience", batch=2) == ["high", "low 1"]


def test_every_consumer_has_its_own_position_and_gets_everything_once(falcon: Falcon) -> None:
    sent = [{"number": number, "text": "grüße"} for number in range(25)]
    for message in sent:
        falcon.publish("copies", message)
    for consumer in ("one", "two"):
        got: list[Any] = []
        while batch := falcon.messages("copies", consumer, batch=7):
            got += batch
        assert got == sent
    assert falcon.messages("copies", "one") == []


def test_with_a_token_a_call_can_be_repeated_until_its_answer_arrived(falcon: Falcon) -> None:
    for number in range(4):
        falcon.publish("tokens", number)
    first = falcon.consume("tokens", batch=2, ack="")
    again = falcon.consume("tokens", batch=4, ack="")
    assert (again["messages"], again["ack"], again["repeated"]) == (first["messages"], first["ack"], True)
    second = falcon.consume("tokens", batch=2, ack=first["ack"])
    assert [one["message"] for one in second["messages"]] == [2, 3]
    assert falcon.consume("tokens", batch=2, ack=first["ack"])["messages"] == second["messages"]
    empty = falcon.consume("tokens", ack=second["ack"])
    assert (empty["messages"], empty["ack"]) == ([], second["ack"])
    status, problem = falcon.curl(f"/topic/tokens/consume?consumerID=c&ack={first['ack']}")
    assert (status, problem["code"]) == (409, "CONFLICT")
    assert second["ack"] in problem["detail"]


def test_a_gateway_that_dies_repeats_nothing_and_skips_nothing(falcon: Falcon, eventually_blocking: Any) -> None:
    for number in range(9):
        falcon.publish("deaths", number)
    got: list[Any] = []
    for _ in range(3):
        got += falcon.messages("deaths", batch=3)
        eventually_blocking(lambda: not falcon.unwritten(), what="the gateway knows that its answer left")
        falcon.kill()
        falcon.start()
    assert got == list(range(9))
    assert falcon.messages("deaths") == []


def test_with_a_token_nothing_is_doubled_whenever_the_gateway_dies(falcon: Falcon) -> None:
    for number in range(6):
        falcon.publish("moments", number)
    got: list[Any] = []
    ack = ""
    for _ in range(3):
        answer = falcon.consume("moments", batch=2, ack=ack)
        falcon.kill()  # perhaps before it knows that its answer left
        falcon.start()
        assert falcon.consume("moments", batch=2, ack=ack)["messages"] == answer["messages"]
        got += [one["message"] for one in answer["messages"]]
        ack = answer["ack"]
    assert got == list(range(6))
    assert falcon.messages("moments", ack=ack) == []


def test_an_answer_that_its_caller_did_not_wait_for_comes_again(falcon: Falcon, eventually_blocking: Any) -> None:
    falcon.publish("lost", "once")
    with socket.create_connection(("127.0.0.1", falcon.service.ready["port"])) as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closing resets the connection
        caller.sendall(b"GET /topic/lost/consume?consumerID=c HTTP/1.1\r\nHost: localhost\r\n\r\n")
    eventually_blocking(falcon.unwritten, what="the answer is out, and not written")
    answer = falcon.consume("lost")
    assert ([one["message"] for one in answer["messages"]], answer["repeated"]) == (["once"], True)
    assert falcon.messages("lost") == []


def test_a_gateway_that_lost_its_positions_gives_the_last_answer_again(start: Callable[..., Falcon]) -> None:
    first = start("first")
    for number in range(3):
        first.publish("memory", number)
    assert first.messages("memory", batch=2) == [0, 1]
    first.kill()
    other = start("other")
    assert other.messages("memory", batch=3) == [0, 1, 2], "what was leased and not settled is not lost"


def test_partitions_can_be_named_everywhere_and_need_not_be(start: Callable[..., Falcon]) -> None:
    falcon = start(partitions=3)
    for number in range(6):
        where = falcon.publish("parts", f"{number}", "high" if number == 5 else "low", partition=number % 3)
        assert where["partition"] == number % 3
    status, answer = falcon.curl("/topics/parts/partitions")
    assert status == 200
    assert [(one["partition"], one["end"] > one["start"]) for one in answer["partitions"]] == [
        (0, True), (1, True), (2, True),
    ]  # fmt: skip
    assert all(one["primary"] for one in answer["partitions"])
    assert "parts" in falcon.curl("/topics")[1]["topics"]
    assert falcon.messages("parts", "whole", batch=3) == ["5", "0", "1"], "the high one of any partition goes first"
    assert sorted(falcon.messages("parts", "whole")) == ["2", "3", "4"]
    assert falcon.messages("parts", "one", partition=1) == ["1", "4"]
    assert falcon.messages("parts", "one", partition=2) == ["5", "2"], "partition 2 has its own last answer"
    assert falcon.messages("parts", "one", partition=1) == []
    status, answer = falcon.curl("/topic/parts/peek?offset=0&batch=2&partition=1")
    assert [one["message"] for one in answer["messages"]] == ["1", "4"]
    status, answer = falcon.curl(f"/topic/parts/peek?offset={answer['messages'][1]['offset']}&partition=1")
    assert [one["message"] for one in answer["messages"]] == ["4"]
    assert falcon.curl("/topic/parts/peek?offset=1000000")[1]["messages"] == []


async def in_sync(cluster: LocalCluster, topic: str, partitions: int) -> None:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        assert await healed(client, topic, partitions, 2, 60)


async def copies(cluster: LocalCluster, topic: str) -> list[tuple[int, ...]]:
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        return [part.replicas for part in (await client.admin.describe_topic(topic)).partitions]


def test_a_partition_without_primary_does_not_hold_up_the_others(
    cluster: LocalCluster, start: Callable[..., Falcon]
) -> None:
    falcon = start(partitions=3)
    for number in range(12):
        falcon.publish("alone", number, partition=number % 3)
    assert falcon.messages("alone", batch=1) == [0]
    replicas = asyncio.run(copies(cluster, "alone"))
    gone = next(number for number in (1, 2) if set(replicas[number]) != set(replicas[0]))
    names = [cluster.name_of(broker) for broker in replicas[gone]]
    for name in names:
        cluster.kill(name)
    try:
        got: list[int] = []
        took: list[float] = []
        end = time.monotonic() + 90
        while len(got) < 4:  # at first nobody knows that the brokers are gone
            assert time.monotonic() < end, "the other partitions have a copy that lives"
            asked = time.monotonic()
            status, answer = falcon.curl("/topic/alone/consume?consumerID=c&batch=100")
            if status == 200:
                took.append(time.monotonic() - asked)
                got += [one["message"] for one in answer["messages"]]
        assert all(number % 3 != gone for number in got)
        assert min(took) < 8, "the time that a partition without primary is given alone is longer"
    finally:
        for name in names:
            cluster.start_one(name)
    asyncio.run(in_sync(cluster, "alone", 3))
    while found := falcon.messages("alone", batch=100):
        got += found
    assert sorted([0, *got]) == list(range(12))


def test_nothing_is_lost_or_doubled_while_primaries_are_killed(
    cluster: LocalCluster, start: Callable[..., Falcon]
) -> None:
    falcon = start(partitions=3)
    sent: list[str] = []
    got: list[str] = []
    over = threading.Event()

    def publish() -> None:
        number = 0
        while not over.is_set():
            name = f"{number % 3}/{number}"
            body = json.dumps({"message": name, "priority": "low", "partition": number % 3})
            if falcon.curl("/topic/kills/publish", "-d", body)[0] == 201:
                sent.append(name)
            number += 1

    falcon.publish("kills", "0/-1", partition=0)
    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        for name in cluster.brokers[:2]:
            end = time.monotonic() + 90
            goal = len(got) + 30
            cluster.kill(name)
            while len(got) < goal:
                assert time.monotonic() < end, "nothing comes any more"
                status, answer = falcon.curl("/topic/kills/consume?consumerID=c&batch=5")
                got += [one["message"] for one in answer["messages"]] if status == 200 else []
            cluster.start_one(name)
            asyncio.run(in_sync(cluster, "kills", 3))  # or the next one takes the last copy of a partition along
    finally:
        over.set()
        publisher.join()
    end = time.monotonic() + 90
    while missing := {"0/-1", *sent} - set(got):
        assert time.monotonic() < end, f"{len(missing)} are missing"
        got += falcon.messages("kills", batch=100)
    assert len(got) == len(set(got)), "none came twice"
    for partition in "012":
        numbers = [int(name.split("/")[1]) for name in got if name.startswith(partition)]
        assert numbers == sorted(numbers), "in the order of the log"


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/topic/there/publish", "{", 400, "body"),
        ("/topic/there/publish", "[]", 400, "body"),
        ("/topic/there/publish", '{"priority": "low"}', 400, "message"),
        ("/topic/there/publish", '{"message": "x", "priority": "urgent"}', 400, "priority"),
        ("/topic/there/publish", '{"message": "x", "speed": 1}', 400, "speed"),
        ("/topic/there/publish", '{"message": "x", "partition": 1}', 400, "0..0"),
        ("/topic/there/publish", '{"message": "' + "x" * 1_048_577 + '"}', 413, "1048576"),
        ("/topic/a%20b/publish", '{"message": "x"}', 400, "topic"),
        ("/topic/there/consume", None, 400, "consumerID"),
        ("/topic/there/consume?consumerID=a/b", None, 400, "consumerID"),
        ("/topic/there/consume?consumerID=c&batch=0", None, 400, "1..1000"),
        ("/topic/there/consume?consumerID=c&batch=1001", None, 400, "1..1000"),
        ("/topic/there/consume?consumerID=c&batch=-1", None, 400, "batch"),
        ("/topic/there/consume?consumerID=c&partition=1", None, 400, "0..0"),
        ("/topic/nowhere/consume?consumerID=c", None, 404, "nowhere"),
        ("/topic/nowhere/peek", None, 404, "nowhere"),
        ("/topic/there/peek?offset=x", None, 400, "offset"),
        ("/topics/nowhere/partitions", None, 404, "nowhere"),
        ("/nowhere", None, 404, "nowhere"),
    ],
)
def test_nonsense_is_refused_by_field_and_limit(
    shared: Falcon, tmp_path: Path, path: str, body: str | None, status: int, named: str
) -> None:
    extra: list[str] = []
    if body is not None:
        (tmp_path / "body").write_text(body)
        extra = ["-d", f"@{tmp_path / 'body'}"]
    got, problem = shared.curl(path, *extra)
    assert got == status, problem
    assert named in problem["detail"]


@pytest.fixture(scope="module")
def shared(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Falcon]:
    falcon = Falcon(cluster, tmp_path_factory.mktemp("gateway") / "falconq").start()
    falcon.publish("there", "x")
    yield falcon
    falcon.kill()


def test_pages_of_other_sites_are_refused(shared: Falcon) -> None:
    for header in ("Host: falconq.example.org", "Origin: https://example.org", "Origin: null"):
        status, problem = shared.curl("/topics", "-H", header)
        assert (status, problem["code"]) == (403, "FORBIDDEN"), header
    assert shared.curl("/topics", "-H", "Origin: http://localhost:3000")[0] == 200


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ferryline.cli", "falconq", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_listens_on_the_loopback_only_and_says_what_is_wrong(shared: Falcon, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        done = run("--host", host, "--port", "0")
        assert done.returncode == 2, done.stderr
        assert "loopback" in done.stderr
    taken = run("--port", str(shared.service.ready["port"]), "--data-dir", str(tmp_path))
    assert taken.returncode == 1
    assert "PORT_IN_USE" in taken.stderr
    both = run("--port", "0", "--data-dir", str(shared.service.folder / "data"))
    assert both.returncode == 1
    assert "another gateway" in both.stderr


def test_it_ends_in_order_when_it_is_asked_to(start: Callable[..., Falcon]) -> None:
    falcon = start()
    falcon.service.send_signal(signal.SIGTERM)
    assert falcon.service.process is not None
    assert falcon.service.process.wait(15) == 0, falcon.service.log_tail()
