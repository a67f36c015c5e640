"""Record batches: what goes in comes out; hostile bytes give CorruptBatch, never a crash or unbounded memory.

Every test here runs on each codec that there is; `test_codec.py` compares them with each other.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import cramjam
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.protocol import records
from ferryline.protocol.errors import CorruptBatch, InvalidArgument
from ferryline.protocol.partitioner import partition_of
from unit.codecs import CODEC_NAMES, records_on


@pytest.fixture(scope="module", params=CODEC_NAMES, autouse=True)
def codec_in_use(request: pytest.FixtureRequest) -> Iterator[None]:
    """`records` on this codec, whichever was chosen at import."""
    global records
    ours, records = records, records_on(request.param)
    yield
    records = ours


record = st.tuples(
    st.none() | st.binary(max_size=40),
    st.none() | st.binary(max_size=200),
    st.lists(st.tuples(st.text(min_size=1, max_size=8), st.none() | st.binary(max_size=20)), max_size=3),
)
batches = st.lists(record, min_size=1, max_size=20)
codecs = st.sampled_from(sorted(records.CODECS))


@settings(deadline=None)
@given(batches, codecs, st.integers(0, 2**40), st.integers(0, 2**30))
def test_records_come_back_as_they_went_in(
    rows: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]], codec: str, base: int, epoch: int
) -> None:
    data = records.encode_batch(rows, timestamp_ms=1234, base_offset=base, epoch=epoch, codec=codec, producer=(9, 1, 5))
    header = records.read_header(data)
    records.check_crc(data, header)
    assert (header.base_offset, header.epoch, header.size) == (base, epoch, len(data))
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (9, 1, 5)
    decoded = list(records.decode_batch(data))
    assert [(r.key, r.value, list(r.headers)) for r in decoded] == rows
    assert [r.offset for r in decoded] == list(range(base, base + len(rows)))
    assert {r.timestamp for r in decoded} == {1234}


@settings(deadline=None)
@given(batches, st.integers(0, 2**60), st.integers(0, 2**30))
def test_stamping_does_not_touch_what_the_crc_covers(rows: list[object], base: int, epoch: int) -> None:
    data = records.encode_batch(rows)  # type: ignore[arg-type]
    records.stamp(data, base, epoch)
    header = records.read_header(data)
    records.check_crc(data, header)
    assert (header.base_offset, header.epoch) == (base, epoch)


@settings(deadline=None)
@given(batches, st.data())
def test_a_flipped_bit_never_passes_the_crc(rows: list[object], draw: st.DataObject) -> None:
    data = records.encode_batch(rows)  # type: ignore[arg-type]
    at = draw.draw(st.integers(17, len(data) - 1))
    data[at] ^= 1 << draw.draw(st.integers(0, 7))
    with pytest.raises(CorruptBatch):
        records.check_crc(data, records.read_header(data))


@settings(deadline=None)
@given(batches, st.data())
def test_a_cut_batch_is_named_as_cut(rows: list[object], draw: st.DataObject) -> None:
    data = bytes(records.encode_batch(rows))  # type: ignore[arg-type]
    cut = draw.draw(st.integers(0, len(data) - 1))
    if cut == 0:
        assert records.split_batches(b"") == []
        return
    with pytest.raises(CorruptBatch):
        records.split_batches(data[:cut])


@settings(max_examples=300, deadline=None)
@given(batches, codecs, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_hostile_bytes_decode_or_are_refused(rows: list[object], codec: str, edits: list[tuple[int, int]]) -> None:
    data = records.encode_batch(rows, codec=codec)  # type: ignore[arg-type]
    for at, value in edits:
        data[at % len(data)] = value
    try:
        header = records.read_header(data)
        list(records.decode_batch(data, header))
    except CorruptBatch:
        pass


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_never_a_batch(noise: bytes) -> None:
    if noise:
        with pytest.raises(CorruptBatch):
            records.split_batches(noise)


@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4", "snappy"])
def test_a_decompression_bomb_is_refused_within_the_bound(codec: str) -> None:
    zeros = b"\0" * (records.BATCH_DECODED_BYTES_MAX + 1024)
    if codec == "gzip":
        packer = zlib.compressobj(9, wbits=31)
        packed = packer.compress(zeros) + packer.flush()
    elif codec == "snappy":
        packed = bytes(cramjam.snappy.compress_raw(zeros))
    else:
        packed = bytes((cramjam.zstd if codec == "zstd" else cramjam.lz4).compress(zeros))
    data = records.encode_batch([(None, b"x", [])])[: records.HEADER_BYTES] + packed
    struct.pack_into(">i", data, 8, len(data) - 12)
    struct.pack_into(">h", data, 21, records.CODECS[codec])
    with pytest.raises(CorruptBatch):
        list(records.decode_batch(data))


@pytest.mark.parametrize("codec", sorted(records.CODECS))
def test_very_compressible_data_travels_with_every_codec(codec: str) -> None:
    data = records.encode_batch([(None, b"\0" * 4_000_000, [])], codec=codec)
    records.check_crc(data, records.read_header(data))
    assert len(next(iter(records.decode_batch(data))).value or b"") == 4_000_000


def test_an_unknown_codec_is_refused_when_asked_for() -> None:
    with pytest.raises(InvalidArgument, match="brotli"):
        records.BatchBuilder(1000, "brotli")


@pytest.mark.parametrize(
    ("offset", "fmt", "value"),
    [(16, ">b", 1), (8, ">i", 10), (8, ">i", -1), (57, ">i", -1), (57, ">i", 0), (57, ">i", 2**31 - 1), (23, ">i", 77)],
)
def test_impossible_headers_are_refused_by_the_header_alone(offset: int, fmt: str, value: int) -> None:
    data = records.encode_batch([(None, b"x", [])])
    struct.pack_into(fmt, data, offset, value)
    with pytest.raises(CorruptBatch):
        records.read_header(data)


def test_a_changed_producer_identity_is_sealed_again() -> None:
    data = records.encode_batch([(b"k", b"v", [])], producer=(1, 0, 0), codec="lz4")
    records.set_producer(data, 2, 7, 40)
    header = records.read_header(data)
    records.check_crc(data, header)
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (2, 7, 40)


def test_a_builder_takes_a_first_record_of_any_size_and_then_no_more() -> None:
    builder = records.BatchBuilder(1000)
    assert builder.append(0, None, b"x" * 5000, [])
    assert not builder.append(0, None, b"y", [])
    assert records.read_header(builder.build()).record_count == 1


def test_a_control_batch_says_so() -> None:
    data = records.epoch_start_batch(17, 3, 2)
    header = records.read_header(data)
    records.check_crc(data, header)
    assert header.is_control
    assert (header.base_offset, header.epoch, header.record_count) == (17, 3, 1)


@settings(deadline=None)
@given(st.binary(max_size=50), st.integers(1, 10_000))
def test_a_key_stays_on_its_partition(key: bytes, partitions: int) -> None:
    assert 0 <= partition_of(key, partitions) < partitions
    assert partition_of(key, partitions) == partition_of(bytes(key), partitions)


def test_keys_land_where_crc32_says() -> None:
    assert [partition_of(key, 12) for key in (b"", b"a", b"order-1", b"customer-42")] == [
        0,
        zlib.crc32(b"a") % 12,
        zlib.crc32(b"order-1") % 12,
        zlib.crc32(b"customer-42") % 12,
    ]
