"""PartitionLog: one log of one replica in one directory; an append-only sequence of record batches.

Rules of this file:

* Every call is short and inline. Nothing here waits for anything but the disk.
* ``append`` reaches the page cache; ``flush`` makes it durable. Cuts and resets are durable when they return.
* A sealed segment is durable with its index and seal before the next one gets its first byte. So only the active segment
  can have a torn tail, and recovery reads no other.
* A failed fdatasync fails the log for the rest of this process life (rule L10): appends and flushes raise, reads go on.
"""

from __future__ import annotations

import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar, cast

from ferryline.protocol.errors import FerrylineError, OffsetOutOfRange, StorageFailed, StorageFull
from ferryline.protocol.limits import BATCH_BYTES_MAX
from ferryline.protocol.messages import LOG_DAMAGED
from ferryline.protocol.records import BatchHeader
from ferryline_broker.log.index import ENTRY_BYTES, SparseIndex
from ferryline_broker.log.interface import Bytes, LogDamaged, Storage
from ferryline_broker.log.lookup import offset_for_time, stop_position
from ferryline_broker.log.model import NO_CHECKPOINT, LogCheckpoint, LogConfig, LogHooks, SegmentInfo
from ferryline_broker.log.recovery import EPOCH_ANY, LogStart, Recovered, Recovery, finish_reset
from ferryline_broker.log.segment import CHAINED_BYTES, INDEX, LOG, Segment

T = TypeVar("T")

