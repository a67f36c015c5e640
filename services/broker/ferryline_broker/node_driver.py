"""Run the node core: registration, heartbeats, metadata, opening and deleting replicas, stopping."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline.protocol.messages import AlterIsrResult, HandoverEntry, Heartbeat
from ferryline_broker.clock import now_ms
from ferryline_broker.coordinator import CoordinatorLink
from ferryline_broker.core import events as ev
from ferryline_broker.core.node import NodeCore
from ferryline_broker.core.replica import ROLE_PRIMARY
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.log.node_store import NodeStore
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.opening import Opener, apply_config, retry_policy
from ferryline_broker.replica_work import KeepTopic, ReplicaWork
from ferryline_broker.view import ClusterView
from ferryline_service.logs import get_logger

_log = get_logger()


class NodeDriver:
    """Feeds the node core and carries out its effects. ``on_metadata`` is called after each change of the metadata."""

    def __init__(
        self,
        node: NodeCore,
        partitions: PartitionDriver,
        link: CoordinatorLink,
        store: NodeStore,
        opener: Opener,
        view: ClusterView,
        metrics: BrokerMetrics,
    ) -> None:
        self.on_metadata: Callable[[], None] = _nothing
        self.on_serving: Callable[[], None] = _nothing  # called once, when first unfenced
        self.stopped: asyncio.Future[ev.StopNow] = asyncio.get_running_loop().create_future()
        self._node = node
        self._partitions = partitions
        self._link = link
        self._store = store
        self._opener = opener
        self._view = view
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._topic_versions: dict[str, int] = {}
        self._held_back: Heartbeat | None = None  # the last heartbeat, if it named an older revision than we have
        self._worked_off = (0, -1)  # (coordinator epoch, revision) that all replicas have heard of
        self.work = ReplicaWork(
            node,
            partitions,
            store,
            opener,
            opened=self._replica_opened,
            done=self._work_done,
            failed=lambda error: self._stop_now(ev.StopNow(False, f"storage failed: {error}")),
        )
        self._do: dict[type[ev.Effect], Callable[[Any], None]] = {
            ev.SendRegister: self._send_register,
            ev.ConfirmRegistered: self._confirm_registered,
            ev.PersistCoordEpoch: lambda e: store.persist_coord_epoch(e.coord_epoch),
            ev.RequestMetadata: lambda e: link.request_metadata(e.request),
            ev.OpenReplica: self.work.add,
            ev.DeleteReplica: self.work.add,
            ev.TellReplica: self.work.add,
            ev.ResetCoordinatorSession: lambda e: link.reset(e.reason),
            ev.Registered: self._registered,
            ev.StopNow: self._stop_now,
        }

    # -- events in ----------------------------------------------------------------------------------

    def node_event(self, event: ev.Event) -> None:
        """Let the node core handle ``event`` and carry out what it wants."""
        node = self._node
        before = node.metadata.revision, node.metadata.coord_epoch
        try:
            effects = node.handle(event, now_ms())
        except AssertionError as error:
            # Nothing can be believed about this broker's place in the cluster any more: leave, and come back anew.
            story = [str(told)[:300] for told in list(node.story)[-40:]]
            _log.critical("invariant of the node violated", error=str(error)[:1000], story=story, exc_info=error)
            self._stop_now(ev.StopNow(False, f"invariant violated: {str(error)[:200]}"))
            return
        try:
            for effect in effects:
                if type(effect) is not ev.SendHeartbeat:
                    self._do[type(effect)](effect)
        except (StorageFailed, StorageFull) as error:
            # What the node must remember could not be written: going on would forget it after a restart.
            self._stop_now(ev.StopNow(False, f"storage failed: {error}"))
            return
        self.work.begin()
        for effect in effects:
            if type(effect) is ev.SendHeartbeat:  # after the first slice of work: it tells how far that has come
                self._send_heartbeat(effect)
        self._arm()
        if (node.metadata.revision, node.metadata.coord_epoch) != before:
            if isinstance(event, ev.MetadataReceived) and event.answer is not None:
                self._view.took(event.answer)
            self._metadata_changed()

    def alter_isr_answered(self, result: AlterIsrResult) -> None:
        hosted = self._partitions.replicas.get((result.topic_id, result.partition))
        if hosted is not None:
            self._partitions.feed(hosted, ev.AlterIsrAnswered(result))

    def hand_over_asked(self, entry: HandoverEntry) -> None:
        """The coordinator wants another replica to lead; a request for an epoch that is over means nothing."""
        hosted = self._partitions.replicas.get((entry.topic_id, entry.partition))
        if hosted is not None and hosted.core.role == ROLE_PRIMARY and hosted.core.epoch == entry.epoch:
            self._partitions.feed(hosted, ev.HandOverAsked())

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._node.next_deadline_ms()
        if deadline is not None:
            self._timer = self._loop.call_later(max(1, deadline - now_ms()) / 1000, self.node_event, ev.Tick())

    def close(self) -> None:
        self.work.close()
        if self._timer is not None:
            self._timer.cancel()

    # -- effects out --------------------------------------------------------------------------------

    def _send_register(self, effect: ev.SendRegister) -> None:
        reports = [hosted.core.report() for hosted in self._partitions.replicas.values()]
        self._link.send_register(msgspec.structs.replace(effect.register, replicas=reports))

    def _confirm_registered(self, effect: ev.ConfirmRegistered) -> None:
        self._store.set_identity(effect.cluster_id, effect.broker_id)
        self._store.confirm_registered()
        self._view.claim_key = effect.claim_key

    def _replica_opened(self, event: ev.ReplicaOpened) -> None:
        for effect in self._node.handle(event, now_ms()):
            self._do[type(effect)](effect)

    def _send_heartbeat(self, effect: ev.SendHeartbeat) -> None:
        """A heartbeat names the revision that our replicas have heard of: the coordinator unfences by it."""
        heartbeat = effect.heartbeat
        position = (self._node.metadata.coord_epoch, heartbeat.revision)
        self._held_back = heartbeat if self.work.pending and position != self._worked_off else None
        if self._held_back is not None:
            heartbeat = msgspec.structs.replace(heartbeat, revision=-1)
        self._link.send_heartbeat(heartbeat)

    def _work_done(self) -> None:
        metadata, held = self._node.metadata, self._held_back
        self._worked_off = (metadata.coord_epoch, metadata.revision)
        self._held_back = None
        if held is not None and self._node.registered and held.broker_epoch == self._node.broker_epoch:
            self._link.send_heartbeat(held)

    def _registered(self, effect: ev.Registered) -> None:
        self._metrics.fenced = effect.fenced
        _log.info("registered", broker_id=effect.broker_id, fenced=effect.fenced)
        if not effect.fenced:
            announce, self.on_serving = self.on_serving, _nothing
            announce()

    def _stop_now(self, effect: ev.StopNow) -> None:
        if not self.stopped.done():
            self.stopped.set_result(effect)

    # -- metadata -----------------------------------------------------------------------------------

    def _metadata_changed(self) -> None:
        metadata, versions = self._node.metadata, self._topic_versions
        for topic in metadata.topics.values():
            if versions.get(topic.id) == topic.version:
                continue
            versions[topic.id] = topic.version
            for number in range(topic.config.partitions):
                hosted = self._partitions.replicas.get((topic.id, number))
                if hosted is not None and hosted.topic != topic:
                    if hosted.topic.name != topic.name:
                        hosted.counts = self._metrics.topic(topic.name)
                    hosted.topic = topic
                    apply_config(hosted, topic.config)
                    self._partitions.feed(hosted, ev.RetryChanged(retry_policy(topic)))
                    self.work.add(KeepTopic(hosted.key, topic))
        self.work.begin()
        for topic_id in [topic_id for topic_id in versions if topic_id not in metadata.topics]:
            del versions[topic_id]
        self.on_metadata()


def _nothing() -> None:
    return
