"""What a worker writes of the jobs it runs, into the results of their queue."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.app.handler import Call
from ferryline.app.queue import TaskQueue
from ferryline.app.results import now_ms
from ferryline.app.statuses import JobState, StatusRecord, results_partition
from ferryline.app.task import Task
from ferryline.app.verdicts import Verdict
from ferryline.protocol.errors import BufferFull, FerrylineError
from ferryline.protocol.queue_messages import NACK

if TYPE_CHECKING:
    from ferryline.producer import Producer

log = logging.getLogger("ferryline.app")

_NOTHING = msgspec.Raw(b"null")
_encoder = msgspec.json.Encoder()


class Reports:
    """The reports of one worker about one queue. They go through one producer, so those of a job stay in order.

    A first attempt is said to be running only when it still is after ``running_after`` seconds: most tasks have ended
    by then, and a record of each would cost as much as its result.
    """

    def __init__(self, queue: TaskQueue, producer: Producer, *, running_after: float) -> None:
        self._queue = queue
        self._topic = queue.results_topic
        self._producer = producer
        self._after_s = running_after
        self._loop = asyncio.get_running_loop()
        self._begun: dict[Call, float] = {}  # loop times from which they are said to be running, in order
        self._timer: asyncio.TimerHandle | None = None

    def began(self, call: Call) -> None:
        """An attempt begins. `ended` follows."""
        if call.context.attempt > 1 or not self._after_s:
            self._running(call)
            return
        due = self._begun[call] = self._loop.time() + self._after_s
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look)

    def ended(self, call: Call) -> None:
        """It runs no more; `done` or `failed` may follow."""
        self._begun.pop(call, None)

    def done(self, call: Call, result: Any) -> asyncio.Future[Any] | None:
        """Begin to store the result; together with those of other tasks that end now. The future tells the outcome, as
        of ``producer.send``; None: the task keeps no results.

        Raises what says that it cannot be stored: SerializationFailed, RecordTooLarge and others.
        """
        task = call.handler
        assert isinstance(task, Task)
        data = task.results.encode(result)
        if not call.keeps_result:
            return None
        record = self._record(call, JobState.DONE, result=data)
        try:
            return self._send_nowait(record)
        except BufferFull:
            return self._loop.create_task(self._send(record))

    async def failed(self, call: Call, verdict: Verdict, detail: str) -> None:
        """The attempt failed. That it cannot be stored changes nothing: the queue knows, too."""
        state = JobState.DEAD if verdict.last else JobState.RETRYING
        retry_ms = (
            -1 if verdict.last or verdict.action != NACK or verdict.delay is None else round(verdict.delay * 1000)
        )
        try:
            await self._send(self._record(call, state, verdict.reason, detail, retry_ms))
        except FerrylineError as error:
            log.warning("%s is %s, which could not be stored: %s", call.context.job_id, state, error)

    def _look(self) -> None:
        """Tell of those that have run for long enough."""
        self._timer = None
        now = self._loop.time()
        for call, due in list(self._begun.items()):
            if due > now:
                self._timer = self._loop.call_at(due, self._look)
                return
            del self._begun[call]
            if call.message.is_held:
                self._running(call)

    def _running(self, call: Call) -> None:
        """Nobody waits until this is stored: the end, which counts, comes behind it."""
        if not call.keeps_result:
            return
        record = self._record(call, JobState.RUNNING)
        try:
            self._send_nowait(record).add_done_callback(_told)
        except FerrylineError as error:
            log.warning("%s: %s", record.id, error)

    def _record(
        self, call: Call, state: JobState, error: str = "", detail: str = "", retry_ms: int = -1,
        result: msgspec.Raw = _NOTHING,
    ) -> StatusRecord:  # fmt: skip
        context, message = call.context, call.message
        return StatusRecord(
            context.job_id, context.name, state, context.attempt, context.attempts, now_ms(), message.partition,
            message.offset, error, detail, retry_ms, result, call.keeps_result,
        )  # fmt: skip

    def _send_nowait(self, record: StatusRecord) -> asyncio.Future[Any]:
        partition = self._partition(record)
        return self._producer.send_nowait(self._topic, _encoder.encode(record), record.id, partition=partition)

    async def _send(self, record: StatusRecord) -> None:
        partition = self._partition(record)
        await self._producer.send(self._topic, _encoder.encode(record), record.id, partition=partition)

    def _partition(self, record: StatusRecord) -> int:
        return results_partition(record.id, self._queue.result_partitions)


def _told(sent: asyncio.Future[Any]) -> None:
    if not sent.cancelled() and (error := sent.exception()) is not None:
        log.warning("that a job began could not be stored: %s", error)
