"""The working copy of one decision: rules read and write here, and see what they have written.

`finish` turns it into a `Decision`: changed records only, with the next revision if anybody outside can see a change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from ferryline.protocol.access import PrincipalMeta
from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.exchanges import ExchangeMeta
from ferryline.protocol.metadata import PartitionMeta, TopicMeta
from ferryline_coordinator.core.events import Decision, Effect, Note, Refuse, Reply
from ferryline_coordinator.core.records import (
    CLUSTER_KEY,
    BrokerRecord,
    ClusterRecord,
    GroupOwners,
    GroupRecord,
    PartRecord,
    Record,
    TopicGone,
    exchange_key,
    group_key,
    owners_key,
    part_key,
    principal_key,
    record_key,
    topic_key,
)
from ferryline_coordinator.core.state import CoordinatorState, Key

_VISIBLE = (BrokerRecord, TopicMeta, TopicGone, ExchangeMeta)


class Change:
    """Reads fall through to the state; nothing here outlives the decision."""

    def __init__(self, state: CoordinatorState, now_ms: int, coord_epoch: int) -> None:
        self.state = state
        self.now_ms = now_ms
        self.coord_epoch = coord_epoch
        self.effects: list[Effect] = []
        self._late: dict[int, Callable[[], Effect]] = {}  # by position in effects
        self._puts: dict[str, Record] = {}
        self._brokers: dict[int, BrokerRecord | None] = {}  # those among the puts and deletes: asked for all the time
        self._parts: dict[Key, PartRecord] = {}  # the partitions among the puts: a cluster has many, keys cost time
        self._deletes: dict[str, None] = {}

    # -- reading ------------------------------------------------------------------------------------

    @property
    def cluster(self) -> ClusterRecord:
        record = self._puts.get(CLUSTER_KEY, self.state.cluster)
        assert isinstance(record, ClusterRecord), "the cluster was not founded"
        return record

    def broker(self, broker_id: int) -> BrokerRecord | None:
        if broker_id in self._brokers:
            return self._brokers[broker_id]
        return self.state.brokers.get(broker_id)

    def brokers(self) -> list[BrokerRecord]:
        """All brokers by id."""
        ids = {*self.state.brokers, *self._brokers}
        return [record for broker_id in sorted(ids) if (record := self.broker(broker_id)) is not None]

    def part(self, key: Key) -> PartRecord | None:
        record = self._parts.get(key)
        if record is not None:
            return record
        if self._deletes and part_key(*key) in self._deletes:
            return None
        return self.state.parts.get(key)

    def parts(self) -> list[PartRecord]:
        """All partitions in a fixed order. Costs time in proportion: for planning and rare commands."""
        keys = self.state.part_keys()
        new = [key for key in self._parts if key not in self.state.parts]
        return [record for key in (sorted([*keys, *new]) if new else keys) if (record := self.part(key)) is not None]

    def parts_held(self, broker_id: int) -> list[PartRecord]:
        """Partitions with a replica on a broker, as of before this decision, in a fixed order."""
        found = (self.part(key) for key in self.state.held_by(broker_id))
        return [record for record in found if record is not None]

    @property
    def writes_parts(self) -> bool:
        return bool(self._parts or self._deletes)

    def written_parts(self) -> list[PartRecord]:
        """Partitions that this decision changes, in a fixed order."""
        return [self._parts[key] for key in sorted(self._parts)]

    def parts_of(self, topic: TopicMeta) -> list[PartRecord]:
        found = (self.part((topic.id, number)) for number in range(topic.config.partitions))
        return [record for record in found if record is not None]

    def topic(self, name: str) -> TopicMeta | None:
        known = self.state.topic(name)
        if known is None or topic_key(known.id) in self._deletes:
            return None
        record = self._puts.get(topic_key(known.id))
        return record if isinstance(record, TopicMeta) else known

    def exchange(self, name: str) -> ExchangeMeta | None:
        if exchange_key(name) in self._deletes:
            return None
        record = self._puts.get(exchange_key(name))
        return record if isinstance(record, ExchangeMeta) else self.state.exchanges.get(name)

    def exchanges(self) -> list[ExchangeMeta]:
        """All exchanges by name."""
        names = {*self.state.exchanges, *(r.name for r in self._puts.values() if isinstance(r, ExchangeMeta))}
        return [record for name in sorted(names) if (record := self.exchange(name)) is not None]

    def principal(self, name: str) -> PrincipalMeta | None:
        if principal_key(name) in self._deletes:
            return None
        record = self._puts.get(principal_key(name))
        return record if isinstance(record, PrincipalMeta) else self.state.principals.get(name)

    def principals(self) -> list[PrincipalMeta]:
        """All principals in the records, by name."""
        names = {*self.state.principals, *(r.name for r in self._puts.values() if isinstance(r, PrincipalMeta))}
        return [record for name in sorted(names) if (record := self.principal(name)) is not None]

    def group(self, name: str) -> GroupRecord | None:
        if group_key(name) in self._deletes:
            return None
        record = self._puts.get(group_key(name))
        return record if isinstance(record, GroupRecord) else self.state.groups.get(name)

    def owners(self, group: str, topic_id: str) -> GroupOwners | None:
        key = owners_key(group, topic_id)
        if key in self._deletes:
            return None
        record = self._puts.get(key)
        return record if isinstance(record, GroupOwners) else self.state.owners.get((group, topic_id))

    def owners_of(self, group: str) -> list[GroupOwners]:
        """All topics of a group, in a fixed order."""
        topics = set(self.state.group_topics.get(group, ()))
        topics.update(r.topic_id for r in self._puts.values() if isinstance(r, GroupOwners) and r.group == group)
        return [record for topic_id in sorted(topics) if (record := self.owners(group, topic_id)) is not None]

    def unfenced(self, broker_id: int) -> bool:
        broker = self.broker(broker_id)
        return broker is not None and not broker.meta.fenced

    def electable(self, broker_id: int) -> bool:
        """May become primary: serving, and not about to leave."""
        broker = self.broker(broker_id)
        return broker is not None and not broker.meta.fenced and not broker.meta.stopping

    def usable(self, broker_id: int) -> bool:
        """May be given replicas: serving, and neither leaving nor being drained."""
        broker = self.broker(broker_id)
        return broker is not None and not (broker.meta.fenced or broker.meta.stopping or broker.meta.draining)

    # -- writing ------------------------------------------------------------------------------------

    def put(self, record: Record) -> None:
        assert not isinstance(record, PartRecord), "partitions are written by put_part"
        key = record_key(record)
        self._puts[key] = record
        self._deletes.pop(key, None)
        if isinstance(record, BrokerRecord):
            self._brokers[record.meta.id] = record

    def put_new(self, record: Record) -> None:
        """`put`, unless there is such a record."""
        if self.state.record(record_key(record)) is None:
            self.put(record)

    def put_part(self, meta: PartitionMeta, *, frozen: bool | None = None, touched: bool = False) -> PartitionMeta:
        """Store a partition with the version after the stored one. Returns it as stored; unchanged stays unchanged,
        unless it is to be ``touched``: then its version rises all the same."""
        key = (meta.topic_id, meta.partition)
        known = self.state.parts.get(key)
        working = self.part(key)
        is_frozen = frozen if frozen is not None else (working.frozen if working is not None else False)
        if known is not None:
            same = meta.epoch == known.meta.epoch and replace(meta, version=known.meta.version) == known.meta
            if same and is_frozen == known.frozen and not touched:
                self._parts.pop(key, None)
                return known.meta
            if meta.version <= known.meta.version:
                meta = replace(meta, version=known.meta.version + 1)
        self._parts[key] = PartRecord(meta, is_frozen)
        return meta

    def put_broker(self, record: BrokerRecord) -> None:
        self.put(record)

    def set_cluster(self, **fields: Any) -> None:
        self._puts[CLUSTER_KEY] = replace(self.cluster, **fields)

    def delete(self, key: str) -> None:
        self._deletes[key] = None
        self._puts.pop(key, None)
        if key.startswith("broker/"):
            self._brokers[int(key.partition("/")[2])] = None

    def delete_part(self, key: Key) -> None:
        self._deletes[part_key(*key)] = None
        self._parts.pop(key, None)

    def add(self, effect: Effect) -> None:
        self.effects.append(effect)

    def reply(self, reply: int, message: Any) -> None:
        self.effects.append(Reply(reply, message))

    def reply_at_end(self, reply: int, build: Callable[[], Any]) -> None:
        """Answer with what holds when the decision is complete: a record that later rules of the same decision change
        again keeps its version, so an answer built too early would show another record under the same number."""
        self._late[len(self.effects)] = lambda: Reply(reply, build())
        self.effects.append(Reply(reply, None))

    def refuse(self, reply: int, error: FerrylineError) -> None:
        self.effects.append(Refuse(reply, error.info()))

    def note(self, name: str, level: str = "info", **fields: Any) -> None:
        self.effects.append(Note(name, fields, level))

    # -- the end ------------------------------------------------------------------------------------

    @property
    def visible(self) -> bool:
        """Whether anybody outside can see a change."""
        return (
            bool(self._parts)
            or self.cluster_moved
            or any(isinstance(record, _VISIBLE) for record in self._puts.values())
            or any(key.startswith(("broker/", "exchange/")) for key in self._deletes)
        )

    @property
    def cluster_moved(self) -> bool:
        """Whether the coordinators, or the feature level, are others than before."""
        record = self._puts.get(CLUSTER_KEY)
        known = self.state.cluster
        return isinstance(record, ClusterRecord) and known is not None and _told(record) != _told(known)

    def next_revision(self) -> int:
        """The revision that will stand once this decision is durable. Only right when no more is written."""
        return self.state.revision + (1 if self.visible else 0)

    def finish(self) -> Decision:
        if self.visible:
            self.set_cluster(revision=self.state.revision + 1)
        # The cluster's record comes first, with the revision; partitions last, because they name brokers.
        keys = sorted(self._puts, key=lambda key: (key != CLUSTER_KEY, key))
        puts = [*(self._puts[key] for key in keys), *(self._parts[key] for key in sorted(self._parts))]
        effects = [self._late[n]() if n in self._late else effect for n, effect in enumerate(self.effects)]
        return Decision(tuple(puts), tuple(sorted(self._deletes)), tuple(effects))


def _told(cluster: ClusterRecord) -> tuple[object, ...]:
    """What of it goes to everybody."""
    return cluster.coordinators, cluster.feature_level
