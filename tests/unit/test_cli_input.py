"""How text becomes records, and how sizes and durations are written."""

from __future__ import annotations

import io

import pytest

from ferryline.cli.formats import Parsed
from ferryline.cli.quantities import parse_size, parse_time, show_size, show_time
from ferryline.cli.records import BadInput, InputForm, read
from ferryline.cli.settings import UsageError


def records(text: bytes, **form: object) -> list[Parsed | str]:
    found = read([("-", io.BytesIO(text))], InputForm(**form))  # type: ignore[arg-type]
    return [str(item) if isinstance(item, BadInput) else item for item in found]


def test_lines_are_values() -> None:
    assert records(b"a\n\nb") == [Parsed(None, b"a", []), Parsed(None, b"", []), Parsed(None, b"b", [])]


def test_a_separator_splits_the_key_off_and_what_has_none_is_named() -> None:
    assert records(b"k:v:w\nnone\n", key_separator=":") == [Parsed(b"k", b"v:w", []), "-:2: has no separator ':'"]
    assert records(b"k\tv\n", key_separator=r"\t") == [Parsed(b"k", b"v", [])]


def test_a_field_of_json_is_the_key_and_the_line_stays_the_value() -> None:
    found = records(
        b'{"a": {"id": 7}}\n{"a": {"id": "x"}}\nnot json\n{"a": {}}\n{"a": {"id": [1]}}\n', key_field="a.id"
    )
    first, second, *bad = found
    assert isinstance(first, Parsed)
    assert isinstance(second, Parsed)
    assert (first.key, first.value) == (b"7", b'{"a": {"id": 7}}')
    assert (second.key, second.headers) == (b"x", [("content-type", b"application/json")])
    assert [str(item).split(":")[1] for item in bad] == ["3", "4", "5"]


def test_formats_and_whole_files() -> None:
    assert records(b"k1 v1;k2 v2;", template="%k %v;") == [Parsed(b"k1", b"v1", []), Parsed(b"k2", b"v2", [])]
    found = read([("a.png", io.BytesIO(b"x\ny"))], InputForm(whole_files=True))
    assert list(found) == [Parsed(b"a.png", b"x\ny", [])]


def test_two_forms_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="--format and --key-field"):
        InputForm(template="%v", key_field="a").check()


@pytest.mark.parametrize(
    ("text", "size"), [("10", 10), ("1KiB", 1024), ("1kb", 1000), ("1.5GiB", 1610612736), ("unlimited", -1)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-5", "1 parsec", "1e9"])
def test_nonsense_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_sizes_and_times_are_shown_as_they_are_written() -> None:
    for text in ("7d", "36h", "90s", "1500ms", "unlimited"):
        assert show_time(parse_time(text)) == text
    assert [show_size(size) for size in (-1, 5, 2048, 128 * 1024**2)] == ["unlimited", "5 B", "2 KiB", "128 MiB"]
