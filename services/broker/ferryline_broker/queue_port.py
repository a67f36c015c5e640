"""What queues want of this broker, passed on to whoever does it; the driver's `QueuePort`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ferryline.protocol.errors import StorageFailed
from ferryline.protocol.messages import RECORDS
from ferryline_broker.clock import now_ms, wall_ms
from ferryline_broker.core.queue_events import MoveDead, ReadWindow, WakeReceivers, WindowRead
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.queue_frames import QueueHandler
from ferryline_broker.queue_records import QueueRecords


class Queues:
    """``move`` copies a dead record to its dead letters."""

    def __init__(self, driver: PartitionDriver, handler: QueueHandler, records: QueueRecords) -> None:
        self.move: Callable[[HostedReplica, MoveDead], None]
        self._driver = driver
        self._handler = handler
        self._records = records
        self._loop = asyncio.get_running_loop()

    def read_window(self, hosted: HostedReplica, effect: ReadWindow) -> None:
        """In a later pass of the loop: a long backlog is looked at piece by piece, between other work."""
        if effect.ahead:
            hosted.follow_ups.append(self._records.window(hosted, effect, now_ms(), wall_ms()))
        else:
            self._loop.call_soon(self._read, hosted, effect)

    def _read(self, hosted: HostedReplica, effect: ReadWindow) -> None:
        if hosted.broken:
            return
        try:
            event = self._records.window(hosted, effect, now_ms(), wall_ms())
        except StorageFailed as failure:
            self._driver.storage_failed(hosted, RECORDS, failure)
            event = WindowRead(effect.group, effect.offset, effect.offset, [])
        self._driver.feed(hosted, event)

    def wake(self, hosted: HostedReplica, effect: WakeReceivers) -> None:
        self._handler.wake(hosted, effect)

    def ask_again(self) -> None:
        self._handler.ask_again()

    def move_dead(self, hosted: HostedReplica, effect: MoveDead) -> None:
        self._loop.call_soon(self.move, hosted, effect)

    def role_changed(self, hosted: HostedReplica) -> None:
        self._handler.role_changed(hosted)

    def cut(self, hosted: HostedReplica) -> None:
        self._records.forget(hosted.key)
