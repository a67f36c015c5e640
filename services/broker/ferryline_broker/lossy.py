"""A disk for kill tests: what was written and not synced lives in this process only, so kill -9 is a power cut.

Contents only: names (creations, renames, removals) reach the real disk at once, and a cut takes effect at once, both of
which a real power cut may do as well.
"""

from __future__ import annotations

from ferryline_broker.log.files import FileStorage
from ferryline_broker.log.interface import Bytes, FileHandle


class _Unsynced:
    """Writes to one path that no sync has covered yet, oldest first; appends run together."""

    __slots__ = ("writes",)

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytearray]] = []

    def write(self, position: int, data: Bytes) -> None:
        if self.writes:
            start, held = self.writes[-1]
            if start + len(held) == position:
                held += data
                return
        self.writes.append((position, bytearray(data)))

    def cut(self, size: int) -> None:
        self.writes = [(at, held[: max(0, size - at)]) for at, held in self.writes if at < size]

    @property
    def end(self) -> int:
        return max((at + len(held) for at, held in self.writes), default=0)


class _LossyFile:
    """A file handle whose writes wait for `fdatasync`."""

    def __init__(self, storage: LossyStorage, path: str, real: FileHandle) -> None:
        self._storage = storage
        self._path = path
        self._real = real

    def _unsynced(self) -> _Unsynced | None:
        return self._storage.unsynced.get(self._path)

    def pwrite(self, data: Bytes, position: int) -> None:
        self._storage.unsynced.setdefault(self._path, _Unsynced()).write(position, data)

    def pread(self, size: int, position: int) -> bytes:
        data = self._real.pread(size, position)
        unsynced = self._unsynced()
        if unsynced is None:
            return data
        out = bytearray(data)
        for at, held in unsynced.writes:
            begin, end = max(at, position), min(at + len(held), position + size)
            if begin >= end:
                continue
            if len(out) < begin - position:
                out.extend(bytes(begin - position - len(out)))
            out[begin - position : end - position] = memoryview(held)[begin - at : end - at]
        return bytes(out)

    def size(self) -> int:
        unsynced = self._unsynced()
        return max(self._real.size(), unsynced.end if unsynced is not None else 0)

    def fdatasync(self) -> None:
        unsynced = self._storage.unsynced.pop(self._path, None)
        if unsynced is not None:
            for at, held in unsynced.writes:
                self._real.pwrite(held, at)
        self._real.fdatasync()

    def truncate(self, size: int) -> None:
        unsynced = self._unsynced()
        if unsynced is not None:
            unsynced.cut(size)
        self._real.truncate(size)

    def set_idle(self, idle: bool) -> None:
        self._real.set_idle(idle)

    def close(self) -> None:
        self._real.close()


class LossyStorage(FileStorage):
    """The real disk, but for writes that were not synced."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.unsynced: dict[str, _Unsynced] = {}

    def open(self, path: str, *, create: bool = False) -> FileHandle:
        return _LossyFile(self, path, super().open(path, create=create))

    def read_small(self, path: str) -> bytes | None:
        if path not in self.unsynced:
            return super().read_small(path)
        file = self.open(path)
        try:
            return file.pread(file.size(), 0)
        finally:
            file.close()

    def sync_all(self) -> bool:
        return False  # file by file, so that each one's unsynced writes are written first

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        for path in [path for path in self.unsynced if path == source or path.startswith(f"{source}/")]:
            self.unsynced[target + path[len(source) :]] = self.unsynced.pop(path)

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self.unsynced.pop(path, None)
