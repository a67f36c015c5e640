"""The comparison of queues and tasks: what counts as handled, goals, rows; its roles on a queue in memory."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmarks.compare import __main__ as compare
from benchmarks.compare import queue_measure, queue_roles
from benchmarks.compare.__main__ import chosen, options_of
from benchmarks.compare.peers.catalogue import PEERS
from benchmarks.compare.plan import HEADLINE
from benchmarks.compare.queue_goals import queue_verdicts
from benchmarks.compare.queue_plan import (
    NO_RESULTS,
    QUEUE_VARIANTS,
    QUEUE_WORKLOADS,
    SUBSCRIBER,
    TASK_VARIANTS,
    chosen_queue_workloads,
    queue_cells,
)
from benchmarks.compare.receivers import RECEIVERS, Handler, Receiving
from benchmarks.compare.render import render
from benchmarks.compare.runner import Comparison
from benchmarks.compare.spec import Spec, key_of, stamp_of
from benchmarks.compare.stats import table
from benchmarks.compare.tasks import CONCURRENCY, SYSTEMS, Marks, Submitter, environment

from tests.unit.test_bench_compare import report, result, timed

PARTS = {"sender": 0.0004, "receiver": 0.0006}


def queued(rate: float, **changes: Any) -> dict[str, Any]:
    return result(rate, parts_cpu_s=PARTS, **changes)


# -- what is handled --------------------------------------------------------------------------------


def test_a_record_counts_once_however_often_it_comes() -> None:
    handler = Handler(3)
    for number in (2, 0, 2, 2):
        handler.record(key_of(number), b"value")
    assert (handler.distinct, handler.repeated, handler.size) == (2, 2, 10)
    handler.body(key_of(1) + b"value")
    assert handler.distinct == 3


def test_only_a_record_with_a_stamp_has_a_latency() -> None:
    pad = Spec("", "", "", "").value()
    handler = Handler(3, stamps=True)
    handler.record(key_of(0), stamp_of(0, pad))  # of the warm-up
    handler.record(key_of(1), stamp_of(time.monotonic_ns() - 5_000_000, pad))
    assert len(handler.times_ns) == 1
    assert handler.times_ns[0] >= 5_000_000


class Memory(Receiving):
    """Hands out ``numbers``, a few at each step. ``lost`` of its acknowledgements fail."""

    def __init__(self, spec: Spec, handler: Handler, numbers: list[int], lost: int = 0) -> None:
        super().__init__(spec, handler)
        self.numbers, self.lost = numbers, lost
        self.said: list[str] = []

    async def connect(self) -> None:
        self.said.append("connect")

    async def subscribe(self) -> None:
        self.said.append("subscribe")

    async def step(self) -> None:
        some, self.numbers = self.numbers[:7], self.numbers[7:]
        for number in some:
            self.handler.record(key_of(number), self.spec.value())

    async def settled(self) -> None:
        self.said.append("settled")
        self.errors += self.lost

    async def close(self) -> None:
        self.said.append("close")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that a role says; it is let go at once."""
    lines: list[str] = []
    monkeypatch.setattr(queue_roles, "tell", lines.append)
    monkeypatch.setattr(sys, "stdin", io.StringIO("GO\n"))
    return lines


def made(monkeypatch: pytest.MonkeyPatch, numbers: list[int], lost: int = 0) -> list[Memory]:
    """The receiver that `receive` will have, in a list once it was made."""
    found: list[Memory] = []

    def make(spec: Spec, handler: Handler) -> Memory:
        found.append(Memory(spec, handler, numbers, lost))
        return found[-1]

    monkeypatch.setattr(queue_roles, "receiving", make)
    return found


