"""Disks of brokers: what is written, what is synced, and what a crash leaves of it.

`FastDisk` keeps batches in lists and knows for each log how far it was synced; that is quick enough for thousands of
seeds. `real_disk.RealDisk` has the same face over the product's own log code on its `MemoryStorage`.

A disk outlives the processes that use it. Everything except appends to the logs is durable when the call returns, as
the effects of the cores demand.
"""

from __future__ import annotations

import random
from typing import Protocol

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline.protocol.messages import (
    LOG_DAMAGED,
    LOG_OK,
    RECORDS,
    RESTART_CLEAN,
    RESTART_FOREIGN,
    RESTART_OS_CRASH,
    RESTART_PROCESS_CRASH,
)
from ferryline.protocol.records import BatchHeader, decode_batch
from ferryline_broker.core.events import Bytes, Key
from ferryline_broker.core.producers import ProducerTable
from ferryline_broker.core.replica import LogOpened, OpenedReplica
from tests.simulation.hosts import Host
from tests.simulation.settings import Weather
from tests.simulation.upkeep import Expired

BOTH = (0, 1)
RETENTION_STEP = 4  # batches in one go


def spoilt(data: bytes) -> bytes:
    """With one bit flipped where no header lies."""
    return data[:-1] + bytes((data[-1] ^ 1,))


class Stored:
    """One batch on a disk. ``value``: of a state record, decoded when first asked for."""

    __slots__ = ("appended_ms", "appended_us", "data", "header", "rotten", "values")

    def __init__(self, header: BatchHeader, data: bytes, appended_ms: int, appended_us: int) -> None:
        self.header = header
        self.rotten = False
        self.appended_ms = appended_ms  # by the wall clock of the broker
        self.appended_us = appended_us  # in truth
        self.data = data
        self.values: list[tuple[int, int, bytes]] | None = None

    @property
    def entries(self) -> list[tuple[int, int, bytes]]:
        """(offset, epoch, value) of each record."""
        if self.values is None:
            batch = decode_batch(self.data, self.header)
            self.values = [(record.offset, self.header.epoch, record.value or b"") for record in batch]
        return self.values


class ReplicaFiles(Protocol):
    """One replica on a disk. Any method may raise StorageFailed, those that write StorageFull."""

    def opened(self) -> OpenedReplica: ...
    def append(self, log: int, data: Bytes, headers: list[tuple[int, BatchHeader]]) -> None: ...
    def sync(self, log: int, end: int) -> int:
        """Make everything below ``end`` durable (more is allowed); returns how far it is now."""

    def truncate(self, log: int, offset: int) -> int:
        """Returns the new end of the log."""

    def reset(self, log: int, offset: int, epoch: int) -> None: ...
    def advance_start(self, log: int, offset: int) -> int: ...
    def persist_epoch(self, epoch: int) -> None: ...
    def checkpoint(self, high_watermark: list[int]) -> None: ...
    def read(self, log: int, start: int, below: int, bytes_max: int) -> tuple[bytes, list[tuple[int, BatchHeader]]]: ...
    def state_entries(self) -> list[tuple[int, int, bytes]]: ...
    def producers(self) -> ProducerTable: ...
    def stored(self, log: int) -> list[tuple[int, int, int, int]]:
        """(base, next, epoch, crc) of every batch, for the checks."""

    def start(self, log: int) -> int: ...
    def expired(self, wall_ms: int, limit: int) -> Expired | None:
        """What retention would take from the records, none of it at or above ``limit``."""

    def scrub(self) -> int:
        """Look for rot, and remember that there is some. Returns the log in which there is, -1 if in none."""

    def rotten(self) -> int:
        """The same without remembering it: for the checks."""

    def rot(self, rng: random.Random) -> bool:
        """Flip a bit of one batch. False if there is nothing to spoil."""