TAIL_BATCHES_MAX = 1024  # newest batches whose positions are kept exactly: live readers never touch the index
LOADED_INDEXES_MAX = 4  # of sealed segments, per log
RETENTION_STEP = 4  # segments named at once: unlinking a large file takes milliseconds


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class PartitionLog:
    """One log. Offsets are half-open; sizes in bytes.

    Invariants: log_start <= flushed_end <= log_end; segments lie back to back; only the last may be unsealed (then it is
    the *active* one); epochs and their starts rise strictly.
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
        self.path = path
        self.config = config
        self.log_state = recovered.log_state
        self.damage = recovered.damage
        self.failure = ""  # why the log failed, "" while it works
        self._storage, self._hooks, self._wall_ms = storage, hooks, wall_ms
        self._start_file, self._start = recovered.start_file, recovered.start
        self._segments = recovered.segments
        self._bases = [segment.base for segment in self._segments]
        self._active = self._segments[-1] if self._segments and self._segments[-1].seal is None else None
        self._log_end = recovered.log_end
        self._epochs: list[tuple[int, int]] = []
        for segment in self._segments:
            self._epochs += [pair for pair in segment.epochs if not self._epochs or pair[0] > self._epochs[-1][0]]
        self._clip_epochs()
        self._tail_offsets: list[int] = []  # base offsets of the newest batches of the active segment ...
        self._tail_positions: list[int] = []  # ... and where they stand
        self._loaded: list[Segment] = []  # sealed segments with their index in memory, oldest use first
        self._names_dirty = False  # a file was created and its directory not yet synced
        self._flushed_end = self._log_end
        self._index_bytes = self._index_crc = 0  # of the active segment's index file, as written
        self._flushed = NO_CHECKPOINT
        self._remember_flushed()

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
    ) -> Generator[None, None, PartitionLog]:
        """Open the log step by step; each step holds the caller for a few ms at most.

        A damaged log opens too: ``log_state`` says so, and append and read raise LogDamaged.
        """
        config, hooks = config or LogConfig(), hooks or LogHooks()
        recovered = yield from Recovery(storage, path, config, checkpoint, hooks, epoch_max, wall_ms).run()
        return cls(storage, path, config, recovered, hooks, wall_ms)

    @classmethod
    def open(
        cls,
        storage: Storage,
        path: str,
        config: LogConfig | None = None,
        *,
        checkpoint: LogCheckpoint = NO_CHECKPOINT,
        hooks: LogHooks | None = None,
        epoch_max: int = EPOCH_ANY,
        wall_ms: Callable[[], int] = wall_clock_ms,
    ) -> PartitionLog:
        """`recover` in one go."""
        return drained(
            cls.recover(
                storage, path, config, checkpoint=checkpoint, hooks=hooks, epoch_max=epoch_max, wall_ms=wall_ms
            )
        )

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
        return self._epochs[-1][0] if self._epochs else -1

    @property
    def size_bytes(self) -> int:
        return sum(segment.size for segment in self._segments)

    @property
    def dirty_bytes(self) -> int:
        """Appended and not yet flushed."""
        if self._active is None:
            return 0
        flushed = self._flushed
        return self._active.size - (flushed.position if flushed.segment == self._active.base else 0)

    @property
    def segments(self) -> list[Segment]:
        """For the scrubber and tools; not to be changed."""
        return self._segments

    def epoch_starts(self) -> list[tuple[int, int]]:
        """(epoch, start offset), both rising strictly. An epoch that spans the log start begins there."""
        return list(self._epochs)

    # -- appending --------------------------------------------------------------------------------

    def append(self, data: Bytes, headers: list[tuple[int, BatchHeader]]) -> None:
        """Append stamped batches that lie back to back in ``data``. In the page cache when this returns.

        Raises StorageFull: nothing was appended, the log goes on. StorageFailed: the log has failed.
        """
        self._check_usable()
        offset, epoch, at = self._log_end, self.tail_epoch, 0
        for position, header in headers:
            assert position == at and header.base_offset == offset, f"{self.path}: batch does not follow {offset}"
            assert header.epoch >= epoch, f"{self.path}: epoch {header.epoch} after {epoch} at {offset}"
            assert header.size <= BATCH_BYTES_MAX, f"{self.path}: batch of {header.size} bytes at {offset}"
            offset, epoch, at = header.next_offset, header.epoch, at + header.size
        assert headers and at == len(data), f"{self.path}: {len(data)} bytes for {at} bytes of batches"
        segment = self._active
        if segment is None or self._roll_due(segment, at, offset):
            segment = self._next_segment()
        self._write(segment, data)
        view = memoryview(data)
        tail_offsets, tail_positions = self._tail_offsets, self._tail_positions
        for position, header in headers:
            tail_offsets.append(header.base_offset)
            tail_positions.append(segment.size)
            if not self._epochs or header.epoch != self._epochs[-1][0]:
                self._begin_epoch(header.epoch, header.base_offset)
            segment.account(header, view[position : position + CHAINED_BYTES])
        segment.appended_ms = self._wall_ms()
        self._log_end = offset
        if len(tail_offsets) > 2 * TAIL_BATCHES_MAX:
            del tail_offsets[:-TAIL_BATCHES_MAX]
            del tail_positions[:-TAIL_BATCHES_MAX]
        if self.dirty_bytes > self.config.dirty_bytes_max:
            self.flush()

    def flush(self) -> int:
        """Make everything appended durable; returns the new flushed end. Raises StorageFailed: the log has failed."""
        if self._flushed_end == self._log_end and not self._names_dirty:
            return self._flushed_end
        self._check_usable()
        try:
            if self._active is not None:
                self._active.file.fdatasync()
            if self._names_dirty:
                self._storage.fsync_dir(self.path)
                self._names_dirty = False
        except FerrylineError as error:
            raise self._fail(error) from error
        self._flushed_end = self._log_end
        self._remember_flushed()
        return self._flushed_end

    def checkpoint(self, hw: int) -> LogCheckpoint:
        """What may be recorded as flushed. Also brings the index file up to date (unsynced: it is only a copy)."""
        flushed, active = self._flushed, self._active
        if active is not None and flushed.segment == active.base:
            self._persist_index(active)
        return LogCheckpoint(
            flushed.offset,
            flushed.segment,
            flushed.position,
            flushed.chain,
            min(hw, self._log_end),
            self._index_bytes,
            self._index_crc,
            flushed.max_timestamp,
            flushed.created_ms,
            flushed.appended_ms,
        )

    # -- cutting ----------------------------------------------------------------------------------

    def truncate(self, offset: int) -> int:
        """Cut to the last batch boundary at or below ``offset`` (not below the log start); returns the new log end.

        Durable when this returns.
        """
        self._check_usable()
        if offset >= self._log_end:
            return self._log_end
        offset = max(offset, self.log_start)
        keep = max(0, bisect_right(self._bases, offset) - 1)
        segment = self._segments[keep]
        at = segment.locate(offset)
        index = SparseIndex(segment.load_index().data)
        index.cut(at.position)
        end = max(at.offset, self.log_start)
        lowered = LogCheckpoint(
            end, segment.base, at.position, at.chain, end, 0, 0, at.max_timestamp, segment.created_ms, segment.appended_ms
        )
        if at.position == 0:
            lowered = LogCheckpoint(end, hw=end)
        self._hooks.before_cut(lowered, self.log_state)
        try:
            self._cut(keep, at.position, index)
        except FerrylineError as error:
            raise self._fail(error) from error
        if at.position:
            segment.size, segment.next_offset, segment.chain = at.position, at.offset, at.chain
            segment.max_timestamp = at.max_timestamp
            segment.epochs = [pair for pair in segment.epochs if pair[1] < at.offset]
            segment.tail_epoch = segment.epochs[-1][0]
            segment.trusted_from = min(segment.trusted_from, at.position)
        self._log_end = self._flushed_end = end
        self._epochs = [pair for pair in self._epochs if pair[1] < end] or self._start_epochs()
        self._settle()
        return end

    def _cut(self, keep: int, position: int, index: SparseIndex) -> None:
        while len(self._segments) > keep + 1 or (position == 0 and len(self._segments) > keep):
            self._segments[-1].remove()
            self._storage.fsync_dir(self.path)  # one by one from the end: a crash must not leave a gap
            self._segments.pop()
            self._bases.pop()
        if position:
            segment = self._segments[-1]
            if segment.seal is not None:
                segment.unseal(index)
            segment.index = index
            segment.file.truncate(position)
            segment.file.fdatasync()

    def reset(self, offset: int, epoch: int = -1) -> None:
        """Empty the log and let it begin at ``offset``; ``epoch`` is that of the record before it, if known. Durable."""
        self._check_usable()
        self._hooks.before_cut(LogCheckpoint(offset, hw=offset), self.log_state)
        out = Recovered(self._start_file, LogStart(offset, epoch, dropping=True))
        try:
            self._start_file.store(out.start)
            for segment in self._segments:
                segment.file.close()
            finish_reset(self._storage, self.path, out, self._bases)
        except FerrylineError as error:
            raise self._fail(error) from error
        self._segments, self._bases = [], []
        self._start = out.start
        self._log_end = self._flushed_end = offset
        self._epochs = self._start_epochs()
        self._settle()

    def advance_start(self, offset: int) -> int:
        """Delete whole segments below ``offset`` (retention); returns the log start. Durable when this returns."""
        self._check_usable()
        offset = min(offset, self._log_end)
        if self._active is not None and self._active.next_offset <= offset:
            self._seal_active()
        gone = [segment for segment in self._segments if segment.next_offset <= offset]
        if not gone:
            return self.log_start
        start = LogStart(gone[-1].next_offset, gone[-1].tail_epoch)
        try:
            self._start_file.store(start)
            for segment in gone:
                segment.remove()
            self._storage.fsync_dir(self.path)
        except FerrylineError as error:
            raise self._fail(error) from error
        self._start = start
        del self._segments[: len(gone)]
        del self._bases[: len(gone)]
        self._clip_epochs()
        self._settle()
        return self.log_start

    def retention_candidates(self, now_wall_ms: int, limit_offset: int) -> list[SegmentInfo]:
        """Segments that retention would delete, oldest first, at most RETENTION_STEP, none that ends above
        ``limit_offset``. Pass the ``end`` of the last one to `advance_start`. Age counts from the broker's append time."""
        config = self.config
        found: list[SegmentInfo] = []
        over = self.size_bytes - config.retention_bytes if config.retention_bytes >= 0 else 0
        for segment in self._segments:
            if segment.next_offset > limit_offset or len(found) == RETENTION_STEP:
                break
            too_old = config.retention_ms >= 0 and now_wall_ms - segment.appended_ms > config.retention_ms
            too_much = segment.seal is not None and segment.size <= over
            if not (too_old or too_much):
                break
            found.append(SegmentInfo(segment.base, segment.next_offset, segment.size, segment.appended_ms))
            over -= segment.size
        return found

    # -- reading ----------------------------------------------------------------------------------

    def read(self, offset: int, bytes_max: int, below: int) -> bytes:
        """Whole batches from the one that holds ``offset`` on, about ``bytes_max`` bytes, at least one batch, but none
        that ends above ``below``; empty if there is none. May stop early at the end of a segment.

        Raises OffsetOutOfRange below the log start or above the log end, LogDamaged for bytes that fail a check.
        """
        if not self.log_start <= offset <= self._log_end:
            details = {"log_start": self.log_start, "log_end": self._log_end}
            raise OffsetOutOfRange(f"offset {offset} is outside {self.log_start}..{self._log_end}", **details)
        if self.damage is not None:
            raise LogDamaged(f"{self.path}: {self.damage.reason}", offset=self.damage.offset)
        if offset >= below or offset == self._log_end:
            return b""
        tail = self._tail_offsets
        if tail and offset >= tail[0]:
            return self._read_tail(offset, bytes_max, below)
        segment = self._segments[bisect_right(self._bases, offset) - 1]
        self._touch(segment)
        at = segment.locate(offset)
        stop = stop_position(segment, at, bytes_max, below)
        if stop == at.position:
            return b""
        data = segment.file.pread(stop - at.position, at.position)
        if len(data) != stop - at.position:
            raise segment.damaged(at.offset, f"{len(data)} bytes at {at.position}, not {stop - at.position}")
        if at.position < segment.trusted_from:
            segment.check_slice(data, at.offset)
        return data

    def _read_tail(self, offset: int, bytes_max: int, below: int) -> bytes:
        offsets, positions = self._tail_offsets, self._tail_positions
        active = self._active
        assert active is not None
        first = bisect_right(offsets, offset) - 1
        start = positions[first]
        last = len(offsets) if below >= self._log_end else bisect_right(offsets, below) - 1
        if last <= first:
            return b""
        stop = positions[last] if last < len(positions) else active.size
        if stop - start > bytes_max:
            last = max(first + 1, bisect_right(positions, start + bytes_max) - 1)
            stop = positions[last] if last < len(positions) else active.size
        data = active.file.pread(stop - start, start)
        if len(data) != stop - start:
            raise active.damaged(offsets[first], f"{len(data)} bytes at {start}, not {stop - start}")
        return data

    def offset_for_time(self, timestamp_ms: int) -> int:
        """First offset whose record is not older than ``timestamp_ms`` (the records' own timestamps); log end if none."""
        for segment in self._segments:
            if segment.max_timestamp >= timestamp_ms:
                self._touch(segment)
                found = offset_for_time(segment, timestamp_ms)
                return self._log_end if found is None else max(found, self.log_start)
        return self._log_end

    def batch_headers(self, from_offset: int) -> Iterator[BatchHeader]:
        """Headers from the batch that holds ``from_offset`` to the log end as it is now."""
        for segment in list(self._segments):
            if segment.next_offset <= from_offset:
                continue
            at = segment.locate(max(from_offset, segment.base))
            for header, _ in segment.walk(at.position, segment.size):
                yield header

    def close(self) -> None:
        """Give back descriptors. Does not flush."""
        for segment in self._segments:
            segment.file.close()
        self._start_file.close()
        self.failure = self.failure or "closed"

    # -- inside -----------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self.failure:
            raise StorageFailed(f"{self.path}: {self.failure}")
        if self.log_state == LOG_DAMAGED:
            assert self.damage is not None
            raise LogDamaged(f"{self.path}: {self.damage.reason}", offset=self.damage.offset)

    def _fail(self, error: FerrylineError) -> FerrylineError:
        self.failure = f"failed: {error.message}"
        return error if isinstance(error, StorageFailed) else StorageFailed(error.message)

    def _write(self, segment: Segment, data: Bytes) -> None:
        try:
            segment.file.pwrite(data, segment.size)
        except StorageFull:
            try:  # what was written in part must go, or a later shorter append would leave batches behind it: a hole
                segment.file.truncate(segment.size)
            except FerrylineError as error:
                raise self._fail(error) from error
            raise
        except FerrylineError as error:
            raise self._fail(error) from error

    def _roll_due(self, segment: Segment, more_bytes: int, next_offset: int) -> bool:
        config = self.config
        return segment.size > 0 and (
            segment.size + more_bytes > config.segment_bytes
            or next_offset - segment.base >= 2**32
            or (config.segment_ms >= 0 and self._wall_ms() - segment.created_ms >= config.segment_ms)
        )

    def _next_segment(self) -> Segment:
        if self._active is not None:
            self._seal_active()
            self._hooks.rolled()
        stem = f"{self.path}/{self._log_end:020d}"
        file = self._storage.open(stem + LOG, create=True)
        self._storage.unlink(stem + INDEX)  # of a segment of that name before a cut
        segment = Segment(self._storage, self.path, self._log_end, file)
        segment.created_ms = self._wall_ms()
        self._names_dirty = True
        self._active = segment
        self._segments.append(segment)
        self._bases.append(segment.base)
        self._settle_tail()
        return segment

    def _seal_active(self) -> None:
        """Seal and make everything durable. Raises StorageFull: nothing changed, try again later."""
        active = self._active
        assert active is not None
        self.flush()
        try:
            active.write_seal()
            self._storage.fsync_dir(self.path)
        except StorageFull:
            raise
        except FerrylineError as error:
            raise self._fail(error) from error
        self._active = None
        self._settle_tail()
        self._loaded.append(active)
        self._remember_flushed()

    def _begin_epoch(self, epoch: int, offset: int) -> None:
        if self._epochs and self._epochs[-1][1] == offset:
            self._epochs.pop()  # the epoch before the log start, of which nothing is left
        self._epochs.append((epoch, offset))

    def _start_epochs(self) -> list[tuple[int, int]]:
        return [(self._start.epoch, self._start.offset)] if self._start.epoch >= 0 else []

    def _clip_epochs(self) -> None:
        """Let epochs begin at the log start or above it."""
        start = self._start.offset
        above = [pair for pair in self._epochs if pair[1] > start]
        spanning = [pair for pair in self._epochs if pair[1] <= start]
        first = [(spanning[-1][0], start)] if spanning else self._start_epochs()
        self._epochs = first + above

    def _settle(self) -> None:
        last = self._segments[-1] if self._segments else None
        self._active = last if last is not None and last.seal is None else None
        self._loaded = [segment for segment in self._loaded if segment.seal is not None and segment in self._segments]
        self._settle_tail()
        self._remember_flushed()

    def _settle_tail(self) -> None:
        self._tail_offsets, self._tail_positions = [], []
        self._index_bytes = self._index_crc = 0

    def _remember_flushed(self) -> None:
        active = self._active
        if active is None:
            last = self._segments[-1] if self._segments else None
            if last is None:
                self._flushed = LogCheckpoint(self._flushed_end)
                return
            active = last
        self._flushed = LogCheckpoint(
            self._flushed_end,
            active.base,
            active.size,
            active.chain,
            0,
            0,
            0,
            active.max_timestamp,
            active.created_ms,
            active.appended_ms,
        )

    def _persist_index(self, active: Segment) -> None:
        assert active.index is not None
        data = active.index.data
        whole = len(data)
        last = active.index.at_position(self._flushed.position - 1) if self._flushed.position else None
        if last is None:
            return
        # entries above the flushed position must not be counted: after a crash they may describe lost batches
        while whole and active.index.entry(whole // ENTRY_BYTES - 1).position > last.position:
            whole -= ENTRY_BYTES
        if whole <= self._index_bytes:
            return
        fresh = bytes(data[self._index_bytes : whole])
        file = self._storage.open(active.stem + INDEX, create=True)
        try:
            file.pwrite(fresh, self._index_bytes)
        except FerrylineError:
            return  # only a copy; recovery walks the headers instead
        finally:
            file.close()
        self._index_crc = zlib.crc32(fresh, self._index_crc)
        self._index_bytes = whole

    def _touch(self, segment: Segment) -> None:
        """Keep few indexes of sealed segments in memory."""
        if segment.seal is None:
            return
        if segment in self._loaded:
            self._loaded.remove(segment)
        self._loaded.append(segment)
        while len(self._loaded) > LOADED_INDEXES_MAX:
            self._loaded.pop(0).index = None


def drained(steps: Generator[None, None, T]) -> T:
    """Run a stepwise operation to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return cast(T, stop.value)
