"""The two codecs of record batches: the same bytes, the same refusals, and no way to hurt the process."""

from __future__ import annotations

import gc
import struct
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.protocol.errors import CorruptBatch
from unit.codecs import records_on

timestamps = st.integers(0, 2**62)
names = st.text(min_size=1, max_size=12)
rows = st.lists(
    st.tuples(
        timestamps,
        st.none() | st.binary(max_size=300),
        st.none() | st.binary(max_size=300),
        st.lists(st.tuples(names, st.none() | st.binary(max_size=80)), max_size=4),
    ),
    min_size=1,
    max_size=200,
)
edits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=8)


@pytest.fixture(scope="module")
def compiled() -> Any:
    return records_on("compiled")


@pytest.fixture(scope="module")
def python() -> Any:
    return records_on("python")


def plain(records: Any) -> list[tuple[Any, ...]]:
    return [(one.offset, one.timestamp, one.key, one.value, list(one.headers)) for one in records]


def outcome(module: Any, data: bytes) -> tuple[str, Any]:
    """What becomes of these bytes: headers and records, or the refusal with its words."""
    try:
        found = module.split_batches(data, verify=False)
        decoded = [plain(module.decode_batch(data[at : at + head.size], head)) for at, head in found]
    except CorruptBatch as refused:
        return ("refused", str(refused))
    return ("taken", ([str(head).partition("(")[2] for _, head in found], decoded))


@settings(deadline=None)
@given(
    rows,
    st.integers(100, 4_000),
    st.tuples(st.integers(-1, 2**62), st.integers(-1, 2**15 - 1), st.integers(-1, 2**31 - 1)),
)
def test_both_codecs_make_the_same_bytes_and_are_full_at_the_same_record(
    compiled: Any, python: Any, taken: list[Any], bytes_max: int, producer: tuple[int, int, int]
) -> None:
    built = []
    for module in (compiled, python):
        one_by_one, at_once = module.BatchBuilder(bytes_max), module.BatchBuilder(bytes_max)
        count = at_once.extend(taken)
        assert all(one_by_one.append(*row) for row in taken[:count])
        if count < len(taken):
            assert not one_by_one.append(*taken[count])
        assert one_by_one.count == at_once.count == count
        assert one_by_one.size() == at_once.size()
        data = one_by_one.build(*producer)
        assert data == at_once.build(*producer)
        built.append((count, data))
    assert built[0] == built[1]
    assert outcome(compiled, built[0][1]) == outcome(python, built[0][1])


@settings(max_examples=500, deadline=None)
@given(rows, edits, st.integers(0, 2**20), st.booleans())
def test_both_codecs_refuse_the_same_bytes_with_the_same_words(
    compiled: Any, python: Any, taken: list[Any], changes: list[tuple[int, int]], cut: int, cuts: bool
) -> None:
    builder = compiled.BatchBuilder(2**20)
    builder.extend(taken)
    data = builder.build()
    for at, value in changes:
        data[at % len(data)] = value
    if cuts:  # and say so in the header, or only the length is tested
        del data[max(61, cut % len(data)) :]
        struct.pack_into(">i", data, 8, len(data) - 12)
    assert outcome(compiled, bytes(data)) == outcome(python, bytes(data))


@settings(deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=9_000))
def test_the_processors_crc_is_the_crc(compiled: Any, python: Any, head: bytes, body: bytes) -> None:
    data = head + body * 3
    table = compiled._codec._compiled.crc32c_table
    assert compiled.crc32c(data) == python.crc32c(data) == table(data)
    assert compiled.crc32c(data[len(head) :], compiled.crc32c(head)) == compiled.crc32c(data)
    assert table(data[len(head) :], table(head)) == table(data)


def test_the_crc_of_the_standard_holds(compiled: Any, python: Any) -> None:
    assert compiled.crc32c(b"123456789") == python.crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("size", [0, 1, 7, 8, 767, 768, 769, 12_287, 12_288, 12_289, 100_003])
def test_the_crc_holds_at_every_seam_and_alignment(compiled: Any, python: Any, size: int) -> None:
    data = bytes((number * 37 + 11) % 256 for number in range(size + 8))
    for start in range(8):
        part = memoryview(data)[start : start + size]
        assert compiled.crc32c(part) == python.crc32c(bytes(part))


@settings(deadline=None)
@given(rows)
def test_messages_are_the_records(compiled: Any, taken: list[Any]) -> None:
    from ferryline.message import Message, Source
    from ferryline.protocol import _codec

    if not _codec.COMPILED:
        pytest.skip("Message is on the other codec in this process")
    builder = compiled.BatchBuilder(2**20)
    builder.extend(taken)
    data = builder.build()
    head, source = compiled.read_header(data), Source("t", 3, None)
    messages = compiled.decode_messages(data, head, Message, source, plain=True)
    got = [(one.offset, one.timestamp_ms, one.key, one.raw, one._pairs) for one in messages]
    assert got == plain(compiled.decode_batch(data))
    assert [one.value for one in messages] == [one.raw for one in messages]
    assert {one.topic for one in messages} == {"t"}


