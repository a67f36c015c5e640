"""What the application settles, gathered until the loop comes round or for a moment longer, and who waits for the
outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from ferryline.core.leases import HANDED, LOST, WAITING, Lease
from ferryline.core.receiving import ReceiverCore
from ferryline.core.receiving_events import Settle, Settled
from ferryline.options import check_seconds
from ferryline.protocol.errors import ClientClosed, FerrylineError, InvalidArgument, LeaseLost
from ferryline.protocol.queue_messages import ACK, EXTEND, RELEASE
from ferryline.queues.message import QueueMessage
from ferryline.queues.options import LEASE_S_MAX, LEASE_S_MIN

GATHER_MAX = 2_000  # settlements that are not sent before the loop comes round
SettleFuture = asyncio.Future[Any]  # of nothing, but for one that stands for several records


class Settlements:
    """Settlements of one receiver, from the call to the last word. ``send(settles, awaited)`` gives them to the core.

    ``gathered``: how many records were settled since the last frame. ``gather_s``: acknowledgements leave no sooner
    after those before them. One that comes after a pause, or when nothing else is here to be acknowledged, leaves at
    once: nothing is lost where nothing is gathered, and the next record of its key waits for it.
    """

    def __init__(
        self, core: ReceiverCore, topic: str, send: Callable[[list[Settle], bool], None], *, gather_s: float = 0.0
    ) -> None:
        self.gathered = 0
        self.closed = False
        self.awaited = False  # somebody waits for one of those that were settled since the last frame
        self._core = core
        self._table = core.table
        self._topic = topic
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._new_future: Callable[[], SettleFuture] = partial(asyncio.Future, loop=self._loop)
        self._acks: dict[Lease, tuple[list[int], list[SettleFuture]]] = {}
        self._others: list[tuple[Settle, list[SettleFuture]]] = []
        self._outcomes: dict[int, tuple[Settle, list[SettleFuture]]] = {}  # sent, without a last word
        self._numbers = 0
        self._flushing: asyncio.Handle | None = None
        self._gathering = False  # it waits for more to come
        self._gather_s = gather_s
        self._flushed_at = float("-inf")  # loop time
        self._failed: FerrylineError | None = None  # why the core says nothing any more

    @property
    def last(self) -> int:
        """Number of the last settlement that was sent."""
        return self._numbers

    def done(self, upto: int) -> bool:
        """Whether every settlement up to this number has had its last word."""
        return min(self._outcomes, default=upto + 1) > upto

    def ack(self, lease: Lease, index: int) -> SettleFuture:
        """Settle one record with all others of this pass of the loop. The common path: no object but the future."""
        if not self._table.begin(lease, index):
            return self._refused(lease, index)
        future = self._new_future()
        found = self._acks.get(lease)
        if found is None:
            self._acks[lease] = ([index], [future])
        else:
            found[0].append(index)
            found[1].append(future)
        self.gathered += 1
        if self._flushing is None:
            self._gather()
        elif self.gathered >= GATHER_MAX:
            self.flush()
        elif self._gathering and not self._table.unsettled:
            self._flush_soon()
        return future

    def ack_together(self, lease: Lease, places: dict[int, int]) -> Together:
        """Settle records of one lease, with one future for all: the common path of batches. ``places`` names them, and
        for each a number of the caller's, under which it is told what was not done."""
        indexes = sorted(places)
        errors: dict[int, FerrylineError] = {}
        refused = self._table.begin_all(lease, indexes)
        for index in refused:
            errors[places[index]] = self._refusal(lease, index)
        good = indexes if not refused else [index for index in indexes if places[index] not in errors]
        self.gathered += len(good)
        future = self._ask(lease, good, ACK) if good else None
        return Together(
            future, {index: places[index] for index in good}, errors, lambda index: self._lost_error(lease, index)
        )

    def settle(
        self, lease: Lease, index: int, action: str, delay_ms: int = -1, reason: str = "", detail: str = ""
    ) -> SettleFuture:
        """Any other end of a record."""
        if not self._table.begin(lease, index):
            return self._refused(lease, index)
        return self._ask(lease, [index], action, delay_ms, reason, detail)

    def extend(self, lease: Lease, index: int, seconds: float) -> SettleFuture:
        """Prolong the lease that a record is in."""
        for_ms = int(check_seconds(seconds, "seconds", LEASE_S_MIN, LEASE_S_MAX) * 1000)
        if lease.states[index] != HANDED:
            return self._refused(lease, index)
        return self._ask(lease, [index], EXTEND, for_ms)

    def give_back(self, messages: list[QueueMessage[Any]]) -> None:
        """Release records that were not handed out."""
        by_lease: dict[Lease, list[int]] = {}
        for message in messages:
            lease, index = message._source.lease, message._at
            if self._table.begin(lease, index):
                by_lease.setdefault(lease, []).append(index)
        for lease, indexes in by_lease.items():
            self._ask(lease, indexes, RELEASE)

    def end_waiting(self, lease: Lease, action: str, reason: str = "") -> None:
        """Settle what was not handed out of one lease."""
        indexes = [index for index in lease.indexes(WAITING) if self._table.begin(lease, index)]
        if indexes:
            self._ask(lease, indexes, action, reason=reason)

    def _ask(
        self, lease: Lease, indexes: list[int], action: str, delay_ms: int = -1, reason: str = "", detail: str = ""
    ) -> SettleFuture:
        self._numbers += 1
        deadline_ms = self._core.settle_deadline_ms(lease, self._now_ms())
        settle = Settle(self._numbers, lease, action, sorted(indexes), deadline_ms, delay_ms, reason, detail)
        future = self._new_future()
        self._others.append((settle, [future]))
        self._flush_soon()  # somebody else may want the record
        return future

    def _gather(self) -> None:
        if self._gather_s and self._table.unsettled:
            due = self._flushed_at + self._gather_s
            if due > self._loop.time():
                self._gathering = True
                self._flushing = self._loop.call_at(due, self.flush)
                return
        self._flush_soon()

    def _flush_soon(self) -> None:
        """When the loop comes round, whatever was to be waited for."""
        if self._flushing is not None:
            if not self._gathering:
                return
            self._flushing.cancel()
        self._gathering = False
        self._flushing = self._loop.call_soon(self.flush)

    def came_round(self) -> None:
        """The application has let the loop run: send what it settled, unless that shall be gathered for longer."""
        if self.gathered and not self._gather_s:
            self.flush()

    def flush(self) -> None:
        """Send what was settled since the last time."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        self._gathering = False
        self.gathered = 0
        if self._gather_s:
            self._flushed_at = self._loop.time()
        acks, self._acks = self._acks, {}
        awaited, self.awaited = self.awaited, False
        asked, self._others = self._others, []
        now_ms = self._now_ms()
        for lease, (indexes, futures) in acks.items():
            self._numbers += 1
            deadline_ms = self._core.settle_deadline_ms(lease, now_ms)
            asked.append((Settle(self._numbers, lease, ACK, indexes, deadline_ms), futures))
        if asked or (awaited and self._outcomes):
            self._outcomes.update((settle.number, (settle, futures)) for settle, futures in asked)
            self._send([settle for settle, _ in asked], awaited)
            if self._failed is not None:
                self.fail(self._failed)

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    def _refused(self, lease: Lease, index: int) -> SettleFuture:
        future = self._new_future()
        _fail(future, self._refusal(lease, index))
        return future

    def _refusal(self, lease: Lease, index: int) -> FerrylineError:
        if lease.states[index] != LOST:
            return self.settled_before(lease, index)
        if self.closed:
            return ClientClosed(f"{self._where(lease, index)}: the receiver is closed")
        return self._lost_error(lease, index)

    def settled_before(self, lease: Lease, index: int) -> InvalidArgument:
        return InvalidArgument(f"{self._where(lease, index)} was settled before", field="message")

    def _where(self, lease: Lease, index: int) -> str:
        return f"{self._topic}/{lease.key[1]}/{lease.offsets[index]}"

    def _lost_error(self, lease: Lease, index: int) -> LeaseLost:
        offset = lease.offsets[index]
        return LeaseLost(
            f"{self._where(lease, index)} is not leased to this receiver any more",
            topic=self._topic, partition=lease.key[1], offset=offset,
        )  # fmt: skip

    def settled(self, effect: Settled) -> None:
        """The core has said its last word on one. A future that stands for several records tells which were lost."""
        settle, futures = self._outcomes.pop(effect.number)
        if effect.error is not None:
            for future in futures:
                _fail(future, effect.error)
            return
        if len(futures) < len(settle.indexes):
            if not futures[0].done():
                futures[0].set_result(effect.lost)
            return
        if not effect.lost:
            for future in futures:
                if not future.done():
                    future.set_result(None)
            return
        lost = set(effect.lost)
        for index, future in zip(settle.indexes, futures, strict=True):
            if index in lost:
                _fail(future, self._lost_error(settle.lease, index))
            elif not future.done():
                future.set_result(None)

    def fail(self, error: FerrylineError) -> None:
        """Nobody waits for what cannot come, from now on either."""
        self._failed = error
        outcomes, self._outcomes = self._outcomes, {}
        for _, futures in outcomes.values():
            for future in futures:
                _fail(future, error)

    def close(self) -> None:
        """Nothing is sent any more. After the core's last word on what was sent."""
        self.closed = True
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        error = ClientClosed("the receiver is closed")
        waiting = [futures for _, futures in self._acks.values()] + [futures for _, futures in self._others]
        for futures in waiting:
            for future in futures:
                _fail(future, error)
        for lease in list(self._table.held.values()):
            for index in lease.indexes(WAITING, HANDED):
                self._table.lose(lease, index)


class Together:
    """Several records that are acknowledged with one future. ``lost(index)``: the error of one that was not ours."""

    __slots__ = ("_errors", "_future", "_lost", "_places")

    def __init__(
        self,
        future: SettleFuture | None,
        places: dict[int, int],
        errors: dict[int, FerrylineError],
        lost: Callable[[int], FerrylineError],
    ) -> None:
        self._future = future
        self._places = places
        self._errors = errors
        self._lost = lost

    async def errors(self) -> dict[int, FerrylineError]:
        """What was not done, by the caller's numbers; once that is known of all."""
        if self._future is None:
            return self._errors
        try:
            lost = await self._future
        except FerrylineError as error:
            return self._errors | dict.fromkeys(self._places.values(), error)
        return self._errors | {self._places[index]: self._lost(index) for index in lost or ()}


def _fail(future: SettleFuture, error: FerrylineError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever does not ask for the outcome shall not read of it at the end of the program
