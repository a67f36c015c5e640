"""What the coordinator knows: the replay of its records, and indexes over it.

Invariants, asserted on every change: the record invariants of `check_partition`; a fenced broker is in no in-sync set;
epoch and version of a partition, broker epochs and the revision never fall.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from ferryline.protocol.access import PrincipalMeta
from ferryline.protocol.exchanges import ExchangeMeta
from ferryline.protocol.metadata import NO_BROKER, BrokerMeta, PartitionMeta, TopicMeta, check_partition
from ferryline_coordinator.core.events import Decision
from ferryline_coordinator.core.records import (
    BrokerRecord,
    ClusterRecord,
    GroupOwners,
    GroupRecord,
    PartRecord,
    Record,
    TopicGone,
    decode_record,
    record_key,
)

Key = tuple[str, int]  # (topic id, partition)


class CoordinatorState:
    """Durable state. `apply` is the only thing that changes it.

    ``changes`` holds (revision, record key) of what became visible, newest last, for deltas; what is at or below
    ``changes_floor`` has been forgotten.
    """

    def __init__(self, changes_max: int) -> None:
        self.cluster: ClusterRecord | None = None
        self.brokers: dict[int, BrokerRecord] = {}
        self.topics: dict[str, TopicMeta] = {}
        self.topic_ids: dict[str, str] = {}  # name -> id
        self.parts: dict[Key, PartRecord] = {}
        self.gone: dict[str, TopicGone] = {}
        self.exchanges: dict[str, ExchangeMeta] = {}
        self.principals: dict[str, PrincipalMeta] = {}
        self.groups: dict[str, GroupRecord] = {}
        self.owners: dict[tuple[str, str], GroupOwners] = {}
        self.group_topics: dict[str, set[str]] = {}  # group -> topics that have owners
        self.held: dict[int, set[Key]] = {}  # broker -> partitions that name it as a replica
        self.changes: deque[tuple[int, str | Key]] = deque()  # partitions by number: their keys as text cost time
        self.changes_floor = 0
        self.replicas = 0  # of all partitions
        # Indexes, so that looking costs what is unusual and not what there is. Replicas that leave are not counted.
        self.assigned: dict[int, int] = {}  # broker -> replicas
        self.preferred: dict[int, int] = {}  # broker -> partitions that name it first
        self.led: dict[int, int] = {}  # broker -> partitions it is primary of
        self.moving: set[Key] = set()  # with replicas that come or go
        self.misled: set[Key] = set()  # whose primary is not the preferred one, or is about to leave
        self._changes_max = changes_max
        self._loading = False
        self._part_keys: list[Key] | None = None  # sorted; None: a partition came or went

    @property
    def revision(self) -> int:
        return self.cluster.revision if self.cluster is not None else 0

    def load(self, records: Iterable[tuple[str, bytes]]) -> None:
        """Replay a store into this empty state."""
        self._loading = True  # records come in any order: relations between them hold at the end only
        for key, value in sorted(records):
            record = decode_record(key, value)
            assert record_key(record) == key, (key, record)
            self._put(record)
        self._loading = False
        self.changes_floor = self.revision
        for part in self.parts.values():
            self._check(part.meta)

    def apply(self, decision: Decision) -> None:
        """Take over what a decision makes durable."""
        for key in decision.deletes:
            self._delete(key)
        for record in decision.puts:  # the cluster record with its revision comes first, brokers before partitions
            if isinstance(record, PartRecord):
                self._put_part(record)
            else:
                self._put(record)
        if decision.puts or decision.deletes:
            self._remember(decision)

    def part(self, topic_id: str, partition: int) -> PartRecord | None:
        return self.parts.get((topic_id, partition))

    def records(self) -> list[Record]:
        """Everything durable that people have made: topics, exchanges, principals; in a fixed order."""
        kinds: tuple[dict[str, Any], ...] = (self.topics, self.exchanges, self.principals)
        return [kind[name] for kind in kinds for name in sorted(kind)]

    def record(self, key: str) -> Record | None:
        """One of `records`."""
        return next((record for record in self.records() if record_key(record) == key), None)

    def part_keys(self) -> list[Key]:
        """Keys of all partitions, in a fixed order. Not to be changed by the caller."""
        if self._part_keys is None:
            self._part_keys = sorted(self.parts)
        return self._part_keys

    def held_by(self, broker_id: int) -> list[Key]:
        """Partitions with a replica on this broker, in a fixed order."""
        return sorted(self.held.get(broker_id, ()))

    def topic(self, name: str) -> TopicMeta | None:
        topic_id = self.topic_ids.get(name)
        return self.topics.get(topic_id) if topic_id is not None else None

    def broker_metas(self) -> list[BrokerMeta]:
        return [self.brokers[broker_id].meta for broker_id in sorted(self.brokers)]

    # -- inside -------------------------------------------------------------------------------------

    def _put(self, record: Record) -> None:
        match record:
            case ClusterRecord():
                assert record.revision >= self.revision, (self.cluster, record)
                self.cluster = record
            case BrokerRecord():
                known = self.brokers.get(record.meta.id)
                assert known is None or record.meta.broker_epoch >= known.meta.broker_epoch, (known, record)
                self.brokers[record.meta.id] = record
            case TopicMeta():
                self.topics[record.id] = record
                self.topic_ids[record.name] = record.id
            case PartRecord():
                self._put_part(record)
            case TopicGone():
                self.gone[record.topic_id] = record
            case GroupRecord():
                self.groups[record.group] = record
            case GroupOwners():
                self.owners[(record.group, record.topic_id)] = record
                self.group_topics.setdefault(record.group, set()).add(record.topic_id)
            case ExchangeMeta():
                self.exchanges[record.name] = record
            case PrincipalMeta():
                self.principals[record.name] = record

    def _put_part(self, record: PartRecord) -> None:
        meta = record.meta
        key = (meta.topic_id, meta.partition)
        known = self.parts.get(key)
        if not self._loading:
            self._check(meta)
        self.parts[key] = record
        if known is None:
            self._part_keys = None
            self._hold(key, meta)
            return
        before = known.meta
        assert meta.version > before.version, (known, record)
        assert meta.epoch >= before.epoch, (known, record)
        if before.replicas != meta.replicas or before.removing != meta.removing or before.adding != meta.adding:
            self._unhold(key, before)
            self._hold(key, meta)
        elif before.primary != meta.primary:
            self.led[before.primary] -= 1
            self.led[meta.primary] = self.led.get(meta.primary, 0) + 1
            self._note_primary(key, meta)

    def _hold(self, key: Key, meta: PartitionMeta) -> None:
        self.replicas += len(meta.replicas)
        for broker_id in meta.replicas:
            self.held.setdefault(broker_id, set()).add(key)
        self._count(meta, 1)
        if meta.adding or meta.removing:
            self.moving.add(key)
        self._note_primary(key, meta)

    def _unhold(self, key: Key, meta: PartitionMeta) -> None:
        self.replicas -= len(meta.replicas)
        for broker_id in meta.replicas:
            self.held[broker_id].discard(key)
        self._count(meta, -1)
        self.moving.discard(key)
        self.misled.discard(key)

    def _count(self, meta: PartitionMeta, sign: int) -> None:
        keep = [b for b in meta.replicas if b not in meta.removing]
        for broker_id in keep:
            self.assigned[broker_id] = self.assigned.get(broker_id, 0) + sign
        if keep:
            self.preferred[keep[0]] = self.preferred.get(keep[0], 0) + sign
        self.led[meta.primary] = self.led.get(meta.primary, 0) + sign

    def _note_primary(self, key: Key, meta: PartitionMeta) -> None:
        first = next((b for b in meta.replicas if b not in meta.removing), NO_BROKER)
        if meta.primary != first:
            self.misled.add(key)
        else:
            self.misled.discard(key)

    def _check(self, meta: PartitionMeta) -> None:
        check_partition(meta)
        for broker_id in meta.isr:
            broker = self.brokers.get(broker_id)
            assert broker is not None, meta
            assert not broker.meta.fenced, (meta, broker)

    def _delete(self, key: str) -> None:
        kind, _, rest = key.partition("/")
        match kind:
            case "broker":
                self.brokers.pop(int(rest), None)
            case "topic":
                topic = self.topics.pop(rest, None)
                if topic is not None and self.topic_ids.get(topic.name) == rest:
                    del self.topic_ids[topic.name]
            case "part":
                topic_id, _, number = rest.partition("/")
                part = self.parts.pop((topic_id, int(number)), None)
                self._part_keys = None
                if part is not None:
                    self._unhold((topic_id, int(number)), part.meta)
            case "gone":
                self.gone.pop(rest, None)
            case "group":
                self.groups.pop(rest, None)
            case "owners":
                group, _, topic_id = rest.partition("/")
                self.owners.pop((group, topic_id), None)
                self.group_topics.get(group, set()).discard(topic_id)
            case "exchange":
                self.exchanges.pop(rest, None)
            case "principal":
                self.principals.pop(rest, None)
            case _:
                raise AssertionError(key)

    def _remember(self, decision: Decision) -> None:
        revision = self.revision
        for record in decision.puts:
            if isinstance(record, PartRecord):
                self.changes.append((revision, record.meta.key))
            elif isinstance(record, BrokerRecord | TopicMeta | TopicGone | ExchangeMeta):
                self.changes.append((revision, record_key(record)))
        for key in decision.deletes:
            if key.startswith(("broker/", "exchange/")):
                self.changes.append((revision, key))
        while len(self.changes) > self._changes_max:
            self.changes_floor = max(self.changes_floor, self.changes.popleft()[0])

    def changed_since(self, revision: int) -> list[str | Key] | None:
        """Keys of the records that became visible after ``revision``, each once; None: too long ago to know."""
        if revision < self.changes_floor or revision > self.revision:
            return None
        found: dict[str | Key, None] = {}
        for number, key in reversed(self.changes):
            if number <= revision:
                break
            found[key] = None
        return list(found)
