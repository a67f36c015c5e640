"""PartitionLog against a plain list of batches, and the promises of each of its calls."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ferryline.protocol.errors import OffsetOutOfRange, StorageFailed, StorageFull
from ferryline.protocol.records import read_header, set_producer, split_batches, stamp
from ferryline_broker.log.model import LogCheckpoint, LogConfig, LogHooks
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.storage import Faults, MemoryStorage, Storage
from unit.log_builders import SMALL, ManualClock, append, batch, contents, fill, headers_of, log_files


class LogAgainstList(RuleBasedStateMachine):
    """The log holds exactly the batches of ``model``, whatever happens, and after a power cut at least ``flushed``."""

    @initialize(segment_bytes=st.sampled_from([300, 700, 4000]))
    def create(self, segment_bytes: int) -> None:
        self.disk = MemoryStorage()
        self.clock = ManualClock()
        self.config = LogConfig(segment_bytes=segment_bytes, segment_ms=-1, retention_ms=-1)
        self.checkpoint = LogCheckpoint()
        self.model: list[bytes] = []
        self.start = 0
        self.before = -1  # epoch of the record before the start, if retention took it
        self.flushed = 0  # number of batches of the model that are surely on disk
        self.epoch = 1
        self.seed = 0
        self.reopen()

    def reopen(self) -> None:
        hooks = LogHooks(before_cut=lambda checkpoint, state: setattr(self, "checkpoint", checkpoint))
        self.log = PartitionLog.open(
            self.disk, "log", self.config, checkpoint=self.checkpoint, hooks=hooks, wall_ms=self.clock
        )
        assert self.log.log_state == "ok", self.log.damage

    def end(self) -> int:
        return read_header(self.model[-1]).next_offset if self.model else self.start

    @rule(
        sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 400)), min_size=1, max_size=4),
        epoch_step=st.sampled_from([0, 0, 0, 1, 3]),
    )
    def append(self, sizes: list[tuple[int, int]], epoch_step: int) -> None:
        self.epoch += epoch_step
        data, offset = bytearray(), self.end()
        for records, size in sizes:
            one = batch(offset, records=records, epoch=self.epoch, value=b"x" * size, timestamp_ms=offset * 10)
            data += one
            self.model.append(bytes(one))
            offset += records
        self.log.append(data, headers_of(data))

    @rule()
    def flush(self) -> None:
        assert self.log.flush() == self.end()
        self.flushed = len(self.model)

    @rule(hw=st.integers(0, 50))
    def write_checkpoint(self, hw: int) -> None:
        self.checkpoint = self.log.checkpoint(hw)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(self.start - 1, self.end() + 1))
        self.model = [one for one in self.model if read_header(one).next_offset <= offset]
        assert self.log.truncate(offset) == self.end()
        self.flushed = min(self.flushed, len(self.model))
        self.epoch = max(self.epoch, self.log.tail_epoch)

    @rule(step=st.integers(-5, 20))
    def reset(self, step: int) -> None:
        self.start = max(0, self.end() + step)
        self.model, self.flushed = [], 0
        self.before = -1
        self.log.reset(self.start)
        assert self.log.epochs.items() == []

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def advance_start(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(self.start, self.end()))
        at = self.log.advance_start(offset)
        assert self.start <= at <= offset
        kept = [one for one in self.model if read_header(one).base_offset >= at]
        self.flushed = max(0, self.flushed - (len(self.model) - len(kept)))
        gone = self.model[: len(self.model) - len(kept)]
        self.before = read_header(gone[-1]).epoch if gone else self.before
        self.model, self.start = kept, at

    @rule()
    def process_crash(self) -> None:
        self.disk.crash()
        self.reopen()
        self.flushed = len(self.model)  # recovery synced what it found

    @rule(everything=st.booleans())
    def power_cut(self, everything: bool) -> None:
        self.seed += 1
        if everything:
            self.disk.lose_unsynced()
        else:
            self.disk.power_cut(random.Random(self.seed))
        self.reopen()
        found = contents(self.log)
        assert found == self.model[: len(found)], "what is left is not a prefix of what was there"
        assert len(found) >= self.flushed, "flushed data is gone"
        self.model = found
        self.flushed = len(found)

    @rule(offset=st.integers(0, 60), below=st.integers(0, 60), bytes_max=st.integers(1, 900))
    def read(self, offset: int, below: int, bytes_max: int) -> None:
        if not self.start <= offset <= self.end():
            with pytest.raises(OffsetOutOfRange):
                self.log.read(offset, bytes_max, below)
            return
        found = [bytes(part) for part in _split(self.log.read(offset, bytes_max, below))]
        wanted = [one for one in self.model if read_header(one).next_offset > offset]
        wanted = [one for one in wanted if read_header(one).next_offset <= below] if below > offset else []
        assert found == wanted[: len(found)]
        assert len(found) >= min(1, len(wanted)), "at least one batch"
        assert sum(map(len, found)) <= bytes_max or len(found) == 1

    @rule(timestamp=st.integers(0, 700))
    def look_up_time(self, timestamp: int) -> None:
        offsets = [read_header(one).base_offset for one in self.model if read_header(one).max_timestamp >= timestamp]
        assert self.log.offset_for_time(timestamp) == (offsets[0] if offsets else self.end())

    @invariant()
    def holds_the_same(self) -> None:
        log = self.log
        assert (log.log_start, log.log_end) == (self.start, self.end())
        assert log.log_start <= log.flushed_end <= log.log_end
        assert log.size_bytes == sum(map(len, self.model))
        assert contents(log) == self.model
        headers = list(log.batch_headers(log.log_start))
        assert headers == [read_header(one) for one in self.model]
        starts = log.epochs.items()
        real = []
        for header in headers:
            if not real or header.epoch != real[-1][0]:
                real.append((header.epoch, header.base_offset))
        assert (starts, log.epochs.before) == (real, self.before)


def _split(data: bytes) -> list[bytes]:
    return [data[at : at + header.size] for at, header in split_batches(data)]


TestLogAgainstList = LogAgainstList.TestCase
TestLogAgainstList.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# -- single promises --------------------------------------------------------------------------------


@pytest.fixture
def disk() -> MemoryStorage:
    return MemoryStorage()


def opened(storage: Storage, config: LogConfig = SMALL, **options: object) -> PartitionLog:
    return PartitionLog.open(storage, "log", config, **options)  # type: ignore[arg-type]


def test_an_append_must_follow_the_log_end_and_never_lower_the_epoch(disk: MemoryStorage) -> None:
    log = opened(disk)
    fill(log, 2, epoch=5)
    for wrong in (batch(7, epoch=5), batch(5, epoch=5), batch(6, epoch=4)):
        with pytest.raises(AssertionError):
            log.append(wrong, headers_of(wrong))
    assert log.log_end == 6
    append(log, epoch=5)


def test_segments_roll_by_size_and_each_is_sealed(disk: MemoryStorage) -> None:
    log = opened(disk)
    sent = fill(log, 40)
    files = log_files(disk, "log")
    assert len(files) > 2
    assert len([name for name in disk.listdir("log") if name.endswith(".seal")]) == len(files) - 1
    for segment in log.segments:
        assert segment.size <= 2000
    assert contents(log) == sent


def test_a_segment_rolls_by_age_at_the_next_append(disk: MemoryStorage) -> None:
    clock = ManualClock()
    log = opened(disk, replace(SMALL, segment_ms=1000), wall_ms=clock)
    fill(log, 2)
    clock.now_ms += 999
    append(log)
    assert len(log.segments) == 1
    clock.now_ms += 1
    append(log)
    assert len(log.segments) == 2


def test_a_batch_larger_than_a_segment_and_than_a_read_is_whole(disk: MemoryStorage) -> None:
    log = opened(disk)
    fill(log, 3)
    large = append(log, value=b"x" * 5000)
    fill(log, 3)
    assert log.read(9, 10, log.log_end)[: len(large)] == large
    assert opened(disk).read(9, 10, log.log_end)[: len(large)] == large


def test_a_read_never_passes_the_limit_it_was_given(disk: MemoryStorage) -> None:
    log = opened(disk)
    fill(log, 10)
    for source in (log, opened(disk)):
        assert source.read(0, 10_000, 2) == b"", "the first batch ends at 3"
        for below in range(3, 30):
            found = split_batches(source.read(0, 10_000, below))
            assert found[-1][1].next_offset <= below < found[-1][1].next_offset + 3


def test_an_offset_outside_the_log_is_refused_with_both_ends(disk: MemoryStorage) -> None:
    log = opened(disk)
    log.reset(100)
    fill(log, 1)
    for offset in (-1, 0, 99, 104, 2**62):
        with pytest.raises(OffsetOutOfRange) as caught:
            log.read(offset, 100, 200)
        assert caught.value.details == {"log_start": 100, "log_end": 103}
    assert log.read(103, 100, 200) == b""


def test_unflushed_bytes_are_bounded_whatever_the_topic_says(disk: MemoryStorage) -> None:
    log = opened(disk, LogConfig(flush="replicated", dirty_bytes_max=1000))
    for _ in range(50):
        append(log)
        assert log.dirty_bytes <= 1000


def test_a_full_disk_refuses_definitely_and_the_log_goes_on(disk: MemoryStorage) -> None:
    log = opened(disk)
    sent = fill(log, 3)
    size = len(sent[0])
    for left in (0, 1, size - 1, size + 10):
        disk.faults = Faults(space_left=left, match=".log")
        data = batch(log.log_end) + batch(log.log_end + 3)
        with pytest.raises(StorageFull):
            log.append(data, headers_of(data))
        assert disk.contents(f"log/{0:020d}.log") == b"".join(sent), "nothing of it may stay behind the log end"
        disk.faults = Faults()
        sent.append(append(log))
    assert contents(log) == sent
    disk.crash()
    assert contents(opened(disk)) == sent


def test_a_full_disk_at_a_roll_is_no_damage(disk: MemoryStorage) -> None:
    log = opened(disk)
    sent: list[bytes] = []
    for step in range(300):
        disk.faults = Faults(space_left=step % 7 * 40)
        try:
            sent.append(append(log))
        except StorageFull:
            disk.faults = Faults()
            if step % 2:
                sent.append(append(log))
    disk.faults = Faults()
    assert len(log.segments) > 3
    assert contents(log) == sent
    disk.crash()
    assert contents(opened(disk)) == sent


def test_after_a_failed_sync_the_log_refuses_and_never_syncs_again(disk: MemoryStorage) -> None:
    log = opened(disk)
    sent = fill(log, 2)
    log.flush()
    sent.append(append(log))
    disk.faults = Faults(sync_error=True)
    with pytest.raises(StorageFailed):
        log.flush()
    synced: list[str] = []
    disk.faults = Faults(on_sync=synced.append)
    for call in (log.flush, lambda: append(log), lambda: log.truncate(0), lambda: log.reset(0)):
        with pytest.raises(StorageFailed, match="failed"):
            call()
    assert log.flushed_end == 6
    assert synced == []
    assert contents(log) == sent, "reads go on"


def test_a_failed_write_fails_the_log(disk: MemoryStorage) -> None:
    log = opened(disk)
    fill(log, 1)
    disk.faults = Faults(write_error=True)
    with pytest.raises(StorageFailed):
        append(log)
    disk.faults = Faults()
    with pytest.raises(StorageFailed):
        append(log)


def test_a_cut_goes_to_the_batch_boundary_below(disk: MemoryStorage) -> None:
    log = opened(disk)
    sent = fill(log, 30)
    assert log.truncate(1000) == 90
    assert log.truncate(65) == 63
    assert contents(log) == sent[:21]
    assert log.flushed_end == 63
    assert log.truncate(1) == 0
    assert contents(log) == []
    sent = fill(log, 30, epoch=2)
    assert contents(log) == sent


def test_a_cut_is_durable_and_lowers_the_checkpoint_first(disk: MemoryStorage) -> None:
    order: list[tuple[int, int]] = []
    log = opened(disk)
    log._hooks = LogHooks(before_cut=lambda checkpoint, state: order.append((checkpoint.offset, log.log_end)))
    sent = fill(log, 30)
    log.truncate(40)
    assert order == [(39, 90)]
    disk.lose_unsynced()
    again = opened(disk)
    assert contents(again) == sent[:13]


def test_the_tail_epoch_outlives_the_records(disk: MemoryStorage) -> None:
    log = opened(disk)
    assert log.tail_epoch == -1
    fill(log, 20, epoch=3)
    fill(log, 20, epoch=7)
    log.advance_start(log.log_end)
    assert log.log_start == log.log_end == 120
    for source in (log, opened(disk)):
        assert source.tail_epoch == 7
        assert (source.epochs.items(), source.epochs.before) == ([], 7)
    append(log, epoch=9)
    for source in (log, opened(disk)):  # a secondary that ends at 120 in epoch 7 must be told that the logs agree
        assert (source.epochs.items(), source.epochs.before) == ([(9, 120)], 7)
    log.truncate(120)
    assert (log.epochs.items(), log.tail_epoch) == ([], 7)


def test_an_epoch_that_spans_the_log_start_begins_there(disk: MemoryStorage) -> None:
    log = opened(disk)
    fill(log, 40, epoch=3)
    fill(log, 10, epoch=4)
    start = log.advance_start(60)
    assert 0 < start <= 60
    for source in (log, opened(disk)):
        assert (source.epochs.items(), source.epochs.before) == ([(3, start), (4, 120)], 3)


def test_retention_by_age_counts_from_the_append_and_spares_what_is_young(disk: MemoryStorage) -> None:
    clock = ManualClock(0)
    log = opened(disk, replace(SMALL, retention_ms=5000), wall_ms=clock)
    for _ in range(60):
        append(log, timestamp_ms=10**12)  # the client's clock says something else
        clock.now_ms += 100
    ends = [segment.next_offset for segment in log.segments]
    assert log.retention_candidates(clock.now_ms, log.log_end) == []
    ages = [segment.appended_ms for segment in log.segments]
    found = log.retention_candidates(ages[1] + 5001, log.log_end)
    assert [info.end for info in found] == ends[:2]
    assert log.retention_candidates(ages[1] + 5001, ends[1] - 1)[-1].end == ends[0], "never above the limit"
    assert log.advance_start(found[-1].end) == ends[1]
    assert log.retention_candidates(10**9, log.log_end)[-1].end == log.log_end, "an old active segment goes too"


def test_age_survives_a_restart(disk: MemoryStorage) -> None:
    clock = ManualClock(0)
    log = opened(disk, replace(SMALL, retention_ms=5000), wall_ms=clock)
    fill(log, 30)
    log.flush()
    checkpoint = log.checkpoint(0)
    clock.now_ms = 4000
    log = opened(disk, replace(SMALL, retention_ms=5000), wall_ms=clock, checkpoint=checkpoint)
    assert log.retention_candidates(5000, log.log_end) == []
    assert log.retention_candidates(5001, log.log_end)[-1].end == log.log_end


def test_retention_by_size_keeps_at_least_the_size(disk: MemoryStorage) -> None:
    log = opened(disk, replace(SMALL, retention_bytes=5000))
    fill(log, 100)
    while found := log.retention_candidates(0, log.log_end):
        assert len(found) <= 4
        log.advance_start(found[-1].end)
    assert 5000 <= log.size_bytes < 5000 + 2 * 2000
    fill(log, 1)
    assert log.read(log.log_start, 100, log.log_end)


def test_a_time_inside_a_batch_finds_the_record(disk: MemoryStorage) -> None:
    from ferryline.protocol.records import BatchBuilder

    log = opened(disk)
    for base in (0, 3, 6):
        builder = BatchBuilder(10_000, "gzip" if base == 3 else "none")
        for number in range(3):
            builder.append((base + number) * 100, b"k", b"v", [])
        data = builder.build()
        set_producer(data, 7, 0, base)
        stamp(data, base, 1)
        log.append(data, headers_of(data))
    for source in (log, opened(disk)):
        for timestamp in range(0, 900):
            wanted = min(9, (timestamp + 99) // 100)
            assert source.offset_for_time(timestamp) == wanted
        assert source.offset_for_time(10_000) == 9


def test_timestamps_that_run_backwards_still_find_the_first_not_older(disk: MemoryStorage) -> None:
    log = opened(disk)
    times = [500, 100, 900, 200, 800, 950, 10]
    for timestamp in times:
        append(log, records=1, timestamp_ms=timestamp, value=b"x" * 900)
    for wanted in (0, 10, 101, 500, 501, 900, 901, 951):
        first = next((offset for offset, time in enumerate(times) if time >= wanted), len(times))
        assert log.offset_for_time(wanted) == first
        assert opened(disk).offset_for_time(wanted) == first


def test_a_closed_log_refuses(disk: MemoryStorage) -> None:
    log = opened(disk)
    fill(log, 1)
    log.close()
    for call in (lambda: append(log), lambda: log.read(0, 1, 3), log.flush):
        with pytest.raises(StorageFailed, match="closed"):
            call()
