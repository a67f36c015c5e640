"""A backup comes back into an empty cluster: records first, then logs, and only then somebody leads.

A partition that is being restored has no primary, no in-sync set and RESTORING in place of a recovery epoch, so no rule
elects anybody for it: half a backup is never taken for all there is. Its epoch is the highest that the logs hold. When
one broker has them whole, it is made primary under the next epoch, alone in the in-sync set; the others fetch from it.
"""

from __future__ import annotations

import re

import msgspec
from msgspec.structs import asdict, replace

from ferryline.protocol.errors import (
    Conflict,
    InvalidArgument,
    NotEnoughReplicas,
    NotReady,
    Throttled,
    UnknownPartition,
)
from ferryline.protocol.limits import check_name
from ferryline.protocol.messages import FEATURE_RESTORE
from ferryline.protocol.metadata import NO_BROKER, RESTORING, PartitionMeta, TopicConfig, TopicMeta
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.events import RestoreBegun, RestoreEnded
from ferryline_coordinator.core.placement import placed
from ferryline_coordinator.core.records import Record, decode_record, record_key
from ferryline_coordinator.core.state import Key
from ferryline_coordinator.core.topics import checked_config

# Everything else says how this cluster is or was: brokers, partitions, members. Of another one it would be untrue.
_TOPIC_ID = re.compile(r"\A[0-9a-f]{32}\Z")  # names a directory on brokers
BACKED_UP = ("topic", "exchange", "principal")


def is_backed_up(key: str) -> bool:
    """Whether the record under ``key`` belongs into a backup."""
    return key.partition("/")[0] in BACKED_UP


class Restoring:
    """Carries out both commands. A refused one changes nothing."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config

    def begin(self, change: Change, event: RestoreBegun) -> None:
        if change.cluster.feature_level < FEATURE_RESTORE:
            raise Conflict(
                f"feature_level: restoring needs {FEATURE_RESTORE}, the cluster runs at "
                f"{change.cluster.feature_level}: ferryline cluster upgrade --finish",
                feature_level=change.cluster.feature_level,
            )
        self._check_empty(change)
        records = [_decoded(key, value) for key, value in sorted(event.records.items())]
        topics = {record.id: record for record in records if isinstance(record, TopicMeta)}
        new: dict[Key, int] = {}
        for topic in topics.values():
            known = change.topic(topic.name)
            if known is not None and known.id != topic.id:
                raise Conflict(f"topic {topic.name} exists already, as another one", topic=topic.name)
            for number in range(topic.config.partitions):
                if (topic.id, number) not in event.epochs:
                    raise InvalidArgument(f"epochs: {topic.name}/{number} is missing", field="epochs")
                if change.part((topic.id, number)) is None:
                    new[(topic.id, number)] = topic.config.replication
        if change.state.replicas + sum(new.values()) > self._config.partitions_max:
            raise Throttled(f"partitions: over the cluster's {self._config.partitions_max} replicas")
        self._place(change, topics, new, event.epochs)
        for record in records:
            change.put_new(record)
        keys = [(topic.id, number) for topic in topics.values() for number in range(topic.config.partitions)]
        change.reply(event.reply, [(*key, self._taker(change, key)) for key in sorted(keys)])
        change.note("restoring", topics=len(topics), partitions=len(keys))

    def end(self, change: Change, event: RestoreEnded) -> None:
        record = change.part((event.topic_id, event.partition))
        if record is None:
            raise UnknownPartition(f"partition: {event.topic_id}/{event.partition} does not exist")
        part = record.meta
        if part.recovery_epoch != RESTORING:
            if part.primary == event.broker_id:
                return change.reply(event.reply, part)  # the answer was lost
            raise Conflict(f"{part.topic_id}/{part.partition} is not being restored")
        if event.broker_id not in part.replicas:
            raise InvalidArgument(f"broker: {event.broker_id} holds no copy of it", field="broker")
        if not change.electable(event.broker_id):
            raise NotReady(f"broker {event.broker_id} does not serve; ask again", broker=event.broker_id)
        leads = replace(
            part,
            primary=event.broker_id,
            isr=(event.broker_id,),
            epoch=part.epoch + 1,
            version=part.version + 1,
            recovery_epoch=0,
        )
        change.reply(event.reply, change.put_part(leads))
        change.note("restored", topic_id=part.topic_id, partition=part.partition, primary=event.broker_id)
        return None

    # -- inside -------------------------------------------------------------------------------------

    def _check_empty(self, change: Change) -> None:
        """Nothing may be there but what an earlier call of a restore has made that is still under way."""
        parts = change.parts()
        if parts and all(record.meta.recovery_epoch != RESTORING for record in parts):
            topic = change.state.topics.get(parts[0].meta.topic_id)
            name = topic.name if topic is not None else parts[0].meta.topic_id
            raise Conflict(
                f"the cluster is not empty: it has topic {name}; a backup goes into a cluster without topics",
                topic=name,
            )

    def _place(self, change: Change, topics: dict[str, TopicMeta], new: dict[Key, int], epochs: dict[Key, int]) -> None:
        registered = [b.meta.id for b in change.brokers() if b.meta.broker_epoch and not b.meta.draining]
        usable = [b for b in registered if change.usable(b)]
        wanted = max(new.values(), default=0)
        if new and (len(usable) < wanted or not usable):
            raise NotEnoughReplicas(
                f"replication: {wanted} replicas need as many brokers, {len(usable)} serve",
                replication=wanted,
                serving=len(usable),
            )
        state = change.state
        for key, replicas in placed(state.assigned, state.preferred, new, usable, registered).items():
            config = topics[key[0]].config
            part = PartitionMeta(
                *key, replicas, NO_BROKER, epochs[key], 1, (), min_isr=config.min_isr, flush=config.flush
            )
            change.put_part(replace(part, recovery_epoch=RESTORING))

    def _taker(self, change: Change, key: Key) -> int:
        """Which broker takes the logs in: always the same one, so that a restore can go on. 0: it has been done."""
        record = change.part(key)
        assert record is not None, key
        return record.meta.replicas[0] if record.meta.recovery_epoch == RESTORING else NO_BROKER


def _decoded(key: str, value: bytes) -> Record:
    """Raises InvalidArgument for what is no record, or none that belongs into a backup."""
    try:
        record = decode_record(key, value) if is_backed_up(key) else None
    except (KeyError, msgspec.MsgspecError) as error:
        raise InvalidArgument(
            f"records: {key[:100]!r} is not understood: {str(error)[:200]}", field="records"
        ) from None
    if record is None or record_key(record) != key:
        raise InvalidArgument(f"records: {key[:100]!r} does not belong into a backup", field="records")
    if isinstance(record, TopicMeta):
        check_name(record.name, "records")
        checked_config({**asdict(record.config), "retry": asdict(record.config.retry)}, TopicConfig())
        if not _TOPIC_ID.match(record.id):
            raise InvalidArgument(f"records: {record.id[:64]!r} is no topic id", field="records")
    return record
