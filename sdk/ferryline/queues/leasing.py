"""The driver of `ReceiverCore`: carries out its effects, feeds it what happens, keeps its one timer.

No rule of queues stands here; those are in ``core/receiving.py``. What the application settles is gathered until the
loop comes round and leaves in one frame for each broker.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ferryline.core.leases import HANDED, LOST, WAITING, Lease
from ferryline.core.receiving import ReceiverCore
from ferryline.core.receiving_events import (
    Arrived,
    Closed,
    Effect,
    Event,
    ForgetReceive,
    GiveBack,
    Parting,
    RaiseError,
    RecordsLost,
    RefreshMetadata,
    RoutesChanged,
    SendKeep,
    SendReceive,
    SendSettle,
    SessionLost,
    Settle,
    SettleAsked,
    Settled,
    Stopped,
    TimePassed,
)
from ferryline.protocol.errors import (
    ClientClosed,
    CorruptBatch,
    FerrylineError,
    InternalError,
    InvalidArgument,
    LeaseLost,
)
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import ACK, EXTEND, NACK, RELEASE
from ferryline.protocol.records import check_crc, decode_messages, read_header
from ferryline.queues.buffer import Buffer
from ferryline.queues.frames import Frames
from ferryline.queues.message import Delivered, QueueMessage
from ferryline.queues.options import ReceiverOptions

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.queue")

CLOSE_SETTLE_S = 5.0  # how long closing waits for settlements on their way
CLOSE_PART_S = 2.0  # and for primaries to hear that nothing is held here
GATHER_MAX = 2_000  # settlements that are not sent before the loop comes round
_TIMER_SLACK_S = 0.0005  # loop time and our ms do not round alike; waking early would spin
SettleFuture = asyncio.Future[None]


class Leasing:
    """What a receiver holds. ``working``: how many records are in a `Processing` now."""

    def __init__(self, client: Client, options: ReceiverOptions, meta: TopicMeta) -> None:
        self.member = f"r-{secrets.token_hex(12)}"
        self.core = ReceiverCore(
            ordering=options.ordering,
            prefetch=options.prefetch,
            prefetch_bytes=options.prefetch_bytes,
            seed=secrets.randbits(62),
        )
        self.table = self.core.table
        self.loop = asyncio.get_running_loop()
        self.buffer = Buffer(self.table, self._expired)
        self.working = 0
        self.gathered = 0  # settlements since the last frame
        self._client = client
        self._options = options
        self._topic_id, self._topic = meta.id, meta.name
        self._frames = Frames(client, options, self.member, self.feed, self._look_at_routes)
        self._new_future: Callable[[], SettleFuture] = partial(asyncio.Future, loop=self.loop)
        self._told: dict[tuple[str, int], tuple[int, int]] | None = None  # routes, as the core knows them
        self._events: deque[tuple[Event, list[memoryview]]] = deque()
        self._feeding = False
        self._parts: list[memoryview] = []  # payloads of the event that is being handled
        self._acks: dict[Lease, tuple[list[int], list[SettleFuture]]] = {}
        self._others: list[tuple[Settle, list[SettleFuture]]] = []
        self._outcomes: dict[int, tuple[Settle, list[SettleFuture]]] = {}
        self._numbers = 0
        self._flushing: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._watchers: set[asyncio.Future[None]] = set()  # resolved when anything has happened
        self._closing = False

    def start(self) -> None:
        self._client.watch.on_change.append(self._look_at_routes)
        self._client.connections.on_lost.append(self._session_lost)
        self._look_at_routes()

    def now_ms(self) -> int:
        return int(self.loop.time() * 1000)

    # -- settling ----------------------------------------------------------------------------------

    def ack(self, lease: Lease, index: int) -> SettleFuture:
        """Settle one record with all others of this pass of the loop. The common path: no object but the future."""
        if not self.table.begin(lease, index):
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
            self._flushing = self.loop.call_soon(self.flush)
        elif self.gathered >= GATHER_MAX:
            self.flush()
        return future

    def settle(
        self, lease: Lease, index: int, action: str, delay_ms: int = -1, reason: str = "", detail: str = ""
    ) -> SettleFuture:
        """Any other end of a record."""
        if not self.table.begin(lease, index):
            return self._refused(lease, index)
        return self._ask(lease, [index], action, delay_ms, reason, detail)

    def extend(self, lease: Lease, index: int, seconds: float) -> SettleFuture:
        """Prolong the lease that a record is in."""
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 1 <= seconds <= 43_200:
            raise InvalidArgument(f"seconds: {seconds!r} is not a number of seconds in 1..43200", field="seconds")
        if lease.states[index] != HANDED:
            return self._refused(lease, index)
        return self._ask(lease, [index], EXTEND, int(seconds * 1000))

    def give_back(self, messages: list[QueueMessage[Any]]) -> None:
        """Release records that were not handed out."""
        by_lease: dict[Lease, list[int]] = {}
        for message in messages:
            lease, index = message._source.lease, message._at
            if self.table.begin(lease, index):
                by_lease.setdefault(lease, []).append(index)
        for lease, indexes in by_lease.items():
            self._ask(lease, indexes, RELEASE)

    def _ask(
        self, lease: Lease, indexes: list[int], action: str, delay_ms: int = -1, reason: str = "", detail: str = ""
    ) -> SettleFuture:
        self._numbers += 1
        deadline_ms = self.core.settle_deadline_ms(lease, self.now_ms())
        settle = Settle(self._numbers, lease, action, sorted(indexes), deadline_ms, delay_ms, reason, detail)
        future = self._new_future()
        self._others.append((settle, [future]))
        if self._flushing is None:
            self._flushing = self.loop.call_soon(self.flush)
        return future

    def flush(self) -> None:
        """Send what was settled since the last time."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        self.gathered = 0
        acks, self._acks = self._acks, {}
        asked, self._others = self._others, []
        now_ms = self.now_ms()
        for lease, (indexes, futures) in acks.items():
            self._numbers += 1
            deadline_ms = self.core.settle_deadline_ms(lease, now_ms)
            asked.append((Settle(self._numbers, lease, ACK, indexes, deadline_ms), futures))
        if asked:
            self._outcomes.update((settle.number, (settle, futures)) for settle, futures in asked)
            self.feed(SettleAsked([settle for settle, _ in asked]))

    def _refused(self, lease: Lease, index: int) -> SettleFuture:
        where = f"{self._topic}/{lease.key[1]}/{lease.offsets[index]}"
        future = self._new_future()
        if lease.states[index] != LOST:
            _fail(future, InvalidArgument(f"{where} was settled before", field="message"))
        elif self._closing:
            _fail(future, ClientClosed(f"{where}: the receiver is closed"))
        else:
            _fail(future, self._lost_error(lease, index))
        return future

    def _lost_error(self, lease: Lease, index: int) -> LeaseLost:
        offset = lease.offsets[index]
        return LeaseLost(
            f"{self._topic}/{lease.key[1]}/{offset} is not leased to this receiver any more",
            topic=self._topic, partition=lease.key[1], offset=offset,
        )  # fmt: skip

    def _settled(self, effect: Settled) -> None:
        settle, futures = self._outcomes.pop(effect.number)
        if effect.error is not None:
            for future in futures:
                _fail(future, effect.error)
            return
        lost = set(effect.lost)
        for position, future in enumerate(futures):
            index = settle.indexes[position]
            if index in lost:
                _fail(future, self._lost_error(settle.lease, index))
            elif not future.done():
                future.set_result(None)

    # -- the core ----------------------------------------------------------------------------------

    def feed(self, event: Event, parts: list[memoryview] | None = None) -> None:
        """One event after the other: what an effect leads to waits until the effects before it are carried out."""
        self._events.append((event, parts or []))
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                event, self._parts = self._events.popleft()
                for effect in self.core.handle(event, self.now_ms()):
                    self._carry_out(effect)
        except AssertionError as failed:
            self._break(failed)
        finally:
            self._feeding = False
            self._parts = []
        self._arm()
        self._happened()

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, SendSettle):
            self._frames.settle(effect)
        elif isinstance(effect, Settled):
            self._settled(effect)
        elif isinstance(effect, Arrived):
            self._arrived(effect)
        elif isinstance(effect, SendReceive):
            self._frames.receive(effect)
        elif isinstance(effect, SendKeep):
            self._frames.keep(effect)
        elif isinstance(effect, ForgetReceive):
            self._frames.forget(effect)
        elif isinstance(effect, GiveBack):
            self.give_back(self.buffer.last(effect.count))
        elif isinstance(effect, RefreshMetadata):
            self._client.watch.refresh()
        elif isinstance(effect, RaiseError):
            self.buffer.fail(effect.error)

    def _arrived(self, effect: Arrived) -> None:
        lease, payload = effect.lease, self._parts[effect.index]
        source = Delivered(self._topic, lease.key[1], self._options.decode, lease, self)
        try:
            header = read_header(payload)
            check_crc(payload, header)
            messages: list[QueueMessage[Any]] = decode_messages(
                payload, header, QueueMessage, source, plain=source.decode is None
            )
            if len(messages) != len(lease.offsets):
                raise CorruptBatch(f"a delivery holds {len(messages)} records, {len(lease.offsets)} were leased")
        except CorruptBatch as error:
            located = CorruptBatch(f"{self._topic}/{lease.key[1]}: {error.message}", **error.details)
            indexes = [index for index in lease.indexes(WAITING) if self.table.begin(lease, index)]
            self._ask(lease, indexes, NACK, reason=str(located)[:60])
            self.buffer.fail(located)
        else:
            self.buffer.put(messages)

    def _expired(self, lease: Lease) -> None:
        """Nobody may work on these any more: others may have them. If not, they need not wait for the end."""
        indexes = [index for index in lease.indexes(WAITING) if self.table.begin(lease, index)]
        self._ask(lease, indexes, RELEASE)

    def _break(self, failed: AssertionError) -> None:
        """An invariant does not hold: nothing more is asked for, and nobody waits for what cannot come."""
        log.critical("the receiver stops: %s\n%s", failed, "\n".join(map(str, self.core.history)))
        error = InternalError(f"the receiver stopped: {str(failed).splitlines()[0][:200] if str(failed) else ''}")
        self._events.clear()
        self.core.broken = True
        for _, futures in self._outcomes.values():
            for future in futures:
                _fail(future, error)
        self._outcomes.clear()
        self.buffer.fail(error)

    def _arm(self) -> None:
        deadline_ms = self.core.next_deadline_ms()
        if self._timer is not None:
            if deadline_ms == self._timer_ms:
                return
            self._timer.cancel()
            self._timer = None
        if deadline_ms is not None:
            self._timer_ms = deadline_ms
            self._timer = self.loop.call_at(deadline_ms / 1000 + _TIMER_SLACK_S, self.look_again)

    def look_again(self) -> None:
        """Time has passed, or room was made."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.feed(TimePassed())

    def _look_at_routes(self) -> None:
        routing = self._client.routing
        meta = routing.cluster.topics.get(self._topic_id)
        keys = [(self._topic_id, number) for number in range(meta.config.partitions if meta is not None else 0)]
        routes = {key: (route.broker, route.epoch) for key in keys for route in [routing.route(key)]}
        if routes != self._told:
            self._told = routes
            self.feed(RoutesChanged(routes))

    def _session_lost(self, broker: int) -> None:
        self.feed(SessionLost(broker))

    def lost(self, lease: Lease, offsets: list[int]) -> None:
        """A renewal found out that these are not ours any more."""
        self.feed(RecordsLost(lease, offsets))

    # -- closing -----------------------------------------------------------------------------------

    def worked(self) -> None:
        """A `Processing` has ended."""
        self.working -= 1
        self._happened()

    async def settle_all(self, timeout: float) -> bool:
        """Send what is gathered and wait for the last word on all that was settled so far. Returns whether it came."""
        self.flush()
        upto = self._numbers
        return await self._until(lambda: min(self._outcomes, default=upto + 1) > upto, timeout)

    async def close(self, timeout: float) -> None:
        """Ask for nothing more, give back what waits, let the work in hand end, settle, and say goodbye."""
        try:
            self.feed(Stopped())
            self.give_back(self.buffer.last(self.table.waiting))
            self.buffer.close()
            await self._until(lambda: not self.working, timeout)
            await self.settle_all(CLOSE_SETTLE_S)
            self.feed(Parting())
            await self._until(lambda: self.core.parted, CLOSE_PART_S)
        finally:
            self._closing = True
            self._client.watch.on_change.remove(self._look_at_routes)
            self._client.connections.on_lost.remove(self._session_lost)
            self.feed(Closed())
            for lease in list(self.table.held.values()):
                for index in lease.indexes(WAITING, HANDED):
                    self.table.lose(lease, index)
            self.buffer.close()
            if self._flushing is not None:
                self._flushing.cancel()
            await self._frames.close()

    async def _until(self, done: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``done()``, looked at whenever something has happened, for at most ``timeout`` seconds."""
        end = self.loop.time() + timeout
        while not done():
            left = end - self.loop.time()
            if left <= 0:
                return False
            watcher: asyncio.Future[None] = self.loop.create_future()
            self._watchers.add(watcher)
            timer = self.loop.call_later(left, _resolve, watcher)
            try:
                await watcher
            finally:
                timer.cancel()
                self._watchers.discard(watcher)
        return True

    def _happened(self) -> None:
        watchers, self._watchers = self._watchers, set()
        for watcher in watchers:
            _resolve(watcher)


def _fail(future: SettleFuture, error: FerrylineError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever does not ask for the outcome shall not read of it at the end of the program


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
