"""The product's own log code (`ferryline_broker.log`) on its `MemoryStorage`, with the face that the simulation needs.

Slower than `FastDisk`, and closer: torn tails byte by byte, lost directory entries, recovery, checkpoints, epochs and
producer snapshots are the real ones. Segments are small, so that rolls and sealed segments occur.
"""

from __future__ import annotations

import random

from ferryline.protocol.errors import StorageFailed
from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.records import BatchHeader, split_batches
from ferryline_broker.core.events import Bytes, Key
from ferryline_broker.core.partition import OpenedReplica
from ferryline_broker.core.producers import ProducerTable
from ferryline_broker.log.model import LogConfig
from ferryline_broker.log.node_store import NodeStore
from ferryline_broker.log.replica_store import ReplicaStore
from ferryline_broker.log.scrubber import Scrubber
from ferryline_broker.log.storage import Faults, MemoryStorage
from ferryline_broker.opening import opened_replica, rebuild_producers, replay_state
from tests.simulation.hosts import Host
from tests.simulation.settings import Weather
from tests.simulation.upkeep import Expired

SEGMENT_BYTES = 3_000


class RealReplica:
    """One replica on the product's log."""

    def __init__(self, store: ReplicaStore, storage: MemoryStorage, *, repairing: bool) -> None:
        self.store = store
        self.disk_storage = storage
        self._repairing = repairing

    def opened(self) -> OpenedReplica:
        return opened_replica(self.store, repairing=self._repairing)

    def append(self, log: int, data: Bytes, headers: list[tuple[int, BatchHeader]]) -> None:
        self.store.logs[log].append(data, headers)

    def sync(self, log: int, end: int) -> int:
        return max(end, self.store.logs[log].flush())

    def truncate(self, log: int, offset: int) -> int:
        return self.store.logs[log].truncate(offset)

    def reset(self, log: int, offset: int, epoch: int) -> None:
        self.store.logs[log].reset(offset, epoch)

    def advance_start(self, log: int, offset: int) -> int:
        return self.store.logs[log].advance_start(offset)

    def persist_epoch(self, epoch: int) -> None:
        self.store.persist_epoch(epoch)

    def checkpoint(self, high_watermark: list[int]) -> None:
        self.store.write_checkpoint(high_watermark[RECORDS], high_watermark[STATE])

    def read(self, log: int, start: int, below: int, bytes_max: int) -> tuple[bytes, list[tuple[int, BatchHeader]]]:
        data = self.store.logs[log].read(start, bytes_max, below)
        if bytes_max > 1 << 40:  # everything: a read may stop at the end of a segment
            parts, at = [data], start
            while data:
                at = split_batches(data, verify=False)[-1][1].next_offset
                data = self.store.logs[log].read(at, bytes_max, below) if at < below else b""
                parts.append(data)
            data = b"".join(parts)
        return data, split_batches(data, verify=False)

    def state_entries(self) -> list[tuple[int, int, bytes]]:
        return replay_state(self.store)

    def producers(self) -> ProducerTable:
        return rebuild_producers(self.store)

    def stored(self, log: int) -> list[tuple[int, int, int, int]]:
        found = self.store.logs[log]
        if found.damage is not None:
            return []
        return [(h.base_offset, h.next_offset, h.epoch, h.crc) for h in found.batch_headers(found.log_start)]

    def start(self, log: int) -> int:
        return self.store.logs[log].log_start

    def expired(self, wall_ms: int, limit: int) -> Expired | None:
        found = self.store.logs[RECORDS].retention_candidates(wall_ms, limit)
        return Expired(found[-1].end, True, -1, -1) if found else None

    def scrub(self) -> int:
        found = self.rotten()
        if found >= 0:
            self.store.mark_damaged("rot")
        return found

    def rotten(self) -> int:
        for log in (RECORDS, STATE):
            if Scrubber(self.store.logs[log]).step(1 << 30) is not None:
                return log
        return -1

    def rot(self, rng: random.Random) -> bool:
        """A bit of a log file, not in its last bytes: those are a torn tail as well as rot."""
        storage, log = self.disk_storage, self.store.logs[int(rng.random() * 2)]
        segments = [segment for segment in log.segments if segment.seal is not None]
        if not segments:
            return False
        segment = segments[int(rng.random() * len(segments))]
        path = f"{log.path}/{segment.base:020d}.log"
        storage.flip(path, int(rng.random() * segment.size), int(rng.random() * 8))
        return True


