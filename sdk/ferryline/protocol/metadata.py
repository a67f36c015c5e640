"""The picture of a cluster that everybody shares: brokers, topics, partitions, as versioned records.

The coordinator owns them; brokers and clients keep a copy (`ClusterMetadata`) fed by a versioned long poll.
``revision`` rises with every durable change; an answer holds what changed after the asker's revision, or everything
(``full``) when the asker is too old or belongs to another cluster.
"""

from __future__ import annotations

import msgspec

from ferryline.protocol.exchanges import ExchangeMeta

NO_BROKER = 0  # broker ids begin at 1
RESTORING = -1  # as recovery epoch: a backup is being put in, and nobody leads before that has ended
FLUSH_FSYNC = "fsync"  # an acknowledgement means fsynced on every in-sync replica
FLUSH_REPLICATED = "replicated"  # ... in the page cache of every in-sync replica; a power cut of all may lose it


class BrokerMeta(msgspec.Struct, array_like=True, frozen=True):
    """One registered broker. ``internal``/``external``: https URLs for peers and for clients."""

    id: int
    internal: str
    external: str
    broker_epoch: int = 0
    fenced: bool = True
    stopping: bool = False  # leaving (SIGTERM) or draining: no new replicas, no primaries
    storage_id: str = ""
    incarnation: int = 0
    draining: bool = False  # asked by an operator; outlives restarts until cancelled


ON_DEAD_SKIP, ON_DEAD_PARK = "skip", "park"  # what becomes of a record whose attempts are used up


class RetryPolicy(msgspec.Struct, array_like=True, frozen=True):
    """How a topic retries what its queues could not process. ``attempts``: leases of a record, all together.

    The wait before attempt n + 1 is drawn evenly from [0, min(``backoff_max_ms``, ``backoff_ms`` * 2^(n-1))].
    ``on_dead``: "skip" copies what is dead to the topic ``dead_letters`` ("" means ``<topic>.dlq``) and goes on;
    "park" copies nothing and stops its lane until somebody redrives it.
    """

    attempts: int = 5
    backoff_ms: int = 1_000
    backoff_max_ms: int = 60_000
    on_dead: str = ON_DEAD_SKIP
    dead_letters: str = ""


class TopicConfig(msgspec.Struct, array_like=True, frozen=True):
    """Settings of a topic. Sizes in bytes, times in ms; -1 means no limit."""

    partitions: int = 3
    replication: int = 2
    min_isr: int = 1
    flush: str = FLUSH_FSYNC
    retention_ms: int = 7 * 86_400_000
    retention_bytes: int = -1  # per partition
    segment_bytes: int = 128 * 1024 * 1024
    segment_ms: int = 86_400_000
    max_record_bytes: int = 1024 * 1024
    retry: RetryPolicy = RetryPolicy()  # of queues


class TopicMeta(msgspec.Struct, array_like=True, frozen=True):
    """A topic. ``id`` is 32 hex digits; a topic made again under the same name has another one.

    ``owner``: the principal that created it, whose quota of stored bytes it counts for; "" where access was off.
    """

    id: str
    name: str
    config: TopicConfig
    version: int = 0
    owner: str = ""


class PartitionMeta(msgspec.Struct, array_like=True, frozen=True):
    """The coordinator's record of one partition (`Part` of the replication rules).

    Invariants: primary is in isr or NO_BROKER; isr and elr are disjoint; len(isr) >= min_isr implies elr is empty;
    a fenced broker is not in isr; epoch and version never decrease.
    """

    topic_id: str
    partition: int
    replicas: tuple[int, ...]
    primary: int
    epoch: int
    version: int
    isr: tuple[int, ...]
    elr: tuple[int, ...] = ()
    last_known_elr: tuple[int, ...] = ()
    min_isr: int = 1
    flush: str = FLUSH_FSYNC
    recovery_epoch: int = 0  # epoch of the last unclean recovery, 0 if there never was one; RESTORING
    adding: tuple[int, ...] = ()  # replicas that are catching up to replace others
    removing: tuple[int, ...] = ()  # replicas that leave once `adding` is in sync

    @property
    def key(self) -> tuple[str, int]:
        return (self.topic_id, self.partition)


def check_partition(part: PartitionMeta) -> None:
    """Assert the invariants of a partition record; kept on in production."""
    assert part.primary == NO_BROKER or part.primary in part.isr, part
    assert not set(part.isr) & set(part.elr), part
    assert len(part.isr) < part.min_isr or not part.elr, part
    assert set(part.isr) <= set(part.replicas), part


