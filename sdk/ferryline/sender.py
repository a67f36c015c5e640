"""The driver of `ProducerCore`: carries out its effects, feeds it what happens, keeps its one timer.

No rule of the protocol stands here; those are in ``core/producer.py``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from ferryline.accumulator import Batch, TopicBuffer
from ferryline.core.producer import (
    BatchAnswered,
    BatchClosed,
    Closed,
    CompleteBatch,
    Event,
    FailBatch,
    ProducerCore,
    RefreshMetadata,
    RepartitionBatch,
    RouteChanged,
    SendBatch,
    SessionLost,
    TimePassed,
)
from ferryline.protocol.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    FerrylineError,
    InternalError,
    QuotaExceeded,
    RequestTimedOut,
    from_info,
)
from ferryline.protocol.frames import FLAG_MORE, Frame, Kind, decode_header
from ferryline.protocol.limits import FRAME_ENTRIES_MAX
from ferryline.protocol.messages import Produce, ProduceAnswer, ProduceEntry
from ferryline.transport import Session

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.receipts import Receipts

log = logging.getLogger("ferryline.producer")

PRODUCE_FRAME_BYTES = 4 * 1024 * 1024  # payload of one frame; a larger one only makes others on the session wait
LATE_ANSWER_S = 60.0  # how long an answer may still settle an attempt that was given up
_TIMER_SLACK_S = 0.0005  # loop time and our ms do not round alike; waking early would spin


class Flight:
    """One PRODUCE frame on its way: which sends its entries are, and which of them were answered."""

    __slots__ = ("answered", "correlation", "sender", "sends", "session", "timer")

    def __init__(self, sender: Sender, session: Session, sends: list[SendBatch]) -> None:
        self.sender = sender
        self.session = session
        self.sends = sends
        self.answered = [False] * len(sends)
        self.correlation = 0
        self.timer: asyncio.TimerHandle | None = None

    def on_answer(self, frame: Frame | None, error: FerrylineError | None) -> None:
        """Entries may be answered in several frames, in any order."""
        sender = self.sender
        if frame is not None:
            try:
                answer = decode_header(frame.header, ProduceAnswer)
            except FerrylineError as malformed:
                error = RequestTimedOut(f"the answer is not readable: {malformed}")
            else:
                for result in answer.results:
                    if 0 <= result.index < len(self.sends) and not self.answered[result.index]:
                        self.answered[result.index] = True
                        refusal = None if result.error is None else from_info(result.error)
                        sender.answered(self.sends[result.index], refusal, result.base_offset, result.epoch)
                if frame.flags & FLAG_MORE:
                    sender.dispatch()
                    return
        for index, send in enumerate(self.sends):  # an answer without this entry says nothing about it
            if not self.answered[index]:
                self.answered[index] = True
                sender.answered(send, error or RequestTimedOut("the broker did not answer for this batch"))
        if self.timer is not None:
            self.timer.cancel()
        sender.dispatch()

    def forget(self) -> None:
        self.session.forget(self.correlation)


class Sender:
    """Sends batches for a producer. ``left(batch)`` is told when a batch has had its last word, futures resolved;
    ``returned(batch)`` when its records must be routed anew; ``over_quota(batch, quota, limit)`` when it was refused
    for that."""

    def __init__(
        self,
        client: Client,
        *,
        request_timeout_ms: int,
        partial_in_flight: int,
        left: Callable[[Batch], None],
        returned: Callable[[Batch], None],
        over_quota: Callable[[Batch, str, int], None],
        receipts: Receipts | None = None,
    ) -> None:
        self._client = client
        self._left = left
        self._returned = returned
        self._over_quota = over_quota
        self._receipts = receipts
        self._core = ProducerCore(
            secrets.randbits(63), request_timeout_ms=request_timeout_ms, partial_in_flight=partial_in_flight
        )
        self._loop = asyncio.get_running_loop()
        self._batches: dict[int, Batch] = {}
        self._routes: dict[tuple[str, int], tuple[int, int, int]] = {}  # as last told to the core
        self._outbox: dict[int, list[SendBatch]] = {}
        self._waiting: dict[int, list[SendBatch]] = {}  # for a session that is being opened
        self._connecting: dict[int, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._broken: FerrylineError | None = None
        self.room = self._core.room
        client.connections.on_lost.append(self._session_lost)

    def oldest(self) -> int | None:
        """Number of the first closed of the batches that have had no last word."""
        return next(iter(self._batches), None)

    def now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    def add(self, batch: Batch, deadline_ms: int) -> None:
        """Take a closed batch. `dispatch` sends what the core decides."""
        if self._broken is not None:
            batch.fail(self._broken)
            self._left(batch)
            return
        self._batches[batch.number] = batch
        if self._receipts is not None:
            self._receipts.sent(batch)
        partitions = batch.partitions if batch.keyed else 0
        self._feed(BatchClosed(batch.key, batch.number, len(batch.futures), deadline_ms, partitions))

    def answered(self, send: SendBatch, error: FerrylineError | None, base_offset: int = -1, epoch: int = 0) -> None:
        if error is not None and "primary" in error.details:
            self._client.routing.hint(send.key, error.details.get("primary"), error.details.get("epoch"))
        if error is None and self._receipts is not None:
            self._receipts.answered(send.batch, epoch)
        if isinstance(error, QuotaExceeded):
            self._note_quota(send, error)
        self._feed(BatchAnswered(send.key, send.batch, send.attempt, base_offset, epoch, error))

    def _note_quota(self, send: SendBatch, error: QuotaExceeded) -> None:
        batch, limit = self._batches.get(send.batch), error.details.get("limit")
        if batch is not None and type(limit) is int:
            self._over_quota(batch, str(error.details.get("quota")), limit)

    def tell_routes(self, buffer: TopicBuffer) -> None:
        """Tell the core where the partitions of a topic are now, as far as that changed."""
        routing = self._client.routing
        meta = routing.cluster.topics.get(buffer.id)
        partitions = meta.config.partitions if meta is not None else 0
        for accumulator in buffer.accumulators:
            key = accumulator.key
            route = routing.route(key)
            told = (route.broker, route.epoch, partitions)
            if self._routes.get(key) != told:
                self._routes[key] = told
                self._feed(RouteChanged(key, route.broker, route.epoch, partitions, meta is None))
        self.dispatch()

    def give_up(self) -> None:
        """Fail everything that is unsettled and send nothing more."""
        self._feed(Closed())
        for task in self._connecting.values():
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._client.connections.on_lost.remove(self._session_lost)

    # -- the core ----------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        if self._broken is not None:
            return
        left: list[Batch] = []
        try:
            effects = self._core.handle(event, self.now_ms())
        except AssertionError as failed:
            self._break(failed)
            return
        for effect in effects:
            if isinstance(effect, SendBatch):
                self._outbox.setdefault(effect.broker, []).append(effect)
            elif isinstance(effect, CompleteBatch):
                batch = self._batches.pop(effect.batch)
                if self._receipts is not None:
                    self._receipts.acknowledged(batch, effect.base_offset)
                batch.complete(effect.base_offset)
                left.append(batch)
            elif isinstance(effect, FailBatch):
                batch = self._batches.pop(effect.batch)
                if self._receipts is not None:
                    self._receipts.failed(batch, definite=effect.error.definite)
                batch.fail(effect.error)
                left.append(batch)
            elif isinstance(effect, RepartitionBatch):
                left.append(self._batches.pop(effect.batch))
                left[-1].returned = True
                if self._receipts is not None:
                    self._receipts.failed(left[-1], definite=True)
            elif isinstance(effect, RefreshMetadata):
                self._client.watch.refresh()
        # Only now, because these may close further batches, whose sends must follow the ones above.
        for batch in left:
            if batch.returned:
                self._returned(batch)
            else:
                self._left(batch)
        self._arm()

    def _break(self, failed: AssertionError) -> None:
        """An invariant does not hold: nothing more is sent, and nobody waits for what cannot come."""
        log.critical("the producer stops: %s", failed)
        self._broken = InternalError(f"the producer stopped: {str(failed).splitlines()[0][:200]}")
        self._outbox.clear()
        batches, self._batches = self._batches, {}
        for batch in batches.values():
            batch.fail(self._broken)
            self._left(batch)

    def _arm(self) -> None:
        deadline_ms = self._core.next_deadline_ms()
        if deadline_ms is None:
            return
        if self._timer is not None:
            if self._timer_ms <= deadline_ms:
                return
            self._timer.cancel()
        self._timer_ms = deadline_ms
        self._timer = self._loop.call_at(deadline_ms / 1000 + _TIMER_SLACK_S, self._time_passed)

    def _time_passed(self) -> None:
        self._timer = None
        self._feed(TimePassed())
        self.dispatch()

    def _session_lost(self, broker: int) -> None:
        self._feed(SessionLost(broker))
        self.dispatch()

    # -- the network -------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Send what the core wants sent: per broker in its order, several batches in one frame."""
        while self._outbox:
            outbox, self._outbox = self._outbox, {}
            for broker, sends in outbox.items():
                session = self._client.connections.ready(broker)
                if broker in self._connecting:
                    self._waiting[broker].extend(sends)
                elif session is not None:
                    self._send(session, sends)
                else:
                    self._waiting[broker] = sends
                    self._connecting[broker] = self._loop.create_task(self._connect(broker))

    async def _connect(self, broker: int) -> None:
        connections = self._client.connections
        try:
            session = await connections.session(broker, timeout=connections.connector.connect_timeout + 1)
        except FerrylineError as error:
            del self._connecting[broker]
            if isinstance(error, DeadlineExceeded):  # of this connection, not of the records
                error = ConnectionFailed(f"broker {broker}: {error.message}")
            for send in self._waiting.pop(broker):
                self.answered(send, error)
        else:
            del self._connecting[broker]
            self._send(session, self._waiting.pop(broker))
        self.dispatch()

    def _send(self, session: Session, sends: list[SendBatch]) -> None:
        entries: list[ProduceEntry] = []
        parts: list[bytes | bytearray | memoryview] = []
        group: list[SendBatch] = []
        size = 0
        for send in sends:
            batch = self._batches.get(send.batch)
            if batch is None:
                continue  # its last word was said while the session was being opened
            data = batch.seal(send.pid, send.pepoch, send.sequence)
            if group and (size + len(data) > PRODUCE_FRAME_BYTES or len(group) >= FRAME_ENTRIES_MAX):
                self._send_frame(session, group, entries, parts)
                entries, parts, group, size = [], [], [], 0
            entries.append(
                ProduceEntry(
                    send.key[0], send.key[1], batch.partitions if batch.keyed else self._partitions(batch), len(data)
                )
            )
            parts.append(data)
            group.append(send)
            size += len(data)
        if group:
            self._send_frame(session, group, entries, parts)

    def _partitions(self, batch: Batch) -> int:
        """The count as known now: records without a key may go where they were meant to go, whatever it is."""
        meta = self._client.routing.cluster.topics.get(batch.key[0])
        return meta.config.partitions if meta is not None else batch.partitions

    def _send_frame(
        self,
        session: Session,
        sends: list[SendBatch],
        entries: list[ProduceEntry],
        parts: list[bytes | bytearray | memoryview],
    ) -> None:
        flight = Flight(self, session, sends)
        timeout_ms = min(send.timeout_ms for send in sends)
        try:
            flight.correlation = session.ask(Kind.PRODUCE, Produce(timeout_ms, entries), parts, flight.on_answer)
        except FerrylineError as error:
            for send in sends:
                self.answered(send, error)
            return
        flight.timer = self._loop.call_later(timeout_ms / 1000 + LATE_ANSWER_S, flight.forget)
