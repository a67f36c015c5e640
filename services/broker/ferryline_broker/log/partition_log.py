"""PartitionLog: one log of one replica in one directory, an append-only sequence of record batches.

Rules of this file:

* Every call is short and inline. Nothing here waits for anything but the disk.
* ``append`` reaches the page cache; ``flush`` makes it durable. Cuts and resets are durable when they return.
* A sealed segment is durable, with its index and seal, before the next one gets its first byte. So only the active
  segment can have a torn tail, and recovery reads no other.
* A failed fdatasync fails the log for the rest of this process life (rule L10): appends and flushes raise, reads go on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

from msgspec.structs import replace

from ferryline.protocol.errors import FerrylineError, OffsetOutOfRange, StorageFailed, StorageFull
from ferryline.protocol.limits import BATCH_BYTES_MAX
from ferryline.protocol.records import BatchHeader, split_batches
from ferryline_broker.core.epochs import EpochIndex
from ferryline_broker.log.chain import SegmentChain
from ferryline_broker.log.interface import Bytes, LogDamaged, Storage
from ferryline_broker.log.lookup import expired_segments, offset_for_time, stop_position
from ferryline_broker.log.model import NO_CHECKPOINT, LogCheckpoint, LogConfig, LogHooks, SegmentInfo
from ferryline_broker.log.recovery import EPOCH_ANY, LogStart, Recovered, Recovery, finish_reset
from ferryline_broker.log.segment import Segment
from ferryline_broker.log.steps import drained, wall_clock_ms
from ferryline_broker.log.tail import Tail
from ferryline_broker.log.together import Together
from ferryline_broker.log.walk import CHAINED_BYTES

CLOSED = "closed"
_CHECKED_BYTES = 1024 * 1024  # read at once by a walk that checks what it passes


class PartitionLog:
    """One log. Offsets are half-open; sizes in bytes.

    Invariants: log_start <= flushed_end <= log_end; segments lie back to back and only the last may be unsealed (the
    *active* one); epochs and their starts rise strictly.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        config: LogConfig,
        recovered: Recovered,
        hooks: LogHooks,
        wall_ms: Callable[[], int],
    ) -> None:
        """Use `open` or `recover`."""
        self.path = path
        self.config = config  # may be replaced while the log is open
        self.log_state = recovered.log_state
        self.damage = recovered.damage
        self.failure = ""  # why the log failed, "" while it works
        self._storage, self._hooks, self._wall_ms = storage, hooks, wall_ms
        self.start_file, self._start = recovered.start_file, recovered.start
        self._chain = SegmentChain(storage, path, recovered.segments, wall_ms)
        self._tail = Tail()
        self._log_end = self._flushed_end = recovered.log_end
        pairs = (pair for segment in recovered.segments for pair in segment.epochs)
        self.epochs = EpochIndex(pairs, self._start.epoch)  # what others may only read
        self.epochs.advance(self._start.offset, self._log_end)
        self.flushed_mark = self._present()  # what is on disk: a checkpoint but for high watermark and index
        if recovered.untouched:
            self.rest()

    @classmethod
    def recover(
        cls,
        storage: Storage,
        path: str,
        config: LogConfig | None = None,
        *,
        checkpoint: LogCheckpoint = NO_CHECKPOINT,
        hooks: LogHooks | None = None,
        epoch_max: int = EPOCH_ANY,
        wall_ms: Callable[[], int] = wall_clock_ms,
        together: Together | None = None,
        power_lost: bool = False,
    ) -> Generator[None, None, PartitionLog]:
        """Open the log step by step; each step holds the caller for a few ms at most. With ``together`` what was found
        is durable only once that is settled. ``power_lost``: this is the first opening after a loss of power.

        A damaged log opens too: ``log_state`` says so, and append and read raise LogDamaged.
        """
        config, hooks = config or LogConfig(), hooks or LogHooks()
        recovery = Recovery(storage, path, config, checkpoint, hooks, epoch_max, wall_ms, together, power_lost)
        recovered = yield from recovery.run()
        return cls(storage, path, config, recovered, hooks, wall_ms)

    @classmethod
    def open(cls, storage: Storage, path: str, config: LogConfig | None = None, **options: Any) -> PartitionLog:
        """`recover` in one go, with its options."""
        return drained(cls.recover(storage, path, config, **options))

    # -- what it holds ----------------------------------------------------------------------------

    @property
    def log_start(self) -> int:
        return self._start.offset

    @property
    def log_end(self) -> int:
        return self._log_end

    @property
    def flushed_end(self) -> int:
        return self._flushed_end

    @property
    def tail_epoch(self) -> int:
        """Epoch of the last record, also when retention removed it; -1 when the log never held one."""
        return self.epochs.tail_epoch

    @property
    def size_bytes(self) -> int:
        return sum(segment.size for segment in self._chain.segments)

    @property
    def dirty_bytes(self) -> int:
        """Appended and not yet flushed."""
        active, flushed = self._chain.active, self.flushed_mark
        size = active.size if active is not None else 0
        return size - flushed.position if active is not None and flushed.segment == active.base else size

    @property
    def segments(self) -> list[Segment]:
        """For the scrubber and tools; not to be changed."""
        return self._chain.segments

    # -- appending --------------------------------------------------------------------------------

    def append(self, data: Bytes, headers: list[tuple[int, BatchHeader]]) -> None:
        """Append stamped batches that lie back to back in ``data``. In the page cache when this returns.

        Raises StorageFull: nothing was appended, the log goes on. StorageFailed: the log has failed.
        """
        self._check_usable()
        offset, epoch, at = self._log_end, self.epochs.tail_epoch, 0
        for position, header in headers:
            assert position == at, f"{self.path}: a batch at {position} of the data, expected at {at}"
            assert header.base_offset == offset, f"{self.path}: batch {header.base_offset} does not follow {offset}"
            assert header.epoch >= epoch, f"{self.path}: epoch {header.epoch} after {epoch} at {offset}"
            assert header.size <= BATCH_BYTES_MAX, f"{self.path}: batch of {header.size} bytes at {offset}"
            offset, epoch, at = header.next_offset, header.epoch, at + header.size
        assert at == len(data) > 0, f"{self.path}: {len(data)} bytes for {at} bytes of batches"
        now_ms = self._wall_ms()
        if self._chain.resting:
            self._chain.wake()
        segment = self._chain.active
        if segment is None or self._roll_due(segment, at, offset, now_ms):
            segment = self._next_segment()
        try:
            segment.write(data)
        except FerrylineError as error:
            if isinstance(error, StorageFull):
                raise
            raise self._fail(error) from error
        view = memoryview(data)
        for position, header in headers:
            self._tail.add(header.base_offset, segment.size)
            self.epochs.observe(header.epoch, header.base_offset)
            segment.account(header, view[position : position + CHAINED_BYTES])
        segment.appended_ms = now_ms
        self._log_end = offset
        if self.dirty_bytes > self.config.dirty_bytes_max:
            self.flush()

    def flush(self) -> int:
        """Make everything appended durable; returns the new flushed end. Raises StorageFailed: the log has failed."""
        if not self.dirty:
            return self._flushed_end
        self._check_usable()
        try:
            self._chain.sync()
        except FerrylineError as error:
            raise self._fail(error) from error
        self._flushed_end = self._log_end
        self.flushed_mark = self._present()
        return self._flushed_end

    def rest(self) -> None:
        """Nothing is appended at present: hold no descriptor until the next append."""
        if not (self.dirty or self.failure):
            self._chain.rest()

    @property
    def dirty(self) -> bool:
        return self._flushed_end != self._log_end or self._chain.dirty

    def flushed_by_group(self) -> None:
        """`Storage.sync_all` has made everything appended durable (`group.py`)."""
        self._chain.synced_by_group()
        self._flushed_end = self._log_end
        self.flushed_mark = self._present()

    def checkpoint(self, hw: int) -> LogCheckpoint:
        """What may be recorded as flushed. Also brings the index file up to date (unsynced: it is only a copy)."""
        flushed, active = self.flushed_mark, self._chain.active
        written = (0, 0)
        if active is not None and flushed.segment == active.base:
            written = self._chain.persist_index(flushed.position)
        return replace(flushed, hw=min(hw, self._log_end), index_bytes=written[0], index_crc=written[1])

    # -- cutting ----------------------------------------------------------------------------------

    def truncate(self, offset: int) -> int:
        """Cut to the last batch boundary at or below ``offset``, not below the log start; returns the new log end.

        Durable when this returns.
        """
        self._check_usable()
        if offset >= self._log_end:
            return self._log_end
        offset = max(offset, self.log_start)
        keep = self._chain.number_of(offset)
        segment = self._chain.segments[keep]
        self._chain.touch(segment)
        at = segment.locate(offset)
        end = max(at.offset, self.log_start)
        if self._flushed_end < end or self._chain.dirty:
            self.flush()  # the checkpoint that comes next must not promise more than is on disk
        lowered = LogCheckpoint(end, hw=end)
        if at.position:
            times = (at.max_timestamp, segment.created_ms, segment.appended_ms)
            lowered = LogCheckpoint(end, segment.base, at.position, at.chain, end, 0, 0, *times)
        self._hooks.before_cut(lowered, self.log_state)
        try:
            self._chain.cut(keep, at)
        except FerrylineError as error:
            raise self._fail(error) from error
        self.epochs.truncate(end)
        self._tail.cut(end if self._chain.active is segment else 0)
        self._ends_at(end)
        return end

    def reset(self, offset: int, epoch: int = -1) -> None:
        """Empty the log and let it begin at ``offset``. Durable. ``epoch``: of the record before it, -1 unknown."""
        self._check_usable()
        self._hooks.before_cut(LogCheckpoint(offset, hw=offset), self.log_state)
        out = Recovered(self.start_file, LogStart(offset, epoch, dropping=True))
        try:
            self.start_file.store(out.start)
            finish_reset(self._storage, self.path, out, self._chain.clear())
        except FerrylineError as error:
            raise self._fail(error) from error
        self._start = out.start
        self.epochs = EpochIndex(before=epoch)
        self._tail = Tail()
        self._ends_at(offset)

    def advance_start(self, offset: int) -> int:
        """Delete whole segments that end at or below ``offset`` (retention); returns the log start. Durable.

        Raises StorageFull: nothing was deleted, the log goes on."""
        self._check_usable()
        active = self._chain.active
        if active is not None and active.next_offset <= offset:
            self._seal_active()
        gone = [segment for segment in self._chain.segments if segment.next_offset <= offset]
        if not gone:
            return self.log_start
        start = LogStart(gone[-1].next_offset, gone[-1].tail_epoch)
        try:
            self.start_file.store(start)
            self._chain.drop_below(len(gone))
        except FerrylineError as error:
            if isinstance(error, StorageFull):
                raise  # only the first step takes space: nothing has changed
            raise self._fail(error) from error
        self._start = start
        self.epochs.advance(start.offset, self._log_end)
        if self._chain.active is None:
            self.flushed_mark = self._present()
        return start.offset

    def retention_candidates(self, now_wall_ms: int, limit_offset: int) -> list[SegmentInfo]:
        """Segments that retention would delete, oldest first, few at a time, none that ends above ``limit_offset``.

        Pass the ``end`` of the last one to `advance_start`. Age counts from the broker's append time.
        """
        return expired_segments(self._chain.segments, self.config, now_wall_ms, limit_offset)

    # -- reading ----------------------------------------------------------------------------------

    def read(self, offset: int, bytes_max: int, below: int) -> bytes:
        """Whole batches from the one that holds ``offset`` on: about ``bytes_max`` bytes, at least one batch, but none
        that ends above ``below``; empty if there is none. May stop early at the end of a segment.

        Raises OffsetOutOfRange below the log start or above the log end, LogDamaged for bytes that fail a check.
        """
        if not self._start.offset <= offset <= self._log_end:
            details = {"log_start": self.log_start, "log_end": self._log_end}
            raise OffsetOutOfRange(f"offset {offset} is outside {self.log_start}..{self._log_end}", **details)
        if self.damage is not None or self.failure == CLOSED:
            self._check_usable()
        if offset >= min(below, self._log_end):
            return b""
        if self._tail.covers(offset):
            segment = self._chain.active
            assert segment is not None
            start, stop = self._tail.span(offset, bytes_max, below, self._log_end, segment.size)
        else:
            segment = self._chain.find(offset)
            at = segment.locate(offset)
            offset, start, stop = at.offset, at.position, stop_position(segment, at, bytes_max, below)
        if stop == start:
            return b""
        data = segment.file.pread(stop - start, start)
        if len(data) != stop - start:
            raise segment.damaged(offset, f"{len(data)} bytes at position {start}, not {stop - start}")
        if start < segment.trusted_from:
            segment.check_slice(data, offset)
        return data

    def offset_for_time(self, timestamp_ms: int) -> int:
        """First offset whose record is not older than ``timestamp_ms`` by the records' own timestamps; else log end."""
        for segment in self._chain.segments:
            if segment.max_timestamp >= timestamp_ms:
                self._chain.touch(segment)
                found = offset_for_time(segment, timestamp_ms)
                return self._log_end if found is None else max(found, self.log_start)
        return self._log_end

    def batch_headers(self, from_offset: int) -> Iterator[BatchHeader]:
        """Headers from the batch that holds ``from_offset`` to the log end as it is now.

        Where this process has not checked the bytes yet, it does so now: headers lie inside the CRC of their batch.
        """
        log_end = self._log_end
        while from_offset < log_end:
            segment = self._chain.find(from_offset)
            at = segment.locate(from_offset)
            if at.position < segment.trusted_from:
                for _, header in split_batches(self.read(from_offset, _CHECKED_BYTES, log_end), verify=False):
                    yield header
                    from_offset = header.next_offset
            else:
                for header, _ in segment.walk(at.position, segment.size):
                    yield header
                    from_offset = header.next_offset

    def close(self) -> None:
        """Give back descriptors; every later call that needs one raises. Does not flush."""
        self._chain.clear()
        self.start_file.close()
        self.failure = CLOSED

    # -- inside -----------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self.damage is not None:
            raise LogDamaged(f"{self.path}: {self.damage.reason}", offset=self.damage.offset)
        if self.failure:
            raise StorageFailed(f"{self.path}: {self.failure}")

    def _fail(self, error: FerrylineError) -> FerrylineError:
        self.failure = f"failed: {error.message}"
        return error if isinstance(error, StorageFailed) else StorageFailed(error.message)

    def _roll_due(self, segment: Segment, more_bytes: int, next_offset: int, now_ms: int) -> bool:
        config = self.config
        too_far = next_offset - segment.base >= 2**32  # relative offsets in the index are 32 bits
        too_old = 0 <= config.segment_ms <= now_ms - segment.created_ms
        return segment.size > 0 and (too_far or too_old or segment.size + more_bytes > config.segment_bytes)

    def _next_segment(self) -> Segment:
        if self._chain.active is not None:
            self._seal_active()
            self._hooks.rolled()
        self._tail = Tail()
        return self._chain.begin(self._log_end)

    def _seal_active(self) -> None:
        """Flush and seal. Raises StorageFull: the segment stays active, a later call tries again."""
        self.flush()
        try:
            self._chain.seal_active()
        except FerrylineError as error:
            if isinstance(error, StorageFull):
                raise
            raise self._fail(error) from error
        self._tail = Tail()
        self.flushed_mark = self._present()

    def _ends_at(self, offset: int) -> None:
        self._log_end = self._flushed_end = offset
        self.flushed_mark = self._present()

    def _present(self) -> LogCheckpoint:
        last = self._chain.last
        if last is None:
            return LogCheckpoint(self._flushed_end)
        at, times = (last.base, last.size, last.chain), (last.max_timestamp, last.created_ms, last.appended_ms)
        return LogCheckpoint(self._flushed_end, *at, 0, 0, 0, *times)