async def test_a_warm_receiver_counts_what_came_after_the_clock(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    receivers = made(monkeypatch, list(range(120)))
    found = await queue_roles.receive(Spec("x", "receive", "t", "s", count=100, warm_up=20))
    assert told == ["READY"]
    assert (found.records, found.errors) == (99, 0)  # the third step crossed the line by one
    assert receivers[0].said == ["connect", "subscribe", "settled", "close"]


async def test_what_never_came_came_twice_or_was_not_acknowledged_is_an_error(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    made(monkeypatch, [*range(10), 3, 4], lost=5)
    found = await queue_roles.receive(Spec("x", "receive", "t", "s", count=12, timeout_s=0.1))
    assert found.records == 10
    assert found.errors == 2 + 2 + 5


async def test_a_receiver_that_gets_no_warm_up_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    made(monkeypatch, [0, 1])
    with pytest.raises(SystemExit, match="2 records of 20"):
        await queue_roles.receive(Spec("x", "receive", "t", "s", count=10, warm_up=20, timeout_s=0.1))
    assert told == []


class FakePeer:
    """A server that still holds ``left`` records for a while."""

    def __init__(self, left: list[int]) -> None:
        self.answers = left

    def left(self, topic: str, group: str) -> int:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_what_the_server_still_holds_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_measure, "LEFT_S", 0.2)
    for answers, errors in (([5, 2, 0], 0), ([3], 3)):
        work: Any = type("Work", (), {"peer": FakePeer(answers), "topic": "t"})
        assert queue_measure.with_left(work, "g", {"errors": 0})["errors"] == errors


# -- tasks ------------------------------------------------------------------------------------------


async def test_marks_are_seen_by_all_and_tell_what_ran_never_or_twice(tmp_path: Path) -> None:
    Marks.create(tmp_path / "marks", 5)
    one, other = Marks(str(tmp_path / "marks")), Marks(str(tmp_path / "marks"))
    for number in (0, 1, 3, 3):
        one.add(number)
    assert other.wrong(0, 5) == 3
    assert other.wrong(0, 2) == 0
    late = threading.Timer(0.05, lambda: [one.add(2), one.add(4)])
    late.start()
    await other.wait(0, 5, time.monotonic() + 30.0)
    late.join()
    assert other.wrong(0, 5) == 1
    await other.wait(0, 5, 0.0)  # the deadline ends it


class Immediate(Submitter):
    """Runs every task at once, and task ``again`` twice."""

    again = -1

    async def open(self) -> None: ...

    async def submit_all(self, numbers: Any) -> None:
        marks = Marks(self.spec.marks)
        for number in numbers:
            marks.add(number)
            if number == self.again:
                marks.add(number)

    async def close(self) -> None: ...


@pytest.mark.parametrize(("again", "errors"), [(-1, 0), (7, 1)])
async def test_tasks_are_counted_once_each(
    monkeypatch: pytest.MonkeyPatch, told: list[str], tmp_path: Path, again: int, errors: int
) -> None:
    Marks.create(tmp_path / "marks", 15)
    spec = Spec("x", "submit", "t", "s", count=10, warm_up=5, marks=str(tmp_path / "marks"))
    monkeypatch.setattr(Immediate, "again", again)
    monkeypatch.setattr(queue_roles, "submitter", Immediate)
    found = await queue_roles.submit(spec)
    assert (found.records, found.errors) == (10 - errors, errors)


async def test_a_worker_that_runs_nothing_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, told: list[str], tmp_path: Path
) -> None:
    class Idle(Immediate):
        async def submit_all(self, numbers: Any) -> None: ...

    Marks.create(tmp_path / "marks", 15)
    monkeypatch.setattr(queue_roles, "submitter", Idle)
    spec = Spec("x", "submit", "t", "s", count=10, warm_up=5, marks=str(tmp_path / "marks"), timeout_s=0.1)
    with pytest.raises(SystemExit, match="5 of 5 tasks did not run"):
        await queue_roles.submit(spec)
    assert told == []


def test_every_worker_has_the_same_number_of_tasks_at_once_and_knows_where_to_find_them() -> None:
    for client, module in SYSTEMS.items():
        command = queue_measure.worker_command(client)
        assert any(module in word for word in command)
        numbers = [int(word) for word in command if word.isdigit()]
        assert (numbers[0] * numbers[1] if len(numbers) == 2 else numbers[0]) == CONCURRENCY
    found = environment(Spec("x", "submit", "queue", "server", ca="ca", marks="marks"))
    assert set(found.values()) == {"server", "queue", "marks", "ca", ""}


# -- plan -------------------------------------------------------------------------------------------


def test_every_row_says_how_it_acknowledges_and_can_be_run() -> None:
    for variants, clients in ((QUEUE_VARIANTS, RECEIVERS), (TASK_VARIANTS, SYSTEMS)):
        assert len({one.name for one in variants}) == len(variants)
        for one in variants:
            assert one.settles
            assert one.client in clients
            assert PEERS[one.peer].system == one.system
    assert {one.name for one in QUEUE_VARIANTS if not one.one_by_one} == {"redis always, batch XACK"}


def test_rows_of_queues_and_of_tasks_are_not_mixed() -> None:
    found = queue_cells(QUEUE_WORKLOADS, {"ferryline", "redis"})
    assert {one.variant.name for one in found if one.workload.kind == "tasks"} == {one.name for one in TASK_VARIANTS}
    paced = {one.variant.name for one in found if one.workload.kind == "queue-pace"}
    assert paced == {"ferryline r2 fsync", "ferryline r2 replicated", "redis always", "redis everysec"}
    assert not queue_cells(QUEUE_WORKLOADS, {"kafka"})


def test_options_choose_workloads_and_rows_of_queues() -> None:
    found = chosen(options_of(["--only-queues", "--workloads", "tasks", "--variants", "celery", "--only", "redis"]))
    assert {one.name for one in found} == {f"tasks / {one.name}" for one in TASK_VARIANTS if one.client == "celery"}
    with pytest.raises(ValueError, match="produce is no workload"):
        chosen(options_of(["--only-queues", "--workloads", "produce"]))
    assert chosen_queue_workloads([]) == list(QUEUE_WORKLOADS)


