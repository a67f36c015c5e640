"""What runs beside the traffic: the scrubber finds rot, and group commit makes many logs durable at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ferryline.protocol.errors import StorageFailed
from ferryline_broker.log.group import GroupFlush
from ferryline_broker.log.model import LogConfig
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.replica_store import ReplicaStore
from ferryline_broker.log.scrubber import Scrubber
from ferryline_broker.log.storage import Faults, FileStorage, MemoryStorage, Storage
from unit.log_builders import SMALL, TOPIC, append, contents, fill


def sealed_log(disk: Storage, count: int = 60) -> PartitionLog:
    log = PartitionLog.open(disk, "log", SMALL)
    fill(log, count)
    log.flush()
    return log


# -- scrubber ---------------------------------------------------------------------------------------


def test_a_sound_log_is_passed_over_round_after_round() -> None:
    disk = MemoryStorage()
    scrubber = Scrubber(sealed_log(disk))
    steps = 0
    while scrubber.rounds < 3:
        assert scrubber.step(500) is None
        steps += 1
        assert steps < 1000
    assert steps > 3, "bounded work for each call"


def test_every_flipped_bit_of_a_sealed_segment_is_found() -> None:
    base = MemoryStorage()
    sealed_log(base, 30)
    path = f"log/{0:020d}.log"
    for position in range(len(base.contents(path))):
        disk = base.copy()
        disk.flip(path, position, position % 8)
        finding = Scrubber(PartitionLog.open(disk, "log", SMALL)).step(1 << 30)
        assert finding is not None, position
        assert (finding.path, finding.segment) == ("log", 0)


def test_rot_while_running_is_found_although_the_bytes_were_good_before() -> None:
    disk = MemoryStorage()
    log = sealed_log(disk)
    scrubber = Scrubber(log)
    assert scrubber.step(1 << 30) is None
    second = log.segments[1]
    disk.flip(f"{second.stem}.log", 12)  # the epoch of a batch: outside its CRC, inside the chain
    finding = scrubber.step(1 << 30)
    assert finding is not None
    assert finding.segment == second.base
    assert scrubber.step(1 << 30) is None, "goes on behind the finding"


def test_a_scrubbed_segment_is_read_without_checking_again() -> None:
    disk = MemoryStorage()
    sealed_log(disk)
    disk.crash()
    log = PartitionLog.open(disk, "log", SMALL)
    sealed = [segment for segment in log.segments if segment.seal is not None]
    assert all(segment.trusted_from for segment in sealed)
    assert Scrubber(log).step(1 << 30) is None
    assert not any(segment.trusted_from for segment in sealed)


def test_the_scrubber_keeps_up_with_retention_and_cuts() -> None:
    disk = MemoryStorage()
    log = sealed_log(disk, 200)
    scrubber = Scrubber(log)
    for step in range(60):
        assert scrubber.step(700) is None
        if step % 10 == 0:
            log.advance_start(log.segments[1].next_offset)
        if step % 15 == 0:
            log.truncate(log.log_end - 40)
        fill(log, 3)


LONG = b"x" * 50_000  # 7 batches of three to a window of the scrubber


def unsealed_log(disk: Storage, flushed: int, unflushed: int = 0, value: bytes = b"value") -> PartitionLog:
    log = PartitionLog.open(disk, "log", LogConfig(segment_ms=-1, retention_ms=-1))
    fill(log, flushed, value=value)
    log.flush()
    fill(log, unflushed, value=value)
    return log


def test_every_flipped_bit_of_the_active_segment_is_found_below_its_flushed_end_and_no_further() -> None:
    base = MemoryStorage()
    log = unsealed_log(base, 10, 3)
    (active,) = log.segments
    path, flushed = f"{active.stem}.log", log.flushed_mark.position
    assert active.seal is None
    assert 0 < flushed < active.size
    scrubber = Scrubber(log)
    for position in range(active.size):
        base.flip(path, position, position % 8)
        finding = scrubber.step(1 << 30)
        assert (finding is not None) == (position < flushed), position
        base.flip(path, position, position % 8)
        while scrubber.step(1 << 30) is not None or scrubber._next_base >= 0:  # to the end of the round
            pass


def test_the_active_segment_is_taken_in_pieces_while_it_grows() -> None:
    log = unsealed_log(MemoryStorage(), 20, value=LONG)
    log.config = replace(log.config, segment_bytes=8_000_000)
    scrubber = Scrubber(log)
    steps = 0
    while len(log.segments) < 3 or scrubber.rounds < 2:
        assert scrubber.step(1) is None
        fill(log, 1, value=LONG)
        steps += 1
        if steps % 3 == 0:
            log.flush()
        assert steps < 1000
    assert steps > 3 * scrubber.rounds


def test_what_was_cut_and_written_again_while_it_was_being_read_is_no_damage() -> None:
    """A secondary that cuts a tail and fetches another one of the same length."""
    log = unsealed_log(MemoryStorage(), 20, value=LONG)
    scrubber = Scrubber(log)
    assert scrubber.step(1) is None
    end = log.flushed_mark.position
    log.truncate(log.log_end - 30)
    fill(log, 10, epoch=2, value=LONG)
    log.flush()
    assert log.flushed_mark.position == end
    assert scrubber._segment is log.segments[0], "it is in the middle of it"
    while not scrubber.rounds:
        assert scrubber.step(1) is None


def test_a_disk_that_cannot_read_is_a_finding() -> None:
    disk = MemoryStorage()
    log = sealed_log(disk)
    disk.faults = Faults(read_error=True)
    finding = Scrubber(log).step(1 << 30)
    assert finding is not None
    assert "Input/output error" in finding.reason


# -- group commit -----------------------------------------------------------------------------------


def stores(storage: Storage, count: int) -> list[ReplicaStore]:
    found = [ReplicaStore.open(storage, "", TOPIC, number, SMALL) for number in range(count)]
    for store in found:
        store.persist_epoch(1)
    return found


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_group_flush_makes_every_log_and_checkpoint_durable(count: int) -> None:
    disk = MemoryStorage()
    replicas = stores(disk, count)
    group = GroupFlush(disk)
    sent: list[list[bytes]] = [[] for _ in replicas]
    for _ in range(70):
        for number, store in enumerate(replicas):
            sent[number].append(append(store.records))
        assert group.flush([store.records for store in replicas]) == []
        assert all(store.records.flushed_end == store.records.log_end for store in replicas)
        assert group.checkpoint([(store, store.records.log_end, 0) for store in replicas]) == []
    disk.lose_unsynced()
    for number in range(count):
        store = ReplicaStore.open(disk, "", TOPIC, number, SMALL)
        assert contents(store.records) == sent[number]
        assert store.high_watermarks == (210, 0)


def test_many_logs_take_one_sync() -> None:
    disk = MemoryStorage()
    replicas = stores(disk, 40)
    for store in replicas:
        append(store.records)
    before = disk.syncs
    group = GroupFlush(disk)
    group.flush([store.records for store in replicas])
    assert disk.syncs == before + 1
    group.flush([store.records for store in replicas])
    assert disk.syncs == before + 1, "nothing to do"


def test_the_dearer_way_is_avoided_and_tried_again_now_and_then() -> None:
    """A file system on which syncfs waits for somebody else's gigabytes."""
    disk = MemoryStorage()
    now = [0.0]
    calls = [0]
    real = disk.sync_all

    def slow_sync_all() -> bool:
        now[0] += 0.5
        calls[0] += 1
        return real()

    disk.sync_all = slow_sync_all  # type: ignore[method-assign]
    replicas = stores(disk, 10)
    group = GroupFlush(disk, seconds=lambda: now[0])
    for _ in range(200):
        for store in replicas:
            append(store.records)
        assert group.flush([store.records for store in replicas]) == []
    assert 2 <= calls[0] <= 6


