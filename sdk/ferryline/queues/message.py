"""A record that is leased to this receiver, and what can be done with it."""

from __future__ import annotations

import asyncio
import logging
import traceback
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ferryline import tracing
from ferryline.core.leases import HANDED, LOST, WAITING, Lease
from ferryline.message import Described, Source
from ferryline.protocol._codec import COMPILED, MessageBase, without_gc
from ferryline.protocol.errors import FerrylineError, SerializationFailed
from ferryline.protocol.queue_messages import NACK, REJECT, RELEASE
from ferryline.queues.options import DETAIL_BYTES_MAX, REASON_BYTES_MAX, check_delay, shortened
from ferryline.serializers import Decoder

if TYPE_CHECKING:
    from ferryline.queues.leasing import Leasing
    from ferryline.queues.settlements import Settlements

log = logging.getLogger("ferryline.queue")

T = TypeVar("T")


class Delivered(Source):
    """What the messages of one delivery share. ``unreadable``: why values of it did not parse, by index."""

    __slots__ = ("lease", "leasing", "settlements", "unreadable")

    def __init__(self, topic: str, partition: int, decode: Decoder | None, lease: Lease, leasing: Leasing) -> None:
        super().__init__(topic, partition, decode)
        self.lease = lease
        self.leasing = leasing
        self.settlements: Settlements = leasing.settlements
        self.unreadable: dict[int, SerializationFailed] = {}


@without_gc
class QueueMessage(Described, MessageBase, Generic[T]):
    """One record, leased to this receiver until it is settled: `ack`, `nack`, `reject` or `release`, or `processing`.

    The lease is renewed meanwhile. A settlement returns when it is committed. It raises LeaseLost when the record was
    not ours any more (nothing was done then), InvalidArgument when it was settled before, OutcomeUnknown or
    DeadlineExceeded when no broker has answered by the end of the lease.
    """

    if COMPILED:
        __slots__ = ()

    # Where it stands in its delivery: that is what offsets of the batches in it mean.
    _at: ClassVar[Any] = MessageBase.offset

    if TYPE_CHECKING:

        @property
        def value(self) -> T:
            """The value as the receiver's type. Raises SerializationFailed, naming topic, partition and offset."""

    @property
    def offset(self) -> int:
        return self._source.lease.offsets[self._at]  # type: ignore[no-any-return]

    @property
    def delivery_count(self) -> int:
        """How often it was leased, this time included."""
        return self._source.lease.attempts[self._at]  # type: ignore[no-any-return]

    @property
    def is_held(self) -> bool:
        """Whether it is still ours to settle, as far as we know."""
        return self._source.lease.states[self._at] in (WAITING, HANDED)

    # -- settling ----------------------------------------------------------------------------------

    async def ack(self) -> None:
        """It is done: nobody gets it again."""
        self._source.settlements.awaited = True
        await self.ack_nowait()

    def ack_nowait(self) -> asyncio.Future[None]:
        """`ack`, without waiting: it leaves with all others of this pass of the loop, or some milliseconds later with
        more if the application waits for records and has none. The future tells its outcome."""
        source = self._source
        return source.settlements.ack(source.lease, self._at)  # type: ignore[no-any-return]

    async def nack(self, delay: float | None = None, reason: str = "", detail: str = "") -> None:
        """It failed: again after ``delay`` seconds, or after the topic's back-off. Its attempts may be used up by that.

        ``reason`` (256 bytes) and ``detail`` (4 KiB) stay with it.
        """
        delay_ms = -1 if delay is None else check_delay(delay, "delay")
        await self._settle(NACK, delay_ms, reason, detail)

    async def reject(self, reason: str = "", detail: str = "") -> None:
        """It can never be done: to the dead letters, or parked, as the topic's retry policy says."""
        await self._settle(REJECT, -1, reason, detail)

    async def release(self) -> None:
        """Give it back unread: somebody else gets it at once, and this attempt does not count."""
        await self._settle(RELEASE, -1, "", "")

    async def extend(self, seconds: float) -> None:
        """Hold the lease for this long from now. It is renewed anyway; this also says that it is being worked on."""
        await self._source.settlements.extend(self._source.lease, self._at, seconds)

    def processing(self, *, reraise: bool = False) -> Processing[T]:
        """``async with`` around the work: `ack` when it returns, `nack` with the topic's back-off when it raises.

        A value that does not parse is rejected. What was raised goes to the log and with the record, and the program
        goes on, unless ``reraise``. A cancelled one is released. Nothing is done if the block settled it. The outcome
        is not waited for.
        """
        return Processing(self, reraise)

    def _settle(self, action: str, delay_ms: int, reason: str, detail: str) -> asyncio.Future[None]:
        source = self._source
        return source.settlements.settle(  # type: ignore[no-any-return]
            source.lease, self._at, action, delay_ms, shortened(reason, REASON_BYTES_MAX),
            shortened(detail, DETAIL_BYTES_MAX),
        )  # fmt: skip

    def _parse(self) -> Any:
        """The parsed value; asked for once. That it did not parse is remembered, so that it is not tried for ever."""
        try:
            return super()._parse()
        except SerializationFailed as error:
            self._source.unreadable[self._at] = error
            raise

    def __repr__(self) -> str:
        return f"QueueMessage({self.topic}/{self.partition}/{self.offset} key={self.key!r} raw={self.raw!r:.100})"


class Processing(Generic[T]):
    """The work on one record. Made by `QueueMessage.processing`."""

    def __init__(self, message: QueueMessage[T], reraise: bool) -> None:
        self._message = message
        self._reraise = reraise
        self._span: AbstractContextManager[Any] | None = None

    async def __aenter__(self) -> QueueMessage[T]:
        source = self._message._source
        source.leasing.working += 1
        if tracing.active is not None:
            self._span = tracing.active.processing(self._message)
            self._span.__enter__()
        return self._message

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        message = self._message
        source = message._source
        if self._span is not None:
            self._span.__exit__(kind, error, trace)
        try:
            state = source.lease.states[message._at]
            if state == HANDED:
                self._settle(error).add_done_callback(self._told)
            elif state == LOST:
                log.warning("%r was lost before its processing ended; it will be delivered again", message)
        finally:
            source.leasing.worked()
        if not isinstance(error, Exception):
            return False
        if not self._reraise:
            log.warning("%r failed, attempt %d", message, message.delivery_count, exc_info=error)
        return not self._reraise

    def _settle(self, error: BaseException | None) -> asyncio.Future[None]:
        message = self._message
        if error is None:
            return message.ack_nowait()
        if not isinstance(error, Exception):  # cancelled, or the program ends: the record is not at fault
            return message._settle(RELEASE, -1, "", "")
        unreadable = message._source.unreadable.get(message._at)
        action = NACK if unreadable is None else REJECT
        return message._settle(action, -1, described(unreadable or error), detailed(error))

    def _told(self, outcome: asyncio.Future[None]) -> None:
        error = None if outcome.cancelled() else outcome.exception()
        if isinstance(error, FerrylineError):
            log.warning("%r: %s", self._message, error)


def described(error: BaseException) -> str:
    """One line about an exception: its type and what it says."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def detailed(error: BaseException) -> str:
    """The traceback of an exception. Its end, where it happened, is kept if it is too long."""
    text = "".join(traceback.format_exception(error))
    data = text.encode(errors="replace")
    if len(data) <= DETAIL_BYTES_MAX:
        return text
    return "..." + data[3 - DETAIL_BYTES_MAX :].decode(errors="ignore")
