"""Offsets, times and formats on the command line mean what the help says."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryline.cli.formats import Reader, Shown, parse_headers, split_stream, unescape, writer
from ferryline.cli.offsets import Point, Span, parse_duration_ms, parse_span, parse_time_ms
from ferryline.cli.settings import UsageError

NOW = 1_800_000_000_000


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("start", Span(Point("start"))),
        ("end", Span(Point("end"))),
        ("committed", Span(Point("committed"))),
        ("-10", Span(Point("last", 10))),
        ("1000", Span(Point("offset", 1000))),
        ("1000:2000", Span(Point("offset", 1000), Point("offset", 2000))),
        (":2000", Span(Point("start"), Point("offset", 2000))),
        ("1000:end", Span(Point("offset", 1000), Point("end"))),
        ("-5:end", Span(Point("last", 5), Point("end"))),
        ("@-1h", Span(Point("time", NOW - 3_600_000))),
        ("@-2h..@-1h30m", Span(Point("time", NOW - 7_200_000), Point("time", NOW - 5_400_000))),
        ("@1769860800000", Span(Point("time", 1_769_860_800_000))),
        ("@2026-01-31T12:00:00+00:00", Span(Point("time", 1_769_860_800_000))),
    ],
)
def test_a_span_is_read_as_written(text: str, span: Span) -> None:
    assert parse_span(text, NOW) == span


@pytest.mark.parametrize("text", ["", "x", "1.5", "2000:1000", "@yesterday", "@-1", "--5", "9" * 19, "1:x", "@-h"])
def test_nonsense_is_a_usage_error_that_quotes_it(text: str) -> None:
    with pytest.raises(UsageError):
        parse_span(text, NOW) if text else parse_time_ms(text, NOW)


def test_durations_add_up() -> None:
    assert parse_duration_ms("1h30m") == 5_400_000
    assert parse_duration_ms("1.5s") == 1_500
    with pytest.raises(UsageError, match="90"):
        parse_duration_ms("90")


RECORD = Shown("orders", 3, 42, 1_769_860_800_123, b"k1", b"v\x00\xff", [("a", b"1"), ("b", None)])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("%k %v\\n", b"k1 v\x00\xff\n"),
        ("%t[%p]@%o", b"orders[3]@42"),
        ("%T %d", b"1769860800123 2026-01-31T12:00:00.123+00:00"),
        ("%K:%S:%h", b"2:3:a=1,b="),
        ("100%%\\t%s", b"100%\tv\x00\xff"),
        ("\\x00%k", b"\x00k1"),
    ],
)
def test_a_record_is_written_as_the_format_says(template: str, text: bytes) -> None:
    assert writer(template)(RECORD) == text


def test_null_keys_and_values_are_empty_with_length_minus_one() -> None:
    record = Shown("t", 0, 0, 0, None, None, [])
    assert writer("%k|%v|%K|%S")(record) == b"||-1|-1"


@pytest.mark.parametrize("template", ["%x", "%", "%k \\q"])
def test_an_unknown_field_or_escape_is_a_usage_error(template: str) -> None:
    with pytest.raises(UsageError):
        writer(template)


def test_lines_become_records() -> None:
    reader = Reader("%k %v\\n")
    assert reader.delimiter == b"\n"
    parsed = reader.parse(b"c1 hello world")
    assert (parsed.key, parsed.value) == (b"c1", b"hello world")
    with pytest.raises(ValueError, match="has no ' ' after %k"):
        reader.parse(b"nokey")


def test_headers_and_partition_can_be_read_too() -> None:
    parsed = Reader("%p;%h;%k=%v;;").parse(b"7;a=1,b;key=value=x")
    assert (parsed.partition, parsed.headers, parsed.key, parsed.value) == (
        7,
        [("a", b"1"), ("b", None)],
        b"key",
        b"value=x",
    )


@pytest.mark.parametrize("template", ["%k", "%k%v", "%o %v", "only text"])
def test_a_format_that_cannot_be_read_is_a_usage_error(template: str) -> None:
    with pytest.raises(UsageError):
        Reader(template)


@given(st.lists(st.binary(max_size=20).filter(lambda piece: b"ab" not in piece + b"a"), max_size=20), st.integers(1, 9))
def test_a_stream_splits_the_same_however_it_arrives(pieces: list[bytes], step: int) -> None:
    whole = b"ab".join(pieces)

    class Trickle(io.RawIOBase):
        def __init__(self) -> None:
            self.at = 0

        def read(self, size: int = -1) -> bytes:
            chunk = whole[self.at : self.at + step]
            self.at += len(chunk)
            return chunk

    expected = whole.split(b"ab")
    if not expected[-1]:
        expected.pop()
    assert list(split_stream(Trickle(), b"ab")) == expected  # type: ignore[arg-type]


def test_small_helpers() -> None:
    assert unescape(r"a\tb\\n\x41") == "a\tb\\nA"
    assert parse_headers(b"") == []
