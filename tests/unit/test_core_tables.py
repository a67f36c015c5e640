"""Epoch index, dedupe table and group table against naive models."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ferryline.protocol import records
from ferryline.protocol.limits import BATCH_BYTES_MAX, COMMIT_METADATA_BYTES_MAX
from ferryline_broker.core.epochs import EpochIndex
from ferryline_broker.core.groups import (
    ClaimEntry,
    CommitEntry,
    ForgetEntry,
    GroupTable,
    Refused,
    SnapshotEntry,
    StateEntry,
    encode_entry,
)
from ferryline_broker.core.producers import ProducerTable

epochs_of_records = st.lists(st.integers(0, 6), max_size=30).map(sorted)


def index_of(epochs: list[int], start: int = 0) -> EpochIndex:
    index = EpochIndex()
    for offset, epoch in enumerate(epochs, start):
        index.observe(epoch, offset)
    return index


@given(epochs_of_records, st.integers(-1, 8))
def test_the_end_of_an_epoch_is_where_the_next_one_begins(epochs: list[int], asked: int) -> None:
    found, end = index_of(epochs).end_offset_for(asked, len(epochs))
    older = [epoch for epoch in epochs if epoch <= asked]
    if older:
        assert found == older[-1]
        assert end == len(older)
    else:
        assert found == -1
        assert end == 0 or not epochs


@given(epochs_of_records, st.integers(0, 31))
def test_truncation_forgets_exactly_what_was_cut(epochs: list[int], to: int) -> None:
    index = index_of(epochs)
    index.truncate(to)
    assert index.items() == index_of(epochs[:to]).items()


@given(epochs_of_records, st.integers(0, 30), st.integers(0, 30))
def test_what_is_left_is_exact_after_retention_and_a_cut(epochs: list[int], start: int, to: int) -> None:
    start = min(start, len(epochs))
    to = max(start, min(to, len(epochs)))
    index = index_of(epochs)
    index.advance(start, len(epochs))
    index.truncate(to)
    left = index_of(epochs[start:to], start)
    assert index.items() == left.items()
    assert index.before == (epochs[start - 1] if start else -1)
    assert index.tail_epoch == (epochs[to - 1] if to else -1), "of the last record below the end, retained or not"
    for asked in range(8):
        known = [epoch for epoch in epochs[:to] if epoch <= asked and epoch >= index.before]
        end = start + sum(1 for epoch in epochs[start:to] if epoch <= asked)
        assert index.end_offset_for(asked, to) == (max(known, default=-1), end)


def header(pid: int, pepoch: int, sequence: int, count: int, offset: int) -> records.BatchHeader:
    data = records.encode_batch([(None, b"", [])] * count, producer=(pid, pepoch, sequence), base_offset=offset)
    return records.read_header(data)


attempts = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 2), st.integers(0, 12), st.integers(1, 3)), max_size=40)


@given(attempts)
def test_only_the_next_sequence_is_accepted_and_only_exact_repeats_are_duplicates(
    tried: list[tuple[int, int, int, int]],
) -> None:
    table, log = ProducerTable(), list[tuple[int, int, int, int, int]]()
    for pid, pepoch, sequence, count in tried:
        candidate = header(pid, pepoch, sequence, count, len(log) * 10)
        verdict = table.check(candidate)
        mine = [entry for entry in log if entry[0] == pid]
        latest = mine[-1] if mine else None
        if latest is None or pepoch > latest[1]:
            assert (not verdict.error) == (sequence == 0)
        elif pepoch < latest[1]:
            assert verdict.error == "PRODUCER_FENCED"
        elif sequence == latest[2] + latest[3]:
            assert not verdict.error
            assert verdict.duplicate is None
        else:
            recent = [e for e in mine if e[1] == pepoch][-5:]
            same = [e for e in recent if e[2:4] == (sequence, count)]
            assert bool(same) == (verdict.duplicate is not None)
            assert bool(same) == (not verdict.error)
            if same:
                assert verdict.duplicate is not None
                assert verdict.duplicate.base_offset == same[-1][4]
        if not verdict.error and verdict.duplicate is None:
            table.observe(candidate)
            log.append((pid, pepoch, sequence, count, candidate.base_offset))
    assert ProducerTable.restore(table.snapshot()).snapshot() == table.snapshot()


def test_sequences_wrap_as_in_kafka() -> None:
    table = ProducerTable()
    table.observe(header(1, 0, 0, 1, 0))
    table._states[1].batches[-1] = type(table._states[1].batches[-1])(2**31 - 2, 2, 0)
    assert not table.check(header(1, 0, 0, 1, 5)).error


entries = st.lists(
    st.one_of(
        st.builds(ClaimEntry, st.sampled_from("ab"), st.sampled_from("mn"), st.integers(1, 4)),
        st.builds(CommitEntry, st.sampled_from("ab"), st.integers(0, 9), st.just(0), st.just("")),
    ),
    max_size=20,
)


@given(entries, st.integers(0, 20))
def test_a_snapshot_anywhere_replays_to_the_same_table(rows: list[StateEntry], at: int) -> None:
    log_end, epochs = 10, index_of([0] * 10)
    whole = GroupTable.replay([(i, 1, encode_entry(r)) for i, r in enumerate(rows)], epochs, 0, log_end)
    before = GroupTable.replay([(i, 1, encode_entry(r)) for i, r in enumerate(rows[:at])], epochs, 0, log_end)
    short: list[StateEntry] = [before.snapshot(lambda _: -1), *rows[at:]]
    again = GroupTable.replay([(i, 1, encode_entry(r)) for i, r in enumerate(short)], epochs, 0, log_end)
    assert [r for r in again.items() if r[1].offset >= 0] == [r for r in whole.items() if r[1].offset >= 0]
    assert isinstance(before.snapshot(lambda _: -1), SnapshotEntry)


def test_a_lower_generation_and_another_member_of_the_same_are_refused() -> None:
    table = GroupTable()
    first = table.decide_claim("g", "m", 3)
    assert isinstance(first, ClaimEntry)
    table.apply(first)
    assert isinstance(table.decide_claim("g", "n", 2), Refused)
    assert isinstance(table.decide_claim("g", "n", 3), Refused)
    assert isinstance(table.decide_claim("g", "m", 3), ClaimEntry)
    common = {"records": index_of([0] * 10), "high_watermark": 10, "log_start": 0}
    assert isinstance(table.decide_commit("g", "n", 3, 1, "", False, **common), Refused)  # type: ignore[arg-type]
    assert isinstance(table.decide_commit("g", "m", 2, 1, "", False, **common), Refused)  # type: ignore[arg-type]
    assert isinstance(table.decide_commit("g", "m", 3, 1, "", False, **common), CommitEntry)  # type: ignore[arg-type]


def test_groups_that_anybody_can_make_by_committing_always_fit_into_a_snapshot() -> None:
    """A reader names groups as it likes: without a bound they would grow into an entry that no batch can carry."""
    table, common = GroupTable(), {"records": index_of([0] * 10), "high_watermark": 10, "log_start": 0}

    def commit(group: str, metadata: str, offset: int = 1) -> bool:
        entry = table.decide_commit(group, "", 0, offset, metadata, False, **common)  # type: ignore[arg-type]
        if isinstance(entry, CommitEntry):
            table.apply(entry)
        else:
            assert isinstance(entry, Refused)
            assert entry.code == "THROTTLED"
        return isinstance(entry, CommitEntry)

    made = next(number for number in range(10_000) if not commit(f"g{number}", "m" * COMMIT_METADATA_BYTES_MAX))
    assert 900 < made < 1_100
    assert len(encode_entry(table.snapshot(lambda _: -1))) < BATCH_BYTES_MAX / 2
    assert commit("g0", "m" * COMMIT_METADATA_BYTES_MAX, 2), "who is there goes on"
    assert not commit("small", "m" * COMMIT_METADATA_BYTES_MAX)
    table.apply(ForgetEntry("g1"))
    assert commit("g1", "\u00fc" * (COMMIT_METADATA_BYTES_MAX // 2 - 10))
    assert commit("g0", "", 3), "less than before"
    again = GroupTable()
    again.apply(table.snapshot(lambda _: -1))
    assert again._rows_bytes == table._rows_bytes
    for number in range(made):
        again.apply(ForgetEntry(f"g{number}"))
    assert again._rows_bytes == 0


def test_an_epoch_that_retention_emptied_still_tells_where_it_ended() -> None:
    index = EpochIndex([(1, 0), (2, 5)])
    index.advance(5, 9)
    assert index.end_offset_for(1, 9) == (1, 5), "a secondary that ends at 5 in epoch 1 agrees with this log"
    index.advance(9, 9)
    index.observe(4, 9)  # everything is gone, and another primary begins
    assert index.end_offset_for(2, 10) == (2, 9)
    index.truncate(9)
    assert index.end_offset_for(2, 9) == (2, 9), "nor does a cut forget it"
