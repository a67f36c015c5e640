"""What one replica is, apart from its role: two logs, their positions, and what the coordinator last said. Pure.

`Primary` and `Secondary` are made anew for every epoch and change the replica only through the methods here, so that
positions, epoch index and dedupe table never disagree with the effects that were emitted.
"""

from __future__ import annotations

import msgspec

from ferryline.protocol.messages import LOG_OK, RECORDS, STATE, LogPosition, ReplicaReport
from ferryline.protocol.metadata import FLUSH_FSYNC, PartitionMeta, RetryPolicy
from ferryline.protocol.records import BatchHeader
from ferryline_broker.core.epochs import EpochIndex
from ferryline_broker.core.events import (
    Append,
    Bytes,
    Effect,
    Flush,
    Key,
    RebuildProducers,
    ResetLog,
    SendReport,
    Truncate,
    WakeReaders,
)
from ferryline_broker.core.producers import ProducerTable
from ferryline_broker.core.queue_config import QueueConfig

ROLE_PRIMARY = "primary"
ROLE_SECONDARY = "secondary"
ROLE_IDLE = "idle"  # no primary known, or not a replica of this partition any more
ROLE_STOPPED = "stopped"  # conflict, failed storage or failed assertion: serves nothing until an operator or a refetch

BOTH_LOGS = (RECORDS, STATE)


class ReplicaConfig(msgspec.Struct, frozen=True):
    """Times in ms, sizes in bytes."""

    fetch_bytes_max: int = 1024 * 1024  # per log and answer; a single larger batch still travels
    fetch_wait_ms: int = 5_000  # the primary answers a parked fetch after this, so that a lost one shows
    fetch_retry_ms: int = 7_000  # a secondary asks again; above fetch_wait_ms, or every idle fetch is sent twice
    flush_first_bytes: int = 4 * 1024  # a secondary flushes so little before it asks for more; of more both at once
    refused_retry_ms: int = 100  # after an answer that was an error
    watermark_tell_ms: int = 250  # an idle secondary hears of a new high watermark after this
    lag_max_ms: int = 10_000  # not caught up for this long: proposed out of the in-sync set
    commit_stall_ms: int = 20_000  # nothing committed for this long: appends are refused, so the tail stays bounded
    alter_retry_ms: int = 1_000
    handover_ms: int = 300
    patience_ms: int = 20  # what nobody waits for is flushed and sent after this, if nothing else is appended before
    snapshot_bytes: int = 1024 * 1024  # of state log between two snapshots of the group table
    queue: QueueConfig = QueueConfig()


class LogOpened(msgspec.Struct):
    """One log after recovery: everything below ``log_end`` is on disk."""

    log_start: int = 0
    log_end: int = 0
    epochs: list[tuple[int, int]] = []
    high_watermark: int = 0
    epoch_before: int = -1  # of the record before log_start, -1: there was none, or nobody remembers


class OpenedReplica(msgspec.Struct):
    """A replica as found on disk. ``repairing``: its damaged files were set aside and it is being fetched again."""

    seen_epoch: int
    logs: tuple[LogOpened, LogOpened]
    producers: ProducerTable
    log_state: str = LOG_OK
    repairing: bool = False


