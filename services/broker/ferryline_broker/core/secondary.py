"""The secondary of one epoch: follow the primary's logs byte for byte (rules F1 to F7). Pure.

Pull, not push: the fetch offset is a cumulative, idempotent acknowledgement, so a lost message costs a retry and no
state. At most one fetch is outstanding; an answer counts only if it is for exactly the present epoch, log end and tail
epoch, because a late answer of the *same* epoch could cut good data.
"""

from __future__ import annotations

import msgspec

from ferryline.protocol.messages import (
    LOG_CONFLICT,
    RECORDS,
    STATE,
    LogData,
    LogPosition,
    ReplicaData,
    ReplicaFetch,
    ReplicaProgress,
)
from ferryline.protocol.metadata import PartitionMeta
from ferryline.protocol.records import BatchHeader
from ferryline_broker.core.events import (
    AdvanceStart,
    DataCorrupt,
    DataReceived,
    LogBatches,
    RefreshMetadata,
    SendFetch,
    SendProgress,
)
from ferryline_broker.core.replica import BOTH_LOGS, Replica


class Outstanding(msgspec.Struct):
    """The fetch that was sent and not answered. ``told``: flushed ends that the primary has heard."""

    fetch_id: int
    positions: tuple[LogPosition, LogPosition]
    deadline_ms: int
    told: list[int]


