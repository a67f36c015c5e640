"""What a worker writes of the jobs it runs, into the results of their queue."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.app.handler import Call
from ferryline.app.queue import TaskQueue
from ferryline.app.results import now_ms
from ferryline.app.statuses import JobState, StatusRecord
from ferryline.app.task import Task
from ferryline.app.verdicts import Verdict
from ferryline.protocol.errors import BufferFull, FerrylineError
from ferryline.protocol.queue_messages import NACK

if TYPE_CHECKING:
    from ferryline.producer import Producer

log = logging.getLogger("ferryline.app")

_NOTHING = msgspec.Raw(b"null")


class Reports:
    """The reports of one worker about one queue. They go through one producer, so those of a job stay in order."""

    def __init__(self, queue: TaskQueue, producer: Producer) -> None:
        self._topic = queue.results_topic
        self._producer = producer

    def began(self, call: Call) -> None:
        """An attempt begins. Nobody waits until that is stored: its end, which counts, comes behind it."""
        record = self._record(call, JobState.RUNNING)
        try:
            sent = self._producer.send_nowait(self._topic, msgspec.json.encode(record), record.id)
        except BufferFull as error:
            log.warning("%s: %s", record.id, error)
        else:
            sent.add_done_callback(_told)

    async def done(self, call: Call, result: Any) -> None:
        """Store the result. Raises what says that it cannot be: SerializationFailed, RecordTooLarge and others."""
        task = call.handler
        assert isinstance(task, Task)
        await self._send(self._record(call, JobState.DONE, result=task.results.encode(result)))

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

    def _record(
        self, call: Call, state: JobState, error: str = "", detail: str = "", retry_ms: int = -1,
        result: msgspec.Raw = _NOTHING,
    ) -> StatusRecord:  # fmt: skip
        context, message = call.context, call.message
        return StatusRecord(
            context.job_id, context.name, state, context.attempt, context.attempts, now_ms(), message.partition,
            message.offset, error, detail, retry_ms, result,
        )  # fmt: skip

    async def _send(self, record: StatusRecord) -> None:
        await self._producer.send(self._topic, msgspec.json.encode(record), record.id)


def _told(sent: asyncio.Future[Any]) -> None:
    if not sent.cancelled() and (error := sent.exception()) is not None:
        log.warning("that a job began could not be stored: %s", error)
