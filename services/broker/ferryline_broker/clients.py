"""Every frame that arrives on a session of this broker, and where it goes."""

from __future__ import annotations

from collections.abc import Callable

from ferryline.protocol.errors import NotReady, ShuttingDown, UnknownKind
from ferryline.protocol.frames import Frame, Kind
from ferryline_broker.access_rules import FRAMES
from ferryline_broker.config import BrokerConfig
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.fetch import FetchHandler
from ferryline_broker.groups import GroupHandler
from ferryline_broker.metadata import MetadataHandler, OffsetsHandler
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.peers import Peers
from ferryline_broker.produce import ProduceHandler
from ferryline_broker.queue_frames import QueueHandler
from ferryline_broker.queue_records import QueueRecords
from ferryline_broker.view import ClusterView
from ferryline_service.access.quotas import Quotas
from ferryline_service.access.rules import check_frames, check_kind
from ferryline_service.server_session import ServerSession

Handle = Callable[[ServerSession, Frame], None]


class FrameRouter:
    """Kind -> handler. All handlers are plain functions: nothing on these paths waits."""

    def __init__(
        self,
        config: BrokerConfig,
        driver: PartitionDriver,
        view: ClusterView,
        metrics: BrokerMetrics,
        peers: Peers,
        quotas: Quotas | None = None,
    ) -> None:
        self.produce = ProduceHandler(
            driver,
            view,
            metrics,
            session_bytes_max=config.session_produce_bytes_max,
            total_bytes_max=config.produce_bytes_max,
            quotas=quotas,
        )
        self.fetch = FetchHandler(
            driver,
            view,
            metrics,
            answer_bytes_max=config.answer_bytes_max,
            parked_max=config.parked_max,
            quotas=quotas,
        )
        self.metadata = MetadataHandler(view, parked_max=config.parked_max)
        self.groups = groups = GroupHandler(driver, view, metrics)
        self.records = QueueRecords()
        self.queues = QueueHandler(driver, view, metrics, self.records, quotas)
        self._closed = False
        self._view = view
        self._handlers: dict[int, Handle] = {
            Kind.PRODUCE: self.produce.handle,
            Kind.FETCH: self.fetch.handle,
            Kind.OFFSETS: OffsetsHandler(driver, view, metrics).handle,
            Kind.CLAIM: groups.claim,
            Kind.COMMIT: groups.commit,
            Kind.COMMITTED: groups.committed,
            Kind.METADATA: self.metadata.handle,
            Kind.RECEIVE: self.queues.receive,
            Kind.SETTLE: self.queues.settle,
            Kind.KEEP: self.queues.keep,
            Kind.QUEUE: self.queues.queue,
            Kind.REPLICA_FETCH: peers.on_frame,
            Kind.REPLICA_PROGRESS: peers.on_frame,
        }
        check_frames(self._handlers, FRAMES, "broker")

    def __call__(self, session: ServerSession, frame: Frame) -> None:
        handler = self._handlers.get(frame.kind)
        if handler is None:
            raise UnknownKind(f"kind: {frame.kind} is not served by a broker")
        if self._closed and frame.kind < Kind.REPLICA_FETCH:
            raise ShuttingDown("this broker is stopping")
        if not self._view.metadata.cluster_id and frame.kind < Kind.REPLICA_FETCH:
            raise NotReady("this broker has not heard of the cluster yet")
        if not session.caller.service:
            check_kind(FRAMES[frame.kind], session.caller)
        handler(session, frame)

    def close(self) -> None:
        """Refuse what comes and answer everybody who waits. Called before sessions are ended."""
        self._closed = True
        self.fetch.close()
        self.metadata.close()
        self.queues.close()
