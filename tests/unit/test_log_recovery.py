"""Recovery (replication rule 7): every torn tail is cut, every damage is told, and nothing wrong is ever served."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ferryline.protocol.errors import StorageFailed
from ferryline.protocol.messages import LOG_DAMAGED, LOG_OK, LOG_TRUNCATED
from ferryline.protocol.records import read_header
from ferryline_broker.log.index import ENTRY_BYTES
from ferryline_broker.log.model import LogCheckpoint, LogConfig
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.scrubber import Scrubber
from ferryline_broker.log.storage import Faults, LogDamaged, MemoryStorage
from unit.log_builders import SMALL, append, batch, contents, fill, headers_of

ONE = LogConfig(segment_bytes=1_000_000, segment_ms=-1, retention_ms=-1)
REPLICATED = replace(ONE, flush="replicated")
LOG0 = f"log/{0:020d}.log"


def build(
    batches: int, flushed: int = 0, config: LogConfig = ONE, **options: object
) -> tuple[MemoryStorage, list[bytes], LogCheckpoint]:
    """A log of ``batches`` batches whose checkpoint stands after the first ``flushed``."""
    disk = MemoryStorage()
    log = PartitionLog.open(disk, "log", config)
    sent = fill(log, flushed, **options)
    log.flush()
    checkpoint = log.checkpoint(log.log_end) if flushed else LogCheckpoint()
    sent += fill(log, batches - flushed, **options)
    log.flush()
    disk.crash()
    return disk, sent, checkpoint


def reopened(disk: MemoryStorage, checkpoint: LogCheckpoint, config: LogConfig = ONE, **options: int) -> PartitionLog:
    disk.crash()
    return PartitionLog.open(disk, "log", config, checkpoint=checkpoint, **options)  # type: ignore[arg-type]


def torn_disks(disk: MemoryStorage, down_to: int) -> Iterator[tuple[int, MemoryStorage]]:
    """A copy of the disk for every length that the only log file may have been cut to, down to ``down_to`` bytes."""
    whole = disk.contents(LOG0)
    for length in range(len(whole), down_to - 1, -1):
        torn = disk.copy()
        torn.replace(LOG0, whole[:length])
        yield length, torn


# -- torn tails -------------------------------------------------------------------------------------


def whole_batches(sent: list[bytes], length: int) -> list[bytes]:
    """The batches that lie wholly within the first ``length`` bytes."""
    found, at = [], 0
    for one in sent:
        at += len(one)
        if at > length:
            break
        found.append(one)
    return found


@pytest.mark.parametrize("records", [1, 7])
@pytest.mark.parametrize("config", [ONE, REPLICATED])
def test_a_tail_torn_at_any_byte_of_the_last_three_batches_is_cut_there(config: LogConfig, records: int) -> None:
    disk, sent, checkpoint = build(8, flushed=5, config=config, records=records)
    for length, torn in torn_disks(disk, sum(map(len, sent[:5]))):
        log = reopened(torn, checkpoint, config)
        assert log.log_state == LOG_OK, (length, log.damage)
        kept = whole_batches(sent, length)
        assert contents(log) == kept
        assert torn.contents(LOG0) == b"".join(kept), "the torn bytes are gone from the file"
        append(log, records=records)
        assert len(contents(reopened(torn, checkpoint, config))) == len(kept) + 1


@pytest.mark.parametrize("garbage", [b"\0", b"\xff", b"\2", None])
def test_a_tail_that_goes_on_with_zeros_or_garbage_is_cut_at_the_last_whole_batch(garbage: bytes | None) -> None:
    disk, sent, checkpoint = build(8, flushed=5)
    rng = random.Random(1)
    for length, torn in torn_disks(disk, sum(map(len, sent[:5]))):
        tail = rng.randbytes(5000) if garbage is None else garbage * 5000
        torn.replace(LOG0, disk.contents(LOG0)[:length] + tail)
        log = reopened(torn, checkpoint)
        assert log.log_state == LOG_OK, (length, log.damage)
        kept = whole_batches(sent, length)
        found = contents(log)  # what follows may by chance be what was cut off
        assert found in (kept, sent[: len(kept) + 1])
        assert torn.contents(LOG0) == b"".join(found)


def test_without_a_checkpoint_the_whole_active_segment_is_checked() -> None:
    disk, sent, _ = build(8)
    for length, torn in torn_disks(disk, 0):
        log = reopened(torn, LogCheckpoint())
        assert log.log_state == LOG_OK
        assert contents(log) == whole_batches(sent, length)


def test_a_file_that_ends_below_the_checkpoint_is_damage_when_every_ack_was_synced() -> None:
    disk, _, checkpoint = build(8, flushed=5)
    for length, torn in torn_disks(disk, 0):
        if length >= checkpoint.position:
            continue
        before = torn.contents(LOG0)
        log = reopened(torn, checkpoint)
        assert log.log_state == LOG_DAMAGED
        assert torn.contents(LOG0) == before, "a damaged log is left as it was found"
        with pytest.raises(LogDamaged):
            log.read(log.log_start, 100, 100)
        with pytest.raises(LogDamaged):
            append(log)


def test_a_file_that_ends_below_the_checkpoint_is_truncated_when_acks_did_not_wait_for_the_disk() -> None:
    disk, sent, checkpoint = build(8, flushed=5, config=REPLICATED)
    for length, torn in torn_disks(disk, 0):
        if length >= checkpoint.position:
            continue
        log = reopened(torn, checkpoint, REPLICATED)
        assert log.log_state == LOG_TRUNCATED
        assert contents(log) == whole_batches(sent, length)
        append(log)


def test_a_log_that_ends_below_its_high_watermark_is_truncated_when_acks_did_not_wait_for_the_disk() -> None:
    disk, _, _ = build(8, config=REPLICATED)
    log = reopened(disk, LogCheckpoint(hw=24), REPLICATED)
    assert log.log_state == LOG_OK
    torn = disk.copy()
    torn.replace(LOG0, disk.contents(LOG0)[:-1])
    log = reopened(torn, LogCheckpoint(hw=24), REPLICATED)
    assert log.log_state == LOG_TRUNCATED
    assert reopened(torn, LogCheckpoint(hw=24), ONE).log_state == LOG_OK, "a secondary hears of marks before its sync"


# -- holes and rot ----------------------------------------------------------------------------------


def test_a_valid_batch_after_a_bad_one_is_a_hole_not_a_torn_tail() -> None:
    disk, sent, checkpoint = build(8, flushed=2)
    start = sum(map(len, sent[:4]))
    for position in range(start, start + len(sent[4])):
        broken = disk.copy()
        broken.flip(LOG0, position, 3)
        log = reopened(broken, checkpoint, epoch_max=1)
        assert log.log_state == LOG_DAMAGED, position
        assert log.damage is not None
        assert log.damage.offset == 12, "the first record that cannot be trusted"


@pytest.mark.parametrize("config", [ONE, REPLICATED])
def test_after_a_power_loss_a_hole_above_the_checkpoint_is_where_syncing_ended(config: LogConfig) -> None:
    disk, sent, checkpoint = build(8, flushed=2, config=config)
    start = sum(map(len, sent[:4]))
    for position in (start + 30, start + len(sent[4]) - 1):  # earlier ones lie outside the checksum
        broken = disk.copy()
        broken.flip(LOG0, position, 3)
        log = reopened(broken, checkpoint, config, power_lost=True)
        assert (log.log_state, contents(log)) == (LOG_OK, sent[:4])
        append(log)


def test_after_a_power_loss_rot_below_the_checkpoint_is_still_damage() -> None:
    disk, sent, checkpoint = build(8, flushed=5)
    disk.flip(LOG0, sum(map(len, sent[:3])) + 30, 3)
    log = reopened(disk, checkpoint, power_lost=True)
    with pytest.raises(LogDamaged):
        contents(log)


def test_a_hole_of_zeros_before_a_large_batch_is_found_across_windows() -> None:
    disk = MemoryStorage()
    log = PartitionLog.open(disk, "log", ONE)
    fill(log, 1)
    hole = len(append(log, value=b"\2" * 700_000))
    append(log, value=b"z")
    log.flush()
    whole = disk.contents(LOG0)
    at = len(whole) - hole
    disk.replace(LOG0, whole[: at - 100] + bytes(hole - 100) + whole[at - 100 + hole - 100 :])
    assert reopened(disk, LogCheckpoint()).log_state == LOG_DAMAGED


def test_a_batch_inside_the_value_of_a_torn_batch_is_no_hole() -> None:
    """A topic may carry copies of batches as values; a torn write of one must still look torn."""
    disk = MemoryStorage()
    log = PartitionLog.open(disk, "log", ONE)
    sent = fill(log, 3)
    append(log, value=bytes(batch(9)) + bytes(batch(0)) + bytes(batch(500)) + bytes(batch(11, epoch=0)))
    log.flush()
    disk.replace(LOG0, disk.contents(LOG0)[:-1])
    log = reopened(disk, LogCheckpoint())
    assert log.log_state == LOG_OK
    assert contents(log) == sent


def test_a_whole_batch_with_a_wrong_offset_or_epoch_is_damage() -> None:
    for position, value in ((0, struct.pack(">q", 20)), (12, struct.pack(">i", 0)), (12, struct.pack(">i", 99))):
        disk, sent, checkpoint = build(8, flushed=5, epoch=2)
        whole = bytearray(disk.contents(LOG0))
        at = sum(map(len, sent[:7])) + position
        whole[at : at + len(value)] = value
        disk.replace(LOG0, bytes(whole))
        log = reopened(disk, checkpoint, epoch_max=5)
        assert log.log_state == LOG_DAMAGED
        assert log.log_end <= 21


def flips(disk: MemoryStorage, path: str) -> Iterator[tuple[int, MemoryStorage]]:
    rng = random.Random(path)
    for position in range(len(disk.contents(path))):
        broken = disk.copy()
        broken.flip(path, position, rng.randrange(8))
        yield position, broken


def check_harmless_or_told(disk: MemoryStorage, checkpoint: LogCheckpoint, sent: list[bytes]) -> bool:
    """Open a rotten log and read all of it: either it is as it was, or somebody said so. True if told."""
    log = reopened(disk, checkpoint, SMALL, epoch_max=1)
    if log.log_state != LOG_OK:
        return True
    try:
        found = contents(log)
    except LogDamaged:
        return True
    finding = Scrubber(log).step(1 << 30)
    assert found == sent[: len(found)], "wrong bytes were served"
    if len(found) < len(sent):
        assert log.log_end >= checkpoint.offset, "flushed records vanished in silence"
        return True
    return finding is not None


def test_every_flipped_bit_of_a_log_is_told_or_harmless() -> None:
    disk, sent, checkpoint = build(45, flushed=40, config=SMALL)
    for path in [f"log/{name}" for name in disk.listdir("log")]:
        told = [check_harmless_or_told(broken, checkpoint, sent) for _, broken in flips(disk, path)]
        if path.endswith(".log"):
            assert all(told), path
    assert len([name for name in disk.listdir("log") if name.endswith(".log")]) == 3


def test_rot_below_the_checkpoint_of_the_active_segment_is_found_when_it_is_read() -> None:
    disk, _, checkpoint = build(8, flushed=8)
    for position in range(len(disk.contents(LOG0))):
        broken = disk.copy()
        broken.flip(LOG0, position, 2)
        log = reopened(broken, checkpoint, epoch_max=1)
        with pytest.raises(LogDamaged):
            contents(log, bytes_max=10_000)


# -- files that are not there -----------------------------------------------------------------------


def test_a_missing_segment_is_damage_and_never_an_empty_log() -> None:
    disk, _, checkpoint = build(70, flushed=70, config=SMALL)
    names = [name for name in disk.listdir("log") if name.endswith(".log")]
    assert len(names) == 4
    for gone in range(1, 2 ** len(names)):
        broken = disk.copy()
        for number, name in enumerate(names):
            if gone >> number & 1:
                broken.unlink(f"log/{name}")
        log = reopened(broken, checkpoint, SMALL)
        assert log.log_state == LOG_DAMAGED, [name for number, name in enumerate(names) if gone >> number & 1]


def test_a_sealed_segment_of_another_size_is_damage() -> None:
    disk, _, checkpoint = build(70, flushed=70, config=SMALL)
    for size in (0, 100, -1):
        broken = disk.copy()
        broken.replace(LOG0, disk.contents(LOG0)[:size])
        assert reopened(broken, checkpoint, SMALL).log_state == LOG_DAMAGED


def test_the_file_that_names_the_log_start_must_be_there() -> None:
    disk, _, checkpoint = build(8, flushed=8)
    disk.unlink("log/start")
    assert reopened(disk, checkpoint).log_state == LOG_DAMAGED


def test_a_lost_seal_is_made_again_only_from_bytes_that_check_out() -> None:
    disk, sent, checkpoint = build(70, flushed=70, config=SMALL)
    seal = f"log/{0:020d}.seal"
    disk.unlink(seal)
    good = disk.copy()
    log = reopened(good, checkpoint, SMALL)
    assert log.log_state == LOG_OK
    assert contents(log) == sent
    assert good.exists(seal)
    disk.flip(LOG0, 100)
    assert reopened(disk, checkpoint, SMALL).log_state == LOG_DAMAGED


@pytest.mark.parametrize("change", ["missing", "short", "rotten", "empty"])
def test_indexes_are_rebuilt_from_the_log(change: str) -> None:
    disk, sent, checkpoint = build(70, flushed=65, config=replace(SMALL, segment_bytes=3000))
    before = {}
    for name in disk.listdir("log"):
        path = f"log/{name}"
        if not name.endswith(".index"):
            continue
        before[path] = disk.contents(path)
        if change == "missing":
            disk.unlink(path)
        elif change == "rotten":
            disk.flip(path, ENTRY_BYTES // 2, 5)
        else:
            disk.replace(path, before[path][:-1] if change == "short" else b"")
    assert len(before) > 2
    log = reopened(disk, checkpoint, SMALL)
    assert log.log_state == LOG_OK
    assert contents(log) == sent
    assert [log.offset_for_time(time) for time in (0, 1)] == [0, log.log_end]
    log.flush()
    log.checkpoint(0)
    for path, data in before.items():
        assert disk.contents(path).startswith(data), path


def test_leftovers_of_unfinished_writes_are_swept_up() -> None:
    disk, sent, checkpoint = build(8, flushed=8)
    for name in ("00000000000000000900.seal", "00000000000000000900.index", "x.seal.tmp"):
        disk.open(f"log/{name}", create=True)
    log = reopened(disk, checkpoint)
    assert contents(log) == sent
    assert disk.listdir("log") == ["00000000000000000000.index", "00000000000000000000.log", "start"]


def test_a_segment_of_which_nothing_survived_does_not_outlive_a_reset() -> None:
    disk, sent, checkpoint = build(20, flushed=20, config=SMALL)
    empty = f"log/{60:020d}.log"
    disk.open(empty, create=True)
    log = reopened(disk, checkpoint, SMALL)
    assert contents(log) == sent
    assert not disk.exists(empty)
    log.reset(10)
    assert reopened(disk, LogCheckpoint(), SMALL).log_state == LOG_OK


# -- what a restart may trust -----------------------------------------------------------------------


def test_data_whose_sync_failed_is_written_again_after_a_restart() -> None:
    """After a failed fdatasync the page cache shows the data, and the next fdatasync succeeds without writing it."""
    disk, sent, checkpoint = build(5, flushed=5)
    log = reopened(disk, checkpoint)
    sent += fill(log, 3)
    disk.faults = Faults(sync_error=True)
    with pytest.raises(StorageFailed):
        log.flush()
    log = reopened(disk, checkpoint)
    assert log.flushed_end == 24
    disk.lose_unsynced()
    log = reopened(disk, checkpoint)
    assert log.log_state == LOG_OK
    assert contents(log) == sent


def test_recovery_reads_only_from_the_checkpoint_on() -> None:
    disk, sent, checkpoint = build(300, flushed=299)
    read: list[int] = []

    disk.crash()
    real_open = disk.open

    def counting_open(path: str, *, create: bool = False):  # type: ignore[no-untyped-def]
        file = real_open(path, create=create)
        if path.endswith(".log"):
            real = file.pread

            class Counted:
                def __getattr__(self, name: str) -> object:
                    return getattr(file, name)

                def pread(self, size: int, position: int) -> bytes:
                    data = real(size, position)
                    read.append(len(data))
                    return data

            return Counted()
        return file

    disk.open = counting_open  # type: ignore[method-assign]
    log = PartitionLog.open(disk, "log", ONE, checkpoint=checkpoint)
    assert log.log_end == 900
    assert sum(read) == len(sent[-1])


def test_recovery_takes_many_short_steps() -> None:
    disk = MemoryStorage()
    log = PartitionLog.open(disk, "log", LogConfig(dirty_bytes_max=1 << 30))
    for _ in range(12):
        append(log, value=b"x" * 300_000)
    log.flush()
    disk.crash()
    steps = PartitionLog.recover(disk, "log", LogConfig())
    assert sum(1 for _ in steps) >= 10, "about one step for every MiB"


def test_epochs_of_the_active_segment_come_back_from_the_index_or_from_the_headers() -> None:
    for keep_index in (True, False):
        disk = MemoryStorage()
        log = PartitionLog.open(disk, "log", ONE)
        for epoch in (1, 2, 5, 6, 7, 30):
            fill(log, 40, epoch=epoch)
        log.flush()
        checkpoint = log.checkpoint(0)
        fill(log, 2, epoch=31)
        starts = log.epochs.items()
        if not keep_index:
            disk.unlink(f"log/{0:020d}.index")
        log = reopened(disk, checkpoint)
        assert log.epochs.items() == starts
        assert log.truncate(450) == 450
        assert log.epochs.items() == [pair for pair in starts if pair[1] < 450]
        assert read_header(log.read(449, 1, 450)).epoch == log.tail_epoch == 6
        data = batch(450, epoch=8)
        log.append(data, headers_of(data))
