"""MemoryStorage: a disk that can lose what was not synced, for tests and the simulator.

Each file has two images: what a reader of the running system sees (``live``) and what the medium holds (``disk``).
Writes change ``live`` and queue an operation; ``fdatasync`` applies the queue to ``disk``. Directories are the same:
``entries`` against ``durable`` plus a queue that ``fsync_dir`` applies.

* ``crash()``: the process dies, the kernel lives: everything written stays, handles and locks of the dead process end.
* ``power_cut(rng)``: per file some part of the queue reached the medium: nothing, a prefix with a torn last write, all,
  or (with ``holes``) any set of pages in any order, with zeros where an earlier page is missing. Per directory a
  prefix of its queue.
* Faults: see `Faults`. After a failed ``fdatasync`` the queue is gone while readers still see the data, and the next
  ``fdatasync`` succeeds: this is what kernels do, and why nobody may retry.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass

from ferryline.protocol.errors import StorageFailed
from ferryline_broker.log.interface import TEMP_SUFFIX, Bytes, FileHandle, Lock, name_of, parent_of, translated
from ferryline_broker.log.memory_nodes import (
    TRUNCATE,
    Change,
    Dir,
    Inode,
    apply_write,
    copied,
    cut_file,
    settle_names,
    sync_tree,
)


class SimulatedStop(BaseException):
    """The process stopped at this very operation (see `Faults.stop_after`). Not an Exception: nothing may handle it."""


@dataclass
class Faults:
    """Switches; ``None`` or False is off. ``match`` limits write and sync errors to paths that contain it."""

    write_error: bool = False  # EIO on every pwrite
    sync_error: bool = False  # EIO on every fdatasync and fsync_dir, and the dirty data is lost
    read_error: bool = False  # EIO on every pread
    space_left: int | None = None  # bytes until ENOSPC; a write over the limit is written in part
    stop_after: int | None = None  # SimulatedStop before the n-th further operation that changes anything
    match: str = ""
    on_sync: Callable[[str], None] | None = None  # called before each successful fdatasync, with the path


class _MemoryFile:
    __slots__ = ("_inode", "_life", "_storage")

    def __init__(self, storage: MemoryStorage, inode: Inode) -> None:
        self._storage, self._inode, self._life = storage, inode, storage.life

    def pwrite(self, data: Bytes, position: int) -> None:
        storage, inode = self._storage, self._inode
        if storage.armed or storage.life != self._life:
            data = storage.before_write(self, inode, data, position)
        payload = data if type(data) is bytes else bytes(data)
        apply_write(inode.live, position, payload)
        inode.queue.append((position, payload))
        storage.operations += 1

    def pread(self, size: int, position: int) -> bytes:
        storage = self._storage
        if storage.armed or storage.life != self._life:
            storage.check(self._life, self._inode.path)
            faults = storage.faults
            if faults.read_error and faults.match in self._inode.path:
                raise translated(OSError(errno.EIO, "Input/output error"), f"read {self._inode.path}")
        return bytes(self._inode.live[position : position + size])

    def size(self) -> int:
        self._storage.check(self._life, self._inode.path)
        return len(self._inode.live)

    def fdatasync(self) -> None:
        storage = self._storage
        if storage.armed or storage.life != self._life:
            storage.before_sync(self, self._inode)
        self._inode.sync()
        storage.operations += 1
        storage.syncs += 1

    def truncate(self, size: int) -> None:
        storage = self._storage
        storage.check(self._life, self._inode.path)
        storage.before_change()
        apply_write(self._inode.live, TRUNCATE - size, b"")
        self._inode.queue.append((TRUNCATE - size, b""))

    def set_idle(self, idle: bool) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def life(self) -> int:
        return self._life


class _MemoryLock:
    def __init__(self, storage: MemoryStorage, path: str) -> None:
        self._storage, self._path, self._life = storage, path, storage.life

    def release(self) -> None:
        if self._storage.life == self._life:
            self._storage.locks.discard(self._path)


class MemoryStorage:
    """Disk of one simulated machine. Survives the processes that use it: keep it, and open the stores on it again."""

    def __init__(self, *, total_bytes: int = 1 << 40) -> None:
        self.life = 0  # handles of an earlier life are dead
        self.armed = False  # True while any fault may fire: keeps the common path short
        self.operations = 0  # changes so far
        self.syncs = 0
        self.locks: set[str] = set()
        self._faults = Faults()
        self._root = Dir()
        self._total = total_bytes

    # -- faults -----------------------------------------------------------------------------------

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._faults = faults
        self.armed = faults != Faults()

    def crash(self) -> None:
        """The process dies. What it wrote is in the page cache and will be found again."""
        self.life += 1
        self.locks.clear()
        self.faults = Faults()

    def power_cut(self, rng: random.Random, *, holes: bool = False) -> None:
        """The machine dies: what was not synced survives in part, as ``rng`` decides."""
        self.crash()
        self._cut_dir(self._root, rng, holes)

    def lose_unsynced(self) -> None:
        """A power cut after which nothing unsynced survived."""
        self.crash()
        self._drop_dir(self._root)

    def flip(self, path: str, position: int, bit: int = 0) -> None:
        """Rot: one bit of the file changes, on the medium and for readers."""
        inode = self._inode(path)
        inode.live[position] ^= 1 << bit
        if position < len(inode.disk):
            inode.disk[position] ^= 1 << bit

    def contents(self, path: str) -> bytes:
        return bytes(self._inode(path).live)

    def replace(self, path: str, data: bytes) -> None:
        """Put other contents in place, as if from a copy; durable at once."""
        inode = self._inode(path)
        inode.live[:] = data
        inode.disk[:] = data
        inode.queue.clear()

    def copy(self) -> MemoryStorage:
        """An independent disk with the same contents, settled (nothing pending)."""
        other = MemoryStorage(total_bytes=self._total)
        other._root = copied(self._root)
        return other

    # -- Storage ----------------------------------------------------------------------------------

    def open(self, path: str, *, create: bool = False) -> FileHandle:
        directory, name = self._parent(path)
        node = directory.entries.get(name)
        if node is None:
            if not create:
                raise translated(OSError(errno.ENOENT, "No such file"), f"open {path}")
            self.before_change()
            node = Inode(path)
            self._link(directory, name, node)
        if not isinstance(node, Inode):
            raise translated(OSError(errno.EISDIR, "Is a directory"), f"open {path}")
        return _MemoryFile(self, node)

    def exists(self, path: str) -> bool:
        return self._find(path) is not None

    def listdir(self, path: str) -> list[str]:
        node = self._find(path)
        return sorted(node.entries) if isinstance(node, Dir) else []

    def is_dir(self, path: str) -> bool:
        return isinstance(self._find(path), Dir)

    def mkdirs(self, path: str, *, sync: bool = True) -> None:
        directory = self._root
        made = ""
        for part in path.split("/"):
            parent, made = made, f"{made}/{part}" if made else part
            node = directory.entries.get(part)
            if node is None:
                self.before_change()
                node = Dir()
                self._link(directory, part, node)
            if not isinstance(node, Dir):
                raise translated(OSError(errno.ENOTDIR, "Not a directory"), f"make {path}")
            if sync:
                self.fsync_dir(parent)
            directory = node

    def fsync_dir(self, path: str) -> None:
        node = self._find(path)
        if not isinstance(node, Dir):
            raise translated(OSError(errno.ENOENT, "No such directory"), f"fsync {path}")
        self.before_change()
        if self._faults.sync_error and self._faults.match in path:
            raise translated(OSError(errno.EIO, "Input/output error"), f"fsync {path}")
        for change in node.queue:
            change.apply()
        node.queue.clear()
        self.syncs += 1

    def rename(self, source: str, target: str) -> None:
        old_dir, old = self._parent(source)
        new_dir, new = self._parent(target)
        node = old_dir.entries.get(old)
        if node is None:
            raise translated(OSError(errno.ENOENT, "No such file"), f"rename {source}")
        self.before_change()
        del old_dir.entries[old]
        new_dir.entries[new] = node
        if isinstance(node, Inode):
            node.path = target
        change = Change([(old_dir, old, None), (new_dir, new, node)])
        old_dir.queue.append(change)
        if new_dir is not old_dir:
            new_dir.queue.append(change)

    def unlink(self, path: str) -> None:
        directory, name = self._parent(path)
        if name in directory.entries:
            self.before_change()
            del directory.entries[name]
            directory.queue.append(Change([(directory, name, None)]))

    def rmdir(self, path: str) -> None:
        node = self._find(path)
        if isinstance(node, Dir) and node.entries:
            raise translated(OSError(errno.ENOTEMPTY, "Directory not empty"), f"rmdir {path}")
        self.unlink(path)

    def sync_all(self) -> bool:
        if self._faults.sync_error:
            return False
        self.before_change()
        sync_tree(self._root)
        self.syncs += 1
        return True

    def usage(self) -> tuple[int, int]:
        left = self._faults.space_left
        return (self._total if left is None else left), self._total

    def read_small(self, path: str) -> bytes | None:
        node = self._find(path)
        return bytes(node.live) if isinstance(node, Inode) else None

    def write_small_atomic(self, path: str, data: bytes, *, sync: bool = True) -> None:
        temp = path + TEMP_SUFFIX
        try:
            handle = self.open(temp, create=True)
            handle.truncate(0)
            handle.pwrite(data, 0)
            if sync:
                handle.fdatasync()
        except Exception:
            self.unlink(temp)
            raise
        self.rename(temp, path)
        if sync:
            self.fsync_dir(parent_of(path))

    def try_lock(self, path: str) -> Lock | None:
        self.open(path, create=True)
        if path in self.locks:
            return None
        self.locks.add(path)
        return _MemoryLock(self, path)

    # -- inside -----------------------------------------------------------------------------------

    def check(self, life: int, path: str) -> None:
        if life != self.life:
            raise StorageFailed(f"{path}: this process has ended")

    def before_change(self) -> None:
        self.operations += 1
        if self.armed and self._faults.stop_after is not None:
            self._faults.stop_after -= 1
            if self._faults.stop_after < 0:
                raise SimulatedStop

    def before_write(self, file: _MemoryFile, inode: Inode, data: Bytes, position: int) -> Bytes:
        """Fire what is armed; returns the data to write."""
        self.check(file.life, inode.path)
        faults = self._faults
        if faults.stop_after is not None:
            self.before_change()
        if faults.write_error and faults.match in inode.path:
            raise translated(OSError(errno.EIO, "Input/output error"), f"write {inode.path}")
        if faults.space_left is not None and faults.match in inode.path:
            fresh = max(0, position + len(data) - len(inode.live))
            if fresh > faults.space_left:
                part = bytes(data[: len(data) - (fresh - faults.space_left)])
                faults.space_left = 0
                if part:
                    apply_write(inode.live, position, part)
                    inode.queue.append((position, part))
                raise translated(OSError(errno.ENOSPC, "No space left on device"), f"write {inode.path}")
            faults.space_left -= fresh
        return data

    def before_sync(self, file: _MemoryFile, inode: Inode) -> None:
        self.check(file.life, inode.path)
        faults = self._faults
        if faults.stop_after is not None:
            self.before_change()
        if faults.sync_error and faults.match in inode.path:
            inode.queue.clear()  # the kernel marks the pages clean: the data is lost, later calls succeed
            raise translated(OSError(errno.EIO, "Input/output error"), f"fdatasync {inode.path}")
        if faults.on_sync is not None:
            faults.on_sync(inode.path)

    def _link(self, directory: Dir, name: str, node: Inode | Dir) -> None:
        directory.entries[name] = node
        directory.queue.append(Change([(directory, name, node)]))

    def _find(self, path: str) -> Inode | Dir | None:
        node: Inode | Dir | None = self._root
        if path:
            for part in path.split("/"):
                if not isinstance(node, Dir):
                    return None
                node = node.entries.get(part)
        return node

    def _parent(self, path: str) -> tuple[Dir, str]:
        node = self._find(parent_of(path))
        if not isinstance(node, Dir):
            raise translated(OSError(errno.ENOENT, "No such directory"), path)
        return node, name_of(path)

    def _inode(self, path: str) -> Inode:
        node = self._find(path)
        assert isinstance(node, Inode), path
        return node

    def _cut_dir(self, directory: Dir, rng: random.Random, holes: bool) -> None:
        """Settle names everywhere first: a rename may stand in the queues of two directories."""
        settle_names(directory, rng)
        self._settle_files(directory, rng, holes)

    def _settle_files(self, directory: Dir, rng: random.Random, holes: bool) -> None:
        directory.entries = dict(directory.durable)
        for name in sorted(directory.entries):
            node = directory.entries[name]
            if isinstance(node, Dir):
                self._settle_files(node, rng, holes)
            else:
                cut_file(node, rng, holes)

    def _drop_dir(self, directory: Dir) -> None:
        directory.queue.clear()
        directory.entries = dict(directory.durable)
        for node in directory.durable.values():
            if isinstance(node, Dir):
                self._drop_dir(node)
            else:
                node.queue.clear()
                node.live[:] = node.disk