class Replica:
    """Positions of both logs and the last record heard from the coordinator.

    Invariants, per log: log_start <= high_watermark <= log_end; flushed <= log_end; the epoch index describes exactly
    [log_start, log_end). ``seen_epoch`` never falls and is durable before anything is done in that epoch.
    """

    def __init__(self, key: Key, broker_id: int, config: ReplicaConfig, opened: OpenedReplica) -> None:
        self.key = key
        self.broker_id = broker_id
        self.config = config
        self.seen_epoch = opened.seen_epoch
        self.log_state = opened.log_state
        self.repairing = opened.repairing
        self.log_start = [log.log_start for log in opened.logs]
        self.log_end = [log.log_end for log in opened.logs]
        self.flushed = [log.log_end for log in opened.logs]
        self.high_watermark = [max(log.log_start, min(log.high_watermark, log.log_end)) for log in opened.logs]
        self.epochs = [EpochIndex(log.epochs, log.epoch_before) for log in opened.logs]
        self.producers = opened.producers
        self.part: PartitionMeta | None = None
        self.broker_epoch = 0
        self.coord_epoch = 0
        self.live: dict[int, int] = {}
        self.disk_full = ""  # why records are refused
        self.retry = RetryPolicy()  # of the topic's queues
        self.request_id = 0  # of AlterIsr proposals: rises per (broker_epoch, partition)
        self.fetch_id = 0
        self.state_bytes = 0  # appended to the state log since the last snapshot
        self.out: list[Effect] = []

    # -- positions ----------------------------------------------------------------------------------

    @property
    def fsync(self) -> bool:
        return self.part is None or self.part.flush == FLUSH_FSYNC

    def position(self, log: int) -> LogPosition:
        return LogPosition(self.log_end[log], self.epochs[log].tail_epoch, self.flushed[log])

    def append(self, log: int, data: Bytes, headers: list[tuple[int, BatchHeader]]) -> None:
        """Append stamped batches that continue the log; the caller checked contiguity."""
        end = self.log_end[log]
        for _, header in headers:
            assert header.base_offset == end, f"{self.key} log {log}: batch at {header.base_offset}, log ends at {end}"
            self.epochs[log].observe(header.epoch, header.base_offset)
            if log == RECORDS:
                self.producers.observe(header)
            end = header.next_offset
        self.log_end[log] = end
        if log == STATE:
            self.state_bytes += len(data)
        self.out.append(Append(log, data, headers))

    def flush(self, log: int) -> None:
        self.out.append(Flush(log))

    def truncate(self, log: int, offset: int) -> None:
        """Cut a tail that never committed. Never below the own high watermark (callers stop loudly instead)."""
        assert self.high_watermark[log] <= offset <= self.log_end[log], (self.key, log, offset, self.high_watermark)
        if offset == self.log_end[log]:
            return
        self.out.append(Truncate(log, offset))
        self.log_end[log] = offset
        self.flushed[log] = min(self.flushed[log], offset)
        self.epochs[log].truncate(offset)
        if log == RECORDS:
            self.out.append(RebuildProducers())

    def reset(self, log: int, offset: int, epoch: int = -1) -> None:
        """Begin again, empty, at the primary's log start: what stood here before is no longer retained anywhere."""
        self.out.append(ResetLog(log, offset, epoch))
        self.log_start[log] = self.log_end[log] = self.flushed[log] = self.high_watermark[log] = offset
        self.epochs[log] = EpochIndex(before=epoch)
        if log == RECORDS:
            self.producers = ProducerTable()

    def raise_watermark(self, log: int, value: int) -> bool:
        """HW := max(HW, min(value, log end)). Returns whether it moved."""
        value = min(value, self.log_end[log])
        if value <= self.high_watermark[log]:
            return False
        self.high_watermark[log] = value
        self.out.append(WakeReaders(log, value))
        return True

    def advance_start(self, log: int, offset: int) -> None:
        offset = min(offset, self.high_watermark[log])
        if offset > self.log_start[log]:
            self.log_start[log] = offset
            self.epochs[log].advance(offset, self.log_end[log])

    def record_epoch(self, offset: int) -> int:
        """Epoch of a record, -1 where none is. Of the one before our start, too: a replica whose log begins earlier has
        it, and must not take it for another."""
        epochs = self.epochs[RECORDS]
        if offset == self.log_start[RECORDS] - 1:
            return epochs.before
        return epochs.epoch_at(offset) if offset < self.log_end[RECORDS] else -1

    # -- reports ------------------------------------------------------------------------------------

    def report(self) -> ReplicaReport:
        return ReplicaReport(
            self.key[0],
            self.key[1],
            self.seen_epoch,
            (self.log_end[RECORDS], self.log_end[STATE]),
            (self.epochs[RECORDS].tail_epoch, self.epochs[STATE].tail_epoch),
            (self.high_watermark[RECORDS], self.high_watermark[STATE]),
            self.log_state,
        )

    def stop(self, log_state: str) -> None:
        self.log_state = log_state
        self.out.append(SendReport(self.report()))

    def check(self) -> None:
        """Production assertions; a violation stops this partition with its story."""
        for log in BOTH_LOGS:
            start, high, end = self.log_start[log], self.high_watermark[log], self.log_end[log]
            assert start <= high <= end, f"{self.key} log {log}: start {start}, high watermark {high}, end {end}"
            assert self.flushed[log] <= end, f"{self.key} log {log}: flushed {self.flushed[log]} beyond end {end}"
