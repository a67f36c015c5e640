"""The cluster as this broker knows it: the node core's copy of the metadata, with the look-ups that handlers need."""

from __future__ import annotations

from collections import deque

import msgspec

from ferryline.protocol.errors import FerrylineError, NotPrimary, PrimaryNotAvailable, UnknownPartition, UnknownTopic
from ferryline.protocol.frames import encode_value
from ferryline.protocol.metadata import NO_BROKER, BrokerMeta, ClusterMetadata, MetadataAnswer, TopicMeta

_CHANGES_MAX = 20_000  # records in the answers kept for deltas; who is older gets everything


class ClusterView:
    """Reads of the metadata. ``claim_key`` is known once this process life is registered."""

    def __init__(self, metadata: ClusterMetadata) -> None:
        self.metadata = metadata
        self.claim_key = b""
        self._encoded: tuple[tuple[int, int], msgspec.Raw] | None = None
        self._changes: deque[MetadataAnswer] = deque()  # as the coordinator told them, oldest first, back to back
        self._changes_size = 0
        self._floor = (-1, -1)  # position before the first of them
        self._news: dict[int, msgspec.Raw] = {}  # asker's revision -> encoded, at the present position

    def topic(self, topic_id: str) -> TopicMeta | None:
        return self.metadata.topics.get(topic_id)

    def topic_named(self, name: str) -> TopicMeta:
        topic = self.metadata.topic(name)
        if topic is None:
            raise UnknownTopic(f"topic: {name[:200]!r} does not exist")
        return topic

    def broker(self, broker_id: int) -> BrokerMeta | None:
        return self.metadata.brokers.get(broker_id)

    def not_here(self, topic_id: str, partition: int) -> FerrylineError:
        """Why this broker cannot serve that partition."""
        topic = self.metadata.topics.get(topic_id)
        if topic is None:
            return UnknownTopic(f"topic_id: {topic_id[:64]!r} is not known here")
        part = self.metadata.partition(topic_id, partition)
        if part is None:
            known = topic.config.partitions
            return UnknownPartition(f"partition: {partition} is outside 0..{known - 1} of topic {topic.name}")
        if part.primary == NO_BROKER:
            return PrimaryNotAvailable(f"{topic.name}/{partition} has no primary", epoch=part.epoch)
        return NotPrimary(
            f"{topic.name}/{partition} is at broker {part.primary}", primary=part.primary, epoch=part.epoch
        )

    @property
    def position(self) -> tuple[int, int]:
        return (self.metadata.coord_epoch, self.metadata.revision)

    def encoded(self) -> msgspec.Raw:
        """The whole metadata as an encoded MetadataAnswer; encoded once per revision, however many ask."""
        if self._encoded is None or self._encoded[0] != self.position:
            self._encoded = (self.position, msgspec.Raw(encode_value(self.metadata.answer())))
        return self._encoded[1]

    def took(self, answer: MetadataAnswer) -> None:
        """``answer`` was applied to the metadata just now: remember what it changed."""
        self._news.clear()
        if answer.full or answer.coord_epoch != self._floor[0]:
            # Another history, perhaps: only everything is safe for who knows the one before.
            self._changes.clear()
            self._changes_size, self._floor = 0, self.position
            return
        self._changes.append(answer)
        self._changes_size += _size(answer)
        while self._changes_size > _CHANGES_MAX:
            oldest = self._changes.popleft()
            self._changes_size -= _size(oldest)
            self._floor = (oldest.coord_epoch, oldest.revision)

    def news(self, coord_epoch: int, revision: int) -> msgspec.Raw:
        """What changed since that position, encoded: a delta if it is remembered, else everything."""
        if coord_epoch != self._floor[0] or not self._floor[1] <= revision:
            return self.encoded()
        encoded = self._news.get(revision)
        if encoded is None:
            encoded = self._news[revision] = msgspec.Raw(encode_value(self._delta(revision)))
        return encoded

    def _delta(self, revision: int) -> MetadataAnswer:
        metadata = self.metadata
        newer = [answer for answer in self._changes if answer.revision > revision]
        brokers = {broker.id for answer in newer for broker in answer.brokers}
        brokers.update(broker_id for answer in newer for broker_id in answer.deleted_brokers)
        topics = {topic.id for answer in newer for topic in answer.topics}
        topics.update(topic_id for answer in newer for topic_id in answer.deleted_topics)
        parts = {part.key for answer in newer for part in answer.partitions}
        exchanges = {exchange.name for answer in newer for exchange in answer.exchanges}
        exchanges.update(name for answer in newer for name in answer.deleted_exchanges)
        return MetadataAnswer(
            metadata.cluster_id,
            metadata.coord_epoch,
            metadata.revision,
            False,
            [metadata.brokers[broker_id] for broker_id in sorted(brokers) if broker_id in metadata.brokers],
            [metadata.topics[topic_id] for topic_id in sorted(topics) if topic_id in metadata.topics],
            [metadata.partitions[key] for key in sorted(parts) if key in metadata.partitions],
            [topic_id for topic_id in sorted(topics) if topic_id not in metadata.topics],
            metadata.feature_level,
            list(metadata.coordinators),
            [broker_id for broker_id in sorted(brokers) if broker_id not in metadata.brokers],
            [metadata.exchanges[name] for name in sorted(exchanges) if name in metadata.exchanges],
            [name for name in sorted(exchanges) if name not in metadata.exchanges],
        )


def _size(answer: MetadataAnswer) -> int:
    """What it costs to keep, in records: an exchange counts with each of its bindings."""
    bindings = sum(1 + len(exchange.bindings) for exchange in answer.exchanges)
    records = len(answer.brokers) + len(answer.topics) + len(answer.partitions) + len(answer.deleted_topics)
    return 1 + records + bindings + len(answer.deleted_exchanges)
