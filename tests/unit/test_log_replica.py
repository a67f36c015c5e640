"""ReplicaStore: what one replica remembers over restarts, and what it tells of its past."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline.protocol.messages import LOG_DAMAGED, LOG_OK, LOG_TRUNCATED
from ferryline_broker.log.model import LogConfig
from ferryline_broker.log.replica_store import ReplicaStore, quarantine, replica_path
from ferryline_broker.log.storage import Faults, LogDamaged, MemoryStorage
from unit.log_builders import SMALL, TOPIC, append, contents, fill

PATH = f"partitions/{TOPIC}-0"
REPLICATED = replace(SMALL, flush="replicated")


def opened(disk: MemoryStorage, config: LogConfig = SMALL) -> ReplicaStore:
    disk.crash()
    return ReplicaStore.open(disk, "", TOPIC, 0, config)


@pytest.fixture
def disk() -> MemoryStorage:
    return MemoryStorage()


def test_the_seen_epoch_is_durable_before_the_call_returns_and_never_falls(disk: MemoryStorage) -> None:
    store = opened(disk)
    assert store.seen_epoch == 0
    for epoch, wanted in ((3, 3), (2, 3), (3, 3), (9, 9)):
        store.persist_epoch(epoch)
        disk.lose_unsynced()
        store = opened(disk)
        assert store.seen_epoch == wanted


def test_rot_of_either_slot_does_not_bring_back_an_older_epoch(disk: MemoryStorage) -> None:
    for slot in (0, 4096):
        disk = MemoryStorage()
        store = opened(disk)
        for epoch in (4, 5, 7):
            store.persist_epoch(epoch)
        disk.flip(f"{PATH}/meta", slot + 30)
        assert opened(disk).seen_epoch == 7


def test_unreadable_epochs_and_checkpoints_are_damage_once_there_is_data(disk: MemoryStorage) -> None:
    store = opened(disk)
    disk.unlink(f"{PATH}/meta")
    assert opened(disk).recovery.log_state == LOG_OK, "an empty replica has lost nothing"
    store = opened(disk)
    store.persist_epoch(1)
    append(store.records)
    for slot in (0, 4096):
        disk.flip(f"{PATH}/meta", slot + 30)
    store = opened(disk)
    assert store.recovery.log_state == LOG_DAMAGED
    assert opened(disk).recovery.log_state == LOG_DAMAGED, "and stays so"


def test_both_logs_come_back_with_their_high_watermarks(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(2)
    records, state = fill(store.records, 10, epoch=1), fill(store.state, 4, epoch=2)
    assert store.flush() == (30, 12)
    assert store.write_checkpoint(21, 9)
    assert not store.write_checkpoint(21, 9), "nothing new, nothing written"
    store = opened(disk)
    assert contents(store.records) == records
    assert contents(store.state) == state
    assert store.high_watermarks == (21, 9)
    assert store.recovery.log_end == (30, 12)
    assert store.records.epochs.items() == [(1, 0)]
    assert store.state.epochs.items() == [(2, 0)]


def test_the_high_watermark_stays_within_the_log(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(1)
    fill(store.records, 10)
    store.write_checkpoint(1000, 1000)
    assert store.high_watermarks == (30, 0)
    store.records.truncate(12)
    assert opened(disk).high_watermarks == (12, 0)
    store = opened(disk)
    store.records.reset(500)
    assert opened(disk).high_watermarks == (500, 0), "what is gone at the start was committed"


def test_a_high_watermark_of_records_that_a_power_cut_took_is_forgotten(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(1)
    fill(store.records, 4)
    store.flush()
    fill(store.records, 2)
    store.write_checkpoint(18, 0)  # acknowledged without a flush
    disk.lose_unsynced()
    store = opened(disk)
    end = store.records.log_end
    assert store.high_watermarks == (end, 0)
    assert 12 <= end < 18
    store.persist_epoch(2)
    fill(store.records, 6, epoch=2)  # others stand there now, and nobody has committed them
    store.flush()
    assert opened(disk).high_watermarks == (end, 0)


def test_a_checkpoint_is_written_at_every_roll(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(1)
    fill(store.records, 60)
    last = store.records.segments[-2]
    store = opened(disk)
    checkpoint = store._meta.checkpoints[0]
    assert (checkpoint.segment, checkpoint.offset) == (last.base, last.next_offset)


def test_a_producer_snapshot_covers_everything_below_its_offset(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(1)
    store.snapshot_producers = lambda: b"at %d" % store.records.log_end
    assert store.producer_snapshot() == (0, b"")
    fill(store.records, 70, producer=7)
    store.flush()
    base = store.records.segments[-1].base
    assert store.producer_snapshot() == (base, b"at %d" % base)
    assert len([name for name in disk.listdir(PATH) if name.startswith("producers-")]) == 2
    store = opened(disk)
    assert store.producer_snapshot() == (base, b"at %d" % base)
    headers = list(store.headers_since_snapshot())
    assert [header.base_offset for header in headers] == list(range(base, 210, 3))
    assert {header.producer_id for header in headers} == {7}


def test_a_snapshot_of_records_that_were_cut_is_never_used(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(2)
    fill(store.records, 10)
    store.write_producer_snapshot(b"ten")
    store.records.truncate(15)
    fill(store.records, 10, epoch=2)
    store.flush()
    assert store.producer_snapshot() == (0, b"")
    disk.lose_unsynced()
    assert opened(disk).producer_snapshot() == (0, b""), "not even if a power cut undoes what was not synced"


def test_a_rotten_snapshot_falls_back_to_the_one_before(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(1)
    for step in range(3):
        fill(store.records, 5)
        store.write_producer_snapshot(b"%d" % step)
    store.flush()
    disk.flip(f"{PATH}/producers-{45:020d}", 26)
    assert opened(disk).producer_snapshot() == (30, b"1")


def test_headers_below_the_checkpoint_are_checked_before_they_are_believed(disk: MemoryStorage) -> None:
    store = opened(disk, LogConfig())
    store.persist_epoch(1)
    fill(store.records, 10, producer=5)
    store.flush()
    store.write_checkpoint(30, 0)
    disk.flip(f"{PATH}/records/{0:020d}.log", 45)  # the producer id of the first batch: inside its CRC
    store = opened(disk, LogConfig())
    with pytest.raises(LogDamaged):
        list(store.headers_since_snapshot())


def test_a_snapshot_is_due_after_enough_bytes_of_records(disk: MemoryStorage) -> None:
    store = opened(disk, LogConfig())
    store.persist_epoch(1)
    for _ in range(16):
        assert not store.snapshot_due
        append(store.records, value=b"x" * (1024 * 1024 // 3))
    assert store.snapshot_due
    store.write_producer_snapshot(b"")
    assert not store.snapshot_due


def test_a_log_found_shorter_is_reported_until_the_coordinator_has_heard_of_it(disk: MemoryStorage) -> None:
    store = opened(disk, REPLICATED)
    store.persist_epoch(1)
    fill(store.records, 10)
    store.flush()
    fill(store.records, 5)
    store.write_checkpoint(45, 0)
    disk.lose_unsynced()
    store = opened(disk, REPLICATED)
    assert store.recovery.log_state == LOG_TRUNCATED
    assert store.recovery.log_end == (30, 0)
    fill(store.records, 9)
    store.flush()
    store.write_checkpoint(50, 0)
    store = opened(disk, REPLICATED)
    assert store.recovery.log_state == LOG_TRUNCATED, "a second crash before the registration must not hide it"
    store.confirm_reported()
    assert store.recovery.log_state == LOG_OK
    assert opened(disk, REPLICATED).recovery.log_state == LOG_OK


def test_damage_found_while_running_stays_until_the_files_are_set_aside(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(4)
    kept = fill(store.records, 5, epoch=4)
    store.flush()
    store.mark_damaged("the scrubber says so")
    store.confirm_reported()
    store = opened(disk)
    assert store.recovery.log_state == LOG_DAMAGED
    assert "scrubber" in store.recovery.reason
    store.close()
    quarantine(disk, "", TOPIC, 0, "again from the primary")
    store = opened(disk)
    assert store.recovery.log_state == LOG_OK
    assert (store.records.log_start, store.records.log_end) == (0, 0)
    assert store.seen_epoch == 4
    assert disk.contents(f"{PATH}/damaged-1/records/{0:020d}.log") == b"".join(kept), "for an operator"
    store.records.reset(100)
    fill(store.records, 1, epoch=4)
    store.close()
    quarantine(disk, "", TOPIC, 0, "and again")
    assert {"damaged-1", "damaged-2"} <= set(disk.listdir(PATH))


def test_a_damaged_log_opens_to_be_reported(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(1)
    fill(store.records, 70)
    store.flush()
    store.write_checkpoint(210, 0)
    disk.unlink(f"{PATH}/records/{store.records.segments[1].base:020d}.log")
    store = opened(disk)
    assert store.recovery.log_state == LOG_DAMAGED
    assert store.recovery.log_end[0] == store.records.segments[0].next_offset
    assert "missing" in store.recovery.reason
    with pytest.raises(LogDamaged):
        append(store.records)


def test_a_failed_write_of_the_epoch_is_loud_and_final(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(1)
    disk.faults = Faults(sync_error=True, match="meta")
    with pytest.raises(StorageFailed):
        store.persist_epoch(2)
    disk.faults = Faults()
    with pytest.raises(StorageFailed):
        store.persist_epoch(2)
    assert store.seen_epoch == 1


def test_a_full_disk_at_a_checkpoint_is_no_failure(disk: MemoryStorage) -> None:
    store = opened(disk)
    store.persist_epoch(1)
    store.persist_epoch(2)
    fill(store.records, 3)
    store.flush()
    store.records.checkpoint(0)
    disk.replace(f"{PATH}/meta", disk.contents(f"{PATH}/meta")[:4096])
    disk.faults = Faults(space_left=0)
    full = 0
    for hw in (3, 6):
        try:
            store.write_checkpoint(hw, 0)
        except StorageFull:
            full += 1
    assert full == 2
    disk.faults = Faults()
    assert store.write_checkpoint(9, 0)
    assert opened(disk).high_watermarks == (9, 0)


def test_replicas_live_under_the_id_of_the_topic() -> None:
    assert replica_path("3", TOPIC, 12) == f"3/partitions/{TOPIC}-12"
    assert replica_path("", TOPIC, 12) == f"partitions/{TOPIC}-12"
