"""SegmentChain: the segments of one log, back to back, and the order in which their files come and go.

The order matters more than anything else here, because a crash may fall between any two steps:

* sealing: data synced, then index and seal, then their names; only then may the next segment be created;
* cutting: the last segment goes first, one by one, each removal synced; then the seal of the one to be shortened; then
  its tail;
* dropping the oldest: only after the log start was recorded.

Errors leave as they come from the storage; `PartitionLog` decides what they mean for the log.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable

from ferryline.protocol.errors import FerrylineError
from ferryline_broker.log.index import ENTRY_BYTES, SparseIndex
from ferryline_broker.log.interface import FileHandle, Storage
from ferryline_broker.log.segment import INDEX, LOG, Segment, Walked

LOADED_INDEXES_MAX = 4  # of sealed segments, per log


class SegmentChain:
    """Ascending, contiguous; all sealed but perhaps the last, which is then the ``active`` one."""

    def __init__(self, storage: Storage, path: str, segments: list[Segment], wall_ms: Callable[[], int]) -> None:
        self.segments = segments
        self.active: Segment | None = None
        self._storage, self._path, self._wall_ms = storage, path, wall_ms
        self._bases = [segment.base for segment in segments]
        self._loaded: list[Segment] = []  # sealed segments with their index in memory, least recently used first
        self.resting = False  # the active segment's file may lose its descriptor: nobody appends at present
        self._names_dirty = False  # a file was created and its directory not yet synced
        self._index_file: FileHandle | None = None  # of the active segment, while it is written to
        self._index_bytes = self._index_crc = 0  # of it, as written
        self._settle()

    def _settle(self) -> None:
        last = self.segments[-1] if self.segments else None
        active = last if last is not None and last.seal is None else None
        if active is not self.active:
            self._leave_index()
            self.resting = False
        self.active = active

    def _leave_index(self) -> None:
        """What stands in the index file is not known any more, or nothing is to be added."""
        self._index_bytes = self._index_crc = 0
        self._close_index()

    def _close_index(self) -> None:
        file, self._index_file = self._index_file, None
        if file is not None:
            file.close()

    @property
    def last(self) -> Segment | None:
        return self.segments[-1] if self.segments else None

    @property
    def dirty(self) -> bool:
        return self._names_dirty

    def number_of(self, offset: int) -> int:
        """Index in ``segments`` of the one that holds ``offset``."""
        return max(0, bisect_right(self._bases, offset) - 1)

    def find(self, offset: int) -> Segment:
        """The segment that holds ``offset``, with few indexes of sealed segments kept in memory."""
        segment = self.segments[self.number_of(offset)]
        self.touch(segment)
        return segment

    def touch(self, segment: Segment) -> None:
        if segment.seal is None or (self._loaded and self._loaded[-1] is segment):
            return
        if segment in self._loaded:
            self._loaded.remove(segment)
        self._loaded.append(segment)
        while len(self._loaded) > LOADED_INDEXES_MAX:
            self._loaded.pop(0).index = None

    def rest(self) -> None:
        """Let go of the active segment's descriptor until `wake`. Only when nothing of it is dirty: an error of its
        write-back is told to who has it open."""
        if self.active is not None and not self.resting:
            self.active.file.set_idle(True)
            self._close_index()
            self.resting = True

    def wake(self) -> None:
        """Something is about to be written to the active segment."""
        if self.resting and self.active is not None:
            self.active.file.set_idle(False)
        self.resting = False

    # -- growing ----------------------------------------------------------------------------------

    def begin(self, base: int) -> Segment:
        """Create the next segment and make it the active one. Its name is durable after `sync`."""
        file = self._storage.open(f"{self._path}/{base:020d}{LOG}", create=True)
        segment = Segment(self._storage, self._path, base, file)
        segment.created_ms = self._wall_ms()
        self._names_dirty = True
        self.segments.append(segment)
        self._bases.append(base)
        self._settle()
        return segment

    def sync(self) -> None:
        """Contents and name of the active segment are durable when this returns."""
        if self.active is not None:
            self.active.file.fdatasync()
        if self._names_dirty:
            self._storage.fsync_dir(self._path)
            self._names_dirty = False

    def synced_by_group(self) -> None:
        self._names_dirty = False

    def seal_active(self) -> None:
        """Seal the active segment, which must be synced. Durable, names included."""
        active = self.active
        assert active is not None
        active.write_seal()
        self.touch(active)
        self._settle()

    def persist_index(self, flushed_position: int) -> tuple[int, int]:
        """Write new index entries of the active segment, as far as the log is flushed; (bytes, crc) of what is written.

        Entries of unflushed batches stay out: after a power cut they may describe batches that are gone. Not synced,
        for it is only a copy; if it does not fit at the next start, the headers are walked instead.
        """
        active = self.active
        if active is None:
            return 0, 0
        assert active.index is not None
        whole = active.index.count_below(flushed_position) * ENTRY_BYTES
        if whole > self._index_bytes:
            fresh = bytes(active.index.data[self._index_bytes : whole])
            try:
                if self._index_file is None:
                    self._index_file = self._storage.open(active.stem + INDEX, create=True)
                    self._index_file.set_idle(True)  # its write-back may fail unseen: it is only a copy
                self._index_file.pwrite(fresh, self._index_bytes)
            except FerrylineError:
                self._close_index()
                return self._index_bytes, self._index_crc
            self._index_crc = zlib.crc32(fresh, self._index_crc)
            self._index_bytes = whole
        return self._index_bytes, self._index_crc

    # -- shrinking --------------------------------------------------------------------------------

    def cut(self, keep: int, at: Walked) -> None:
        """Let the chain end at ``at`` inside segment number ``keep``. Durable."""
        self.wake()
        first_gone = keep + 1 if at.position else keep
        while len(self.segments) > first_gone:
            self.segments[-1].remove()
            self._storage.fsync_dir(self._path)  # one by one: a crash must not leave a gap
            self._forget(self.segments.pop())
            self._bases.pop()
        if at.position:
            segment = self.segments[keep]
            index = SparseIndex(segment.load_index().data)
            index.cut(at.position)
            if segment.seal is not None:
                self._forget(segment)
                segment.unseal(index)
            segment.shorten(at, index)
        self._leave_index()
        self._names_dirty = False
        self._settle()

    def drop_below(self, gone: int) -> None:
        """Remove the oldest ``gone`` segments. Durable."""
        for segment in self.segments[:gone]:
            segment.remove()
            self._forget(segment)
        self._storage.fsync_dir(self._path)
        del self.segments[:gone]
        del self._bases[:gone]
        self._settle()

    def clear(self) -> list[int]:
        """Close all files and forget them; returns their bases, for whoever removes them."""
        bases = self._bases
        for segment in self.segments:
            segment.file.close()
        self.segments.clear()
        self._bases = []
        self._loaded.clear()
        self._names_dirty = False
        self._settle()
        return bases

    def _forget(self, segment: Segment) -> None:
        if segment in self._loaded:
            self._loaded.remove(segment)