class Secondary:
    """Follows ``primary`` in ``epoch``. ``failed`` is set when the logs contradict: then it never fetches again."""

    def __init__(self, replica: Replica, epoch: int, primary: int) -> None:
        self.replica = replica
        self.epoch = epoch
        self.primary = primary
        self.outstanding: Outstanding | None = None
        self.retry_ms = 0
        self.flushing: list[int] | None = None  # asks for more when so much of each log is flushed
        self.failed = ""
        self._primary_version = 0  # of the partition record that the last answer was given with

    def next_deadline_ms(self) -> int | None:
        if self.failed:
            return None
        return self.outstanding.deadline_ms if self.outstanding else self.retry_ms

    # -- asking -------------------------------------------------------------------------------------

    def fetch(self, now_ms: int) -> None:
        replica = self.replica
        self.flushing = None
        replica.fetch_id += 1
        positions = (replica.position(RECORDS), replica.position(STATE))
        self.outstanding = Outstanding(
            replica.fetch_id, positions, now_ms + replica.config.fetch_retry_ms, list(replica.flushed)
        )
        fetch = ReplicaFetch(*replica.key, self.epoch, replica.fetch_id, positions, self._version())
        replica.out.append(SendFetch(self.primary, fetch))

    def tick(self, now_ms: int) -> None:
        deadline = self.next_deadline_ms()
        if deadline is not None and now_ms >= deadline:
            self.fetch(now_ms)

    def updated(self, now_ms: int) -> None:
        """A newer record of this epoch: whoever wants to join must ask again, knowing it (see Primary._may_join)."""
        part = self.replica.part
        assert part is not None
        if self.replica.broker_id not in part.isr and not self.failed:
            self.fetch(now_ms)

    def _version(self) -> int:
        return self.replica.part.version if self.replica.part else 0

    def peer_up(self, now_ms: int) -> None:
        """Whatever was outstanding went down with the old session."""
        if not self.failed:
            self.fetch(now_ms)

    def peer_down(self, now_ms: int) -> None:
        self.outstanding = None
        self.retry_ms = now_ms + self.replica.config.fetch_retry_ms  # PeerUp comes first, normally

    def flushed(self, now_ms: int) -> None:
        """A flush ended while the next fetch is parked: tell at once, or the acknowledgement waits for new data."""
        out, replica = self.outstanding, self.replica
        if self.flushing is not None and not self.failed:
            if all(replica.flushed[log] >= self.flushing[log] for log in BOTH_LOGS):
                self.fetch(now_ms)  # else the other log is next
            return
        if out is None or self.failed or out.told == replica.flushed:
            return
        out.told = list(replica.flushed)
        progress = ReplicaProgress(*replica.key, self.epoch, (out.told[RECORDS], out.told[STATE]), self._version())
        replica.out.append(SendProgress(self.primary, progress))

    # -- hearing ------------------------------------------------------------------------------------

    def answered(self, event: DataReceived, now_ms: int) -> None:
        data = event.data
        if self.failed or not self._matches(event.sender, data):
            return
        if data.logs is None:
            self.outstanding = None
            self.retry_ms = now_ms + self.replica.config.refused_retry_ms
            self.replica.out.append(RefreshMetadata())
            return
        self.outstanding = None
        self._primary_version = data.version
        for log in BOTH_LOGS:
            if not self._take(log, data.logs[log], event.batches[log]):
                if not self.failed:
                    self.retry_ms = now_ms + self.replica.config.refused_retry_ms
                return
        size = len(event.batches[RECORDS].data) + len(event.batches[STATE].data)
        if self.replica.fsync and 0 < size <= self.replica.config.flush_first_bytes:
            # Somebody waits for one record: its flush must not wait for a fetch to be written, and then the primary
            # gets one frame instead of two. The retry is for a flush that hangs.
            self.flushing = [self.replica.log_end[log] if event.batches[log].headers else 0 for log in BOTH_LOGS]
            self.retry_ms = now_ms + self.replica.config.fetch_retry_ms
        else:
            self.fetch(now_ms)

    def corrupt(self, event: DataCorrupt, now_ms: int) -> None:
        """Bytes on the way, or the primary's disk: ask again later; the primary's scrubber finds a bad disk."""
        out = self.outstanding
        if event.sender == self.primary and event.epoch == self.epoch and out and out.fetch_id == event.fetch_id:
            self.outstanding = None
            self.retry_ms = now_ms + self.replica.config.refused_retry_ms

    def _matches(self, sender: int, data: ReplicaData) -> bool:
        """Rule F2. An answer to anything but the present (epoch, log end, tail epoch) is dropped."""
        out = self.outstanding
        if out is None or sender != self.primary or data.epoch != self.epoch or data.fetch_id != out.fetch_id:
            return False
        if data.logs is None:
            return True
        return all(self._echoes(log, data.logs[log]) for log in BOTH_LOGS)

    def _echoes(self, log: int, data: LogData) -> bool:
        replica = self.replica
        return data.fetch_offset == replica.log_end[log] and data.last_epoch == replica.epochs[log].tail_epoch

    def _take(self, log: int, data: LogData, batches: LogBatches) -> bool:
        """Take over one log's part of an answer. False: nothing more can be done with this answer."""
        replica = self.replica
        if data.diverging is not None:
            if self._begins_later(log, data):
                return self._restart_at(log, data)
            return self._diverged(log, data, *data.diverging)
        if data.log_start > replica.log_end[log]:
            return self._restart_at(log, data)
        if batches.headers:
            if not self._continues(log, batches.headers):
                return False
            replica.append(log, batches.data, batches.headers)
            if replica.fsync:
                replica.flush(log)
        replica.raise_watermark(log, data.high_watermark)
        if data.log_start > replica.log_start[log]:
            replica.advance_start(log, data.log_start)
            replica.out.append(AdvanceStart(log, replica.log_start[log]))
        return True

    def _continues(self, log: int, headers: list[tuple[int, BatchHeader]]) -> bool:
        """Rule F3, as an operating error: a peer that sends a gap or a falling epoch is not believed."""
        end, epoch = self.replica.log_end[log], self.replica.epochs[log].tail_epoch
        for _, header in headers:
            if header.base_offset != end or not epoch <= header.epoch <= self.epoch:
                return False
            end, epoch = header.next_offset, header.epoch
        return True

    def _diverged(self, log: int, data: LogData, epoch: int, end: int) -> bool:
        """Rule F4: cut back to where both logs may agree, by epoch, never by high watermark.

        Within one epoch both logs are prefixes of one primary's log, so the smaller end is a batch boundary of both. If
        this log does not know the epoch that the primary named, only its own end of the epoch below is one: cut there
        and ask again; the tail epoch falls, so this ends. Where they part below this log's start, nothing can be cut:
        after a declared loss this replica begins again at the primary's log start.
        """
        replica = self.replica
        own_epoch, own_end = replica.epochs[log].end_offset_for(epoch, replica.log_end[log])
        cut = max(min(end, own_end) if own_epoch == epoch else own_end, replica.log_start[log])
        if cut < replica.high_watermark[log] or end < replica.log_start[log]:
            part = replica.part
            assert part is not None
            if part.recovery_epoch <= replica.epochs[log].tail_epoch:
                if self._behind(part):
                    return False
                # Committed data would be cut and nobody declared a loss: one of the two logs is wrong. Stop loudly.
                self.failed = f"log {log}: primary of epoch {self.epoch} agrees only up to {cut}, committed here up to "
                self.failed += str(replica.high_watermark[log])
                replica.stop(LOG_CONFLICT)
                return False
            replica.high_watermark[log] = cut  # an operator accepted the loss (unclean recovery)
            if end < replica.log_start[log]:
                return self._restart_at(log, data)
        replica.truncate(log, cut)
        return True

    def _begins_later(self, log: int, data: LogData) -> bool:
        """The primary retains no epoch as old as our last one: it cannot compare, and nothing here is above its start
        that ever committed."""
        assert data.diverging is not None
        start, high = self.replica.log_start[log], self.replica.high_watermark[log]
        return data.diverging[0] < 0 and start < data.log_start >= high

    def _restart_at(self, log: int, data: LogData) -> bool:
        """Rule F6: the primary no longer has what we need next; only a replica that nobody counts on may jump."""
        replica = self.replica
        part = replica.part
        assert part is not None
        if replica.broker_id in part.isr or replica.broker_id in part.elr:
            if self._behind(part):
                return False
            self.failed = f"log {log}: primary begins at {data.log_start}, this in-sync replica ends at "
            self.failed += str(replica.log_end[log])
            replica.stop(LOG_CONFLICT)
            return False
        replica.reset(log, data.log_start, data.start_epoch)
        return True

    def _behind(self, part: PartitionMeta) -> bool:
        """The primary knows a later record, and an old one must not prove a conflict: learn it and ask again."""
        if self._primary_version <= part.version:
            return False
        self.replica.out.append(RefreshMetadata())
        return True
