"""Bring a log back after a stop of any kind (rule 7 of the replication rules): crash is not corruption.

What is decided, in this order:

1. ``start`` names the log start; leftovers of an unfinished reset or deletion are removed.
2. Sealed segments must be all there, back to back, each of the size its seal says. Anything else is DAMAGED: a missing
   file is never an empty one. Their contents are checked on first read and by the scrubber.
3. The active segment is read from the checkpoint on. The first bad batch at x:

   =====================================================  ==========================================================
   file ends before the checkpoint                        flush=fsync: DAMAGED; flush=replicated: cut, TRUNCATED
   whole and valid, but wrong offset or epoch             DAMAGED: no torn write makes this
   a valid batch lies after x                             DAMAGED: a hole; after a power loss torn tail: cut at x
   otherwise                                              torn tail: cut at x
   =====================================================  ==========================================================

4. What was read above the checkpoint is written again before it is synced. After a failed fdatasync the kernel calls
   dirty pages clean; a restarted process finds the data in the page cache and a sync would "succeed" without a write.
5. A log of a topic with flush=replicated that ends below its checkpointed high watermark is TRUNCATED.

A power loss (the machine's boot id is another one) leaves holes by itself: pages of what was not synced reach the disk
in any order. They prove that nothing from x on was synced, for a sync covers everything before it; so nothing from x on
was acknowledged from here. Called damage, they could stop every copy of a partition at once.

Nothing is changed in a log that is found damaged.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import msgspec

from ferryline.protocol.messages import LOG_DAMAGED, LOG_OK, LOG_TRUNCATED
from ferryline.protocol.metadata import FLUSH_FSYNC
from ferryline.protocol.records import BatchHeader
from ferryline_broker.log.envelope import SlotFile
from ferryline_broker.log.index import SparseIndex
from ferryline_broker.log.interface import TEMP_SUFFIX, LogDamaged, Storage
from ferryline_broker.log.model import Damage, LogCheckpoint, LogConfig, LogHooks
from ferryline_broker.log.scan import ScanEnd, find_batch_after, scan_batches
from ferryline_broker.log.segment import INDEX, LOG, SEAL, Segment, read_seal
from ferryline_broker.log.together import Together
from ferryline_broker.log.walk import CHAINED_BYTES

START_MAGIC = b"FLST"
EPOCH_ANY = 2**31 - 1
_REWRITE_BYTES = 8 * 1024 * 1024  # synced at least this often while written again
_WALK_STEP = 4096  # headers per step


class LogStart(msgspec.Struct, array_like=True, frozen=True):
    """Where the log begins. ``epoch``: of the last record before it, -1 if unknown. ``dropping``: a reset is under way,
    everything in the directory is to go."""

    offset: int = 0
    epoch: int = -1
    dropping: bool = False


@dataclass
class Recovered:
    """Outcome of recovery, ready to become a PartitionLog."""

    start_file: SlotFile
    start: LogStart
    segments: list[Segment] = field(default_factory=list)  # ascending; all sealed, but perhaps the last
    log_state: str = LOG_OK
    damage: Damage | None = None
    untouched: bool = False  # nothing of the active segment was written again

    @property
    def log_end(self) -> int:
        return max(self.start.offset, self.segments[-1].next_offset) if self.segments else self.start.offset


class Recovery:
    """One recovery of one directory. ``run`` yields between steps of at most a few ms."""

    def __init__(
        self,
        storage: Storage,
        path: str,
        config: LogConfig,
        checkpoint: LogCheckpoint,
        hooks: LogHooks,
        epoch_max: int,
        wall_ms: Callable[[], int],
        together: Together | None = None,
        power_lost: bool = False,
    ) -> None:
        self.storage, self.path, self.config, self.together = storage, path, config, together
        self.power_lost = power_lost
        self.checkpoint, self.hooks, self.epoch_max, self.wall_ms = checkpoint, hooks, epoch_max, wall_ms
        self._sealed: set[int] = set()  # bases that have a seal, by name

    def run(self) -> Generator[None, None, Recovered]:
        together = self.together
        together.make(self.path) if together is not None else self.storage.mkdirs(self.path)
        start_file = SlotFile(self.storage, f"{self.path}/start", START_MAGIC, together)
        start = start_file.load(LogStart, together)
        bases = self._bases()
        out = Recovered(start_file, start or LogStart())
        if start is None:
            if bases:
                out.start = LogStart(bases[0])
                return self._damaged(out, bases[0], "the file that names the log start is unreadable")
            if together is None:
                start_file.store_twice(out.start)
            else:
                start_file.store(out.start, sync=False)
                together.file(start_file)
        elif start.dropping:
            self._in_order()
            bases = finish_reset(self.storage, self.path, out, bases)
        bases = self._drop_below_start(out.start.offset, bases)
        try:
            yield from self._load(out, bases)
        except LogDamaged as error:
            return self._damaged(out, int(error.details.get("offset", -1)), error.message)
        return out

    def _in_order(self) -> None:
        """What was found so far is durable when this returns: the next step must not overtake it."""
        if self.together is not None:
            self.together.settle()

    # -- the directory ----------------------------------------------------------------------------

    def _bases(self) -> list[int]:
        """Base offsets of all segments; removes temporary files and sidecars without a log."""
        names = self.storage.listdir(self.path)
        bases = sorted(int(name[:20]) for name in names if name.endswith(LOG) and name[:20].isdigit())
        known = {f"{base:020d}" for base in bases}
        self._sealed = {int(name[:20]) for name in names if name.endswith(SEAL) and name[:20] in known}
        for name in names:
            orphan = name.endswith((SEAL, INDEX)) and name[:20] not in known
            if orphan or name.endswith(TEMP_SUFFIX):
                self.storage.unlink(f"{self.path}/{name}")
        return bases

    def _drop_below_start(self, log_start: int, bases: list[int]) -> list[int]:
        """Finish a deletion by retention: segments that end at or below the log start."""
        kept = list(bases)
        if kept and self._ends_below(kept, log_start):
            self._in_order()
        while kept and self._ends_below(kept, log_start):
            remove_files(self.storage, self.path, kept.pop(0))
        if len(kept) < len(bases):
            self.storage.fsync_dir(self.path)
        return kept

    def _ends_below(self, bases: list[int], log_start: int) -> bool:
        if len(bases) > 1:
            return bases[1] <= log_start
        seal = read_seal(self.storage, self.path, bases[0])
        return seal is not None and seal.next_offset <= log_start

    def _load(self, out: Recovered, bases: list[int]) -> Generator[None, None, None]:
        checkpoint, log_start = self.checkpoint, out.start.offset
        if checkpoint.segment >= log_start and checkpoint.segment not in bases and checkpoint.offset > log_start:
            found = f"segment {checkpoint.segment} named by the checkpoint is missing"
            raise LogDamaged(found, offset=min(checkpoint.segment, bases[0] if bases else log_start))
        if bases and bases[0] > log_start:
            raise LogDamaged(f"the log starts at {log_start}, its first segment at {bases[0]}", offset=log_start)
        for number, base in enumerate(bases):
            following = bases[number + 1] if number + 1 < len(bases) else None
            segment = self._open(base)
            seal = read_seal(self.storage, self.path, base) if base in self._sealed else None
            if seal is not None:
                if segment.file.size() != seal.size:
                    raise segment.damaged(base, f"{segment.file.size()} bytes, sealed with {seal.size}")
                segment.adopt(seal)
                segment.file.set_idle(True)
                if self.storage.exists(segment.stem + INDEX) is False:
                    segment.load_index()
            elif following is not None:
                self._in_order()
                yield from self._seal_again(segment)
            else:
                yield from self._recover_tail(out, segment)
                if segment.size == 0:  # nothing of it survived; left behind, it would outlive a reset
                    segment.remove()
                    self.storage.fsync_dir(self.path)
                    break
            out.segments.append(segment)
            if following is not None and segment.next_offset != following:
                raise segment.damaged(segment.next_offset, f"a segment is missing before {following}")
            if number % 16 == 0:
                yield
        if self.config.flush != FLUSH_FSYNC and out.log_end < checkpoint.hw:
            out.log_state = LOG_TRUNCATED
            self.hooks.before_cut(LogCheckpoint(offset=log_start, hw=out.log_end), LOG_TRUNCATED)

    def _open(self, base: int) -> Segment:
        segment = Segment(self.storage, self.path, base, self.storage.open(f"{self.path}/{base:020d}{LOG}"))
        segment.created_ms = segment.appended_ms = self.wall_ms()
        return segment

    def _seal_again(self, segment: Segment) -> Generator[None, None, None]:
        """A segment with a successor has lost its seal: good only if every byte of it checks out."""
        size = segment.file.size()
        end = yield from scan_batches(
            segment.file, 0, size, segment.base, -1, self.epoch_max, lambda header, data: segment.account(header, data)
        )
        if end.reason:
            raise segment.damaged(segment.next_offset, end.reason)
        segment.write_seal()

    # -- the active segment -----------------------------------------------------------------------

    def _recover_tail(self, out: Recovered, segment: Segment) -> Generator[None, None, None]:
        checkpoint, size = self.checkpoint, segment.file.size()
        mine = checkpoint.segment == segment.base
        short = mine and size < checkpoint.position
        if short and self.config.flush == FLUSH_FSYNC:
            raise segment.damaged(
                min(checkpoint.offset, segment.base), f"{size} bytes, {checkpoint.position} were flushed"
            )
        if mine and not short:
            yield from self._restore_below(segment)
        before = out.segments[-1].tail_epoch if out.segments else out.start.epoch
        rewriter = _Rewriter(segment)
        end: ScanEnd = yield from scan_batches(
            segment.file,
            segment.size,
            size,
            segment.next_offset,
            max(before, segment.tail_epoch),
            self.epoch_max,
            rewriter.accept,
        )
        if end.reason:
            yield from self._judge(segment, end, size)
        if short:  # remembered before the evidence goes
            out.log_state = LOG_TRUNCATED
            self.hooks.before_cut(LogCheckpoint(offset=segment.base, hw=segment.next_offset), LOG_TRUNCATED)
        if end.position < size:
            segment.file.truncate(end.position)
            rewriter.dirty = True
        if rewriter.dirty and self.together is None:
            rewriter.finish()
            self.storage.fsync_dir(self.path)  # after a process crash perhaps not even the file's name was synced
        elif self.together is not None and not self.together.settled and segment.size:
            # Also a cut that the last process did not live to sync: what is shown now must not grow back. A segment of
            # which nothing is left is removed, names and all, and its closed file must not be waited for.
            self.together.handle(segment.file)
            self.together.directory(self.path)
        out.untouched = not rewriter.dirty

    def _judge(self, segment: Segment, end: ScanEnd, size: int) -> Generator[None, None, None]:
        """Torn tail or damage? Returns only for a torn tail."""
        if end.damaged:
            raise segment.damaged(segment.next_offset, end.reason)
        if self.power_lost:
            return
        after = yield from find_batch_after(
            segment.file, end.position, size, segment.next_offset, max(0, segment.tail_epoch)
        )
        if after >= 0:
            raise segment.damaged(segment.next_offset, f"{end.reason}; yet a valid batch follows at position {after}")

    def _restore_below(self, segment: Segment) -> Generator[None, None, None]:
        """Picture of the part below the checkpoint, from the index file; by walking the headers if it does not fit."""
        checkpoint = self.checkpoint
        data = b""
        if checkpoint.index_bytes:
            data = (self.storage.read_small(segment.stem + INDEX) or b"")[: checkpoint.index_bytes]
        if data and len(data) == checkpoint.index_bytes and zlib.crc32(data) == checkpoint.index_crc:
            segment.index = SparseIndex(data)
            segment.epochs = segment.index.epochs(segment.base)
            segment.tail_epoch = segment.epochs[-1][0]
            segment.size, segment.next_offset = checkpoint.position, checkpoint.offset
            segment.chain, segment.max_timestamp = checkpoint.chain, checkpoint.max_timestamp
        else:
            for count, (header, front) in enumerate(segment.walk(0, checkpoint.position)):
                if header.base_offset != segment.next_offset or header.epoch < segment.tail_epoch:
                    raise segment.damaged(segment.next_offset, f"{header.base_offset} found below the checkpoint")
                segment.account(header, front)
                if count % _WALK_STEP == 0:
                    yield
            if segment.chain != checkpoint.chain or segment.next_offset != checkpoint.offset:
                raise segment.damaged(segment.base, "headers below the checkpoint do not match it")
        segment.trusted_from = checkpoint.position
        segment.created_ms, segment.appended_ms = checkpoint.created_ms, checkpoint.appended_ms

    def _damaged(self, out: Recovered, offset: int, reason: str) -> Recovered:
        out.log_state = LOG_DAMAGED
        out.damage = Damage(offset, reason)
        return out


class _Rewriter:
    """Writes good batches back where they stand and takes them up (see point 4 above)."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._since_sync = 0
        self.dirty = False

    def accept(self, header: BatchHeader, data: memoryview) -> None:
        segment = self._segment
        segment.file.pwrite(data, segment.size)
        segment.account(header, data[:CHAINED_BYTES])
        self.dirty = True
        self._since_sync += header.size
        if self._since_sync >= _REWRITE_BYTES:
            segment.file.fdatasync()
            self._since_sync = 0

    def finish(self) -> None:
        self._segment.file.fdatasync()


def finish_reset(storage: Storage, path: str, out: Recovered, bases: list[int]) -> list[int]:
    """Remove every segment and let the log begin, empty, where ``start`` says."""
    for base in reversed(bases):
        remove_files(storage, path, base)
    storage.fsync_dir(path)
    out.start = LogStart(out.start.offset, out.start.epoch)
    out.start_file.store(out.start)
    return []


def remove_files(storage: Storage, path: str, base: int) -> None:
    stem = f"{path}/{base:020d}"
    storage.unlink(stem + LOG)
    storage.unlink(stem + SEAL)
    storage.unlink(stem + INDEX)
