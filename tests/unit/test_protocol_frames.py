"""Frames, messages, errors, metadata: round trips, refusals, and what an older or newer peer may send."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryline.protocol import errors, frames, limits, messages, metadata
from ferryline.protocol.errors import InvalidArgument, InvalidName, MalformedRequest


def all_messages() -> list[type[msgspec.Struct]]:
    return sorted(
        (
            c
            for c in vars(messages).values()
            if isinstance(c, type) and issubclass(c, messages.Message) and c is not messages.Message
        ),
        key=lambda c: c.__name__,
    )


@given(st.integers(1, 255), st.integers(0, 2**32 - 1), st.binary(max_size=100), st.integers(0, 7))
def test_a_frame_comes_back_as_it_went_out(kind: int, correlation: int, payload: bytes, flags: int) -> None:
    header = messages.Produce(5, [messages.ProduceEntry("t" * 32, 1, 3, len(payload))])
    frame = frames.decode_frame(frames.encode_frame(kind, correlation, header, payload, flags=flags))
    assert (frame.kind, frame.correlation, frame.flags, bytes(frame.payload)) == (kind, correlation, flags, payload)
    assert frames.decode_header(frame.header, messages.Produce) == header


@given(st.binary(max_size=60))
def test_noise_is_a_malformed_frame_or_header(noise: bytes) -> None:
    try:
        frame = frames.decode_frame(noise)
        frames.decode_header(frame.header, messages.Fetch)
    except MalformedRequest:
        pass


@pytest.mark.parametrize("kind", all_messages(), ids=lambda c: c.__name__)
@given(noise=st.binary(max_size=40))
def test_noise_is_never_another_error(kind: type[msgspec.Struct], noise: bytes) -> None:
    try:
        frames.decode_header(noise, kind)
    except MalformedRequest:
        pass


def test_a_header_length_beyond_the_frame_is_refused() -> None:
    with pytest.raises(MalformedRequest, match="header_length"):
        frames.decode_frame(frames.PREFIX.pack(1, 0, 0, 1, 2**31) + b"x")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(MalformedRequest):
        frames.decode_header(b"\x91" * 100_000 + b"\x90", messages.Fetch)


def test_a_newer_peer_may_append_fields_and_an_older_one_may_leave_out_those_with_defaults() -> None:
    row = msgspec.msgpack.decode(frames.encode_value(messages.Hello(client="x")))
    newer = frames.encode_value([*row, "a field of tomorrow"])
    assert frames.decode_header(newer, messages.Hello).client == "x"
    assert frames.decode_header(frames.encode_value(row[:2]), messages.Hello).version_max == row[1]


def test_every_error_has_its_own_code_and_survives_the_wire() -> None:
    seen: dict[str, type] = {}
    for code, cls in errors.BY_CODE.items():
        assert code == cls.code
        assert cls not in seen.values()
        seen[code] = cls
        error = cls("because", field="x")
        info = frames.decode_header(frames.encode_value(error.info()), errors.ErrorInfo)
        back = errors.from_info(info)
        assert type(back) is cls
        assert back.message == "because"
        assert back.details == {"field": "x"}
        assert 400 <= cls.http_status < 600


def test_an_unknown_code_is_an_internal_error_with_unknown_outcome() -> None:
    error = errors.from_info(errors.ErrorInfo("FROM_THE_FUTURE", "?"))
    assert isinstance(error, errors.InternalError)
    assert not error.definite
    assert not error.retriable


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "é", "x" * 201, "__hidden", "a\0b", "a\n", 7, None])
def test_bad_names_are_refused(name: Any) -> None:
    with pytest.raises(InvalidName, match="topic"):
        limits.check_name(name)


@pytest.mark.parametrize("name", ["a", "A.b-c_d", "x" * 200, "0", "..a", "_x"])
def test_good_names_pass(name: str) -> None:
    assert limits.check_name(name) == name


@pytest.mark.parametrize("value", [0, 11, True, "5", None, 1.5])
def test_a_number_out_of_range_names_field_and_limits(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="lease"):
        limits.check_range(value, "lease", 1, 10)


def answer(revision: int, *, coord_epoch: int = 1, full: bool = False, **rest: Any) -> metadata.MetadataAnswer:
    return metadata.MetadataAnswer("c", coord_epoch, revision, full, **rest)


def test_metadata_never_goes_back() -> None:
    copy = metadata.ClusterMetadata()
    topic = metadata.TopicMeta("t1", "orders", metadata.TopicConfig(partitions=1))
    old = metadata.PartitionMeta("t1", 0, (1, 2), 1, 1, 1, (1, 2))
    new = msgspec.structs.replace(old, version=2, epoch=2, primary=2)
    assert copy.apply(answer(5, full=True, topics=[topic], partitions=[new]))
    assert not copy.apply(answer(4, partitions=[old]))
    assert copy.apply(answer(6, partitions=[old]))
    assert copy.partition("t1", 0) == new
    assert not copy.apply(metadata.MetadataAnswer("another cluster", 9, 99, True))
    assert copy.topic("orders") == topic


def test_a_topic_made_again_is_another_topic() -> None:
    copy = metadata.ClusterMetadata()
    first = metadata.TopicMeta("t1", "orders", metadata.TopicConfig(partitions=1))
    again = metadata.TopicMeta("t2", "orders", metadata.TopicConfig(partitions=1))
    copy.apply(answer(1, full=True, topics=[first], partitions=[metadata.PartitionMeta("t1", 0, (1,), 1, 1, 1, (1,))]))
    copy.apply(answer(2, topics=[again], deleted_topics=["t1"]))
    assert copy.topic("orders") == again
    assert copy.partition("t1", 0) is None
    assert metadata.ClusterMetadata().apply(copy.answer())


def test_the_prefix_is_twelve_bytes_little_endian() -> None:
    assert frames.encode_frame(10, 7, None)[:12] == struct.pack("<BBHII", 10, 0, 0, 7, 1)
