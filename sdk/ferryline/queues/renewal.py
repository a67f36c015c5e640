"""Renewal of leases, beside the application's loop: on the heartbeat thread, with connections of its own.

A handler that blocks the application's loop for minutes must not cost it its records, nor must a fail-over meanwhile.
So this side finds primaries by itself. It only reads the table of leases, moves their ends, and tells the application's
loop what it found out; connections are opened when the first lease lasts long enough to be renewed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ferryline.connections import Connections, MetadataWatch
from ferryline.core.leases import Lease, LeaseTable, Renewal, renewals
from ferryline.core.metadata import Routing
from ferryline.protocol.errors import FerrylineError, InternalError, PrimaryNotAvailable, from_info
from ferryline.protocol.frames import Kind
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.queue_messages import EXTEND, NACK, RELEASE, Settle, SettleAnswer, SettleEntry
from ferryline.queues.options import ReceiverOptions
from ferryline.transport import Connector

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.queue")

TICK_S_MIN, TICK_S_MAX = 0.05, 1.0
ATTEMPT_S_MIN, ATTEMPT_S_MAX = 0.5, 5.0
_READY_S = 3.0
Lost = Callable[[Lease, list[int]], None]


class Aside:
    """The cluster, seen from another loop than the client's."""

    def __init__(self, client: Client, connector: Connector) -> None:
        brokers = [broker.external for broker in list(client.routing.cluster.brokers.values())]
        urls = [*dict.fromkeys([*client.urls, *client.routing.coordinators, *brokers])]
        self.routing = Routing()
        self.connections = Connections(connector, self.routing)
        self.watch = MetadataWatch(self.connections, urls, seed=secrets.randbits(63))
        self.watch.start()

    async def close(self) -> None:
        await self.watch.close()
        await self.connections.close()


class Renewer:
    """Renews the leases of one receiver. ``lost(lease, offsets)`` runs in the application's loop."""

    def __init__(self, client: Client, options: ReceiverOptions, member: str, table: LeaseTable, lost: Lost) -> None:
        self._client = client
        self._options = options
        self._member = member
        self._table = table
        self._lost = lost
        self._loop = asyncio.get_running_loop()  # the application's
        lease_s = options.lease_ms / 1000
        self._tick_s = min(TICK_S_MAX, max(TICK_S_MIN, lease_s / 12))
        self._idle_s = max(self._tick_s, lease_s / 6)
        self._attempt_s = min(ATTEMPT_S_MAX, max(ATTEMPT_S_MIN, lease_s / 6))
        self._aside: Aside | None = None

    async def run(self, connector: Connector) -> None:
        """Renew what is due, until cancelled."""
        try:
            while True:
                # What is leased from now on is not due before a fifth of its time has passed.
                await asyncio.sleep(self._tick_s if self._table.held else self._idle_s)
                try:
                    due = self._due()
                    if due:
                        await self._renew(due, connector)
                except FerrylineError as error:
                    log.debug("renewal of group %s: %s", self._options.group, error)
                except Exception:  # not foreseen: say so, and go on
                    log.exception("renewal of group %s", self._options.group)
        finally:
            if self._aside is not None:
                await self._aside.close()

    def _due(self) -> list[Renewal]:
        try:
            held = list(self._table.held.values())
        except RuntimeError:  # it changed under way; the next time, then
            return []
        max_ms = int(self._options.max_processing * 1000)
        return renewals(held, self._table.progress_ms, _now_ms(), max_ms)

    async def _renew(self, due: list[Renewal], connector: Connector) -> None:
        if self._aside is None:
            self._aside = Aside(self._client, connector)
        aside = self._aside
        if aside.routing.revision < 0:
            await aside.watch.ready(timeout=min(_READY_S, self._attempt_s))
        by_broker: dict[int, list[Renewal]] = {}
        for renewal in due:
            by_broker.setdefault(aside.routing.route(renewal.lease.key).broker, []).append(renewal)
        await asyncio.gather(*(self._ask(aside, broker, asked) for broker, asked in by_broker.items()))

    async def _ask(self, aside: Aside, broker: int, asked: list[Renewal]) -> None:
        """Whatever goes wrong here is tried again at the next tick, until the lease ends."""
        told = [(renewal, entry) for renewal in asked for entry in self._entries(renewal)]
        sent_ms = _now_ms()
        try:
            if broker == NO_BROKER:
                raise PrimaryNotAvailable("the partition has no primary at the moment")
            session = await aside.connections.session(broker, timeout=self._attempt_s)
            header = Settle(self._options.group, self._member, [entry for _, entry in told])
            answer, _ = await session.request(Kind.SETTLE, header, SettleAnswer, timeout=self._attempt_s)
        except FerrylineError as error:
            log.debug("renewal of group %s: %s", self._options.group, error)
            aside.watch.refresh()
            return
        for result in answer.results:
            if 0 <= result.index < len(told):
                renewal, entry = told[result.index]
                if result.error is not None:
                    self._refused(aside, renewal.lease, from_info(result.error))
                else:
                    self._done(renewal.lease, entry, sent_ms, [*result.stale, *result.settled])

    def _entries(self, renewal: Renewal) -> Iterable[SettleEntry]:
        lease = renewal.lease
        named = (*lease.key, lease.epoch, lease.number, lease.receipt)
        if renewal.overdue:
            text = f"in processing for over {self._options.max_processing:g} s"
            yield SettleEntry(*named, NACK, renewal.overdue, reason=text)
        if renewal.stuck:
            yield SettleEntry(*named, RELEASE, renewal.stuck)
        if renewal.open:
            yield SettleEntry(*named, EXTEND, renewal.open)

    def _done(self, lease: Lease, entry: SettleEntry, sent_ms: int, gone: list[int]) -> None:
        if entry.action != EXTEND:
            log.error(
                "group %s: %d records of %s/%d are given up: %s", self._options.group, len(entry.offsets),
                self._options.topic, entry.partition, entry.reason or "the application does not take them",
            )  # fmt: skip
            gone = entry.offsets
        elif len(gone) < len(entry.offsets):
            lease.prolong(sent_ms, lease.lease_ms)
        if gone:
            try:
                self._loop.call_soon_threadsafe(self._lost, lease, gone)
            except RuntimeError:
                pass  # the application's loop has ended, and with it whoever held these

    def _refused(self, aside: Aside, lease: Lease, error: FerrylineError) -> None:
        if "primary" in error.details:
            aside.routing.hint(lease.key, error.details.get("primary"), error.details.get("epoch"))
        if error.refresh_metadata:
            aside.watch.refresh()
        if isinstance(error, InternalError) or not (error.retriable or error.refresh_metadata):
            log.warning("renewal of group %s: %s", self._options.group, error)


def _now_ms() -> int:
    """All loops of a process have one clock."""
    return int(asyncio.get_running_loop().time() * 1000)
