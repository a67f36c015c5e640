"""From files to cores: open the replicas on disk, and those that the coordinator assigns.

Beside its logs a replica keeps the file ``topic``: what its topic was called and how it is set, as last heard. It is
needed to recover the logs before any coordinator has been heard, and for nothing else.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec
from msgspec.structs import replace

from ferryline.protocol.frames import encode_value
from ferryline.protocol.messages import LOG_OK, RECORDS, STATE
from ferryline.protocol.metadata import FLUSH_FSYNC, RetryPolicy, TopicConfig, TopicMeta
from ferryline.protocol.records import decode_batch
from ferryline_broker.core.events import Key
from ferryline_broker.core.partition import LogOpened, OpenedReplica, PartitionCore, ReplicaConfig
from ferryline_broker.core.producers import ProducerTable
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.interface import LogDamaged
from ferryline_broker.log.model import LogConfig
from ferryline_broker.log.node_store import NodeStore
from ferryline_broker.log.replica_store import ReplicaStore, replica_path, state_config
from ferryline_broker.log.together import Together
from ferryline_broker.log.walk import checked_batches
from ferryline_broker.metrics import BrokerMetrics
from ferryline_service.logs import get_logger

DEAD_LETTERS_SUFFIX = ".dlq"
_log = get_logger()
_SEGMENT_BYTES_MIN = 1024 * 1024
_REPLAY_BYTES = 1024 * 1024


class Opener:
    """Makes hosted replicas out of stores. ``core_class`` is swapped only by the sabotage runs of the proofs."""

    def __init__(
        self,
        store: NodeStore,
        metrics: BrokerMetrics,
        config: ReplicaConfig,
        core_class: type[PartitionCore] = PartitionCore,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._config = config
        self._core_class = core_class
        self._topics: dict[str, TopicMeta] = {}  # as last opened

    def open_all(self, broker_id: int) -> list[HostedReplica]:
        """Every replica on disk, with one sync for all. Called before anything is served."""
        together = self._store.together(starting=True)
        opened = [self.open(key, broker_id, None, together=together) for key in self._store.replicas_on_disk()]
        together.settle()
        return opened

    def open(
        self,
        key: Key,
        broker_id: int,
        topic: TopicMeta | None,
        *,
        flush: str = FLUSH_FSYNC,
        quarantined: str = "",
        together: Together | None = None,
    ) -> HostedReplica:
        """Open one replica, creating it if it is not there. Raises StorageFailed or StorageFull.

        With ``together`` it may be used only once that is settled.
        """
        remembered = self._remembered(key)
        known = self._shared(topic or remembered or TopicMeta(key[0], key[0][:8], TopicConfig(flush=flush)))
        store = self._store.open_replica(
            *key, log_config(known.config), quarantined=quarantined, together=None if quarantined else together
        )
        if topic is not None and topic != remembered:
            self.remember(key, topic, together)
        opened = opened_replica(store, repairing=bool(quarantined))
        report = store.recovery
        if report.log_state != LOG_OK:
            _log.error(
                "replica is not whole", partition=f"{known.name}/{key[1]}", found=report.log_state, why=report.reason
            )
        core = self._core_class(key, broker_id, self._config, opened)
        core.replica.retry = retry_policy(known)
        return HostedReplica(core, store, known, self._metrics.topic(known.name))

    def remember(self, key: Key, topic: TopicMeta, together: Together | None = None) -> None:
        """Keep name and settings of the topic beside the replica."""
        data = encode_value(topic)
        if together is not None:
            together.write_small(self._topic_path(key), data)
        else:
            self._store.storage.write_small_atomic(self._topic_path(key), data)

    def _shared(self, topic: TopicMeta) -> TopicMeta:
        """One object for all replicas of a topic: each has read its own copy."""
        known = self._topics.get(topic.id)
        if known != topic:
            known = self._topics[topic.id] = topic
        return known

    def _remembered(self, key: Key) -> TopicMeta | None:
        data = self._store.storage.read_small(self._topic_path(key))
        try:
            return msgspec.msgpack.decode(data, type=TopicMeta) if data else None
        except msgspec.MsgspecError:
            return None

    def _topic_path(self, key: Key) -> str:
        return f"{replica_path(self._store.root, *key)}/topic"


@lru_cache(maxsize=1024)
def log_config(config: TopicConfig) -> LogConfig:
    """The part of a topic's settings that its logs follow."""
    return LogConfig(
        segment_bytes=max(_SEGMENT_BYTES_MIN, min(config.segment_bytes, 2**31)),
        segment_ms=config.segment_ms,
        retention_ms=config.retention_ms,
        retention_bytes=config.retention_bytes,
        flush=config.flush,
    )


def apply_config(hosted: HostedReplica, config: TopicConfig) -> None:
    """Let a running replica follow changed topic settings. The state log is never subject to retention."""
    records = log_config(config)
    hosted.logs[RECORDS].config = records
    hosted.logs[STATE].config = state_config(records)


def retry_policy(topic: TopicMeta) -> RetryPolicy:
    """How queues of this topic retry. What is dead in a topic of dead letters stays there: it has nowhere to go."""
    retry = topic.config.retry
    return replace(retry, on_dead="park") if topic.name.endswith(DEAD_LETTERS_SUFFIX) else retry


def opened_replica(store: ReplicaStore, *, repairing: bool = False) -> OpenedReplica:
    """What the core must know of the files. Rot that shows while they are read makes this replica damaged, no other."""
    logs = [
        LogOpened(log.log_start, log.log_end, log.epochs.items(), store.high_watermarks[number], log.epochs.before)
        for number, log in enumerate(store.logs)
    ]
    try:
        producers = rebuild_producers(store)
    except LogDamaged as damage:
        store.mark_damaged(damage.message)
        producers = ProducerTable()
    return OpenedReplica(store.seen_epoch, (logs[RECORDS], logs[STATE]), producers, store.recovery.log_state, repairing)


def rebuild_producers(store: ReplicaStore) -> ProducerTable:
    """The dedupe table as of the log end: the newest snapshot and the headers behind it. Empty for a damaged log."""
    if store.records.damage is not None:
        return ProducerTable()
    _, snapshot = store.producer_snapshot()
    table = ProducerTable.restore(snapshot)
    for header in store.headers_since_snapshot():
        table.observe(header)
    return table


def replay_state(store: ReplicaStore) -> list[tuple[int, int, bytes]]:
    """(offset, epoch, value) of every entry of the state log, control batches left out. Raises StorageFailed."""
    log = store.state
    entries: list[tuple[int, int, bytes]] = []
    offset = log.log_start
    while offset < log.log_end:
        data = log.read(offset, _REPLAY_BYTES, log.log_end)
        view = memoryview(data)
        for at, header in checked_batches(log.path, data, offset):
            offset = header.next_offset
            if header.is_control:
                continue
            batch = decode_batch(view[at : at + header.size], header)
            entries.extend((record.offset, header.epoch, record.value or b"") for record in batch)
    return entries
