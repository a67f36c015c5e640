"""What `ReceiverCore` wants sent, as frames, and their answers, as events."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ferryline.core.leases import PartitionKey
from ferryline.core.receiving_events import (
    ForgetReceive,
    KeepAnswered,
    Received,
    ReceiveFailed,
    SendKeep,
    SendReceive,
    SendSettle,
    SettleAnswered,
    SettleFailed,
)
from ferryline.protocol.errors import ErrorInfo, FerrylineError, InternalError, RequestTimedOut, from_info
from ferryline.protocol.frames import FLAG_MORE, Frame, Kind, decode_header
from ferryline.protocol.queue_messages import Keep, KeepEntry, Receive, ReceiveAnswer, Settle, SettleAnswer
from ferryline.queues.calls import Call, Calls
from ferryline.queues.options import ReceiverOptions

if TYPE_CHECKING:
    from ferryline.client import Client

T = TypeVar("T")
ANSWER_S = 5.0  # until a frame counts as lost, beyond what it may wait at the broker


class Frames:
    """The frames of one member. ``feed(event, payloads)`` gets what became of each; ``moved()`` is called when a broker
    named another primary."""

    def __init__(
        self,
        client: Client,
        options: ReceiverOptions,
        member: str,
        feed: Callable[..., None],
        moved: Callable[[], None],
    ) -> None:
        self._routing = client.routing
        self._options = options
        self._member = member
        self._feed = feed
        self._moved = moved
        self._calls = Calls(client)
        self._asks: dict[int, Call] = {}

    def receive(self, effect: SendReceive) -> None:
        options = self._options
        header = Receive(
            options.group, self._member, list(effect.keys), effect.records_max, effect.bytes_max, options.lease_ms,
            effect.wait_ms, options.ordering, options.start, options.strict, batches=True, standing=not options.strict,
        )  # fmt: skip

        def done(frame: Frame | None, error: FerrylineError | None) -> None:
            more = frame is not None and frame.flags & FLAG_MORE != 0
            answer = _decoded(frame, ReceiveAnswer, error)
            if isinstance(answer, FerrylineError):
                self.forget(ForgetReceive(effect.ask))
                self._feed(ReceiveFailed(effect.ask, answer))
                return
            if not more:
                self._asks.pop(effect.ask, None)
            payload = frame.payload if frame is not None else memoryview(b"")
            parts: list[memoryview] = []
            at = 0
            for delivery in answer.deliveries:
                parts.append(payload[at : at + delivery.size])
                at += delivery.size
                self._heed((delivery.topic_id, delivery.partition), delivery.error)
            self._feed(Received(effect.ask, answer.deliveries, more), parts)

        call = self._calls.start(effect.broker, Kind.RECEIVE, header, effect.wait_ms / 1000 + ANSWER_S, done)
        if call in self._calls.open:
            self._asks[effect.ask] = call

    def forget(self, effect: ForgetReceive) -> None:
        call = self._asks.pop(effect.ask, None)
        if call is not None:
            call.forget()

    def keep(self, effect: SendKeep) -> None:
        entries = [KeepEntry(*key, leases) for key, leases in effect.entries]
        header = Keep(self._options.group, self._member, entries)

        def done(frame: Frame | None, error: FerrylineError | None) -> None:
            answer = _decoded(frame, SettleAnswer, error)
            if isinstance(answer, FerrylineError):
                self._feed(KeepAnswered(effect.keep, answer))
                return
            by_index = {result.index: result for result in answer.results}
            told: dict[PartitionKey, FerrylineError] = {}
            for index, (key, _) in enumerate(effect.entries):
                result = by_index.get(index)
                if result is None:
                    told[key] = RequestTimedOut("the broker did not answer for this")
                elif result.error is not None:
                    told[key] = from_info(result.error)
                    self._heed(key, result.error)
            self._feed(KeepAnswered(effect.keep, errors=told))

        self._calls.start(effect.broker, Kind.KEEP, header, ANSWER_S, done)

    def settle(self, effect: SendSettle) -> None:
        header = Settle(self._options.group, self._member, effect.entries, effect.patient)

        def done(frame: Frame | None, error: FerrylineError | None) -> None:
            answer = _decoded(frame, SettleAnswer, error)
            if isinstance(answer, FerrylineError):
                self._feed(SettleFailed(effect.frame, answer))
                return
            for result in answer.results:
                if result.error is not None and 0 <= result.index < len(effect.entries):
                    entry = effect.entries[result.index]
                    self._heed((entry.topic_id, entry.partition), result.error)
            self._feed(SettleAnswered(effect.frame, answer.results))

        self._calls.start(effect.broker, Kind.SETTLE, header, ANSWER_S, done)

    async def close(self) -> None:
        """Heed no answer any more."""
        self._asks.clear()
        await self._calls.close()

    def _heed(self, key: PartitionKey, error: ErrorInfo | None) -> None:
        """A refusal may name the primary of a later epoch."""
        if error is None or "primary" not in error.details:
            return
        if self._routing.hint(key, error.details.get("primary"), error.details.get("epoch")):
            self._moved()


def _decoded(frame: Frame | None, kind: type[T], error: FerrylineError | None) -> T | FerrylineError:
    if frame is None:
        return error or InternalError("neither an answer nor an error")
    try:
        return decode_header(frame.header, kind)
    except FerrylineError as malformed:
        return RequestTimedOut(f"the answer is not readable: {malformed}")