def test_a_failing_disk_fails_the_logs_that_it_failed() -> None:
    disk = MemoryStorage()
    replicas = stores(disk, 5)
    for store in replicas:
        append(store.records)
    disk.faults = Faults(sync_error=True, match=f"{TOPIC}-2/records")
    failed = GroupFlush(disk).flush([store.records for store in replicas])
    assert [log for log, _ in failed] == [replicas[2].records]
    assert isinstance(failed[0][1], StorageFailed)
    assert [store.records.flushed_end for store in replicas] == [3, 3, 0, 3, 3]
    assert replicas[2].records.failure


def test_group_commit_on_a_real_disk(tmp_path: Path) -> None:
    storage = FileStorage(str(tmp_path))
    assert storage.sync_all(), "this kernel reports errors through syncfs"
    replicas = stores(storage, 8)
    group = GroupFlush(storage)
    for _ in range(10):
        for store in replicas:
            append(store.records)
        assert group.flush([store.records for store in replicas]) == []
        assert group.checkpoint([(store, store.records.log_end, 0) for store in replicas]) == []
    for store in replicas:
        assert store.records.flushed_end == 30
        store.close()
    assert ReplicaStore.open(storage, "", TOPIC, 3, SMALL).high_watermarks == (30, 0)
    storage.close()
