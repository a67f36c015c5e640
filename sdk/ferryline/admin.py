"""Administration: topics, groups, brokers, the cluster, exchanges, principals.

Changes go to the coordinator; what exists is read from the cluster's metadata, so that it can be asked during a
coordinator outage, too.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import msgspec

from ferryline.access_admin import AccessAdmin
from ferryline.definition_admin import DefinitionAdmin
from ferryline.exchange_admin import ExchangeAdmin
from ferryline.message import TopicPartition
from ferryline.protocol.errors import InvalidArgument, TopicExists, UnknownTopic
from ferryline.protocol.limits import check_name
from ferryline.protocol.metadata import NO_BROKER, BrokerMeta, TopicConfig, TopicMeta
from ferryline.retry import RetryLike, holds, with_retry


class PartitionInfo(msgspec.Struct, frozen=True):
    """One partition: ``primary`` is 0 while there is none."""

    partition: int
    primary: int
    epoch: int
    replicas: tuple[int, ...]
    isr: tuple[int, ...]
    min_isr: int

    @property
    def healthy(self) -> bool:
        """All replicas in sync, and one of them is primary."""
        return self.primary != NO_BROKER and len(self.isr) >= len(self.replicas)


class TopicInfo(msgspec.Struct, frozen=True):
    """A topic, its settings and its partitions. ``owner``: the principal that created it, "" where access was off."""

    name: str
    id: str
    config: TopicConfig
    partitions: list[PartitionInfo]
    owner: str = ""


class BrokerInfo(msgspec.Struct, frozen=True):
    """A registered broker. ``primaries`` and ``replicas`` count partitions."""

    id: int
    url: str
    fenced: bool
    stopping: bool
    draining: bool
    primaries: int
    replicas: int


class ClusterInfo(msgspec.Struct, frozen=True):
    """The cluster at a glance. ``offline``: partitions without primary; ``under_replicated``: a replica is missing."""

    id: str
    coordinators: list[str]
    feature_level: int
    brokers: list[BrokerInfo]
    topics: int
    partitions: int
    under_replicated: list[TopicPartition]
    offline: list[TopicPartition]


class Admin(ExchangeAdmin, AccessAdmin, DefinitionAdmin):
    """Administration of the cluster that the client is connected to. Made by ``client.admin``.

    Every call ends within ``timeout`` seconds (default: the client's), with a value or a FerrylineError.
    """

    # -- topics ------------------------------------------------------------------------------------

    async def create_topic(
        self,
        name: str,
        *,
        exist_ok: bool = False,
        retry: RetryLike | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> TopicInfo:
        """Create a topic and wait until it can be used. Settings as of TopicConfig: partitions, replication, ...

        ``retry``: how its queues retry (`Retry`). Raises TopicExists unless ``exist_ok``, InvalidArgument,
        NotEnoughReplicas.
        """
        check_name(name)
        config = with_retry(settings, retry)
        try:
            await self._change("POST", "/v1/topics", {"name": name, "config": config}, timeout)
        except TopicExists:
            if not exist_ok:
                raise
        await self._visible(lambda: self._is_served(name), timeout)
        return await self.describe_topic(name, timeout=timeout)

    async def list_topics(self, *, timeout: float | None = None) -> list[TopicInfo]:
        """All topics, by name."""
        await self._refresh(timeout)
        topics = self._client.routing.cluster.topics.values()
        return [self._topic_info(meta) for meta in sorted(topics, key=lambda meta: meta.name)]

    async def describe_topic(self, name: str, *, timeout: float | None = None) -> TopicInfo:
        """One topic as it is now. Raises UnknownTopic."""
        check_name(name)
        await self._refresh(timeout)
        meta = self._client.routing.topic(name)
        if meta is None:
            raise UnknownTopic(f"topic: {name!r} does not exist", field="topic", topic=name)
        return self._topic_info(meta)

    async def alter_topic(
        self, name: str, *, retry: RetryLike | None = None, timeout: float | None = None, **settings: Any
    ) -> TopicInfo:
        """Change settings of a topic. Raises UnknownTopic, InvalidArgument.

        A `Retry` replaces the present one; a mapping of fields of RetryPolicy changes these.
        """
        config = with_retry(settings, retry)
        if not config:
            raise InvalidArgument("settings: at least one is needed", field="settings")
        check_name(name)
        await self._change("PATCH", f"/v1/topics/{quote(name)}", {"config": config}, timeout)
        await self._visible(
            lambda: (meta := self._client.routing.topic(name)) is not None and holds(meta.config, config), timeout
        )
        return await self.describe_topic(name, timeout=timeout)

    async def add_partitions(
        self, name: str, partitions: int, *, keys_move: bool = False, timeout: float | None = None
    ) -> TopicInfo:
        """Give a topic ``partitions`` partitions in all. Keys move between partitions: say ``keys_move=True``."""
        check_name(name)
        body = {"partitions": partitions, "keys_move": keys_move}
        await self._change("POST", f"/v1/topics/{quote(name)}/partitions", body, timeout)
        await self._visible(lambda: self._is_served(name, partitions), timeout)
        return await self.describe_topic(name, timeout=timeout)

    async def delete_topic(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a topic and its records. Raises UnknownTopic."""
        check_name(name)
        await self._change("DELETE", f"/v1/topics/{quote(name)}", None, timeout)
        await self._visible(lambda: self._client.routing.topic(name) is None, timeout)

    # -- groups ------------------------------------------------------------------------------------

    async def list_groups(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """All groups, as the coordinator describes them."""
        return _listed(await self._ask("GET", "/v1/groups", timeout), "groups")

    async def describe_group(self, group: str, *, timeout: float | None = None) -> dict[str, Any]:
        """Members and assignment of a group. Raises UnknownGroup."""
        check_name(group, "group")
        answer: dict[str, Any] = await self._ask("GET", f"/v1/groups/{quote(group)}", timeout)
        return answer

    async def delete_group(self, group: str, *, timeout: float | None = None) -> None:
        """Forget a group without members. Raises UnknownGroup, Conflict while it has members."""
        check_name(group, "group")
        await self._change("DELETE", f"/v1/groups/{quote(group)}", None, timeout)

    # -- brokers and cluster -----------------------------------------------------------------------

    async def list_brokers(self, *, timeout: float | None = None) -> list[BrokerInfo]:
        """All registered brokers, by id."""
        await self._refresh(timeout)
        return self._brokers()

    async def drain_broker(self, broker: int, *, timeout: float | None = None) -> None:
        """Move everything off a broker; it goes on serving until others have taken over. Raises UnknownBroker."""
        await self._change("POST", f"/v1/brokers/{int(broker)}/drain", {}, timeout)

    async def undrain_broker(self, broker: int, *, timeout: float | None = None) -> None:
        """Let a broker have partitions again."""
        await self._change("POST", f"/v1/brokers/{int(broker)}/undrain", {}, timeout)

    async def forget_broker(self, broker: int, *, timeout: float | None = None) -> None:
        """Forget a broker that will not come back. Raises Conflict while it serves or has replicas."""
        await self._change("DELETE", f"/v1/brokers/{int(broker)}", None, timeout)

    async def recover_partition(
        self, topic: str, partition: int, *, accept_data_loss: bool = False, timeout: float | None = None
    ) -> None:
        """Give a partition without candidate a primary again: the most complete of the replicas that report.

        Without ``accept_data_loss`` every replica must report. Consumers past the new end get LogTruncated.
        """
        body = {"topic": check_name(topic), "partition": partition, "accept_data_loss": accept_data_loss}
        await self._change("POST", "/v1/partitions/recover", body, timeout)

    async def cluster(self, *, timeout: float | None = None) -> ClusterInfo:
        """The cluster at a glance: brokers, topics, and what is not as it should be."""
        await self._refresh(timeout)
        metadata = self._client.routing.cluster
        names = {meta.id: meta.name for meta in metadata.topics.values()}
        partitions = sorted(
            metadata.partitions.values(), key=lambda part: (names.get(part.topic_id, ""), part.partition)
        )
        return ClusterInfo(
            metadata.cluster_id,
            list(metadata.coordinators),
            metadata.feature_level,
            self._brokers(),
            len(metadata.topics),
            len(partitions),
            [TopicPartition(names.get(p.topic_id, p.topic_id), p.partition) for p in partitions
             if len(p.isr) < len(p.replicas)],
            [TopicPartition(names.get(p.topic_id, p.topic_id), p.partition) for p in partitions
             if p.primary == NO_BROKER],
        )  # fmt: skip

    async def route(self, topic: str, key: str | bytes) -> TopicPartition:
        """The partition that a key belongs to."""
        from ferryline.protocol.partitioner import partition_of

        meta = await self._client.learn_topic(topic)
        raw = key.encode() if isinstance(key, str) else key
        return TopicPartition(topic, partition_of(raw, meta.config.partitions))

    # -- from metadata -----------------------------------------------------------------------------

    def _topic_info(self, meta: TopicMeta) -> TopicInfo:
        parts = self._client.routing.cluster.partitions_of(meta.id)
        return TopicInfo(
            meta.name,
            meta.id,
            meta.config,
            [PartitionInfo(p.partition, p.primary, p.epoch, p.replicas, p.isr, p.min_isr) for p in parts],
            meta.owner,
        )

    def _brokers(self) -> list[BrokerInfo]:
        parts = self._client.routing.cluster.partitions.values()

        def info(meta: BrokerMeta) -> BrokerInfo:
            primaries = sum(part.primary == meta.id for part in parts)
            replicas = sum(meta.id in part.replicas for part in parts)
            return BrokerInfo(meta.id, meta.external, meta.fenced, meta.stopping, meta.draining, primaries, replicas)

        return [info(meta) for _, meta in sorted(self._client.routing.cluster.brokers.items())]

    def _is_served(self, name: str, partitions: int = 1) -> bool:
        """Every partition has a primary, as far as this client knows."""
        meta = self._client.routing.topic(name)
        if meta is None or meta.config.partitions < partitions:
            return False
        parts = self._client.routing.cluster.partitions_of(meta.id)
        return len(parts) == meta.config.partitions and all(part.primary != NO_BROKER for part in parts)


def _listed(answer: Any, name: str) -> list[dict[str, Any]]:
    found = answer.get(name, []) if isinstance(answer, dict) else answer
    return list(found)
