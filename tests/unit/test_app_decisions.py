"""What becomes of records, what is said of jobs, and how many processes there should be: decided without I/O."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ferryline as fl
from ferryline.app.results import Entry, Watcher
from ferryline.app.scaling import Load, Restarts, Scaler
from ferryline.app.statuses import JobState, JobStatus, StatusRecord, combined, new_id, status_of, told_by_id
from ferryline.app.verdicts import delay_s, judge

RETRY = fl.Retry(3, backoff=fl.exponential(1, 60))

# -- verdicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "options", "action", "last"),
    [
        (None, {}, "ack", True),
        (ValueError(), {}, "nack", False),
        (ValueError(), {"attempt": 2}, "nack", False),
        (ValueError(), {"attempt": 3}, "reject", True),
        (ValueError(), {"attempt": 4}, "reject", True),
        (ValueError(), {"hopeless": True}, "reject", True),
        (fl.Reject("no"), {}, "reject", True),
        (ValueError(), {"retry": None}, "nack", False),
        (ValueError(), {"retry": None, "attempt": 3}, "nack", True),  # the queue ends it
        (fl.Reject("no"), {"retry": None}, "reject", True),
    ],
)
def test_what_follows_from_how_an_attempt_ended(
    error: Exception | None, options: dict[str, Any], action: str, last: bool
) -> None:
    asked = {"hopeless": False, "attempt": 1, "attempts": 3, "retry": RETRY, "draw": 0.5, **options}
    verdict = judge(error, "why", **asked)
    assert (verdict.action, verdict.last) == (action, last)
    assert (verdict.delay is not None) == (action == "nack" and asked["retry"] is not None)
    assert verdict.reason == ("" if error is None else "why")


@given(st.floats(0, 1000), st.floats(0, 1000), st.integers(1, 1000), st.floats(0, 1))
def test_a_wait_is_within_the_limit_that_doubles(first: float, more: float, attempt: int, draw: float) -> None:
    retry = fl.Retry(1000, backoff=fl.exponential(first, first + more))
    limit = min(first + more, first * 2.0 ** min(attempt - 1, 60))
    assert delay_s(retry, attempt, draw) == pytest.approx(limit * draw)
    assert 0 <= delay_s(retry, attempt, draw) <= first + more


# -- jobs ----------------------------------------------------------------------------------------------


def record(state: str, attempt: int = 1, error: str = "") -> StatusRecord:
    return StatusRecord("j", "t", state, attempt, 3, 1_000, 0, 7, error)


def said(known: StatusRecord | None, queue: dict[str, Any] | None, *, old: bool = False) -> str:
    return str(combined("j", status_of(known) if known is not None else None, queue, 5, old=old))


RUNNING, RETRYING = record("running", 2), record("retrying", 2, "boom")
LAST = {"history": [{"attempt": 1, "reason": "first"}, {"attempt": 2, "reason": "last"}]}


@pytest.mark.parametrize(
    ("known", "queue", "expected"),
    [
        (None, None, "never accepted"),
        (None, {"state": "available", "attempts": 0}, "queued"),
        (None, {"state": "waiting", "attempts": 0, "behind": 3}, "queued"),
        (None, {"state": "not in window", "attempts": 0}, "queued"),
        (None, {"state": "delayed", "attempts": 0, "due_in_ms": 5_000}, "queued"),
        (None, {"state": "leased", "attempts": 1}, "running (attempt 1 of 5)"),
        (None, {"state": "delayed", "attempts": 2, **LAST}, "retrying (attempt 2 of 5): last"),
        (None, {"state": "parked", "attempts": 5, **LAST}, "dead: last"),
        (None, {"state": "dying", "attempts": 5}, "dead: its attempts are used up"),
        (RUNNING, {"state": "leased", "attempts": 2}, "running (attempt 2 of 3)"),
        (RUNNING, {"state": "leased", "attempts": 3}, "running (attempt 3 of 3)"),  # its second worker was killed
        (RUNNING, {"state": "delayed", "attempts": 2}, "retrying (attempt 2 of 3)"),
        (RUNNING, {"state": "available", "attempts": 0}, "queued"),  # handed back
        (
            RUNNING,
            {"state": "settled", "attempts": 0},
            "dead: the queue gave it up: its workers ended, or it was purged",
        ),
        (RETRYING, {"state": "delayed", "attempts": 2}, "retrying (attempt 2 of 3): boom"),
        (RETRYING, {"state": "settled", "attempts": 0}, "dead: boom"),
        (RETRYING, None, "retrying (attempt 2 of 3): boom"),
    ],
)
def test_what_is_said_of_a_job_without_an_end(
    known: StatusRecord | None, queue: dict[str, Any] | None, expected: str
) -> None:
    assert said(known, queue) == expected


def test_of_what_is_long_ago_nothing_is_claimed() -> None:
    assert said(None, None, old=True) == "forgotten"
    assert said(None, {"state": "settled", "attempts": 0}, old=True) == "forgotten"
    assert said(None, {"state": "settled", "attempts": 0}) != "forgotten"
    assert said(None, {"state": "available", "attempts": 0}, old=True) == "queued"


def test_an_attempt_that_failed_says_nothing_of_how_a_job_without_a_result_ended() -> None:
    status = combined("j", status_of(RETRYING), {"state": "settled", "attempts": 0}, 5, old=False, kept=False)
    assert (str(status), status.error, status.traceback) == ("forgotten", "", "")


def test_an_id_tells_where_its_job_is() -> None:
    name = new_id("make.pdf", 1_790_000_000_000, 11, "0123456789abcdef")
    assert told_by_id(name) == (1_790_000_000_000, 11)
    for chosen in ("order-7", "tidy@2026-01-01T00:00:00Z", "", name[:-1], name + "\n", name.replace("@", "-")):
        assert told_by_id(chosen) is None


def test_done_is_never_taken_back_and_history_is_not_told_twice() -> None:
    entry = Entry("j", 0, complete=False)
    with Watcher(entry) as watcher:
        entry.apply(5, record("running", 2))
        entry.apply(3, record("running", 1))  # read again, from before
        entry.apply(6, record("done", 2))
        entry.apply(7, record("running", 3))  # the acknowledgement of the second attempt was lost
        assert [one.attempt for one in watcher._news] == [2, 2]
    entry.apply(8, record("retrying", 3))
    assert entry.record is not None
    assert entry.record.state == "done"
    assert not entry.watchers


def test_the_dead_may_rise_by_a_redrive() -> None:
    entry = Entry("j", 0, complete=True)
    for offset, one in enumerate([record("dead", 3), record("running", 1), record("done", 1)]):
        entry.apply(offset, one)
    assert status_of(entry.record).state is JobState.DONE  # type: ignore[arg-type]


async def test_a_watcher_that_hears_nothing_goes_on() -> None:
    entry = Entry("j", 0, complete=True)
    with Watcher(entry) as watcher:
        assert await watcher.next(0.01) is None
        entry.apply(0, RUNNING)
        assert await watcher.next(0.01) == RUNNING
        assert await watcher.next(0.01) is None


def test_a_status_says_how_far_a_job_has_come() -> None:
    steps = [JobStatus("j", JobState.QUEUED), status_of(RUNNING), status_of(RETRYING), status_of(record("dead", 2))]
    assert [one.step for one in steps] == sorted(one.step for one in steps)
    assert [one.ended for one in steps] == [False, False, False, True]


# -- how many processes --------------------------------------------------------------------------------


def loads(backlog: int, settled: int) -> dict[str, Load]:
    return {"q": Load(backlog, settled)}


def test_a_backlog_gets_as_many_as_drain_it_in_time() -> None:
    scaler = Scaler(1, 16, target_s=30)
    assert scaler.decide(loads(0, 0), 1, 0.0) == 1
    # 10 a second by one process, 900 to do: 90 s, so three would do; no more than the double at once
    assert scaler.decide(loads(900, 100), 1, 10.0) == 2
    assert scaler.drain_s("q", Load(900, 100)) == 90
    assert scaler.decide(loads(900, 300), 2, 20.0) == 4


def test_up_to_the_limit_and_no_further() -> None:
    scaler = Scaler(1, 3, target_s=1)
    running = 1
    for step in range(10):
        running = scaler.decide(loads(10_000, step), running, float(step))
    assert running == 3


def test_while_nothing_is_done_one_more_is_tried() -> None:
    scaler = Scaler(1, 8)
    assert [scaler.decide(loads(5, 0), running, float(running)) for running in (1, 2, 3)] == [2, 3, 4]


def test_from_nothing_the_first_record_starts_one_and_silence_ends_it() -> None:
    scaler = Scaler(0, 4, hold_s=60)
    assert scaler.decide(loads(0, 0), 0, 0.0) == 0
    assert scaler.decide(loads(1, 0), 0, 5.0) == 1
    assert scaler.decide(loads(0, 1), 1, 10.0) == 1
    assert scaler.decide(loads(0, 1), 1, 60.0) == 1
    assert scaler.decide(loads(0, 1), 1, 71.0) == 0


def test_down_only_to_what_was_needed_lately() -> None:
    scaler = Scaler(1, 8, target_s=10, hold_s=60)
    assert scaler.decide(loads(100, 0), 4, 0.0) == 5
    assert scaler.decide(loads(10, 1_000), 5, 5.0) == 5
    assert scaler.decide(loads(10, 2_000), 5, 59.0) == 5
    assert scaler.decide(loads(10, 3_000), 5, 66.0) == 1


def test_the_neediest_queue_decides() -> None:
    scaler = Scaler(1, 8, target_s=10)
    scaler.decide({"a": Load(10, 0), "b": Load(0, 0)}, 2, 0.0)
    assert scaler.decide({"a": Load(400, 100), "b": Load(0, 50)}, 2, 10.0) == 4


def test_a_group_that_was_made_anew_is_no_negative_rate() -> None:
    scaler = Scaler(1, 8)
    scaler.decide(loads(10, 1_000), 1, 0.0)
    assert scaler.decide(loads(10, 0), 1, 10.0) == 2
    assert math.isinf(scaler.drain_s("q", Load(10, 0)))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 100)), max_size=30),
       st.integers(0, 5), st.integers(0, 10))  # fmt: skip
def test_always_within_the_limits(steps: list[tuple[int, int, float]], low: int, more: int) -> None:
    scaler = Scaler(low, low + more)
    running, now = low, 0.0
    for backlog, settled, passed in steps:
        now += passed
        before = running
        running = scaler.decide(loads(backlog, settled), running, now)
        assert low <= running <= low + more
        assert running <= max(2 * before, before + 1, low, 1)


def test_what_keeps_ending_young_starts_later_and_later() -> None:
    restarts = Restarts(young_s=10, first_s=1, longest_s=60)
    assert [restarts.delay_s(0.5) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert restarts.delay_s(10.0) == 0
    assert restarts.delay_s(0.5) == 2