class MetadataRequest(msgspec.Struct, array_like=True):
    """``revision`` -1 asks for everything; ``wait_ms`` parks the request until something changes."""

    cluster_id: str = ""
    coord_epoch: int = 0
    revision: int = -1
    wait_ms: int = 0


class MetadataAnswer(msgspec.Struct, array_like=True):
    cluster_id: str
    coord_epoch: int
    revision: int
    full: bool
    brokers: list[BrokerMeta] = []
    topics: list[TopicMeta] = []
    partitions: list[PartitionMeta] = []
    deleted_topics: list[str] = []  # ids
    feature_level: int = 1
    coordinators: list[str] = []  # URLs
    deleted_brokers: list[int] = []
    exchanges: list[ExchangeMeta] = []  # with all their bindings
    deleted_exchanges: list[str] = []  # names


class ClusterMetadata:
    """A copy of the cluster's records. `apply` is the only way to change it; stale answers change nothing."""

    def __init__(self) -> None:
        self.cluster_id = ""
        self.coord_epoch = 0
        self.revision = -1
        self.feature_level = 0
        self.coordinators: list[str] = []
        self.brokers: dict[int, BrokerMeta] = {}
        self.topics: dict[str, TopicMeta] = {}  # by id
        self.topic_ids: dict[str, str] = {}  # name -> id
        self.partitions: dict[tuple[str, int], PartitionMeta] = {}
        self.exchanges: dict[str, ExchangeMeta] = {}  # by name; another object whenever one of them changes

    def request(self, wait_ms: int) -> MetadataRequest:
        return MetadataRequest(self.cluster_id, self.coord_epoch, self.revision, wait_ms)

    def apply(self, answer: MetadataAnswer) -> bool:
        """Take over what is newer. Returns whether anything changed.

        Partitions are taken by (version): an answer that was overtaken never moves a partition back.
        """
        if self.cluster_id and answer.cluster_id != self.cluster_id:
            return False
        if (answer.coord_epoch, answer.revision) <= (self.coord_epoch, self.revision):
            return False
        self.cluster_id = answer.cluster_id
        self.coord_epoch = answer.coord_epoch
        self.revision = answer.revision
        self.feature_level = answer.feature_level
        if answer.coordinators:
            self.coordinators = list(answer.coordinators)
        if answer.full:
            kept = {topic.id for topic in answer.topics}
            for topic_id in [t for t in self.topics if t not in kept]:
                self._forget(topic_id)
            self.brokers = {}
        for broker in answer.brokers:
            self.brokers[broker.id] = broker
        for broker_id in answer.deleted_brokers:
            self.brokers.pop(broker_id, None)
        for topic in answer.topics:
            self.topics[topic.id] = topic
            self.topic_ids[topic.name] = topic.id
        for part in answer.partitions:
            known = self.partitions.get(part.key)
            if known is None or part.version > known.version:
                self.partitions[part.key] = part
        for topic_id in answer.deleted_topics:
            self._forget(topic_id)
        if answer.full or answer.exchanges or answer.deleted_exchanges:
            self._take_exchanges(answer)
        return True

    def topic(self, name: str) -> TopicMeta | None:
        topic_id = self.topic_ids.get(name)
        return self.topics.get(topic_id) if topic_id else None

    def partition(self, topic_id: str, partition: int) -> PartitionMeta | None:
        return self.partitions.get((topic_id, partition))

    def partitions_of(self, topic_id: str) -> list[PartitionMeta]:
        topic = self.topics.get(topic_id)
        if topic is None:
            return []
        found = (self.partitions.get((topic_id, number)) for number in range(topic.config.partitions))
        return [part for part in found if part is not None]

    def answer(self) -> MetadataAnswer:
        """Everything, as a full answer: how a broker serves its copy."""
        return MetadataAnswer(
            self.cluster_id,
            self.coord_epoch,
            self.revision,
            True,
            list(self.brokers.values()),
            list(self.topics.values()),
            list(self.partitions.values()),
            [],
            self.feature_level,
            list(self.coordinators),
            [],
            list(self.exchanges.values()),
        )

    def _take_exchanges(self, answer: MetadataAnswer) -> None:
        kept = {} if answer.full else self.exchanges
        changed = {**kept, **{exchange.name: exchange for exchange in answer.exchanges}}
        for name in answer.deleted_exchanges:
            changed.pop(name, None)
        if changed != self.exchanges:
            self.exchanges = changed

    def _forget(self, topic_id: str) -> None:
        topic = self.topics.pop(topic_id, None)
        if topic is None:
            return
        if self.topic_ids.get(topic.name) == topic_id:
            del self.topic_ids[topic.name]
        for number in range(topic.config.partitions):
            self.partitions.pop((topic_id, number), None)
