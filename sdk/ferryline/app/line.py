"""One topic that a worker takes records from: the receiver, who is called, and what becomes of each record."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ferryline import tracing
from ferryline.app.context import Context, Stop
from ferryline.app.depth import STALL_S, Depth
from ferryline.app.errors import Reject
from ferryline.app.handler import Call, Handler, Threads, from_handler
from ferryline.app.metrics import UNKNOWN, WorkerMetrics
from ferryline.app.queue import HEADER_RESULTS, NO_RESULTS
from ferryline.app.reports import Reports
from ferryline.app.verdicts import Verdict, judge
from ferryline.protocol.errors import (
    ClientClosed,
    CorruptBatch,
    FerrylineError,
    InternalError,
    RecordTooLarge,
    SerializationFailed,
)
from ferryline.protocol.queue_messages import ACK, NACK, ORDER_PARTITION, REJECT
from ferryline.queues.message import described, detailed

if TYPE_CHECKING:
    from ferryline.app.app import App
    from ferryline.queues.message import QueueMessage
    from ferryline.queues.receiver import Receiver

log = logging.getLogger("ferryline.app")

TAKE_MAX = 500  # records that are taken from the receiver in one pass
WAIT_S = 86_400.0  # nothing comes of waking up
CLOSE_S = 3.0  # after the grace, for cancelled handlers to end
AGAIN_S = 1.0  # after an error that may pass
DECIDE_S = 0.1  # how often it is decided anew how many records may be here
STORING_MAX = 2_000  # records whose handlers have ended and whose results are on their way
UNREADABLE = (SerializationFailed, RecordTooLarge)  # of a result, too: the next attempt would end alike


class Line:
    """Takes records and calls handlers, at most ``concurrency`` at once. ``find(message)`` says whom to call.

    A task whose result is being stored has no place in ``concurrency`` any more: results of tasks that end together are
    stored together, and the next tasks run meanwhile. ``depth``: how many records are fetched, where that may change.

    Every record that was taken is settled: acknowledged, failed, rejected, or given back when the worker ends.
    """

    def __init__(
        self,
        app: App,
        receiver: Receiver[Any],
        name: str,
        find: Callable[[QueueMessage[Any]], Handler | None],
        *,
        concurrency: int,
        ordering: str,
        attempts: Callable[[], int],
        stop: Stop,
        reports: Reports | None = None,
        depth: Depth | None = None,
        metrics: WorkerMetrics,
    ) -> None:
        self.name = name
        self._metrics = metrics
        self.receiver = receiver
        self._app = app
        self._find = find
        self._concurrency = concurrency
        self._attempts = attempts  # what the topic allows
        self._stop = stop
        self._reports = reports
        self._threads = Threads(concurrency, name)
        self._depth = depth
        self._decided_at = float("-inf")  # loop time
        self._loop = asyncio.get_running_loop()  # kept: that call asks the kernel for our pid
        self._running: set[asyncio.Task[None]] = set()
        self._busy = 0  # of them, those that have a place in `concurrency`; others wait for their result to be stored
        self._room = asyncio.Event()
        # Where a whole partition is one lane, its records may be here together; they are worked on in order.
        self._lanes: dict[int, asyncio.Lock] | None = defaultdict(asyncio.Lock) if ordering == ORDER_PARTITION else None

    # -- taking ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take records until `stop`. Raises a FerrylineError that will not pass by itself."""
        while not self._stop.asked:
            room = self._concurrency - self._busy
            if room <= 0 or len(self._running) - self._busy >= STORING_MAX:
                await self._until_room()
                continue
            if self._depth is not None:
                self._decide(self._depth)
            try:
                batch = await self.receiver.receive(min(room, TAKE_MAX), WAIT_S)
            except ClientClosed:
                if self._stopping():
                    return
                raise
            except FerrylineError as error:
                if not (error.retriable or isinstance(error, CorruptBatch)) or isinstance(error, InternalError):
                    raise
                log.warning("%s: %s", self.name, error)
                await asyncio.sleep(AGAIN_S)
                continue
            if self._depth is not None and self._last_attempts(batch):
                await self._hold_nothing_ahead(self._depth)
            if self._stopping():  # it came in the pass in which the end began: `stop` waits for what was begun only
                await self._give_back(batch)
                return
            for message in batch:
                self._begin(message)

    def _last_attempts(self, batch: Sequence[QueueMessage[Any]]) -> bool:
        """Whether one of these is dead if its worker dies now."""
        allowed = self._attempts()
        for message in batch:
            handler = self._find(message)
            limit = handler.retry.attempts if handler is not None and handler.retry is not None else allowed
            if 0 < limit <= message.delivery_count:
                return True
        return False

    async def _hold_nothing_ahead(self, depth: Depth) -> None:
        """Before a last attempt begins: processes may have died of that record, and what was fetched ahead would
        be dead with it, without ever having been begun."""
        if depth.records > depth.least:
            self.receiver.set_prefetch(depth.stalled())
            with suppress(FerrylineError):  # then it is in doubt; it cannot be held up for ever
                await self.receiver.flush(CLOSE_S)

    async def _give_back(self, batch: Sequence[QueueMessage[Any]]) -> None:
        outcomes = await asyncio.gather(*(message.release() for message in batch), return_exceptions=True)
        for message, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, FerrylineError):
                log.debug("%r was not given back: %s", message, outcome)

    async def _until_room(self) -> None:
        self._room.clear()
        depth = self._depth
        if depth is None or depth.records == depth.least:
            await self._room.wait()
            return
        timer = self._loop.call_later(STALL_S, self._stalled, depth)
        try:
            await self._room.wait()
        finally:
            timer.cancel()

    def _decide(self, depth: Depth) -> None:
        now = self._loop.time()
        if now - self._decided_at >= DECIDE_S:
            self._decided_at = now
            before = depth.records
            if depth.decide() != before:
                self.receiver.set_prefetch(depth.records)

    def _stalled(self, depth: Depth) -> None:
        """Somebody else may have time for what waits here."""
        self.receiver.set_prefetch(depth.stalled())

    def _stopping(self) -> bool:
        return self._stop.asked

    def _begin(self, message: QueueMessage[Any]) -> None:
        task = self._loop.create_task(self._work(message, Place(self)))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._room.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a record's handling failed", self.name, exc_info=error)

    async def stop(self, grace: float) -> None:
        """Give back what waits, let the work in hand end for ``grace`` seconds, cancel what is left and give it back.

        The caller has set `Stop`.
        """
        self._room.set()
        closing = asyncio.create_task(self.receiver.close(grace + CLOSE_S))
        if self._running:
            await asyncio.wait(self._running, timeout=grace)
        left = list(self._running)
        if left:
            log.warning("%s: %d records are not done after %g s; they are given back", self.name, len(left), grace)
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=CLOSE_S)
        await closing
        self._threads.close()

    # -- one record --------------------------------------------------------------------------------

    async def _work(self, message: QueueMessage[Any], place: Place) -> None:
        try:
            if self._lanes is None:
                await self._process(message, place)
                return
            async with self._lanes[message.partition]:
                if not message.is_held:  # one before it failed, and both come again, in order
                    return
                if self._stop.asked:  # nobody waits for what only stood in line
                    await self._give_back([message])
                else:
                    await self._process(message, place)
        finally:
            place.leave()

    async def _process(self, message: QueueMessage[Any], place: Place) -> None:
        lingering: list[asyncio.Future[Any]] = []
        # `processing` makes the end of the receiver wait, and gives the record back if this is cancelled.
        async with message.processing():
            handler = self._find(message)
            if handler is None:
                self._metrics.of(message.topic, UNKNOWN).ended(NACK)
                await self._settle(message, Verdict(NACK, reason="no task of its name is known to this worker"), "")
                return
            lingering = await self._attempt(handler, message, place)
        if lingering and not self._stop.asked:
            place.take()
            await asyncio.wait(lingering)  # the place in `concurrency` is taken until its thread ends

    async def _attempt(self, handler: Handler, message: QueueMessage[Any], place: Place) -> list[asyncio.Future[Any]]:
        attempt, retry = message.delivery_count, handler.retry
        attempts = retry.attempts if retry is not None else self._attempts()
        context = Context(
            self._app, message, name=handler.name, attempt=attempt, attempts=attempts,
            job_id=message.id if self._reports is not None else "", stop=self._stop,
            loop=self._loop,
        )  # fmt: skip
        call = Call(handler, message, context)
        if self._reports is not None:
            call.keeps_result = message.headers.get(HEADER_RESULTS) != NO_RESULTS
        error: Exception | None = None
        if retry is not None and attempt > attempts:
            error = RuntimeError(f"{attempts} attempts ended without a word: their workers died, or lost it")
            call.hopeless = True
        else:
            if self._reports is not None:
                self._reports.began(call)
            error = await self._timed(call)
            if call.stored is not None:
                place.leave()
                error = await _stored(call, call.stored)
        reason = described(error) if error is not None else ""
        verdict = judge(
            error,
            reason,
            hopeless=call.hopeless,
            attempt=attempt,
            attempts=attempts,
            retry=retry,
            draw=random.uniform(0.0, 1.0),
        )
        detail = ""
        if error is not None:
            if tracing.active is not None:
                tracing.active.failed(error)
            detail = detailed(error)
            trace = None if isinstance(error, Reject) else error
            log.warning(
                "%s: %r: %s (attempt %d of %d)", handler.what, message, reason, attempt, attempts, exc_info=trace
            )
        self._metrics.of(message.topic, handler.name).ended(verdict.action)
        if not message.is_held:
            log.debug("%r was settled by its handler, or lost", message)
            return call.lingering
        if error is not None and self._reports is not None:
            place.take()
            await self._reports.failed(call, verdict, detail)
        await self._settle(message, verdict, detail)
        return call.lingering

    async def _timed(self, call: Call) -> Exception | None:
        counts, began = self._metrics.of(call.message.topic, call.handler.name), perf_counter()
        depth, loop = self._depth, self._loop
        now = loop.time()
        counts.in_flight += 1
        try:
            return await self._run(call)
        finally:
            counts.in_flight -= 1
            counts.took(perf_counter() - began)
            if depth is not None:
                depth.took(loop.time() - now)
            if self._reports is not None:
                self._reports.ended(call)

    async def _run(self, call: Call) -> Exception | None:
        """What went wrong, if anything did; storing a result has begun by then."""
        app = self._app
        try:
            result = await call.run(app.providers, app.middleware, self._threads)
            if self._reports is not None and call.message.is_held:
                try:
                    call.stored = self._reports.done(call, result)
                except UNREADABLE:
                    call.hopeless = True
                    raise
        except Exception as error:
            return from_handler(error)
        return None

    async def _settle(self, message: QueueMessage[Any], verdict: Verdict, detail: str) -> None:
        if verdict.action == ACK:
            message.ack_nowait().add_done_callback(_told)
            return
        try:
            if verdict.action == REJECT:
                await message.reject(verdict.reason, detail)
            else:
                await message.nack(verdict.delay, verdict.reason, detail)
        except FerrylineError as error:
            log.warning("%r: %s", message, error)


class Place:
    """A place in the ``concurrency`` of a line. Taken from the start; `leave` and `take` may be repeated."""

    __slots__ = ("_line", "_taken")

    def __init__(self, line: Line) -> None:
        self._line = line
        self._taken = True
        line._busy += 1

    def leave(self) -> None:
        """Another record may be begun."""
        if self._taken:
            self._taken = False
            self._line._busy -= 1
            self._line._room.set()

    def take(self) -> None:
        """The attempt is not over after all; for this moment there may be one too many."""
        if not self._taken:
            self._taken = True
            self._line._busy += 1


async def _stored(call: Call, stored: asyncio.Future[Any]) -> Exception | None:
    """Why the result of a task was not stored, if it was not."""
    try:
        await stored
    except Exception as error:
        call.hopeless = isinstance(error, UNREADABLE)
        return from_handler(error)
    return None


def _told(settled: asyncio.Future[None]) -> None:
    if not settled.cancelled() and (error := settled.exception()) is not None:
        log.warning("an acknowledged record was not settled: %s", error)
