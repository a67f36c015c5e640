"""FileStorage: the real disk.

Every call is inline on the event loop. A thread executor beside a busy loop was measured at 0.1 to 2.7 s per job,
because the loop gives the GIL back too rarely; a pwrite into the page cache takes microseconds.

Descriptors: a file in use keeps its own; idle files (sealed segments, sidecars) share a bounded cache, so that the
number of segments does not decide how many descriptors a broker needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
from collections import OrderedDict
from collections.abc import Callable

from ferryline.protocol.errors import StorageFailed
from ferryline_broker.log.interface import TEMP_SUFFIX, Bytes, FileHandle, Lock, parent_of, translated

SYNCFS_KERNEL = (5, 8)  # since then syncfs reports write-back errors; before, success meant nothing
_SMALL_BYTES = 64 * 1024
IDLE_FILES_MAX = 256  # descriptors kept for files that are only read now and then


class _File:
    """A file with a descriptor of its own, or (when idle) one that the cache may take away."""

    __slots__ = ("_fd", "_full", "_idle", "_storage", "path")

    def __init__(self, storage: FileStorage, path: str, full: str, fd: int) -> None:
        self._storage, self.path, self._full, self._fd = storage, path, full, fd
        self._idle = False

    def pwrite(self, data: Bytes, position: int) -> None:
        fd = self._fd if self._fd >= 0 else self._reopen()
        try:
            written = os.pwrite(fd, data, position)
            if written != len(data):
                view = memoryview(data)
                while written < len(view):
                    written += os.pwrite(fd, view[written:], position + written)
        except OSError as error:
            raise translated(error, f"write {self.path}") from error

    def pread(self, size: int, position: int) -> bytes:
        fd = self._fd if self._fd >= 0 else self._reopen()
        try:
            data = os.pread(fd, size, position)
            if len(data) == size or not data:
                return data
            parts = [data]  # a short read is the end of the file, unless a signal or the 2 GiB limit cut it
            got = len(data)
            while got < size and (more := os.pread(fd, size - got, position + got)):
                parts.append(more)
                got += len(more)
            return b"".join(parts)
        except OSError as error:
            raise translated(error, f"read {self.path}") from error

    def size(self) -> int:
        fd = self._fd if self._fd >= 0 else self._reopen()
        try:
            return os.fstat(fd).st_size
        except OSError as error:
            raise translated(error, f"stat {self.path}") from error

    def fdatasync(self) -> None:
        fd = self._fd if self._fd >= 0 else self._reopen()
        try:
            os.fdatasync(fd)
        except OSError as error:
            raise translated(error, f"fdatasync {self.path}") from error

    def truncate(self, size: int) -> None:
        fd = self._fd if self._fd >= 0 else self._reopen()
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            raise translated(error, f"truncate {self.path}") from error

    def set_idle(self, idle: bool) -> None:
        if idle:
            self._idle = True
            if self._fd >= 0:
                self._storage._keep(self)
        elif self._idle:
            if self._fd < 0:
                self._reopen()
            self._idle = False
            self._storage._forget(self)

    def close(self) -> None:
        self._idle = False
        self._storage._forget(self)
        self._drop()

    def _drop(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # nothing is dirty here: a failed close loses nothing
                os.close(fd)

    def _reopen(self) -> int:
        if not self._idle:
            raise StorageFailed(f"{self.path}: the file is closed")
        try:
            self._fd = os.open(self._full, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise translated(error, f"open {self.path}") from error
        self._storage._keep(self)
        return self._fd


class _FileLock:
    """Held by an open descriptor, so the kernel releases it with the process, however that ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _find_syncfs() -> Callable[[int], int] | None:
    """The system call, or None where it is missing or does not report errors."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if found is None or (int(found[1]), int(found[2])) < SYNCFS_KERNEL:
        return None
    call: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "syncfs", None)
    return call


class FileStorage:
    """Files below ``root`` (made if missing)."""

    def __init__(self, root: str, *, idle_files_max: int = IDLE_FILES_MAX) -> None:
        self.root = os.fspath(root)
        self._idle: OrderedDict[_File, None] = OrderedDict()  # least recently opened first
        self._idle_max = idle_files_max
        try:
            os.makedirs(self.root, exist_ok=True)
            # Kept open from before the first write: syncfs reports errors since the last call on this descriptor.
            self._root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise translated(error, f"make {self.root}") from error
        self._syncfs = _find_syncfs()

    def open(self, path: str, *, create: bool = False) -> FileHandle:
        full = self._full(path)
        try:
            fd = os.open(full, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o640)
        except OSError as error:
            raise translated(error, f"open {path}") from error
        return _File(self, path, full, fd)

    def exists(self, path: str) -> bool:
        return os.path.exists(self._full(path))

    def listdir(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self._full(path)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise translated(error, f"list {path}") from error

    def is_dir(self, path: str) -> bool:
        return os.path.isdir(self._full(path))

    def mkdirs(self, path: str, *, sync: bool = True) -> None:
        if not sync:
            try:
                os.mkdir(self._full(path), 0o750)
            except FileExistsError:
                pass
            except FileNotFoundError:
                self.mkdirs(parent_of(path), sync=False)
                self.mkdirs(path, sync=False)
            except OSError as error:
                raise translated(error, f"make {path}") from error
            return
        made = ""
        for part in path.split("/"):
            parent, made = made, f"{made}/{part}" if made else part
            try:
                os.mkdir(self._full(made), 0o750)
            except FileExistsError:
                pass  # perhaps made by a process that died before it synced the name
            except OSError as error:
                raise translated(error, f"make {made}") from error
            self.fsync_dir(parent)

    def fsync_dir(self, path: str) -> None:
        try:
            fd = os.open(self._full(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise translated(error, f"fsync {path or '.'}") from error

    def rename(self, source: str, target: str) -> None:
        try:
            os.rename(self._full(source), self._full(target))
        except OSError as error:
            raise translated(error, f"rename {source}") from error

    def unlink(self, path: str) -> None:
        try:
            os.unlink(self._full(path))
        except FileNotFoundError:
            return
        except OSError as error:
            raise translated(error, f"unlink {path}") from error

    def rmdir(self, path: str) -> None:
        try:
            os.rmdir(self._full(path))
        except FileNotFoundError:
            return
        except OSError as error:
            raise translated(error, f"rmdir {path}") from error

    def sync_all(self) -> bool:
        if self._syncfs is None:
            return False
        if self._syncfs(self._root_fd) != 0:
            self._syncfs = None
            return False
        return True

    def close(self) -> None:
        """Give back the storage's own descriptors; open files and locks keep theirs."""
        self._syncfs = None
        while self._idle:
            self._idle.popitem()[0]._drop()
        fd, self._root_fd = self._root_fd, -1
        if fd >= 0:
            os.close(fd)

    def usage(self) -> tuple[int, int]:
        try:
            found = os.statvfs(self.root)
        except OSError as error:
            raise translated(error, f"statvfs {self.root}") from error
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def read_small(self, path: str) -> bytes | None:
        try:  # without a file object: a start reads several such files for each replica
            fd = os.open(self._full(path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.read(fd, _SMALL_BYTES)
                while len(data) and len(data) % _SMALL_BYTES == 0 and (more := os.read(fd, _SMALL_BYTES)):
                    data += more
                return data
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise translated(error, f"read {path}") from error

    def write_small_atomic(self, path: str, data: bytes, *, sync: bool = True) -> None:
        temp = path + TEMP_SUFFIX
        try:
            fd = os.open(self._full(temp), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(self._full(temp))
            raise translated(error, f"write {path}") from error
        self.rename(temp, path)
        if sync:
            self.fsync_dir(parent_of(path))

    def try_lock(self, path: str) -> Lock | None:
        try:
            fd = os.open(self._full(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise translated(error, f"open {path}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError as error:
            os.close(fd)
            raise translated(error, f"lock {path}") from error
        return _FileLock(fd)

    def _full(self, path: str) -> str:
        if path.startswith("/") or ".." in path:  # names come from uuids and numbers: anything else is a bug
            raise StorageFailed(f"path {path!r} leaves the storage root")
        return f"{self.root}/{path}" if path else self.root

    def _keep(self, file: _File) -> None:
        self._idle[file] = None
        self._idle.move_to_end(file)
        while len(self._idle) > self._idle_max:
            oldest, _ = self._idle.popitem(last=False)
            oldest._drop()

    def _forget(self, file: _File) -> None:
        self._idle.pop(file, None)
