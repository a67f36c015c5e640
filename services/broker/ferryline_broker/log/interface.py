"""The narrow interface through which every byte reaches a disk.

Rules of this file:

* Paths are relative to the root of the storage, with ``/`` between parts.
* Every failure is a StorageFull (no space, no quota: nothing is wrong with what is stored) or a StorageFailed
  (anything else). OSError never leaves a Storage.
* Durability is what POSIX promises and no more: contents after ``fdatasync``, directory entries after ``fsync_dir``.
* After a failed ``fdatasync`` nobody may call it again on the same file: the kernel has dropped the dirty pages and a
  second call would report success for data that is gone.
"""

from __future__ import annotations

import errno
from typing import Protocol

from ferryline.protocol.errors import FerrylineError, StorageFailed, StorageFull

Bytes = bytes | bytearray | memoryview

TEMP_SUFFIX = ".tmp"


class LogDamaged(StorageFailed):
    """Bytes that were once durable are wrong or missing. Never served; repaired from another replica.

    ``details``: ``offset`` of the first record that cannot be trusted.
    """


def translated(error: OSError, what: str) -> FerrylineError:
    """The error of the protocol that stands for ``error``."""
    text = f"{what}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(text)
    return StorageFailed(text, errno=error.errno or 0)


class FileHandle(Protocol):
    """One open file. Positions and sizes in bytes."""

    def pwrite(self, data: Bytes, position: int) -> None:
        """Write all of ``data`` or raise; after an error any part of it may have been written."""

    def pread(self, size: int, position: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""

    def size(self) -> int: ...

    def fdatasync(self) -> None:
        """Contents and size are durable when this returns. Never call it again after it raised."""

    def truncate(self, size: int) -> None:
        """Cut to ``size``. Durable only after ``fdatasync``."""

    def set_idle(self, idle: bool) -> None:
        """An idle file may lose its descriptor and get a new one at its next use. Only for files with no dirty data."""

    def close(self) -> None: ...


class Lock(Protocol):
    def release(self) -> None: ...


class Storage(Protocol):
    """A tree of files below one root."""

    def open(self, path: str, *, create: bool = False) -> FileHandle:
        """Open for reading and writing. ``create`` makes a missing file; its name is durable after ``fsync_dir``."""

    def exists(self, path: str) -> bool: ...

    def listdir(self, path: str) -> list[str]:
        """Sorted names; empty when there is no such directory."""

    def is_dir(self, path: str) -> bool: ...

    def mkdirs(self, path: str, *, sync: bool = True) -> None:
        """Make the directory and its parents; their names are durable when this returns, unless ``sync`` is False."""

    def fsync_dir(self, path: str) -> None:
        """Make creations, renames and removals in this directory durable."""

    def rename(self, source: str, target: str) -> None:
        """Atomic; replaces ``target``. Durable after ``fsync_dir`` of both directories."""

    def unlink(self, path: str) -> None:
        """Remove a file; a missing one is no error."""

    def rmdir(self, path: str) -> None:
        """Remove an empty directory; a missing one is no error."""

    def sync_all(self) -> bool:
        """Everything written so far, contents and names, is durable if this returns True.

        False: not known. Then sync each file; from here on the answer stays False, so that an error of a file which
        nobody synced at the time is found when that file is.
        """

    def usage(self) -> tuple[int, int]:
        """(free, total) bytes of the file system."""

    def read_small(self, path: str) -> bytes | None:
        """Whole contents, None when there is no such file."""

    def write_small_atomic(self, path: str, data: bytes, *, sync: bool = True) -> None:
        """Replace the file as one step: after a crash either the old or the new contents are there. Durable.

        With ``sync`` False neither holds before the caller has synced the file and its directory.
        """

    def try_lock(self, path: str) -> Lock | None:
        """An exclusive lock that ends with this process, or None while another holds it."""


def parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def name_of(path: str) -> str:
    return path.rpartition("/")[2]
