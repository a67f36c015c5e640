"""The receiver: records of a queue, leased one by one, and settled one by one or together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ferryline.heartbeats import Hosted, thread_of
from ferryline.options import check_seconds, check_wait
from ferryline.protocol.errors import ClientClosed, DeadlineExceeded, FerrylineError
from ferryline.protocol.limits import check_range
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import ORDER_KEY
from ferryline.queues.leasing import Leasing
from ferryline.queues.message import Delivered, QueueMessage
from ferryline.queues.options import PREFETCH_MAX, ReceiverOptions
from ferryline.queues.renewal import Renewer

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.queue")

T = TypeVar("T")
BREATHE_AFTER = 64  # records handed out without a turn of the loop: what they settle is sent, what has come is read


class Receiver(Generic[T]):
    """Reads a topic as a queue. Made by ``client.receiver()``; use it with ``async with``, or `start` and `close`.

    Any number of receivers share a group, more than the topic has partitions, too; each record is leased to one of them
    until it is settled, and one key's records come one after the other. Several tasks may read from one receiver.

    ``value``: the type of values (default bytes, as they are). ``lease``: seconds until a receiver that has died loses
    its records; a living one renews them, at most until one has been worked on for ``max_processing``. ``prefetch``:
    how many records may be here unsettled. ``ordering``: "key", "partition" or "none"; the first receiver of a group
    sets it. ``start``: where a new group begins, "start" or "end". ``strict``: the highest priority first, always;
    otherwise a record that has waited long goes before it. ``gather``: an acknowledgement that comes less than so many
    seconds after others were sent waits until then, while other records are here, and leaves with theirs.
    """

    def __init__(
        self,
        client: Client,
        topic: str,
        *,
        group: str,
        value: Any = bytes,
        lease: float = 30.0,
        prefetch: int = 32,
        prefetch_bytes: int = 16 * 1024 * 1024,
        ordering: str = ORDER_KEY,
        start: str = "start",
        strict: bool = False,
        max_processing: float = 3600.0,
        close_timeout: float = 10.0,
        gather: float = 0.0,
    ) -> None:
        self._client = client
        self._options = ReceiverOptions.checked(
            topic,
            group=group,
            value=value,
            lease=lease,
            prefetch=prefetch,
            prefetch_bytes=prefetch_bytes,
            ordering=ordering,
            start=start,
            strict=strict,
            max_processing=max_processing,
            close_timeout=close_timeout,
            gather=gather,
        )
        self._leasing: Leasing | None = None
        self._renewing: Hosted | None = None
        self._closed = False
        self._breath = 0

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Receiver[T]:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin to ask for records. Raises UnknownTopic, ConnectionFailed, DeadlineExceeded."""
        if self._closed:
            raise ClientClosed("the receiver is closed")
        if self._leasing is not None:
            return
        await self._client.start()
        meta = await self._client.learn_topic(self._options.topic)
        leasing = self._leasing = self._lease(meta)
        self._client.closables.append(self)
        leasing.start()
        renewer = Renewer(self._client, self._options, leasing.member, leasing.table, leasing.lost)
        try:
            self._renewing = await thread_of(self._client).host(renewer.run)
        except BaseException:
            await self.close()
            raise

    def _lease(self, meta: TopicMeta) -> Leasing:
        """What holds the leases; `ferryline chaos` has one that writes down what passes."""
        return Leasing(self._client, self._options, meta)

    async def close(self, timeout: float | None = None) -> None:
        """Give back what was not handed out, let the work in hand end, settle, and free what is left.

        Waits at most ``timeout`` seconds (default ``close_timeout``) for the blocks of `processing` that are running,
        and a few more for brokers. Whatever is unsettled then goes to other receivers at once.
        """
        if self._closed:
            return
        self._closed = True
        leasing = self._leasing
        if leasing is None:
            return
        limit = self._options.close_timeout if timeout is None else check_seconds(timeout, "timeout", 0.0, 3600.0)
        try:
            await leasing.close(limit)
        finally:
            if self._renewing is not None:
                self._renewing.stop()
            if self in self._client.closables:
                self._client.closables.remove(self)

    # -- reading -----------------------------------------------------------------------------------

    def __aiter__(self) -> Receiver[T]:
        return self

    async def __anext__(self) -> QueueMessage[T]:
        """The next record; ends when the receiver is closed. Raises UnknownTopic, Forbidden, InvalidArgument (another
        ordering than the group has), CorruptBatch; each once, and again if it is still so."""
        leasing = self._running()
        self._breath += 1
        if self._breath >= BREATHE_AFTER:
            await self._breathe(leasing)
        while True:
            message = leasing.buffer.one()
            if message is not None:
                return message
            if leasing.buffer.closed:
                raise StopAsyncIteration
            self._breath = 0
            await self._news(leasing, None)

    async def receive(self, max_records: int = 100, max_wait: float = 1.0) -> list[QueueMessage[T]]:
        """What is there now, up to ``max_records`` (never more than ``prefetch``); waits for the first one at most
        ``max_wait`` seconds, then is empty."""
        check_range(max_records, "max_records", 1, PREFETCH_MAX)
        leasing, loop = self._running(), asyncio.get_running_loop()
        deadline = loop.time() + check_wait(max_wait)
        leasing.buffer.callers += max_wait > 0
        try:
            await self._breathe(leasing)
        finally:
            leasing.buffer.callers -= max_wait > 0
        while True:
            batch = leasing.buffer.some(max_records)
            if batch:
                return batch
            if leasing.buffer.closed:
                raise ClientClosed("the receiver is closed")
            if not await self._news(leasing, deadline - loop.time()):
                return []

    async def _breathe(self, leasing: Leasing) -> None:
        self._breath = 0
        leasing.settlements.came_round()
        await asyncio.sleep(0)

    async def _news(self, leasing: Leasing, timeout: float | None) -> bool:
        if leasing.core.full:
            leasing.look_again()
        return await leasing.buffer.news(timeout)

    # -- settling ----------------------------------------------------------------------------------

    async def ack_many(self, messages: Iterable[QueueMessage[Any]]) -> list[FerrylineError | None]:
        """Acknowledge these together: None for each that is done, else why not, in order."""
        running = self._running()
        together: dict[Delivered, dict[int, int]] = {}  # index in a delivery -> place in ``messages``
        outcomes: list[FerrylineError | None] = []
        source: Delivered | None = None
        places: dict[int, int] = {}
        for place, message in enumerate(messages):
            outcomes.append(None)
            if message._source is not source:
                source = message._source
                places = together.setdefault(source, {})
            if places.setdefault(message._at, place) != place:
                outcomes[place] = running.settlements.settled_before(message._source.lease, message._at)
        asked = [one.settlements.ack_together(one.lease, places) for one, places in together.items()]
        running.settlements.awaited = True
        running.settlements.flush()
        for one in asked:
            for place, error in (await one.errors()).items():
                outcomes[place] = error
        return outcomes

    async def flush(self, timeout: float = 30.0) -> None:
        """Wait until all that was settled so far has had its last word. Raises DeadlineExceeded; settling goes on."""
        if not await self._running().settle_all(check_seconds(timeout, "timeout", 0.0, 86_400.0)):
            raise DeadlineExceeded(f"flush: some records have had no last word after {timeout:g} s")

    def set_prefetch(self, records: int) -> None:
        """Let so many records be here unsettled from now on. Those beyond it that wait are given back in a moment."""
        self._running().prefetch(check_range(records, "prefetch", 1, PREFETCH_MAX))

    # -- questions ---------------------------------------------------------------------------------

    @property
    def member(self) -> str:
        """The name under which the brokers know this receiver; "" before it was started."""
        return self._leasing.member if self._leasing is not None else ""

    @property
    def unsettled(self) -> int:
        """How many records are here, handed out or not, that were not settled."""
        return self._leasing.table.unsettled if self._leasing is not None else 0

    def _running(self) -> Leasing:
        if self._leasing is None:
            raise ClientClosed("the receiver was not started: use `async with`, or await start()")
        return self._leasing
