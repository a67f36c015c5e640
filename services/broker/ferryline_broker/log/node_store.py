"""NodeStore: what one broker keeps on disk beside its replicas, and the lock that makes the directory its own.

::

    <data root>/<n>/
        lock            held for the life of the process
        format          storage_id, cluster_id, broker_id (changes at most twice)
        node            incarnation, boot_id, sticky restart class, seen_coord_epoch (slot file)
        clean_stop      only there after a clean stop; names the incarnation that stopped
        partitions/     one directory per replica (`replica_store.py`); ".gone-*" are being deleted

A restart is one of four classes (rule 7.1):

=============  ===========================================================================================
clean          the last process wrote ``clean_stop`` as its last act
process_crash  same boot of the kernel: everything written is in the page cache; kill -9 loses nothing
os_crash       another boot: what was not synced may be gone
foreign        no or another storage_id: this is not the disk that the cluster knows
=============  ===========================================================================================

The last two are sticky until a registration was confirmed: otherwise an OS crash followed by a quick process crash
would be reported as the harmless one.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Generator
from pathlib import Path

import msgspec

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline.protocol.messages import (
    RESTART_CLEAN,
    RESTART_FOREIGN,
    RESTART_OS_CRASH,
    RESTART_PROCESS_CRASH,
)
from ferryline_broker.log.envelope import SlotFile, pack, unpack
from ferryline_broker.log.model import LogConfig
from ferryline_broker.log.replica_store import ReplicaStore, quarantine, replica_path
from ferryline_broker.log.steps import drained, wall_clock_ms
from ferryline_broker.log.storage import Lock, Storage
from ferryline_broker.log.together import GROUP_MIN, GROUP_MIN_AT_START, Together

FORMAT_MAGIC, NODE_MAGIC, CLEAN_MAGIC = b"FLFM", b"FLND", b"FLCS"
DIRECTORIES_MAX = 1000  # tried before giving up: more brokers than this never share one data root
_REPLICA_NAME = re.compile(r"\A([0-9a-f]{32})-(\d{1,9})\Z")
_GONE = ".gone-"

Key = tuple[str, int]


class Format(msgspec.Struct, array_like=True, frozen=True):
    storage_id: str
    cluster_id: str = ""
    broker_id: int = 0


class NodeState(msgspec.Struct, array_like=True, frozen=True):
    storage_id: str  # as in `format`: a mismatch means that somebody put two disks together
    incarnation: int
    boot_id: str
    lossy_pending: str = ""  # "", "os_crash" or "foreign"
    seen_coord_epoch: int = 0


class CleanStop(msgspec.Struct, array_like=True, frozen=True):
    incarnation: int


def kernel_boot_id() -> str:
    """Changes when the machine (not a container or process) starts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def new_storage_id() -> str:
    return uuid.uuid4().hex


