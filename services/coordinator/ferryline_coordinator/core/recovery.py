"""Partitions without a candidate (rule C7): reports of replicas, and the choice among them."""

from __future__ import annotations

from msgspec.structs import replace

from ferryline.protocol.errors import Conflict, NotReady, UnknownPartition, UnknownTopic
from ferryline.protocol.messages import LOG_OK, ReplicaReport
from ferryline.protocol.metadata import NO_BROKER, RESTORING, PartitionMeta
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.events import RecoveryAsked
from ferryline_coordinator.core.records import PartRecord
from ferryline_coordinator.core.state import Key

# A restored store may hold an older version of a partition than brokers do; theirs must not look newer afterwards.
REGRESSION_VERSIONS = 1 << 20


class Reports:
    """How the replicas of partitions stand. A report is good for one primaryless time and one life of its broker.

    Kept only where a choice may have to be made; `want` brings the others when somebody asks.
    """

    def __init__(self) -> None:
        self._reports: dict[Key, dict[int, tuple[int, int, ReplicaReport]]] = {}  # -> (epoch, broker epoch, report)
        self._wanted: set[int] = set()

    def take(self, change: Change, part: PartitionMeta, broker_id: int, report: ReplicaReport) -> None:
        broker, record = change.broker(broker_id), change.part(part.key)
        assert broker is not None
        if part.primary != NO_BROKER and not (record is not None and record.frozen):
            self._reports.pop(part.key, None)  # of an earlier time without primary
            return
        self._reports.setdefault(part.key, {})[broker_id] = (part.epoch, broker.meta.broker_epoch, report)

    def arrived(self, broker_id: int) -> None:
        """A registration came in, whatever it held."""
        self._wanted.discard(broker_id)

    def want(self, broker_id: int) -> None:
        self._wanted.add(broker_id)

    def wants(self, broker_id: int) -> bool:
        return broker_id in self._wanted

    def of(self, change: Change, part: PartitionMeta) -> dict[int, ReplicaReport]:
        """Reports that still say how things are: no primary since, and the broker has not restarted since."""
        found = {}
        for broker_id, (epoch, broker_epoch, report) in sorted(self._reports.get(part.key, {}).items()):
            broker = change.broker(broker_id)
            same_life = broker is not None and broker.meta.broker_epoch == broker_epoch
            if same_life and epoch == part.epoch and broker_id in part.replicas:
                found[broker_id] = report
        return found

    def forget(self, key: Key) -> None:
        self._reports.pop(key, None)


class Recovery:
    """Chooses a primary where no rule may: on an operator's word, or by policy. It may lose records, and says so."""

    def __init__(self, config: CoreConfig, reports: Reports) -> None:
        self._config = config
        self._reports = reports

    def asked(self, change: Change, event: RecoveryAsked) -> None:
        topic = change.topic(event.topic)
        if topic is None:
            raise UnknownTopic(f"topic {event.topic} does not exist", topic=event.topic)
        record = change.part((topic.id, event.partition))
        if record is None:
            raise UnknownPartition(
                f"partition: {event.topic} has {topic.config.partitions} partitions, {event.partition} is none of them"
            )
        part = record.meta
        if part.primary != NO_BROKER and not record.frozen:
            raise Conflict(f"{event.topic}/{event.partition} has a primary, broker {part.primary}: nothing to recover")
        if part.recovery_epoch == RESTORING:
            raise Conflict(f"{event.topic}/{event.partition} is being restored: ferryline restore goes on with it")
        stored = self._recover(change, record, forced=event.accept_data_loss)
        change.reply(event.reply, stored)

    def automatic(self, change: Change) -> None:
        """Balanced recovery without an operator, if the policy says so, for every partition that has all reports."""
        if self._config.recovery != "balanced":
            return
        for record in change.parts():
            part = record.meta
            if part.recovery_epoch == RESTORING:
                continue  # half of a backup must not be taken for all there is
            if part.primary == NO_BROKER and not part.isr and not any(change.unfenced(b) for b in part.elr):
                try:
                    self._recover(change, record, forced=False)
                except (NotReady, Conflict):
                    continue

    def _recover(self, change: Change, record: PartRecord, *, forced: bool) -> PartitionMeta:
        part = record.meta
        reports = self._reports.of(change, part)
        missing = [b for b in part.replicas if b not in reports]
        reachable = [b for b in missing if change.unfenced(b)]
        if reachable:
            for broker_id in reachable:
                self._reports.want(broker_id)
            raise NotReady(f"waiting for reports of brokers {reachable}; ask again", brokers=reachable)
        if missing and not forced:
            raise NotReady(
                f"brokers {missing} have not reported; start them, or accept data loss to go on without them",
                brokers=missing,
            )
        whole = [b for b, report in reports.items() if report.log_state == LOG_OK]
        good = [b for b in whole if change.electable(b)]
        if not good:
            raise Conflict(f"no undamaged replica of {part.topic_id}/{part.partition} is up", brokers=list(reports))
        best, chosen = _longest(whole, reports), _longest(good, reports)
        if not forced and _rank(reports[best]) > _rank(reports[chosen]):
            # It has reported and does not serve yet, or no more: another choice would give up what it holds.
            raise NotReady(f"broker {best} has the longest log and is not serving; ask again", brokers=[best])
        epoch = max([part.epoch, *(report.seen_epoch for report in reports.values())]) + 1
        version = part.version + (REGRESSION_VERSIONS if record.frozen else 1)
        after = replace(
            part,
            primary=chosen,
            isr=(chosen,),
            elr=(),
            last_known_elr=(),
            epoch=epoch,
            version=version,
            recovery_epoch=epoch,
        )
        stored = change.put_part(after, frozen=False)
        change.note(
            "unclean_recovery",
            "error",
            topic_id=part.topic_id,
            partition=part.partition,
            primary=chosen,
            epoch=epoch,
            forced=forced,
            kept_to=list(reports[chosen].log_end),
            seen_to=[max(r.log_end[log] for r in reports.values()) for log in (0, 1)],
            silent=missing,
        )
        return stored


def _rank(report: ReplicaReport) -> tuple[tuple[int, int], ...]:
    """The records first: a log of a later epoch has outlived the earlier ones, however long they are. Then the state
    log."""
    return tuple((report.tail_epoch[log], report.log_end[log]) for log in (0, 1))


def _longest(brokers: list[int], reports: dict[int, ReplicaReport]) -> int:
    return max(brokers, key=lambda b: (_rank(reports[b]), -b))