class Disk(Protocol):
    """The disk of one broker; outlives its processes."""

    storage_id: str
    broker_id: int
    cluster_id: str
    incarnation: int
    seen_coord_epoch: int
    stopped_clean: bool  # the last process ended cleanly, and nothing has started since
    write_error: bool
    sync_error: bool
    no_space: bool  # of logs: nothing can be appended
    host: Host  # whose clocks it sees

    def start(self) -> str:
        """A process starts: returns its restart class. The incarnation is raised, durably."""

    def keys(self) -> list[Key]: ...
    def open(self, key: Key, *, quarantine: bool) -> ReplicaFiles: ...
    def delete(self, key: Key) -> None: ...
    def join(self, broker_id: int, cluster_id: str) -> None: ...
    def confirmed(self) -> None: ...
    def persist_coord_epoch(self, coord_epoch: int) -> None: ...
    def stop_cleanly(self, marks: dict[Key, list[int]]) -> None: ...
    def process_died(self) -> None: ...
    def power_cut(self, rng: random.Random) -> bool:
        """What was not synced may be gone. Returns whether anything surely is."""

    def survivors(self, key: Key) -> ReplicaFiles | None:
        """What a power cut has left, if this disk can tell before the next recovery."""

    def exchanged(self, *, same_id: bool) -> Disk:
        """Another, empty disk in its place; with ``same_id`` it is taken for the same broker."""