def test_a_batch_that_claims_many_records_costs_no_memory(compiled: Any, python: Any) -> None:
    for module in (compiled, python):
        data = module.encode_batch([(b"k", b"v", [])])
        struct.pack_into(">i", data, 23, 999_999)
        struct.pack_into(">i", data, 57, 1_000_000)
        with pytest.raises(CorruptBatch):
            module.decode_batch(data)


@pytest.mark.parametrize(
    "row",
    [
        ("now", b"k", b"v", []),
        (1, "text", b"v", []),
        (1, b"k", 7, []),
        (1, b"k", b"v", None),
        (1, b"k", b"v", [("name",)]),
        (1, b"k", b"v", [(b"name", b"v")]),
        (1, b"k", b"v", [("name", "text")]),
        (1, b"k", b"v", [("\ud800", b"v")]),
        (2**63, b"k", b"v", []),
    ],
)
def test_what_is_no_record_is_refused_and_leaves_the_batch_as_it_was(compiled: Any, row: tuple[Any, ...]) -> None:
    builder = compiled.BatchBuilder(10_000)
    builder.append(1, b"a", b"b", [])
    before = builder.size()
    with pytest.raises((TypeError, OverflowError, UnicodeEncodeError)):
        builder.append(*row)
    assert (builder.size(), builder.count) == (before, 1)
    assert [one.key for one in compiled.decode_batch(builder.build())] == [b"a"]


def test_a_spent_builder_takes_nothing_more(compiled: Any, python: Any) -> None:
    for module in (compiled, python):
        builder = module.BatchBuilder(1_000)
        builder.append(1, None, b"v", [])
        builder.build()
        with pytest.raises(ValueError, match="spent"):
            builder.append(1, None, b"v", [])
        with pytest.raises(ValueError, match="spent"):
            builder.build()


def test_a_builder_that_was_never_set_up_is_of_no_use(compiled: Any) -> None:
    builder = compiled._codec.Builder.__new__(compiled._codec.Builder)
    with pytest.raises(ValueError, match="spent"):
        builder.append(1, None, b"v", [])
    with pytest.raises(ValueError, match="spent"):
        builder.build(-1, -1, -1)


def test_messages_come_from_a_consumer_only(compiled: Any) -> None:
    base = compiled._codec.MessageBase
    with pytest.raises(TypeError):
        base()
    with pytest.raises(TypeError, match="without_gc"):
        compiled.decode_messages(
            compiled.encode_batch([(b"k", b"v", [])]),
            compiled.read_header(compiled.encode_batch([(b"k", b"v", [])])),
            type("Other", (base,), {"__slots__": ()}),
            None,
            plain=True,
        )
    with pytest.raises(TypeError, match="without_gc"):
        compiled._codec.without_gc(type("Wide", (base,), {"__slots__": ("more",)}))


def test_references_are_counted_right(compiled: Any) -> None:
    """Objects that go through both directions thousands of times are counted as often as before."""
    key, value, pairs = b"key" * 9, b"value" * 9, [("name", b"header" * 3)]
    kind = compiled._codec.without_gc(
        type("Kind", (compiled._codec.MessageBase,), {"__slots__": (), "_parse": lambda self: self.raw})
    )
    source = object()

    def counts() -> list[int]:
        gc.collect()
        return [sys.getrefcount(one) for one in (key, value, pairs, pairs[0], source, kind, None)]

    def once(plain_values: bool) -> None:
        builder = compiled.BatchBuilder(10_000)
        builder.append(5, key, value, pairs)
        builder.extend([(6, key, value, pairs)] * 3)
        data = builder.build()
        head = compiled.read_header(data)
        assert len(list(compiled.decode_batch(data))) == 4
        messages = compiled.decode_messages(data, head, kind, source, plain=plain_values)
        assert [one.value for one in messages] == [value] * 4
        del data[-1]
        with pytest.raises(CorruptBatch):
            compiled.decode_messages(data, head, kind, source, plain=plain_values)
        assert compiled.split_batches(compiled.encode_batch([(key, value, pairs)]))

    once(True)
    once(False)
    before = counts()
    for number in range(2_000):
        once(bool(number % 2))
    after = counts()
    assert after[:-1] == before[:-1]
    assert abs(after[-1] - before[-1]) < 200  # None is everybody's


def test_memory_does_not_grow_over_refused_and_taken_batches(compiled: Any) -> None:
    import tracemalloc

    builder = compiled.BatchBuilder(2**20)
    builder.extend([(number, b"k%d" % number, b"v" * 50, [("h", None)]) for number in range(500)])
    data = bytes(builder.build())
    broken = data[:-30] + b"\xff" * 30

    def rounds(count: int) -> None:
        for _ in range(count):
            list(compiled.decode_batch(data))
            with pytest.raises(CorruptBatch):
                compiled.decode_batch(broken)

    rounds(3)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    rounds(30)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 200_000  # one decoded batch is about 100 KB; thirty would be three million


@pytest.mark.parametrize(("wish", "name"), [("python", "python"), ("compiled", "compiled")])
def test_the_environment_chooses(compiled: Any, wish: str, name: str) -> None:
    code = "from ferryline.protocol import _codec; print(_codec.NAME)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"FERRYLINE_CODEC": wish}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == name


def test_a_wish_that_is_none_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import ferryline.protocol.records"],
        env={"FERRYLINE_CODEC": "fastest"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "none of auto, compiled, python" in done.stderr
