"""Metadata for everybody: what changed since a revision, and long polls that wait for it."""

from __future__ import annotations

import heapq

from ferryline.protocol.errors import ClusterMismatch, Throttled
from ferryline.protocol.exchanges import ExchangeMeta
from ferryline.protocol.limits import WAIT_MS_MAX
from ferryline.protocol.metadata import BrokerMeta, MetadataAnswer, PartitionMeta, TopicMeta
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.events import Decision, Effect, MetadataAsked, Refuse, Reply
from ferryline_coordinator.core.records import BrokerRecord, ClusterRecord, PartRecord, TopicGone
from ferryline_coordinator.core.state import CoordinatorState


class Polls:
    """Who waits here has everything up to the present revision, so that the next decision is its answer.

    One answer object serves all that get the same: whoever encodes it need do so once.
    """

    def __init__(self, config: CoreConfig, state: CoordinatorState, coord_epoch: int) -> None:
        self._config = config
        self._state = state
        self._coord_epoch = coord_epoch
        self._parked: dict[int, int] = {}  # reply -> deadline
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline, reply)
        self._full: dict[bool, MetadataAnswer] = {}  # with tombstones or without, at the present revision

    @property
    def parked(self) -> int:
        return len(self._parked)

    def ask(self, event: MetadataAsked, now_ms: int) -> list[Effect]:
        """Answer now, or park."""
        message, state = event.message, self._state
        cluster = state.cluster
        assert cluster is not None
        if message.cluster_id and message.cluster_id != cluster.cluster_id:
            error = ClusterMismatch(f"this is cluster {cluster.cluster_id}, you ask for {message.cluster_id[:64]}")
            return [Refuse(event.reply, error.info())]
        if message.coord_epoch != self._coord_epoch or message.revision != state.revision:
            return [Reply(event.reply, self._news(message.coord_epoch, message.revision, event.broker_id != 0))]
        wait_ms = min(message.wait_ms, WAIT_MS_MAX)
        if wait_ms <= 0:
            return [Reply(event.reply, self._answer(full=False))]
        if len(self._parked) >= self._config.parked_max and not event.broker_id:  # clients cannot crowd out brokers
            return [Refuse(event.reply, Throttled(f"{self._config.parked_max} metadata requests wait").info())]
        self._parked[event.reply] = now_ms + wait_ms
        heapq.heappush(self._deadlines, (now_ms + wait_ms, event.reply))
        return []

    def abandon(self, reply: int) -> None:
        self._parked.pop(reply, None)

    def expire(self, now_ms: int) -> list[Effect]:
        """Those who have waited long enough learn that nothing changed."""
        effects: list[Effect] = []
        nothing = self._answer(full=False)
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            deadline, reply = heapq.heappop(self._deadlines)
            if self._parked.get(reply) == deadline:
                del self._parked[reply]
                effects.append(Reply(reply, nothing))
        return effects

    def publish(self, decision: Decision) -> list[Effect]:
        """Everybody who waits gets exactly what this decision changes."""
        self._full.clear()
        if not self._parked:
            return []
        brokers, topics, parts, gone, exchanges = [], [], [], [], []
        coordinators: tuple[str, ...] = ()
        revision = self._state.revision + 1
        for record in decision.puts:
            match record:
                case BrokerRecord():
                    brokers.append(record.meta)
                case TopicMeta():
                    topics.append(record)
                case PartRecord():
                    parts.append(record.meta)
                case TopicGone():
                    gone.append(record.topic_id)
                case ExchangeMeta():
                    exchanges.append(record)
                case ClusterRecord():
                    coordinators = record.coordinators
        forgotten = [int(key.partition("/")[2]) for key in decision.deletes if key.startswith("broker/")]
        dropped = [key.partition("/")[2] for key in decision.deletes if key.startswith("exchange/")]
        answer = self._answer(
            full=False,
            revision=revision,
            brokers=brokers,
            topics=topics,
            partitions=parts,
            deleted_topics=gone,
            deleted_brokers=forgotten,
            coordinators=coordinators,
            exchanges=exchanges,
            deleted_exchanges=dropped,
        )
        effects: list[Effect] = [Reply(reply, answer) for reply in self._parked]
        self._parked.clear()
        self._deadlines.clear()
        return effects

    def close(self) -> list[Effect]:
        """The coordinator stops: nobody waits for its end."""
        nothing = self._answer(full=False)
        effects: list[Effect] = [Reply(reply, nothing) for reply in self._parked]
        self._parked.clear()
        self._deadlines.clear()
        return effects

    def next_deadline_ms(self) -> int | None:
        while self._deadlines and self._parked.get(self._deadlines[0][1]) != self._deadlines[0][0]:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    # -- inside -------------------------------------------------------------------------------------

    def _news(self, coord_epoch: int, revision: int, for_broker: bool) -> MetadataAnswer:
        # Another coordinator epoch may have another history (a restored store): then only everything is safe.
        changed = self._state.changed_since(revision) if coord_epoch == self._coord_epoch else None
        if changed is None:
            return self._everything(for_broker)
        brokers: list[BrokerMeta] = []
        topics: list[TopicMeta] = []
        gone: list[str] = []
        forgotten: list[int] = []
        exchanges: list[ExchangeMeta] = []
        dropped: list[str] = []
        state = self._state
        parts = [
            state.parts[key].meta for key in sorted(key for key in changed if type(key) is tuple) if key in state.parts
        ]
        for key in sorted(key for key in changed if type(key) is str):
            kind, _, rest = key.partition("/")
            if kind == "broker":
                broker = state.brokers.get(int(rest))
                if broker is not None:
                    brokers.append(broker.meta)
                else:
                    forgotten.append(int(rest))
            elif kind == "topic" and rest in state.topics:
                topics.append(state.topics[rest])
            elif kind == "gone":
                gone.append(rest)
            elif kind == "exchange" and rest in state.exchanges:
                exchanges.append(state.exchanges[rest])
            elif kind == "exchange":
                dropped.append(rest)
        return self._answer(
            full=False,
            brokers=brokers,
            topics=topics,
            partitions=parts,
            deleted_topics=gone,
            deleted_brokers=forgotten,
            exchanges=exchanges,
            deleted_exchanges=dropped,
        )

    def _everything(self, for_broker: bool) -> MetadataAnswer:
        answer = self._full.get(for_broker)
        if answer is None:
            state = self._state
            answer = self._full[for_broker] = self._answer(
                full=True,
                brokers=state.broker_metas(),
                topics=[state.topics[topic_id] for topic_id in sorted(state.topics)],
                partitions=[state.parts[key].meta for key in state.part_keys()],
                # A broker that was away while a topic was deleted still gets the explicit command to remove its data.
                deleted_topics=sorted(state.gone) if for_broker else [],
                exchanges=[state.exchanges[name] for name in sorted(state.exchanges)],
            )
        return answer

    def _answer(
        self,
        *,
        full: bool,
        revision: int | None = None,
        brokers: list[BrokerMeta] | None = None,
        topics: list[TopicMeta] | None = None,
        partitions: list[PartitionMeta] | None = None,
        deleted_topics: list[str] | None = None,
        deleted_brokers: list[int] | None = None,
        coordinators: tuple[str, ...] = (),
        exchanges: list[ExchangeMeta] | None = None,
        deleted_exchanges: list[str] | None = None,
    ) -> MetadataAnswer:
        cluster = self._state.cluster
        assert cluster is not None
        return MetadataAnswer(
            cluster.cluster_id,
            self._coord_epoch,
            self._state.revision if revision is None else revision,
            full,
            brokers or [],
            topics or [],
            partitions or [],
            deleted_topics or [],
            cluster.feature_level,
            list(coordinators or cluster.coordinators or self._config.coordinators),
            deleted_brokers or [],
            exchanges or [],
            deleted_exchanges or [],
        )