class FastLog:
    """One log: ``batches[:synced]`` survive a power cut. ``start`` is its first offset."""

    __slots__ = ("batches", "start", "start_epoch", "synced")

    def __init__(self) -> None:
        self.batches: list[Stored] = []
        self.start = 0
        self.start_epoch = -1  # of the record before the start, as the real log remembers it
        self.synced = 0

    @property
    def end(self) -> int:
        return self.batches[-1].header.next_offset if self.batches else self.start

    def find(self, offset: int) -> int:
        """Index of the batch that holds ``offset``; len(batches) if none does."""
        low, high = 0, len(self.batches)
        while low < high:
            middle = (low + high) // 2
            if self.batches[middle].header.next_offset <= offset:
                low = middle + 1
            else:
                high = middle
        return low

    def epochs(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for batch in self.batches:
            if not found or found[-1][0] != batch.header.epoch:
                found.append((batch.header.epoch, batch.header.base_offset))
        return found


class FastReplica:
    """A replica in memory. Its methods raise what the real one would."""

    def __init__(self, disk: FastDisk) -> None:
        self.disk = disk
        self.seen_epoch = 0
        self.logs = (FastLog(), FastLog())
        self.marked = [0, 0]  # high watermarks as last checkpointed
        self.log_state = LOG_OK
        self.repairing = False
        self.removed = ProducerTable()  # of what retention took: the snapshot that a real replica keeps of it

    def opened(self) -> OpenedReplica:
        """Recovery: what is found is synced before anybody builds on it."""
        for log in self.logs:
            log.synced = len(log.batches)
        self.marked = [min(mark, log.end) for mark, log in zip(self.marked, self.logs, strict=True)]
        opened = tuple(
            LogOpened(
                log.start, log.end, log.epochs(), max(log.start, min(self.marked[number], log.end)), log.start_epoch
            )
            for number, log in enumerate(self.logs)
        )
        return OpenedReplica(self.seen_epoch, (opened[0], opened[1]), self.producers(), self.log_state, self.repairing)

    def append(self, log: int, data: Bytes, headers: list[tuple[int, BatchHeader]]) -> None:
        if self.disk.write_error:
            raise StorageFailed("write: Input/output error")
        if self.disk.no_space:
            raise StorageFull("write: No space left on device")
        target, host = self.logs[log], self.disk.host
        wall_ms, now_us = host.wall_ms(), host.engine.now_us
        for at, header in headers:
            assert header.base_offset == target.end, (log, header, target.end)
            target.batches.append(Stored(header, bytes(data[at : at + header.size]), wall_ms, now_us))

    def sync(self, log: int, end: int) -> int:
        if self.disk.sync_error:
            raise StorageFailed("fdatasync: Input/output error")
        target = self.logs[log]
        target.synced = max(target.synced, min(target.find(end), len(target.batches)))
        return end

    def truncate(self, log: int, offset: int) -> int:
        """To the last batch boundary at or below ``offset``, as the real one does."""
        target = self.logs[log]
        at = target.find(offset)
        del target.batches[at:]
        target.synced = min(target.synced, len(target.batches))  # the cut is durable; what stands below may not be
        return target.end

    def reset(self, log: int, offset: int, epoch: int) -> None:
        target = self.logs[log]
        target.batches.clear()
        target.start_epoch = epoch
        target.start = offset
        target.synced = 0
        if log == RECORDS:
            self.removed = ProducerTable()

    def advance_start(self, log: int, offset: int) -> int:
        """Whole segments only: here one batch is a segment. Returns the new start."""
        target = self.logs[log]
        at = target.find(offset)
        if at < len(target.batches):
            offset = min(offset, target.batches[at].header.base_offset)
        if offset <= target.start:
            return target.start
        if at:
            target.start_epoch = target.batches[at - 1].header.epoch
        if log == RECORDS:
            for batch in target.batches[:at]:
                self.removed.observe(batch.header)
        del target.batches[:at]
        target.synced = max(0, target.synced - at)
        target.start = offset
        return offset

    def persist_epoch(self, epoch: int) -> None:
        assert epoch >= self.seen_epoch, (epoch, self.seen_epoch)
        self.seen_epoch = epoch

    def checkpoint(self, high_watermark: list[int]) -> None:
        self.marked = list(high_watermark)

    def read(self, log: int, start: int, below: int, bytes_max: int) -> tuple[bytes, list[tuple[int, BatchHeader]]]:
        """Whole batches from the one that holds ``start``, all below ``below``; at least one, if there is any."""
        target = self.logs[log]
        parts: list[bytes] = []
        headers: list[tuple[int, BatchHeader]] = []
        size = 0
        for batch in target.batches[target.find(start) :]:
            if batch.header.next_offset > below or (parts and size + batch.header.size > bytes_max):
                break
            headers.append((size, batch.header))
            parts.append(spoilt(batch.data) if batch.rotten else batch.data)
            size += batch.header.size
        return b"".join(parts), headers

    def state_entries(self) -> list[tuple[int, int, bytes]]:
        found: list[tuple[int, int, bytes]] = []
        for batch in self.logs[1].batches:
            if not batch.header.is_control:
                found += batch.entries
        return found

    def producers(self) -> ProducerTable:
        table = ProducerTable.restore(self.removed.snapshot()) if len(self.removed) else ProducerTable()
        for batch in self.logs[0].batches:
            table.observe(batch.header)
        return table

    def stored(self, log: int) -> list[tuple[int, int, int, int]]:
        return [
            (b.header.base_offset, b.header.next_offset, b.header.epoch, b.header.crc) for b in self.logs[log].batches
        ]

    def start(self, log: int) -> int:
        return self.logs[log].start

    def expired(self, wall_ms: int, limit: int) -> Expired | None:
        """Here one batch is a segment, and all but the last are sealed. A few at a time."""
        weather, batches = self.disk.weather, self.logs[RECORDS].batches
        size = sum(batch.header.size for batch in batches)
        found: Expired | None = None
        for batch in batches[:RETENTION_STEP]:
            if batch.header.next_offset > limit:
                break
            by_age = 0 <= weather.retention_ms < wall_ms - batch.appended_ms
            size -= batch.header.size
            if not by_age and not (0 <= weather.retention_bytes <= size and batch is not batches[-1]):
                break
            found = Expired(batch.header.next_offset, by_age, batch.appended_us, size)
        return found

    def scrub(self) -> int:
        found = self.rotten()
        if found >= 0:
            self.log_state = LOG_DAMAGED
        return found

    def rotten(self) -> int:
        if self.disk.rotten:
            for log in BOTH:
                if any(batch.rotten for batch in self.logs[log].batches):
                    return log
        return -1

    def rot(self, rng: random.Random) -> bool:
        batches = [batch for log in self.logs for batch in log.batches[:-1]]  # the newest may pass for a torn tail
        if not batches:
            return False
        batches[int(rng.random() * len(batches))].rotten = True
        self.disk.rotten = True
        return True

    def lose_unsynced(self, rng: random.Random) -> bool:
        """A power cut. Of what was not synced any prefix survives. Returns whether anything was lost."""
        lost = False
        for log in self.logs:
            kept = rng.randint(log.synced, len(log.batches))
            lost = lost or kept < len(log.batches)
            del log.batches[kept:]
        return lost


class FastDisk:
    """Invariants: incarnation rises with every start; ``lossy_pending`` is set by a lossy start and cleared only when a
    registration is confirmed. Everything but the logs is durable at once.
    """

    def __init__(self, storage_id: str, weather: Weather) -> None:
        self.storage_id = storage_id
        self.weather = weather
        self.host: Host
        self.rotten = False  # some batch of it, some time
        self.broker_id = 0
        self.cluster_id = ""
        self.incarnation = 0
        self.seen_coord_epoch = 0
        self.stopped_clean = False
        self.write_error = False
        self.sync_error = False
        self.no_space = False
        self.replicas: dict[Key, FastReplica] = {}
        self._foreign = False
        self._lossy_pending = ""  # restart class that is still to be told
        self._boot = self._boot_then = 1  # of the kernel now, and at the last start

    def start(self) -> str:
        if self._foreign:
            found = RESTART_FOREIGN
        elif self.stopped_clean:
            found = RESTART_CLEAN
        else:
            found = RESTART_PROCESS_CRASH if self._boot == self._boot_then else RESTART_OS_CRASH
        self.stopped_clean = False
        if found in (RESTART_OS_CRASH, RESTART_FOREIGN):
            self._lossy_pending = found
        self._boot_then = self._boot
        self.incarnation += 1
        return self._lossy_pending or found

    def keys(self) -> list[Key]:
        return sorted(self.replicas)

    def open(self, key: Key, *, quarantine: bool) -> FastReplica:
        replica = self.replicas.get(key)
        if replica is None or quarantine:
            seen = replica.seen_epoch if replica is not None else 0
            replica = self.replicas[key] = FastReplica(self)
            replica.seen_epoch = seen
            replica.repairing = quarantine
        return replica

    def delete(self, key: Key) -> None:
        self.replicas.pop(key, None)

    def join(self, broker_id: int, cluster_id: str) -> None:
        self.broker_id, self.cluster_id = broker_id, cluster_id

    def confirmed(self) -> None:
        self._lossy_pending = ""
        self._foreign = False

    def persist_coord_epoch(self, coord_epoch: int) -> None:
        self.seen_coord_epoch = coord_epoch

    def stop_cleanly(self, marks: dict[Key, list[int]]) -> None:
        for key, high_watermark in marks.items():
            self.replicas[key].checkpoint(high_watermark)
        for replica in self.replicas.values():
            for log in replica.logs:
                if log.synced < len(log.batches) and replica.log_state == LOG_DAMAGED:
                    return  # to flush it fails, and the stop was not a clean one
                log.synced = len(log.batches)
        self.stopped_clean = True

    def process_died(self) -> None:
        """kill -9: the page cache stays."""

    def power_cut(self, rng: random.Random) -> bool:
        self._boot += 1
        return any([replica.lose_unsynced(rng) for _, replica in sorted(self.replicas.items())])

    def survivors(self, key: Key) -> FastReplica | None:
        return self.replicas.get(key)

    def exchanged(self, *, same_id: bool) -> FastDisk:
        fresh = FastDisk(f"{self.storage_id}x", self.weather)
        fresh.host = self.host
        if same_id:
            fresh.join(self.broker_id, self.cluster_id)
            fresh.seen_coord_epoch = self.seen_coord_epoch
            fresh._foreign = True
        return fresh