class NodeStore:
    """The directory of one broker. Open it once per process, before anything else touches the data root.

    Invariants: the incarnation on disk is the one of this process before anybody hears of it; seen_coord_epoch never
    falls; ``lossy_pending`` is cleared only by `confirm_registered`.
    """

    def __init__(self, storage: Storage, root: str, lock: Lock, wall_ms: Callable[[], int]) -> None:
        """Use `open`."""
        self.storage, self.root = storage, root
        self.restart_class = RESTART_FOREIGN
        self.replicas: dict[Key, ReplicaStore] = {}  # open ones
        self._opened: set[Key] = set()  # once, by this process
        self._lock, self._wall_ms = lock, wall_ms
        self._gone = 0  # highest number given to a deleted replica, 0: not looked for yet
        self._purge_due = True  # an earlier process may have left some
        self._format: Format
        self._state: NodeState
        self._node_file: SlotFile

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        boot_id: str | None = None,
        make_storage_id: Callable[[], str] = new_storage_id,
        expected_storage_id: str = "",
        wall_ms: Callable[[], int] = wall_clock_ms,
    ) -> NodeStore:
        """Lock the first free directory below the data root and start a new incarnation in it.

        Raises StorageFailed when every directory is taken.
        """
        for number in range(DIRECTORIES_MAX):
            storage.mkdirs(str(number))
            lock = storage.try_lock(f"{number}/lock")
            if lock is not None:
                self = cls(storage, str(number), lock, wall_ms)
                self._start(boot_id or kernel_boot_id(), make_storage_id, expected_storage_id)
                return self
        raise StorageFailed(f"all {DIRECTORIES_MAX} directories of the data root are locked by other brokers")

    def _start(self, boot_id: str, make_storage_id: Callable[[], str], expected: str) -> None:
        root, storage = self.root, self.storage
        clean = unpack(CLEAN_MAGIC, storage.read_small(f"{root}/clean_stop") or b"", CleanStop)
        # First of all: a crash from now on must not find the old marker.
        storage.unlink(f"{root}/clean_stop")
        storage.fsync_dir(root)
        found = unpack(FORMAT_MAGIC, storage.read_small(f"{root}/format") or b"", Format)
        self._node_file = SlotFile(storage, f"{root}/node", NODE_MAGIC)
        before = self._node_file.load(NodeState)
        self._format = found[1] if found is not None else Format(make_storage_id())
        if found is None:
            self._write_format(self._format)
        self.restart_class = _classify(found is not None, before, self._format.storage_id, boot_id, clean, expected)
        lossy = self.restart_class if self.restart_class in (RESTART_OS_CRASH, RESTART_FOREIGN) else ""
        if before is not None and before.lossy_pending and lossy != RESTART_FOREIGN:
            lossy = self.restart_class = before.lossy_pending
        self._state = NodeState(
            self._format.storage_id,
            (before.incarnation if before is not None else 0) + 1,
            boot_id,
            lossy,
            before.seen_coord_epoch if before is not None else 0,
        )
        self._node_file.store_twice(self._state)
        storage.mkdirs(f"{root}/partitions")
        storage.fsync_dir(f"{root}/partitions")  # a deletion that the last process did not live to sync

    # -- identity ---------------------------------------------------------------------------------

    @property
    def storage_id(self) -> str:
        return self._format.storage_id

    @property
    def cluster_id(self) -> str:
        """Empty until first registered."""
        return self._format.cluster_id

    @property
    def broker_id(self) -> int:
        """0 until first registered."""
        return self._format.broker_id

    @property
    def incarnation(self) -> int:
        return self._state.incarnation

    @property
    def boot_id(self) -> str:
        return self._state.boot_id

    @property
    def lossy_pending(self) -> str:
        return self._state.lossy_pending

    @property
    def seen_coord_epoch(self) -> int:
        return self._state.seen_coord_epoch

    @property
    def directory(self) -> str:
        """Of this broker, relative to the data root: certificates and the like may live here too."""
        return self.root

    def set_identity(self, cluster_id: str, broker_id: int) -> None:
        """Remember who this broker is. Durable; a directory never changes cluster or broker id afterwards."""
        wanted = Format(self.storage_id, cluster_id, broker_id)
        if wanted == self._format:
            return
        known = self._format
        if known.cluster_id not in ("", cluster_id) or known.broker_id not in (0, broker_id):
            raise StorageFailed(
                f"directory {self.root} belongs to broker {known.broker_id} of cluster {known.cluster_id}, "
                f"not to broker {broker_id} of cluster {cluster_id}"
            )
        self._write_format(wanted)
        self._format = wanted

    def persist_coord_epoch(self, coord_epoch: int) -> None:
        """Raise seen_coord_epoch; durable when this returns."""
        if coord_epoch > self._state.seen_coord_epoch:
            self._store(msgspec.structs.replace(self._state, seen_coord_epoch=coord_epoch))

    def confirm_registered(self) -> None:
        """The coordinator has taken up what this start reported: forget the sticky restart class and log states."""
        if self._state.lossy_pending:
            self._store(msgspec.structs.replace(self._state, lossy_pending=""))
        for store in self.replicas.values():
            store.confirm_reported()

    def mark_clean_stop(self) -> None:
        """Flush and checkpoint every open replica, close them, and say so. The last act before the process ends.

        After an error no marker is written: the next start takes this one for a crash, which is always safe.
        """
        together = Together(self.storage)
        for store in self.replicas.values():
            store.finish(together)
        together.settle()
        for store in self.replicas.values():
            store.close()
        self.replicas.clear()
        self.storage.write_small_atomic(f"{self.root}/clean_stop", pack(CLEAN_MAGIC, CleanStop(self.incarnation)))

    def close(self) -> None:
        """Release the lock and all descriptors, without a word about a clean stop."""
        for store in self.replicas.values():
            store.close()
        self.replicas.clear()
        self._node_file.close()
        self._lock.release()

    # -- replicas ---------------------------------------------------------------------------------

    def replicas_on_disk(self) -> list[Key]:
        found = []
        for name in self.storage.listdir(f"{self.root}/partitions"):
            match = _REPLICA_NAME.match(name)
            if match:
                found.append((match[1], int(match[2])))
        return found

    def recover_replica(
        self,
        topic_id: str,
        partition: int,
        config: LogConfig | None = None,
        *,
        quarantined: str = "",
        together: Together | None = None,
    ) -> Generator[None, None, ReplicaStore]:
        """Open a replica, creating it if it is not on disk, in steps of a few ms.

        ``quarantined``: why its files are to be set aside first (see `quarantine`); it then begins empty.
        """
        key = (topic_id, partition)
        assert _REPLICA_NAME.match(f"{topic_id}-{partition}"), key
        assert key not in self.replicas, f"{key} is open"
        if quarantined and self.storage.is_dir(replica_path(self.root, *key)):
            quarantine(self.storage, self.root, topic_id, partition, quarantined)
        store = yield from ReplicaStore.recover(
            self.storage,
            self.root,
            topic_id,
            partition,
            config,
            wall_ms=self._wall_ms,
            together=together,
            power_lost=self.restart_class == RESTART_OS_CRASH and key not in self._opened,
        )
        self.replicas[key] = store
        self._opened.add(key)
        return store

    def together(self, *, starting: bool = False) -> Together:
        """For opening many replicas with one sync."""
        group_min = GROUP_MIN_AT_START if starting else GROUP_MIN
        return Together(self.storage, settled=starting and self.restart_class == RESTART_CLEAN, group_min=group_min)

    def open_replica(
        self,
        topic_id: str,
        partition: int,
        config: LogConfig | None = None,
        *,
        quarantined: str = "",
        together: Together | None = None,
    ) -> ReplicaStore:
        """`recover_replica` in one go."""
        return drained(self.recover_replica(topic_id, partition, config, quarantined=quarantined, together=together))

    def delete_replica(self, topic_id: str, partition: int) -> None:
        """Remove a replica: gone durably when this returns, its space bit by bit through `purge_step`.

        Only for an explicit command of the coordinator that names the topic id (rule 7.5).
        """
        store = self.replicas.pop((topic_id, partition), None)
        if store is not None:
            store.close()
        path = replica_path(self.root, topic_id, partition)
        if self.storage.is_dir(path):
            parent = f"{self.root}/partitions"
            if not self._gone:  # of an earlier process, perhaps: looked for once, for the directory may be large
                names = self.storage.listdir(parent)
                self._gone = max((int(name.rpartition("-")[2]) for name in names if name.startswith(_GONE)), default=0)
            self._gone += 1
            self._purge_due = True
            self.storage.rename(path, f"{parent}/{_GONE}{self._gone}")
            self.storage.fsync_dir(parent)

    def purge_step(self, files_max: int = 4) -> bool:
        """Unlink a few files of deleted replicas; False when nothing is left to do."""
        if not self._purge_due:
            return False
        parent = f"{self.root}/partitions"
        left = files_max
        for name in self.storage.listdir(parent):
            if name.startswith(_GONE):
                left = self._purge(f"{parent}/{name}", left)
                if left <= 0:
                    return True
        self._purge_due = left < files_max
        return self._purge_due

    def usage(self) -> tuple[int, int]:
        """(free, total) bytes of the file system."""
        return self.storage.usage()

    def has_room(self, size: int) -> bool:
        """Whether so many bytes can be written now, by trying: quotas do not show in `usage`. Raises StorageFailed."""
        path = f"{self.root}/room"
        try:
            file = self.storage.open(path, create=True)
            try:
                file.pwrite(bytes(size), 0)
                file.fdatasync()
            finally:
                file.close()
        except StorageFull:
            return False
        finally:
            self.storage.unlink(path)
        return True

    # -- inside -----------------------------------------------------------------------------------

    def _purge(self, path: str, left: int) -> int:
        """Remove up to ``left`` files below ``path``, and the directory once it is empty."""
        for name in self.storage.listdir(path):
            if left <= 0:
                return 0
            if self.storage.is_dir(f"{path}/{name}"):
                left = self._purge(f"{path}/{name}", left)
            else:
                self.storage.unlink(f"{path}/{name}")
                left -= 1
        if left > 0:
            self.storage.rmdir(path)
            left -= 1
        return left

    def _write_format(self, wanted: Format) -> None:
        self.storage.write_small_atomic(f"{self.root}/format", pack(FORMAT_MAGIC, wanted))

    def _store(self, state: NodeState) -> None:
        self._node_file.store_twice(state)
        self._state = state


def _classify(
    formatted: bool,
    before: NodeState | None,
    storage_id: str,
    boot_id: str,
    clean: tuple[int, CleanStop] | None,
    expected: str,
) -> str:
    if not formatted or before is None or before.storage_id != storage_id or expected not in ("", storage_id):
        return RESTART_FOREIGN
    if clean is not None and clean[1].incarnation == before.incarnation:
        return RESTART_CLEAN
    return RESTART_PROCESS_CRASH if before.boot_id == boot_id else RESTART_OS_CRASH