# -- goals and tables -------------------------------------------------------------------------------


def verdicts_of(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {one.goal_text: one for one in queue_verdicts(table(rounds))}


def test_the_best_durable_peer_that_acknowledges_each_record_is_the_yardstick() -> None:
    found = verdicts_of(
        {
            f"queue|queue|{HEADLINE}": [queued(60_000.0)],
            "queue|queue|rabbitmq 3 pika": [queued(10_000.0)],
            "queue|queue|redis always": [queued(15_000.0)],
            "queue|queue|redis everysec": [queued(30_000.0)],
            "queue|queue|redis always, batch XACK": [queued(40_000.0)],
        }
    )
    yardstick = found["queue, best durable peer"]
    assert yardstick.value == pytest.approx(4.0)
    assert yardstick.met
    assert yardstick.counts
    assert found["queue, best peer in any setting"].value == pytest.approx(1.5)
    assert not found["queue, best peer in any setting"].counts
    assert found["queue, rabbitmq"].value == pytest.approx(6.0)
    assert "queue, nats" not in found


def test_latency_at_a_fixed_rate_may_not_be_worse_than_the_best() -> None:
    found = verdicts_of(
        {
            f"queue-pace|queue-pace|{HEADLINE}": [timed(2.0, 9.0)],
            "queue-pace|queue-pace|rabbitmq 3 pika": [timed(3.0, 8.0)],
            "queue-pace|queue-pace|nats r3": [timed(4.0, 10.0)],
        }
    )
    assert found["queue-pace p50, best durable peer"].met
    assert not found["queue-pace p99, best durable peer"].met


def test_tasks_are_compared_with_how_tasks_are_usually_run() -> None:
    found = verdicts_of(
        {
            f"tasks|tasks|{HEADLINE}": [queued(4_000.0)],
            f"tasks|tasks|{NO_RESULTS}": [queued(9_000.0)],
            f"tasks|tasks|{SUBSCRIBER}": [queued(20_000.0)],
            "tasks|tasks|celery": [queued(1_000.0)],
            "tasks|tasks|dramatiq": [queued(2_000.0)],
            "tasks|tasks|dramatiq, always": [queued(500.0)],
        }
    )
    assert found["tasks, best peer"].value == pytest.approx(2.0)
    assert not found["tasks, best peer"].met
    assert found["tasks, best flushed peer"].value == pytest.approx(8.0)
    assert found["tasks without results, best peer"].value == pytest.approx(4.5)
    assert found["a subscriber, best peer of tasks"].value == pytest.approx(10.0)


def test_a_run_that_would_take_too_long_leaves_rounds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []

    class Quick(Comparison):
        @contextmanager
        def running(self) -> Iterator[None]:
            yield

        def round(self, number: int, scale: float) -> float:
            rounds.append(number)
            return 40.0

    monkeypatch.setattr(compare, "Comparison", Quick)
    monkeypatch.setattr(compare, "limits", lambda *_: {})
    for minutes, wanted in (("0.5", [1]), ("12", [1, 2, 3])):
        rounds.clear()
        found = compare.run(options_of(["--only-queues", "--rounds", "3", "--budget-minutes", minutes]))
        assert rounds == wanted
        assert (found["settings"]["rounds"], found["settings"]["scale"]) == (len(wanted), 1.0)


def test_nothing_is_judged_that_was_not_measured() -> None:
    assert verdicts_of({"queue|queue|redis always": [queued(1.0)]}) == {}
    assert verdicts_of({f"queue|queue|{HEADLINE}": [queued(1.0)]}) == {}


def test_the_report_says_who_acknowledges_how_and_what_each_process_used() -> None:
    rounds = {
        f"queue|queue|{HEADLINE}": [queued(60_000.0), queued(80_000.0)],
        "queue|queue|redis always, batch XACK": [queued(40_000.0)],
        f"queue-pace|queue-pace|{HEADLINE}": [timed(1.0, 9.0)],
        "tasks|tasks|celery acks_late": [result(900.0, parts_cpu_s={"submitter": 0.3, "worker": 0.6})],
    }
    text = render(report(rounds))
    assert "| ferryline r2 fsync | 70,000 (60,000 .. 80,000) |" in text
    assert "| redis always, batch XACK | **one XACK for a batch**" in text
    assert "| row | sender us/record | receiver us/record | servers us/record | all |" in text
    assert "| ferryline r2 fsync | 0.4 | 0.6 | 2.0 | 3.0 |" in text
    assert "| celery acks_late | 300.0 | 600.0 | 2.0 |" in text
    assert "not central" not in text
    assert "0 of 0 goals met" in text
