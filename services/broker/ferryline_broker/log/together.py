"""Syncs that many replicas make in one go: at a start, and when one answer of the coordinator moves thousands of them.

Opening a replica syncs about two dozen names and files, most of them for the rare case that the last process died
between a write and its sync. One by one that is 5 ms for each replica; 200 replicas put off to one syncfs take 10 ms.

What was put off is durable when `settle` returns and not before: nobody may act on it until then. Whoever needs an
order between two durable steps (a cut after its checkpoint, a seal after its data) calls `settle` in between.
"""

from __future__ import annotations

from typing import Protocol

from ferryline_broker.log.interface import FileHandle, Storage, parent_of

# Fewer syncs are made one by one: syncfs also waits for what others have dirty on the same file system.
GROUP_MIN, GROUP_MIN_AT_START = 16, 1_000


class Syncable(Protocol):
    """Something that was written and not synced."""

    def sync(self) -> None:
        """Durable when this returns."""

    def synced_by_group(self) -> None:
        """`Storage.sync_all` has made it durable."""


class Together:
    """Collects what is to be synced. ``settled``: the process before synced everything as its last act, so that what
    was only read from files needs no second write."""

    def __init__(self, storage: Storage, *, settled: bool = False, group_min: int = GROUP_MIN) -> None:
        self.settled = settled
        self._group_min = group_min
        self._storage = storage
        self._files: dict[Syncable, None] = {}
        self._directories: dict[str, None] = {}

    def file(self, file: Syncable) -> None:
        """To be synced by `settle`."""
        self._files[file] = None

    def handle(self, handle: FileHandle) -> None:
        """The same for an open file that keeps no account of its own."""
        self._files[_Handle(handle)] = None

    def directory(self, path: str) -> None:
        """Names in this directory are to be durable after `settle`."""
        self._directories[path] = None

    def make(self, path: str) -> None:
        """The directory and its parents exist; their names are durable after `settle`."""
        self._storage.mkdirs(path, sync=False)
        while path:
            path = parent_of(path)
            self.directory(path)

    def write_small(self, path: str, data: bytes) -> None:
        """Replace a small file; whole and durable after `settle`. A power cut before may leave it empty."""
        self._storage.write_small_atomic(path, data, sync=False)
        self._files[_Named(self._storage, path)] = None
        self.directory(parent_of(path))

    def settle(self) -> None:
        """Everything put off so far is durable when this returns. Raises StorageFailed: nobody knows what is."""
        files, self._files = self._files, {}
        directories, self._directories = self._directories, {}
        if len(files) + len(directories) >= self._group_min and self._storage.sync_all():
            for file in files:
                file.synced_by_group()
            return
        for file in files:
            file.sync()
        for directory in directories:
            self._storage.fsync_dir(directory)


class _Handle:
    __slots__ = ("_handle",)

    def __init__(self, handle: FileHandle) -> None:
        self._handle = handle

    def sync(self) -> None:
        self._handle.fdatasync()

    def synced_by_group(self) -> None:
        return


class _Named:
    __slots__ = ("_path", "_storage")

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path

    def sync(self) -> None:
        file = self._storage.open(self._path)
        try:
            file.fdatasync()
        finally:
            file.close()

    def synced_by_group(self) -> None:
        return
