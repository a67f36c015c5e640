"""What is known of a job: the records that workers write of it, the truth of its queue, and what both add up to. Pure.

A worker writes `StatusRecord`s to the topic of results, keyed by the job's id: running, then retrying, done or dead.
They say what happened, but not everything: who is killed writes nothing, and nobody writes that a job was accepted. So
an answer about a job without an end asks the queue itself, too (`combined`).

    never accepted    its queue has no such record
    queued            it is there; nobody has begun
    running           a worker has it
    retrying          attempt n of m has failed, and another one will follow
    done              its result is kept
    dead              it will not be tried again: failed, rejected, or given up by the queue
    forgotten         it has ended, and how is not kept: it is long ago, or its task keeps no results
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import msgspec

from ferryline.protocol.partitioner import partition_of

ID_SEPARATOR = "@"
RESULTS_SPREAD_MS = 1_000
_GIVEN_UP = "the queue gave it up: its workers ended, or it was purged"
_GENERATED = re.compile(r".+@(?P<ms>[0-9a-f]{11,12})\.(?P<partition>\d{1,6})\.[0-9a-f]{16}", re.ASCII)


class JobState(StrEnum):
    """See the module for what each means."""

    NEVER_ACCEPTED = "never accepted"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    DONE = "done"
    DEAD = "dead"
    FORGOTTEN = "forgotten"


ENDED = frozenset((JobState.DONE, JobState.DEAD, JobState.FORGOTTEN))
_STEPS = {state: number for number, state in enumerate(JobState)}


class StatusRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change, as it stands in the topic of results. ``partition`` and ``offset``: of the job in its queue."""

    id: str
    task: str
    state: str
    attempt: int
    attempts: int
    at_ms: int
    partition: int
    offset: int
    error: str = ""
    detail: str = ""  # traceback
    retry_ms: int = -1  # until the next attempt, as far as the worker knows
    result: msgspec.Raw = msgspec.Raw(b"null")
    kept: bool = True  # the result will be; else nothing is written when the job has succeeded


class JobStatus(msgspec.Struct, frozen=True):
    """Where a job is: ``attempt`` of ``attempts``, since ``at``. ``error`` and ``traceback`` are of the last failure.

    ``due_in``: seconds until it may be begun, where that is known and in the future.
    """

    id: str
    state: JobState
    task: str = ""
    attempt: int = 0
    attempts: int = 0
    at: datetime | None = None
    error: str = ""
    traceback: str = ""
    due_in: float = 0.0

    @property
    def step(self) -> tuple[int, int]:
        """How far it has come; only the queue can put it back, when a worker hands back what it had begun."""
        return (self.attempt, _STEPS[self.state])

    @property
    def ended(self) -> bool:
        """Whether nothing will follow, but for a redrive of dead letters."""
        return self.state in ENDED

    def __str__(self) -> str:
        count = f" (attempt {self.attempt} of {self.attempts})" if self.attempt and not self.ended else ""
        return f"{self.state}{count}" + (f": {self.error}" if self.error else "")


def status_of(record: StatusRecord) -> JobStatus:
    """A record as users see it. Its state is one of `JobState`."""
    return JobStatus(
        record.id, JobState(record.state), record.task, record.attempt, record.attempts,
        datetime.fromtimestamp(record.at_ms / 1000, UTC), record.error, record.detail, max(0.0, record.retry_ms / 1000),
    )  # fmt: skip


def supersedes(new: StatusRecord, old: StatusRecord | None) -> bool:
    """Whether ``new``, which stands behind ``old`` in the log, changes what is known: done is never taken back."""
    return old is None or old.state != JobState.DONE


def new_id(task: str, ms: int, partition: int, random: str) -> str:
    """An id that says when and where its job was submitted, so that it can be found. ``random``: 16 hex digits."""
    return f"{task}{ID_SEPARATOR}{ms:012x}.{partition}.{random}"


def told_by_id(job_id: str) -> tuple[int, int] | None:
    """(ms since the Unix epoch, partition) of an id that `new_id` made; None: somebody chose it."""
    match = _GENERATED.fullmatch(job_id)
    return (int(match["ms"], 16), int(match["partition"])) if match else None


def results_partition(job_id: str, partitions: int) -> int:
    """Which partition of the results tells of a job.

    Jobs that were submitted about the same time share one, for they mostly end together, too: what a worker writes of
    them is one batch then, and not one for each. Whoever looks for a job still reads one partition only.
    """
    told = told_by_id(job_id)
    return told[0] // RESULTS_SPREAD_MS % partitions if told is not None else partition_of(job_id.encode(), partitions)


def combined(
    job_id: str, known: JobStatus | None, queue: Mapping[str, Any] | None, attempts: int, *, old: bool,
    kept: bool = True,
) -> JobStatus:  # fmt: skip
    """What is to be said of a job that has not ended by what workers wrote (``known``; None: they wrote nothing).

    ``queue``: what the queue explains of its record; None: it has none. ``attempts``: how many the queue would make.
    ``old``: it was submitted so long ago that records about it may have been deleted. ``kept``: whether its result is.
    """
    status = known or JobStatus(job_id, JobState.QUEUED, attempts=attempts)
    if queue is None:
        if known is not None:
            return known
        return JobStatus(job_id, JobState.FORGOTTEN if old else JobState.NEVER_ACCEPTED)
    state, made = str(queue.get("state", "")), int(queue.get("attempts", 0))
    total = status.attempts or attempts
    replace = msgspec.structs.replace
    if state in ("parked", "dying"):
        reason = status.error or _last_reason(queue) or "its attempts are used up"
        return replace(status, state=JobState.DEAD, attempt=made, attempts=total, error=reason)
    if state == "settled":
        if not kept or (known is None and old):
            # The next attempt has mostly succeeded: what went wrong before is not how it ended.
            return replace(status, state=JobState.FORGOTTEN, error="", traceback="")
        # Whoever finishes a job writes it down before the queue hears of it: the queue has ended this one by itself.
        return replace(status, state=JobState.DEAD, attempts=total, error=status.error or _GIVEN_UP)
    if state == "leased":
        running = status.state == JobState.RUNNING and status.attempt == made
        return status if running else replace(status, state=JobState.RUNNING, attempt=made, attempts=total)
    due_in = int(queue.get("due_in_ms", 0)) / 1000
    if made == 0:
        return replace(status, state=JobState.QUEUED, attempt=0, attempts=total, due_in=due_in)
    error = status.error or _last_reason(queue)
    return replace(status, state=JobState.RETRYING, attempt=made, attempts=total, error=error, due_in=due_in)


def _last_reason(queue: Mapping[str, Any]) -> str:
    history = queue.get("history") or []
    return str(history[-1].get("reason", "")) if history else ""
