"""Where records go: a thin routing cache over the cluster's metadata. Pure.

A refusal may name a primary of a later epoch than the metadata knows (`hint`); it counts until the metadata catches up.
"""

from __future__ import annotations

import msgspec

from ferryline.protocol.metadata import NO_BROKER, ClusterMetadata, MetadataAnswer, MetadataRequest, TopicMeta
from ferryline.protocol.routing import RoutingTable

PartitionKey = tuple[str, int]  # (topic_id, partition)


class Route(msgspec.Struct, frozen=True):
    """The primary of one partition; ``broker`` is NO_BROKER while there is none."""

    broker: int
    epoch: int


NOWHERE = Route(NO_BROKER, -1)


class Routing:
    """A copy of the cluster's metadata, asked by topic name and partition."""

    def __init__(self) -> None:
        self.cluster = ClusterMetadata()
        self._hints: dict[PartitionKey, Route] = {}
        self._table = RoutingTable(self.cluster.exchanges)

    @property
    def cluster_id(self) -> str:
        return self.cluster.cluster_id

    @property
    def revision(self) -> int:
        return self.cluster.revision

    @property
    def coordinators(self) -> list[str]:
        return self.cluster.coordinators

    def request(self, wait_ms: int) -> MetadataRequest:
        return self.cluster.request(wait_ms)

    def apply(self, answer: MetadataAnswer) -> bool:
        """Take over what is newer. Returns whether anything changed."""
        if not self.cluster.apply(answer):
            return False
        for key in [key for key, hint in self._hints.items() if self._epoch(key) >= hint.epoch]:
            del self._hints[key]
        return True

    def topic(self, name: str) -> TopicMeta | None:
        return self.cluster.topic(name)

    def table(self) -> RoutingTable:
        """Routes through the exchanges as they are known now."""
        if self._table.exchanges is not self.cluster.exchanges:
            self._table = RoutingTable(self.cluster.exchanges, self._table)
        return self._table

    def route(self, key: PartitionKey) -> Route:
        hint = self._hints.get(key)
        if hint is not None:
            return hint
        part = self.cluster.partitions.get(key)
        return NOWHERE if part is None else Route(part.primary, part.epoch)

    def hint(self, key: PartitionKey, broker: object, epoch: object) -> bool:
        """A broker named the primary of ``epoch``. Heeded only if that epoch is later than what is known."""
        if not isinstance(broker, int) or not isinstance(epoch, int) or broker not in self.cluster.brokers:
            return False
        if epoch <= self.route(key).epoch:
            return False
        self._hints[key] = Route(broker, epoch)
        return True

    def exists(self, key: PartitionKey) -> bool:
        topic = self.cluster.topics.get(key[0])
        return topic is not None and key[1] < topic.config.partitions

    def address(self, broker: int) -> str | None:
        known = self.cluster.brokers.get(broker)
        return known.external if known is not None else None

    def live_brokers(self) -> list[int]:
        """Ids of the brokers that are not fenced, in order."""
        return sorted(broker.id for broker in self.cluster.brokers.values() if not broker.fenced)

    def _epoch(self, key: PartitionKey) -> int:
        part = self.cluster.partitions.get(key)
        return part.epoch if part is not None else 2**62  # deleted: no hint about it is worth keeping
