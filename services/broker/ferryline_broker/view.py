"""The cluster as this broker knows it: the node core's copy of the metadata, with the look-ups that handlers need."""

from __future__ import annotations

import msgspec

from ferryline.protocol.errors import FerrylineError, NotPrimary, PrimaryNotAvailable, UnknownPartition, UnknownTopic
from ferryline.protocol.frames import encode_value
from ferryline.protocol.metadata import NO_BROKER, BrokerMeta, ClusterMetadata, TopicMeta


class ClusterView:
    """Reads of the metadata. ``claim_key`` is known once this process life is registered."""

    def __init__(self, metadata: ClusterMetadata) -> None:
        self.metadata = metadata
        self.claim_key = b""
        self._encoded: tuple[tuple[int, int], msgspec.Raw] | None = None

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