class RealDisk:
    """One machine's disk. Values that other hosts' checks ask for are kept while no process has it open."""

    def __init__(self, storage_id: str, weather: Weather) -> None:
        self.storage_id = storage_id
        self.broker_id = 0
        self.cluster_id = ""
        self.incarnation = 0
        self.seen_coord_epoch = 0
        self.stopped_clean = False
        self.host: Host
        self.rotten = False
        self._weather = weather
        self._storage = MemoryStorage()
        self._node: NodeStore | None = None
        self._boot = 1
        self._preset: tuple[int, str] | None = None  # a disk put in another's place
        self._write_error = self._sync_error = self._no_space = False

    # -- faults ------------------------------------------------------------------------------------

    @property
    def write_error(self) -> bool:
        return self._write_error

    @write_error.setter
    def write_error(self, on: bool) -> None:
        self._write_error = on
        self._set_faults()

    @property
    def sync_error(self) -> bool:
        return self._sync_error

    @sync_error.setter
    def sync_error(self, on: bool) -> None:
        self._sync_error = on
        self._set_faults()

    @property
    def no_space(self) -> bool:
        return self._no_space

    @no_space.setter
    def no_space(self, on: bool) -> None:
        self._no_space = on
        self._set_faults()

    def stop_after(self, operations: int) -> None:
        """kill -9 before the n-th change of the disk from now."""
        self._storage.faults = Faults(self._write_error, self._sync_error, stop_after=operations, match=".log")

    def _set_faults(self) -> None:
        left = 100 if self._no_space else None  # the beginning of a batch
        self._storage.faults = Faults(self._write_error, self._sync_error, space_left=left, match=".log")

    # -- lives -------------------------------------------------------------------------------------

    def start(self) -> str:
        self._node = NodeStore.open(
            self._storage,
            boot_id=f"boot-{self._boot}",
            make_storage_id=lambda: self.storage_id,
            wall_ms=self.host.wall_ms,
        )
        node = self._node
        if self._preset is not None and not node.broker_id:
            node.set_identity(self._preset[1], self._preset[0])
        self.incarnation = node.incarnation
        self.stopped_clean = False
        return node.restart_class

    @property
    def node(self) -> NodeStore:
        if self._node is None:
            raise StorageFailed("nobody has this disk open")
        return self._node

    def keys(self) -> list[Key]:
        return sorted(self.node.replicas_on_disk())

    def open(self, key: Key, *, quarantine: bool) -> RealReplica:
        node = self.node
        old = node.replicas.pop(key, None)
        if old is not None:
            old.close()
        weather = self._weather
        config = LogConfig(
            segment_bytes=SEGMENT_BYTES, retention_ms=weather.retention_ms, retention_bytes=weather.retention_bytes
        )
        store = node.open_replica(*key, config, quarantined="repair" if quarantine else "")
        return RealReplica(store, self._storage, repairing=quarantine)

    def delete(self, key: Key) -> None:
        if self._node is not None:
            self._node.delete_replica(*key)
            while self._node.purge_step():
                pass

    def join(self, broker_id: int, cluster_id: str) -> None:
        self.node.set_identity(cluster_id, broker_id)
        self.broker_id, self.cluster_id = broker_id, cluster_id

    def confirmed(self) -> None:
        self.node.confirm_registered()

    def persist_coord_epoch(self, coord_epoch: int) -> None:
        self.node.persist_coord_epoch(coord_epoch)
        self.seen_coord_epoch = coord_epoch

    def stop_cleanly(self, marks: dict[Key, list[int]]) -> None:
        for key, high_watermark in marks.items():
            self.node.replicas[key].write_checkpoint(high_watermark[RECORDS], high_watermark[STATE])
        self.node.mark_clean_stop()
        self.stopped_clean = True

    def process_died(self) -> None:
        self._node = None
        self._storage.crash()
        self._set_faults()

    def power_cut(self, rng: random.Random) -> bool:
        self._boot += 1
        self._storage.power_cut(rng, holes=self._weather.holes)
        self._set_faults()
        return False  # nobody knows before the next recovery

    def lose_unsynced(self) -> None:
        """A power cut of which nothing unsynced survives: for scenarios, which must not depend on luck."""
        self._boot += 1
        self._storage.lose_unsynced()
        self._set_faults()

    def survivors(self, key: Key) -> None:
        return None

    def exchanged(self, *, same_id: bool) -> RealDisk:
        fresh = RealDisk(f"{self.storage_id}x", self._weather)
        fresh.host = self.host
        if same_id:
            fresh._preset = (self.broker_id, self.cluster_id)
            fresh.broker_id, fresh.cluster_id = self.broker_id, self.cluster_id
            fresh.seen_coord_epoch = self.seen_coord_epoch
        return fresh
