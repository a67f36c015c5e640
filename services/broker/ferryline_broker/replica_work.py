"""What the node core wants done to replicas, in slices: one answer of the coordinator may open or move thousands.

In order, as the node core asked. What a slice must make durable first (new files, seen epochs) is synced once for the
whole slice and then the cores hear. Between two slices the loop serves everybody else: heartbeats, traffic, peers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline.protocol.metadata import TopicMeta
from ferryline_broker.core import events as ev
from ferryline_broker.core.node import NodeCore
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.node_store import NodeStore
from ferryline_broker.log.together import Together
from ferryline_broker.opening import Opener
from ferryline_service.logs import get_logger

_log = get_logger()
_PREPARE_S = 0.008  # of one slice: files and epochs. Its sync and its cores take about as long again
_SETTLED_MAX = 200  # epochs of one slice


class KeepTopic(ev.Effect, frozen=True):
    """Write changed settings of a topic beside the replica."""

    key: ev.Key
    topic: TopicMeta


Work = ev.OpenReplica | ev.DeleteReplica | ev.TellReplica | KeepTopic


class ReplicaWork:
    """The queue and its slices. ``opened`` hears of each opened replica, ``done`` whenever the queue has run empty, and
    ``failed`` when what must be remembered could not be written: nothing more is done then."""

    def __init__(
        self,
        node: NodeCore,
        partitions: PartitionDriver,
        store: NodeStore,
        opener: Opener,
        *,
        opened: Callable[[ev.ReplicaOpened], None],
        done: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._node = node
        self._partitions = partitions
        self._store = store
        self._opener = opener
        self._opened = opened
        self._done = done
        self._failed = failed
        self._queue: deque[Work] = deque()
        self._loop = asyncio.get_running_loop()
        self._turn: asyncio.Handle | None = None
        self._at_work = False

    @property
    def pending(self) -> bool:
        return bool(self._queue)

    def add(self, work: Work) -> None:
        """To be done after all that was added before; call `begin` when all is added."""
        self._queue.append(work)

    def begin(self) -> None:
        """Do the first slice now, unless a turn is arranged already."""
        if self._queue and self._turn is None and not self._at_work:
            self._slice()

    def close(self) -> None:
        self._queue.clear()
        if self._turn is not None:
            self._turn.cancel()

    def delete_replica(self, key: ev.Key) -> None:
        """The core of that replica said that it belongs here no more. Not if it was opened again meanwhile."""
        hosted = self._partitions.replicas.get(key)
        if hosted is None or hosted.core.part is None or self._node.broker_id in hosted.core.part.replicas:
            return
        self._delete(key)

    # -- one slice ----------------------------------------------------------------------------------

    def _slice(self) -> None:
        self._turn = None
        self._at_work = True
        try:
            told, opened = self._prepare()
            for hosted in opened:
                self._partitions.host(hosted)
                self._opened(ev.ReplicaOpened(hosted.key, hosted.core.report().log_state))
            for tell in told:
                hosted_now = self._partitions.replicas.get(tell.key)
                if hosted_now is not None:
                    self._partitions.feed(hosted_now, tell.event)
        except (StorageFailed, StorageFull) as error:
            self._queue.clear()
            self._failed(error)
            return
        finally:
            self._at_work = False
        if self._queue:
            self._turn = self._loop.call_soon(self._slice)
        else:
            self._done()

    def _prepare(self) -> tuple[list[ev.TellReplica], list[HostedReplica]]:
        """Take work for one slice: files are made, epochs written, and all of it is durable when this returns."""
        together = self._store.together()
        told: list[ev.TellReplica] = []
        opened: dict[ev.Key, HostedReplica] = {}
        keys: set[ev.Key] = set()  # that somebody in `told` or `opened` is
        queue, until, epochs = self._queue, perf_counter() + _PREPARE_S, 0
        while queue and perf_counter() < until and epochs < _SETTLED_MAX:
            work = queue[0]
            if isinstance(work, ev.OpenReplica | ev.DeleteReplica) and work.key in keys:
                break  # what was said to the replica before comes first
            queue.popleft()
            match work:
                case ev.TellReplica(key, event):
                    hosted = opened.get(key) or self._partitions.replicas.get(key)
                    if isinstance(event, ev.MetaReceived) and hosted is not None:
                        epochs += self._persist_epoch(hosted, event, together)
                    told.append(work)
                    keys.add(key)
                case ev.OpenReplica(key):
                    fresh = self._open(work, together)
                    if fresh is not None:
                        opened[key] = fresh
                    keys.add(key)
                case ev.DeleteReplica(key):
                    self._delete(key)
                case KeepTopic(key, topic):
                    if key in self._partitions.replicas:
                        self._keep(key, topic, together)
        together.settle()
        return told, list(opened.values())

    def _persist_epoch(self, hosted: HostedReplica, event: ev.MetaReceived, together: Together) -> bool:
        """Write the epoch that the core is about to begin; the core's own order to do so then finds it done."""
        core, part = hosted.core, event.part
        if hosted.broken or core.role == "stopped" or part.epoch <= hosted.store.seen_epoch:
            return False
        if core.part is not None and part.version <= core.part.version:
            return False
        try:
            hosted.store.persist_epoch(part.epoch, together)
        except (StorageFailed, StorageFull):
            return False  # the core's own order fails the same way, and it knows what to do then
        return True

    def _open(self, effect: ev.OpenReplica, together: Together) -> HostedReplica | None:
        key, partitions = effect.key, self._partitions
        known = partitions.unhost(key)
        topic = self._node.metadata.topics.get(key[0])
        quarantined = "damaged; fetched again from the primary" if effect.quarantine else ""
        try:
            if known is not None:
                self._store.replicas.pop(key, None)
                known.store.close()
            return self._opener.open(
                key, self._node.broker_id, topic, flush=effect.flush, quarantined=quarantined, together=together
            )
        except (StorageFailed, StorageFull) as error:
            _log.error(
                "replica cannot be opened", topic=topic.name if topic else key[0], partition=key[1], error=str(error)
            )
            if isinstance(error, StorageFull):
                self._partitions.on_full()  # the next process life opens it
            return None

    def _keep(self, key: ev.Key, topic: TopicMeta, together: Together) -> None:
        """The next start should know it before it has heard the coordinator: no reason to end for a full disk."""
        try:
            self._opener.remember(key, topic, together)
        except StorageFull as error:
            _log.error("settings are not kept", topic=topic.name, partition=key[1], error=str(error))

    def _delete(self, key: ev.Key) -> None:
        hosted = self._partitions.unhost(key)
        if hosted is not None:
            _log.info("replica deleted", partition=hosted.name)
            self._store.delete_replica(*key)
