"""One replica that this broker holds: its core, its files, and who waits on it."""

from __future__ import annotations

import struct
import traceback
from time import perf_counter

import msgspec

from ferryline.protocol.messages import RECORDS, STATE, ReplicaData
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.records import BatchHeader
from ferryline_broker.core.events import Bytes, Event, Key, SendData
from ferryline_broker.core.partition import PartitionCore, ReadVerdict
from ferryline_broker.core.replica import ROLE_PRIMARY
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.replica_store import ReplicaStore
from ferryline_broker.partition_metrics import PartitionGauges
from ferryline_broker.ports import Emitter
from ferryline_broker.traffic import TopicCounts
from ferryline_service.logs import get_logger

_log = get_logger()
_BROKEN_READ = "NOT_PRIMARY"
_INT = struct.Struct(">i").unpack_from
_LENGTH_AT, _COUNT_AT, _LENGTH_PREFIX_BYTES = 8, 57, 12


class HostedReplica:
    """``broken`` is why this replica takes no events any more ("" while it does): a failed assertion, or deletion."""

    __slots__ = (
        "broken",
        "core",
        "counts",
        "deadline_ms",
        "flush_due",
        "follow_ups",
        "fresh",
        "key",
        "logs",
        "queued_ms",
        "readers",
        "sampled_end",
        "sampled_s",
        "store",
        "topic",
        "unsaved",
    )

    def __init__(self, core: PartitionCore, store: ReplicaStore, topic: TopicMeta, counts: TopicCounts) -> None:
        self.key: Key = core.key
        self.core = core
        self.store = store
        self.logs: tuple[PartitionLog, PartitionLog] = store.logs
        self.topic = topic  # as last applied to the logs and kept beside them
        self.counts = counts
        self.broken = ""
        self.follow_ups: list[Event] = []  # what the core is told after the effects of its last event
        self.fresh: list[tuple[int, int, Bytes] | None] = [None, None]  # last appended in this pass: from, to, bytes
        self.flush_due = [False, False]
        self.unsaved = False  # moved since the last checkpoint
        self.deadline_ms: int | None = None  # of the core
        self.queued_ms: int | None = None  # earliest entry in the driver's heap; never later than deadline_ms
        self.readers: dict[Emitter, None] = {}  # parked fetches, in order of arrival
        self.sampled_end = 0  # how long it takes until this offset is committed is being measured; 0: of none
        self.sampled_s = 0.0  # since when

    @property
    def topic_name(self) -> str:
        return self.topic.name

    @property
    def name(self) -> str:
        """For logs."""
        return f"{self.topic.name}/{self.key[1]}"

    def count_in(self, size: int, headers: list[tuple[int, BatchHeader]]) -> None:
        """Book what producers brought; control records and what a secondary fetched are not theirs."""
        if self.core.primary is None:
            return
        if not self.sampled_end:
            self.sampled_end, self.sampled_s = self.logs[RECORDS].log_end, perf_counter()
        counts = self.counts
        for _, header in headers:
            if not header.is_control:
                counts.records_in += header.record_count
                counts.bytes_in += size

    def tell_story(self, event: Event, error: Exception) -> None:
        """Log what led to a broken invariant."""
        _log.error(
            "invariant violated, partition stopped",
            partition=self.name,
            on=str(event.story())[:300],
            error=str(error)[:1000],
            where="".join(traceback.format_exception(error)[-4:])[-2000:],
            story=[str(told)[:300] for told in list(self.core.story)[-40:]],
        )

    # -- reading ------------------------------------------------------------------------------------

    @property
    def serves_readers(self) -> bool:
        """The primary does, also when its disk is full."""
        core = self.core
        return not self.broken and (core.role == ROLE_PRIMARY or (core.full is not None and core.full.leads))

    def check_read(self, offset: int, offset_epoch: int, secondary: bool) -> ReadVerdict:
        if self.broken:
            return ReadVerdict(_BROKEN_READ, f"the partition stopped on this broker: {self.broken}")
        return self.core.check_read(offset, offset_epoch, secondary)

    def read(self, offset: int, below: int, bytes_max: int, *, at_least_one: bool) -> bytes:
        """Whole committed batches; b"" when the first one does not fit and need not be ``at_least_one``.

        Raises StorageFailed (also for damage).
        """
        data = self.logs[RECORDS].read(offset, bytes_max, below)
        if len(data) > bytes_max and not at_least_one:
            return b""
        counts = self.counts
        counts.bytes_out += len(data)
        counts.records_out += count_records(data)
        return data

    def _for_secondary(self, log: int, start: int, below: int, bytes_max: int, room: int) -> Bytes:
        """From memory if it is the one batch of this pass, which a secondary at the log end waits for: sooner than from
        the log, and without a copy."""
        bytes_max, fresh = min(bytes_max, room), self.fresh[log]
        if fresh is not None and fresh[:2] == (start, below) and len(fresh[2]) <= bytes_max:
            return fresh[2]
        return self.logs[log].read(start, bytes_max, below)

    def read_for_secondary(self, effect: SendData, room: int) -> tuple[ReplicaData, list[Bytes]]:
        """Fill in the sizes of an answer to a fetch and read its payload, of each log about ``room`` bytes at most, but
        a whole batch. Raises StorageFailed."""
        data = effect.data
        parts: list[Bytes] = []
        if data.logs is None or effect.reads == (None, None) or room <= 0:
            return data, []
        logs = list(data.logs)
        for log in (RECORDS, STATE):
            wanted = effect.reads[log]
            if wanted is not None:
                part = self._for_secondary(log, *wanted, room)
                if part:
                    parts.append(part)
                    logs[log] = msgspec.structs.replace(logs[log], size=len(part))
        return msgspec.structs.replace(data, logs=(logs[RECORDS], logs[STATE])), parts

    def records_from(self, offset: int) -> int:
        """Committed records that are retained at ``offset`` and above: those that somebody who stands there has not
        read. Where an epoch begins there is no record, so whoever has read everything is not behind."""
        core = self.core
        low, high = max(offset, core.log_start[RECORDS]), core.high_watermark[RECORDS]
        return high - low - len(core.replica.epochs[RECORDS].marks(low, high)) if low < high else 0

    # -- metrics ------------------------------------------------------------------------------------

    def gauges(self) -> PartitionGauges:
        core, shown = self.core, PartitionGauges()
        shown.topic, shown.partition = self.topic_name, self.key[1]
        shown.role = "stopped" if self.broken else core.role
        shown.log_start, shown.high_watermark = core.log_start[RECORDS], core.high_watermark[RECORDS]
        shown.marks = len(core.replica.epochs[RECORDS].marks(shown.log_start, shown.high_watermark))
        shown.log_bytes = self.logs[RECORDS].size_bytes + self.logs[STATE].size_bytes
        shown.in_sync = len(core.isr)
        shown.replicas = len(core.part.replicas) if core.part is not None else 0
        shown.producers = len(core.replica.producers)
        if core.primary is not None:
            shown.secondary_lags = core.primary.sync.lags()
            if core.primary.groups is not None:
                shown.groups = {group: state.offset for group, state in core.primary.groups.items()}
                shown.lags = {group: self.records_from(offset) for group, offset in shown.groups.items()}
            if core.primary.queues is not None:
                shown.queues = core.primary.queues.counts()
                shown.holders = core.primary.queues.holders()
        return shown


def count_records(data: Bytes) -> int:
    """Records in whole batches, from their headers alone: 0.2 us a batch."""
    at, end, records = 0, len(data), 0
    while at < end:
        records += _INT(data, at + _COUNT_AT)[0]
        at += _INT(data, at + _LENGTH_AT)[0] + _LENGTH_PREFIX_BYTES
    return records
