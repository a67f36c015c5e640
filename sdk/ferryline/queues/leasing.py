"""The driver of `ReceiverCore`: carries out its effects, feeds it what happens, keeps its one timer.

No rule of queues stands here; those are in ``core/receiving.py``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ferryline.core.leases import Lease
from ferryline.core.receiving import ReceiverCore
from ferryline.core.receiving_events import (
    Arrived,
    Closed,
    Effect,
    Event,
    ForgetReceive,
    GiveBack,
    Parting,
    PrefetchChanged,
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
from ferryline.protocol.errors import CorruptBatch, InternalError
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import NACK, RELEASE
from ferryline.protocol.records import decode_messages, split_batches
from ferryline.queues.buffer import Buffer
from ferryline.queues.frames import Frames
from ferryline.queues.message import Delivered, QueueMessage
from ferryline.queues.options import ReceiverOptions
from ferryline.queues.settlements import Settlements

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.queue")

CLOSE_SETTLE_S = 5.0  # how long closing waits for settlements on their way
CLOSE_PART_S = 2.0  # and for primaries to hear that nothing is held here
_TIMER_SLACK_S = 0.0005  # loop time and our ms do not round alike; waking early would spin


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
        # Nobody may work on what is left of a lease that ended: others may have it. If not, they need not wait.
        self.buffer = Buffer(self.table, lambda lease: self.settlements.end_waiting(lease, RELEASE))
        self.settlements = Settlements(self.core, meta.name, self._settle, gather_s=options.gather)
        self.working = 0
        self._client = client
        self._options = options
        self._topic_id, self._topic = meta.id, meta.name
        self._frames = Frames(client, options, self.member, self.feed, self._look_at_routes)
        self._told: dict[tuple[str, int], tuple[int, int]] | None = None  # routes, as the core knows them
        self._events: deque[tuple[Event, list[memoryview]]] = deque()
        self._feeding = False
        self._parts: list[memoryview] = []  # payloads of the event that is being handled
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._watchers: set[asyncio.Future[None]] = set()  # resolved when anything has happened

    def start(self) -> None:
        self._client.watch.on_change.append(self._look_at_routes)
        self._client.connections.on_lost.append(self._session_lost)
        self._look_at_routes()

    def now_ms(self) -> int:
        return int(self.loop.time() * 1000)

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

    def _settle(self, items: list[Settle], awaited: bool) -> None:
        self.feed(SettleAsked(items, self.buffer.wanted and not awaited))

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, SendSettle):
            self._frames.settle(effect)
        elif isinstance(effect, Settled):
            self.settlements.settled(effect)
        elif isinstance(effect, Arrived):
            self._arrived(effect)
        elif isinstance(effect, SendReceive):
            self._frames.receive(effect)
        elif isinstance(effect, SendKeep):
            self._frames.keep(effect)
        elif isinstance(effect, ForgetReceive):
            self._frames.forget(effect)
        elif isinstance(effect, GiveBack):
            self.settlements.give_back(self.buffer.last(effect.count))
        elif isinstance(effect, RefreshMetadata):
            self._client.watch.refresh()
        elif isinstance(effect, RaiseError):
            self.buffer.fail(effect.error)

    def _arrived(self, effect: Arrived) -> None:
        lease, payload = effect.lease, self._parts[effect.index]
        source = Delivered(self._topic, lease.key[1], self._options.decode, lease, self)
        try:
            messages: list[QueueMessage[Any]] = []
            for at, header in split_batches(payload):
                if header.base_offset != len(messages):
                    raise CorruptBatch(f"record {len(messages)} of a delivery says that it is {header.base_offset}")
                batch = payload[at : at + header.size]
                messages += decode_messages(batch, header, QueueMessage, source, plain=source.decode is None)
            if len(messages) != len(lease.offsets):
                raise CorruptBatch(f"a delivery holds {len(messages)} records, {len(lease.offsets)} were leased")
        except CorruptBatch as error:
            located = CorruptBatch(f"{self._topic}/{lease.key[1]}: {error.message}", **error.details)
            self.settlements.end_waiting(lease, NACK, "the delivery does not decode")
            self.buffer.fail(located)
        else:
            self.buffer.put(messages)

    def _break(self, failed: AssertionError) -> None:
        """An invariant does not hold: nothing more is asked for, and nobody waits for what cannot come."""
        log.critical("the receiver stops: %s\n%s", failed, "\n".join(map(str, self.core.history)))
        error = InternalError(f"the receiver stopped: {str(failed).splitlines()[0][:200] if str(failed) else ''}")
        self._events.clear()
        self.core.broken = True
        self.settlements.fail(error)
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

    def prefetch(self, records: int) -> None:
        """How many may be here from now on."""
        self.feed(PrefetchChanged(records))

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
        self.settlements.awaited = True
        self.settlements.flush()
        upto = self.settlements.last
        return await self._until(lambda: self.settlements.done(upto), timeout)

    async def close(self, timeout: float) -> None:
        """Ask for nothing more, give back what waits, let the work in hand end, settle, and say goodbye."""
        try:
            self.feed(Stopped())
            self.settlements.give_back(self.buffer.last(self.table.waiting))
            self.buffer.close()
            await self._until(lambda: not self.working, timeout)
            await self.settle_all(CLOSE_SETTLE_S)
            self.feed(Parting())
            await self._until(lambda: self.core.parted or self.core.broken, CLOSE_PART_S)
        finally:
            self._client.watch.on_change.remove(self._look_at_routes)
            self._client.connections.on_lost.remove(self._session_lost)
            self.feed(Closed())
            self.settlements.close()
            self.buffer.close()
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


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
