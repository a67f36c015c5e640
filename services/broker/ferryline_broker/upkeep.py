"""What a broker does beside its traffic, in slices short enough for the loop: checkpoints, retention, scrubbing, free
space, removal of deleted replicas."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline.protocol.messages import RECORDS, STATE
from ferryline_broker.background import Background
from ferryline_broker.clock import now_ms, wall_ms
from ferryline_broker.config import BrokerConfig
from ferryline_broker.core import events as ev
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.group import GroupFlush
from ferryline_broker.log.interface import LogDamaged
from ferryline_broker.log.node_store import NodeStore
from ferryline_broker.log.replica_store import ReplicaStore
from ferryline_broker.log.scrubber import Scrubber
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.node_driver import NodeDriver
from ferryline_service.logs import get_logger

_log = get_logger()
_SLICE_S = 0.01  # of work between two turns of the loop
_TICK_MS = 20
_CLOCK_DRIFT_MAX_MS = 60_000  # wall clock against boot time: beyond it, ages cannot be believed (rule L11)
_CHECKPOINTS_MAX = 200  # of one group: keeps it short
_REST_MS = 10_000  # without anything to save, and the descriptors go back
_ROOM_BYTES = 16 * 1024 * 1024  # free space that is worth a new start, where less is kept in reserve
_SCRUB_STEP_BYTES = 1024 * 1024
_SCRUB_VISIT_BYTES = 256 * 1024  # what a look at a log counts for at least: many small ones must not cost more


class Upkeep(Background):
    """All of it in one task. ``disk_full`` follows the free space, with a little distance between on and off.

    ``on_space`` is called when a replica had to stop for want of space and there is some again: only a new process life
    opens its log once more.
    """

    def __init__(
        self,
        config: BrokerConfig,
        store: NodeStore,
        group: GroupFlush,
        partitions: PartitionDriver,
        node: NodeDriver,
        metrics: BrokerMetrics,
    ) -> None:
        self.disk_full = False
        self.on_space: Callable[[], None] = _ignore
        self.tick_ms = _TICK_MS  # how exactly chores are on time
        self._config = config
        self._store = store
        self._group = group
        self._partitions = partitions
        self._node = node
        self._metrics = metrics
        self._budget = 0  # bytes that may be appended before free space is looked at again
        self._wanting = False  # a replica stopped for want of space
        self._clock_distance = wall_ms() - now_ms()
        self._retention_told = False
        self._to_scrub: deque[tuple[ev.Key, int, Scrubber | None]] = deque()  # logs, and how far this round is there
        self._moved: dict[HostedReplica, int] = {}  # -> when it last had anything to save, oldest first
        partitions.on_appended = self._appended
        partitions.on_full = self._ran_full
        self.check_disk()

    async def _run(self) -> None:
        config = self._config
        due = dict.fromkeys(("checkpoint", "disk", "retention", "scrub"), now_ms())
        while True:
            asked = perf_counter()
            await asyncio.sleep(self.tick_ms / 1000)
            late_s = perf_counter() - asked - self.tick_ms / 1000
            self._metrics.loop_lag_s = max(self._metrics.loop_lag_s, late_s)
            now = now_ms()
            try:
                if now >= due["disk"]:
                    due["disk"] = now + config.disk_check_ms
                    self.check_disk()
                    self._store.purge_step()
                if now >= due["checkpoint"]:
                    due["checkpoint"] = now + config.checkpoint_ms - 2 * self.tick_ms
                    await self._in_slices(self._checkpoints())
                if now >= due["retention"]:
                    due["retention"] = now + config.retention_ms
                    await self._in_slices(self._retention())
                    await self._in_slices(self._begin_scrub())
                if now >= due["scrub"]:
                    due["scrub"] = now + 1000
                    await self._in_slices(self._scrub(config.scrub_bytes_per_s))
            except (StorageFailed, StorageFull) as error:
                _log.error("upkeep failed", error=str(error))
            except Exception:  # a mistake in one chore must not end the others
                _log.exception("upkeep failed")

    async def _in_slices(self, steps: Iterator[None]) -> None:
        """Run ``steps``, giving the loop a turn whenever a slice of time is used up."""
        began = perf_counter()
        for _ in steps:
            if perf_counter() - began > _SLICE_S:
                await asyncio.sleep(0)
                began = perf_counter()

    def _hosted(self) -> Iterator[HostedReplica]:
        for hosted in list(self._partitions.replicas.values()):
            if not hosted.broken and hosted.core.role != "stopped":
                yield hosted

    # -- checkpoints --------------------------------------------------------------------------------

    def _checkpoints(self) -> Iterator[None]:
        """Record what is flushed and committed, of everything that moved; one sync for many."""
        replicas = self._partitions.replicas.values()
        moved = [one for one in replicas if one.unsaved and not one.broken and one.core.role != "stopped"]
        self._note_moved(moved)
        for first in range(0, len(moved), _CHECKPOINTS_MAX):
            self._checkpoint_group(moved[first : first + _CHECKPOINTS_MAX])
            yield
        for hosted in moved:
            if hosted.store.snapshot_due:
                try:
                    self._snapshot_producers(hosted)
                except (StorageFailed, StorageFull) as error:
                    _log.warning("snapshot has to wait", partition=hosted.name, error=str(error))
                yield

    def _note_moved(self, moved: list[HostedReplica]) -> None:
        """Logs that nobody appends to hold no descriptors: a broker has many partitions, and few move at a time."""
        now = now_ms()
        for hosted in moved:
            self._moved.pop(hosted, None)
            self._moved[hosted] = now  # at the end: the dict is in order of time
        while self._moved:
            hosted, last = next(iter(self._moved.items()))
            if now - last < _REST_MS:
                break
            del self._moved[hosted]
            if not hosted.broken:
                for log in hosted.logs:
                    log.rest()

    def _checkpoint_group(self, moved: list[HostedReplica]) -> None:
        asked: dict[ReplicaStore, HostedReplica] = {}
        for hosted in moved:
            hosted.unsaved = False
            asked[hosted.store] = hosted
        marks = [(h.store, h.core.high_watermark[RECORDS], h.core.high_watermark[STATE]) for h in moved]
        for store, error in self._group.checkpoint(marks):
            hosted = asked[store]
            if isinstance(error, StorageFull):
                hosted.unsaved = True
                _log.warning("checkpoint has to wait", partition=hosted.name, error=str(error))
            else:
                self._partitions.write_failed(hosted, RECORDS, error)

    def _snapshot_producers(self, hosted: HostedReplica) -> None:
        """Between two events, so that core and log agree: a snapshot of the dedupe table that knows more than the log
        would make a lost batch look like a duplicate."""
        hosted.store.write_producer_snapshot(hosted.core.replica.producers.snapshot())

    def last_checkpoints(self) -> None:
        """At a clean stop: everything, whether it moved or not. Raises StorageFailed, StorageFull."""
        for hosted in self._hosted():
            core = hosted.core
            hosted.store.write_checkpoint(core.high_watermark[RECORDS], core.high_watermark[STATE])

    # -- retention ----------------------------------------------------------------------------------

    def _retention(self) -> Iterator[None]:
        drift = abs(wall_ms() - now_ms() - self._clock_distance)
        if drift > _CLOCK_DRIFT_MAX_MS:
            if not self._retention_told:
                _log.error("the wall clock jumped; nothing is deleted by age until restart", drift_ms=drift)
                self._retention_told = True
            return
        now = wall_ms()
        for hosted in self._hosted():
            if hosted.core.primary is None:
                continue  # a secondary follows its primary's log start
            log = hosted.logs[RECORDS]
            candidates = log.retention_candidates(now, hosted.core.retention_limit(now_ms()))
            if candidates:
                self._advance(hosted, candidates[-1].end)
            yield

    def _advance(self, hosted: HostedReplica, offset: int) -> None:
        log = hosted.logs[RECORDS]
        before = log.log_start
        try:
            start = log.advance_start(offset)
        except StorageFull as error:
            _log.warning("retention has to wait", partition=hosted.name, error=str(error))
            return
        except StorageFailed as error:
            self._partitions.write_failed(hosted, RECORDS, error)
            return
        if start > before:
            hosted.unsaved = True
            _log.info("retention", partition=hosted.name, log_start=start)
            self._partitions.feed(hosted, ev.LogStartAdvanced(RECORDS, start))

    # -- scrubbing ----------------------------------------------------------------------------------

    def _begin_scrub(self) -> Iterator[None]:
        """When every log was gone through: begin again. Not more often than retention looks at all logs anyway."""
        if self._to_scrub or not self._config.scrub_bytes_per_s:
            return
        for hosted in self._hosted():
            self._to_scrub.extend((hosted.key, number, None) for number in (RECORDS, STATE))
            yield

    def _scrub(self, budget: int) -> Iterator[None]:
        """Read about ``budget`` bytes of what is on disk, of each log a piece in turn."""
        while self._to_scrub and budget > 0:
            key, number, scrubber = self._to_scrub.popleft()
            hosted = self._partitions.replicas.get(key)
            if hosted is None or hosted.broken or hosted.core.role == "stopped":
                continue
            log = hosted.logs[number]
            if scrubber is None or scrubber.log is not log:
                scrubber = Scrubber(log)
            before = scrubber.bytes_read
            finding = scrubber.step(_SCRUB_STEP_BYTES)
            budget -= max(_SCRUB_VISIT_BYTES, scrubber.bytes_read - before)
            if finding is not None:
                _log.error("scrubber found damage", partition=hosted.name, segment=finding.segment, why=finding.reason)
                damage = LogDamaged(f"scrubber: {finding.reason}", offset=finding.offset)
                self._partitions.storage_failed(hosted, number, damage)
            elif not scrubber.rounds:
                self._to_scrub.append((key, number, scrubber))
            yield

    # -- free space ---------------------------------------------------------------------------------

    def _appended(self, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            self.check_disk()

    def check_disk(self) -> None:
        """Compare free space with the reserve and tell the cores when the answer changed (rule L12)."""
        free, reserve = self._room()
        self._metrics.disk_free_bytes = free
        self._metrics.disk_total_bytes = self._store.usage()[1]
        # Half of what is left above the reserve: appends come in bursts, and other programs write too.
        self._budget = max(_SCRUB_STEP_BYTES, (free - reserve) // 2)
        if self._wanting:
            full = free < max(reserve, _ROOM_BYTES) or not self._store.has_room(_SCRUB_STEP_BYTES)
        else:
            full = free < reserve
        if full != self.disk_full:
            self._tell(full)
        if self._wanting and not full:
            self.on_space()

    def _room(self) -> tuple[int, int]:
        """Free bytes, and how many of them are kept in reserve at present."""
        free, total = self._store.usage()
        reserve = max(self._config.disk_reserve_bytes, int(total * self._config.disk_reserve_percent / 100))
        return free, reserve + reserve // 20 if self.disk_full else reserve

    def _tell(self, full: bool) -> None:
        self.disk_full = self._metrics.disk_full = full
        detail = self._about_disk()
        _log.warning("disk", full=full, detail=detail)
        self._node.node_event(ev.NodeDiskFull(ev.DiskFull(full, detail)))

    def _about_disk(self) -> str:
        free, reserve = self._room()
        return f"disk of {self._config.data_root}: {free} bytes are free, {reserve} are kept in reserve"

    def _ran_full(self) -> str:
        """A write found no space. No record is let in any more: refused before its append, it harms no replica."""
        self._wanting = True
        if not self.disk_full:
            self.disk_full = True
            asyncio.get_running_loop().call_soon(self._tell, True)  # not while effects are carried out
        return self._about_disk()


def _ignore() -> None:
    return
