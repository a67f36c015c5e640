"""ReplicaStore: everything one replica keeps on disk.

::

    <root>/partitions/<topic id>-<partition>/
        meta                    seen_epoch, checkpoints of both logs, sticky log state (slot file)
        producers-<offset>      snapshot of the producer table as of that offset of the records log
        records/  state/        the two logs
        damaged-<n>/            files set aside by `quarantine`

Directories are named by topic id, never by topic name: a topic made again under its old name is another topic.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import lru_cache

import msgspec

from ferryline.protocol.errors import StorageFull
from ferryline.protocol.messages import LOG_DAMAGED, LOG_OK, LOG_TRUNCATED, RECORDS, STATE
from ferryline.protocol.records import BatchHeader
from ferryline_broker.log.envelope import SlotFile, pack, unpack
from ferryline_broker.log.model import NO_CHECKPOINT, LogCheckpoint, LogConfig, LogHooks, RecoveryReport
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.recovery import EPOCH_ANY
from ferryline_broker.log.steps import drained, wall_clock_ms
from ferryline_broker.log.storage import Storage
from ferryline_broker.log.together import Together

META_MAGIC = b"FLRM"
PRODUCERS_MAGIC = b"FLPS"
LOGS = ("records", "state")
SNAPSHOTS_KEPT = 2
SNAPSHOT_BYTES = 16 * 1024 * 1024  # of records since the last one: bounds the headers a restart walks
STATE_SEGMENT_BYTES = 16 * 1024 * 1024
_WORST = (LOG_OK, LOG_TRUNCATED, LOG_DAMAGED)


class ReplicaMeta(msgspec.Struct, array_like=True, frozen=True):
    """``sticky`` is a log state that outlives restarts: TRUNCATED until the coordinator has heard of it, DAMAGED until
    the files were set aside."""

    seen_epoch: int = 0
    checkpoints: tuple[LogCheckpoint, LogCheckpoint] = (NO_CHECKPOINT, NO_CHECKPOINT)
    sticky: str = LOG_OK
    sticky_reason: str = ""


class ProducerSnapshot(msgspec.Struct, array_like=True, frozen=True):
    offset: int
    table: bytes


class ReplicaStore:
    """Both logs of one replica and what must be durable beside them.

    Invariants: seen_epoch never falls; a checkpoint on disk is never above what is on disk of its log.
    """

    def __init__(self, storage: Storage, path: str, topic_id: str, partition: int) -> None:
        """Use `open` or `recover`."""
        self.storage, self.path, self.topic_id, self.partition = storage, path, topic_id, partition
        # Called at each roll of the records log, before the batch that made it roll: what it returns must not know that
        # batch yet. Who cannot promise that leaves it out and calls `write_producer_snapshot` when `snapshot_due`.
        self.snapshot_producers: Callable[[], bytes] | None = None
        self.logs: tuple[PartitionLog, PartitionLog]
        self._meta_file: SlotFile
        self._meta = ReplicaMeta()
        self._hw = [0, 0]
        self._last_snapshot_at = 0
        self._together: Together | None = None  # while it is being opened
        self._power_lost = False
        self._snapshot_names: list[str] | None = None

    @classmethod
    def recover(
        cls,
        storage: Storage,
        root: str,
        topic_id: str,
        partition: int,
        config: LogConfig | None = None,
        *,
        wall_ms: Callable[[], int] = wall_clock_ms,
        together: Together | None = None,
        power_lost: bool = False,
    ) -> Generator[None, None, ReplicaStore]:
        """Open, or create, step by step; each step takes a few ms at most.

        With ``together`` what it found and made is durable only once that is settled. ``power_lost``: this is the first
        opening after a loss of power.
        """
        config = config or LogConfig()
        path = replica_path(root, topic_id, partition)
        together.make(path) if together is not None else storage.mkdirs(path)
        self = cls(storage, path, topic_id, partition)
        self._together, self._power_lost = together, power_lost
        self._meta_file = SlotFile(storage, f"{path}/meta", META_MAGIC, together)
        meta = self._meta_file.load(ReplicaMeta, together)
        if meta is None:
            lost = any(name.endswith(".log") for log in LOGS for name in storage.listdir(f"{path}/{log}"))
            if lost:
                meta = ReplicaMeta(sticky=LOG_DAMAGED, sticky_reason="seen_epoch and checkpoints are unreadable")
            else:
                meta = ReplicaMeta()
            self._store(meta, None if lost else together)
        self._meta = meta
        records = yield from self._recover_log(RECORDS, config, wall_ms)
        state = yield from self._recover_log(STATE, state_config(config), wall_ms)
        self.logs = (records, state)
        for log in (RECORDS, STATE):
            opened = self.logs[log]
            # Records leave at the start only below the high watermark, so it is never below the log start.
            self._hw[log] = max(opened.log_start, min(self._meta.checkpoints[log].hw, opened.log_end))
        self._forget_what_is_gone()
        self._drop_snapshots_above(records.log_end)
        self._together = None
        return self

    @classmethod
    def open(
        cls,
        storage: Storage,
        root: str,
        topic_id: str,
        partition: int,
        config: LogConfig | None = None,
        *,
        wall_ms: Callable[[], int] = wall_clock_ms,
    ) -> ReplicaStore:
        """`recover` in one go."""
        return drained(cls.recover(storage, root, topic_id, partition, config, wall_ms=wall_ms))

    # -- what recovery found ----------------------------------------------------------------------

    @property
    def records(self) -> PartitionLog:
        return self.logs[RECORDS]

    @property
    def state(self) -> PartitionLog:
        return self.logs[STATE]

    @property
    def recovery(self) -> RecoveryReport:
        """What must be reported: the worst of both logs and of what earlier starts found and nobody confirmed."""
        states = [self._meta.sticky, *(log.log_state for log in self.logs)]
        worst = max(states, key=_WORST.index)
        reasons = [log.damage.reason for log in self.logs if log.damage is not None]
        if worst == self._meta.sticky and self._meta.sticky_reason:
            reasons.append(self._meta.sticky_reason)
        return RecoveryReport(worst, (self.records.log_end, self.state.log_end), "; ".join(reasons))

    @property
    def high_watermarks(self) -> tuple[int, int]:
        """As of the last checkpoint, never above the log end nor below the log start."""
        return (self._hw[RECORDS], self._hw[STATE])

    @property
    def seen_epoch(self) -> int:
        return self._meta.seen_epoch

    # -- durable changes --------------------------------------------------------------------------

    def persist_epoch(self, epoch: int, together: Together | None = None) -> None:
        """Raise seen_epoch; durable when this returns, or when ``together`` is settled. Lower or equal values change
        nothing."""
        if epoch <= self._meta.seen_epoch:
            return
        self._store(msgspec.structs.replace(self._meta, seen_epoch=epoch), together)

    def write_checkpoint(self, hw_records: int, hw_state: int, *, sync: bool = True) -> bool:
        """Record what is flushed and the high watermarks. Call at least every second; False if nothing changed.

        With ``sync`` False it is durable only after `sync_checkpoint` (or `GroupFlush.checkpoint`).
        """
        self._hw = [min(hw_records, self.records.log_end), min(hw_state, self.state.log_end)]
        checkpoints = (self.records.checkpoint(self._hw[RECORDS]), self.state.checkpoint(self._hw[STATE]))
        if checkpoints == self._meta.checkpoints:
            return False
        self._meta_file.store(meta := msgspec.structs.replace(self._meta, checkpoints=checkpoints), sync=sync)
        self._meta = meta
        return True

    def sync_checkpoint(self, *, by_group: bool = False) -> None:
        """Make an unsynced checkpoint durable; ``by_group``: `Storage.sync_all` has just done so."""
        if by_group:
            self._meta_file.synced_by_group()
        else:
            self._meta_file.sync()

    def confirm_reported(self) -> None:
        """The coordinator knows what `recovery` reported: a log that merely came back shorter is an ordinary one now.

        Damage stays: the files are still bad, and a restart might not look where they are.
        """
        for log in self.logs:
            if log.log_state == LOG_TRUNCATED:
                log.log_state = LOG_OK
        if self._meta.sticky == LOG_TRUNCATED:
            self._store(msgspec.structs.replace(self._meta, sticky=LOG_OK, sticky_reason=""))

    def mark_damaged(self, reason: str) -> None:
        """Remember damage found while running (scrubber, failed read), until `quarantine`."""
        self._store(msgspec.structs.replace(self._meta, sticky=LOG_DAMAGED, sticky_reason=reason[:500]))

    def finish(self, together: Together) -> None:
        """Everything of this replica is durable once ``together`` is settled, its checkpoint included."""
        self.flush()
        self.write_checkpoint(*self.high_watermarks, sync=False)
        together.file(self._meta_file)
        for log in self.logs:
            together.file(log.start_file)

    def flush(self) -> tuple[int, int]:
        return (self.records.flush(), self.state.flush())

    def close(self) -> None:
        for log in self.logs:
            log.close()
        self._meta_file.close()

    # -- producer table ---------------------------------------------------------------------------

    @property
    def snapshot_due(self) -> bool:
        """Have so many records come since the last snapshot that a restart would take long?"""
        size = self.records.size_bytes
        self._last_snapshot_at = min(self._last_snapshot_at, size)  # retention makes the log shorter
        return size - self._last_snapshot_at >= SNAPSHOT_BYTES

    def write_producer_snapshot(self, table: bytes) -> None:
        """Keep the producer table as of the present end of the records log."""
        offset = self.records.log_end
        self.storage.write_small_atomic(
            f"{self.path}/producers-{offset:020d}", pack(PRODUCERS_MAGIC, ProducerSnapshot(offset, table))
        )
        self._last_snapshot_at = self.records.size_bytes
        self._snapshot_names = None
        for name in self._snapshots()[:-SNAPSHOTS_KEPT]:
            self.storage.unlink(f"{self.path}/{name}")
        self._snapshot_names = self._snapshots()[-SNAPSHOTS_KEPT:]

    def producer_snapshot(self) -> tuple[int, bytes]:
        """(offset, table) of the newest usable snapshot; (log start, b"") if there is none."""
        for name in reversed(self._snapshots()):
            found = unpack(PRODUCERS_MAGIC, self.storage.read_small(f"{self.path}/{name}") or b"", ProducerSnapshot)
            if found is not None and self.records.log_start <= found[1].offset <= self.records.log_end:
                return found[1].offset, found[1].table
        return self.records.log_start, b""

    def headers_since_snapshot(self) -> Iterator[BatchHeader]:
        """Headers of record batches that `producer_snapshot` does not cover."""
        return self.records.batch_headers(self.producer_snapshot()[0])

    # -- inside -----------------------------------------------------------------------------------

    def _recover_log(
        self, log: int, config: LogConfig, wall_ms: Callable[[], int]
    ) -> Generator[None, None, PartitionLog]:
        def before_cut(checkpoint: LogCheckpoint, log_state: str) -> None:
            self._lower(log, checkpoint, log_state)

        hooks = LogHooks(before_cut, self._rolled if log == RECORDS else self._checkpoint_again)
        opened = yield from PartitionLog.recover(
            self.storage,
            f"{self.path}/{LOGS[log]}",
            config,
            checkpoint=self._meta.checkpoints[log],
            hooks=hooks,
            epoch_max=self._meta.seen_epoch or EPOCH_ANY,
            wall_ms=wall_ms,
            together=self._together,
            power_lost=self._power_lost,
        )
        return opened

    def _forget_what_is_gone(self) -> None:
        """A high watermark above the log end was of records that a power cut took. It must not stay on disk: once other
        records stand at those offsets, the start after next would take them for committed."""
        before = self._meta.checkpoints
        if all(mark.hw <= log.log_end for mark, log in zip(before, self.logs, strict=True)):
            return
        records, state = (msgspec.structs.replace(mark, hw=hw) for mark, hw in zip(before, self._hw, strict=True))
        self._store(msgspec.structs.replace(self._meta, checkpoints=(records, state)), self._together)

    def _rolled(self) -> None:
        if self.snapshot_producers is not None:
            try:
                self.write_producer_snapshot(self.snapshot_producers())
            except StorageFull:
                pass  # an older snapshot and more headers give the same table
        self._checkpoint_again()

    def _checkpoint_again(self) -> None:
        self.write_checkpoint(*self._hw)

    def _lower(self, log: int, checkpoint: LogCheckpoint, log_state: str) -> None:
        """Before a cut: the checkpoint comes down first, and snapshots of what will be gone go first."""
        self._hw[log] = min(self._hw[log], checkpoint.offset)
        lowered = msgspec.structs.replace(checkpoint, hw=self._hw[log])
        checkpoints = list(self._meta.checkpoints)
        checkpoints[log] = lowered
        sticky = max(self._meta.sticky, log_state, key=_WORST.index)
        meta = msgspec.structs.replace(self._meta, checkpoints=(checkpoints[0], checkpoints[1]), sticky=sticky)
        if self._together is not None:
            self._together.settle()  # the logs that were opened so far, before any of them is cut
        self._store(meta)
        if log == RECORDS:
            self._drop_snapshots_above(checkpoint.offset)

    def _drop_snapshots_above(self, log_end: int) -> None:
        gone = [name for name in self._snapshots() if int(name[10:30]) > log_end]
        for name in gone:
            self.storage.unlink(f"{self.path}/{name}")
        if gone:
            self._snapshot_names = None
            self.storage.fsync_dir(self.path)

    def _snapshots(self) -> list[str]:
        """Names, oldest first. Listed once: nobody else makes or removes them while the replica is open."""
        if self._snapshot_names is None:
            names = self.storage.listdir(self.path)
            self._snapshot_names = [name for name in names if name.startswith("producers-") and name[10:].isdigit()]
        return self._snapshot_names

    def _store(self, meta: ReplicaMeta, together: Together | None = None) -> None:
        """Durable when this returns, or when ``together`` is settled."""
        if together is None:
            self._meta_file.store_twice(meta)
        else:
            self._meta_file.store(meta, sync=False)
            together.file(self._meta_file)
        self._meta = meta


@lru_cache(maxsize=1024)
def state_config(config: LogConfig) -> LogConfig:
    """The state log is kept until its owner advances its start, and rolls early so that this can free space."""
    segment_bytes = min(config.segment_bytes, STATE_SEGMENT_BYTES)
    return replace(config, segment_bytes=segment_bytes, retention_ms=-1, retention_bytes=-1)


def replica_path(root: str, topic_id: str, partition: int) -> str:
    prefix = f"{root}/" if root else ""
    return f"{prefix}partitions/{topic_id}-{partition}"


def quarantine(storage: Storage, root: str, topic_id: str, partition: int, reason: str) -> None:
    """Set both logs of a closed replica aside and leave it empty, ready to fetch everything again.

    Only once the coordinator counts on this copy no more (it is neither in isr nor in elr): the empty replica calls
    itself sound. Until the last step it does not. The files stay (for an operator, or for a forced recovery) until the
    replica is deleted. seen_epoch stays too: an epoch, once accepted, is never accepted again from an older primary.
    """
    path = replica_path(root, topic_id, partition)
    meta_file = SlotFile(storage, f"{path}/meta", META_MAGIC)
    meta = meta_file.load(ReplicaMeta) or ReplicaMeta()
    # Marked first: a crash half way must not leave an emptied replica that calls itself good.
    marked = ReplicaMeta(meta.seen_epoch, meta.checkpoints, LOG_DAMAGED, reason[:500])
    meta_file.store_twice(marked)
    names = storage.listdir(path)
    number = 1 + max((int(name[8:]) for name in names if name.startswith("damaged-")), default=0)
    aside = f"{path}/damaged-{number}"
    storage.mkdirs(aside)
    for name in names:
        if name in LOGS or name.startswith("producers-"):
            storage.rename(f"{path}/{name}", f"{aside}/{name}")
    storage.fsync_dir(aside)
    storage.fsync_dir(path)
    meta_file.store_twice(ReplicaMeta(meta.seen_epoch))
    meta_file.close()
