"""kcat-style formats: how records look as text, and how text becomes records.

=====  ================================  =====  ==========================
``%t`` topic                             ``%k`` key
``%p`` partition                         ``%v`` value (``%s`` is the same)
``%o`` offset                            ``%K`` length of the key, -1 null
``%T`` timestamp, ms since 1970          ``%S`` length of the value, -1 null
``%d`` timestamp, ISO 8601               ``%h`` headers ``a=1,b=2``
``%%`` a percent sign                    ``\\n \\t \\0 \\xHH`` as in C
=====  ================================  =====  ==========================
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO

from ferryline.cli.settings import UsageError

Headers = Sequence[tuple[str, bytes | None]]
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", "%": "%"}
_CHUNK_BYTES = 256 * 1024
RECORD_TEXT_BYTES_MAX = 16 * 1024 * 1024  # one record's text on stdin; without it a missing delimiter eats all memory


@dataclass(frozen=True)
class Shown:
    """A record as the formats see it."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers


def unescape(text: str) -> str:
    r"""C-like escapes: ``\n``, ``\t``, ``\r``, ``\0``, ``\\``, ``\xHH``."""

    def one(match: re.Match[str]) -> str:
        body = match.group(1)
        if body.startswith("x"):
            return chr(int(body[1:], 16))
        if body not in _ESCAPES:
            raise UsageError(f"unknown escape \\{body} in {text!r}")
        return _ESCAPES[body]

    return re.sub(r"\\(x[0-9a-fA-F]{2}|.)", one, text)


def tokens(template: str) -> list[tuple[str, str]]:
    """("field", letter) and ("text", literal) in order. Raises UsageError for a field that does not exist."""
    found: list[tuple[str, str]] = []
    literal = ""
    at = 0
    while at < len(template):
        if template[at] == "%":
            letter = template[at + 1 : at + 2]
            at += 2
            if letter == "%":
                literal += "%"
                continue
            if letter not in _WRITERS:
                known = " ".join(f"%{name}" for name in _WRITERS)
                raise UsageError(f"format: %{letter} does not exist; known: {known} %%")
            if literal:
                found.append(("text", unescape(literal)))
                literal = ""
            found.append(("field", letter))
            continue
        if template[at] == "\\":
            literal += template[at : at + 2]
            at += 2
            continue
        literal += template[at]
        at += 1
    if literal:
        found.append(("text", unescape(literal)))
    return found


def _headers_text(record: Shown) -> bytes:
    return b",".join(name.encode() + b"=" + (value or b"") for name, value in record.headers)


def _iso(record: Shown) -> bytes:
    return datetime.fromtimestamp(record.timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds").encode()


def _length(data: bytes | None) -> bytes:
    return b"%d" % (-1 if data is None else len(data))


_WRITERS: dict[str, Callable[[Shown], bytes]] = {
    "t": lambda record: record.topic.encode(),
    "p": lambda record: b"%d" % record.partition,
    "o": lambda record: b"%d" % record.offset,
    "T": lambda record: b"%d" % record.timestamp_ms,
    "d": _iso,
    "k": lambda record: record.key or b"",
    "v": lambda record: record.value or b"",
    "s": lambda record: record.value or b"",
    "K": lambda record: _length(record.key),
    "S": lambda record: _length(record.value),
    "h": _headers_text,
}


def writer(template: str) -> Callable[[Shown], bytes]:
    """A function from a record to its text. Bytes pass through untouched."""
    parts: list[Callable[[Shown], bytes] | bytes] = [
        text.encode("latin-1" if text.isascii() else "utf-8") if kind == "text" else _WRITERS[text]
        for kind, text in tokens(template)
    ]

    def write(record: Shown) -> bytes:
        return b"".join(part if isinstance(part, bytes) else part(record) for part in parts)

    return write


@dataclass(frozen=True)
class Parsed:
    """A record read from text. ``partition`` is None unless the format names it."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    partition: int | None = None


class Reader:
    """Text to records by a format such as ``%k %v\\n``: fields between separators, the last text ends a record."""

    def __init__(self, template: str) -> None:
        parts = tokens(template)
        if not parts or parts[-1][0] == "field":
            parts.append(("text", "\n"))
        self.delimiter = parts.pop()[1].encode()
        fields = [text for kind, text in parts if kind == "field"]
        if bad := [name for name in fields if name not in "kvshp"]:
            raise UsageError(f"format: %{bad[0]} cannot be read; a record has %k %v %h %p")
        if "v" not in fields and "s" not in fields:
            raise UsageError(f"format: {template!r} has no %v")
        for (kind, _), (after, _) in itertools.pairwise(parts):
            if kind == after == "field":
                raise UsageError(f"format: {template!r} has two fields with nothing between them")
        self._parts = [(kind, text.encode() if kind == "text" else text) for kind, text in parts]

    def parse(self, line: bytes) -> Parsed:
        """One record's text, without its delimiter. Raises ValueError that says which separator is missing."""
        found: dict[str, bytes] = {}
        rest = line
        for number, (kind, text) in enumerate(self._parts):
            if kind == "text":
                assert isinstance(text, bytes)
                if number == 0:
                    if not rest.startswith(text):
                        raise ValueError(f"does not begin with {text.decode(errors='replace')!r}")
                    rest = rest[len(text) :]
                continue
            assert isinstance(text, str)
            if number + 1 == len(self._parts):
                found[text], rest = rest, b""
                continue
            separator = self._parts[number + 1][1]
            assert isinstance(separator, bytes)
            value, hit, rest = rest.partition(separator)
            if not hit:
                raise ValueError(f"has no {separator.decode(errors='replace')!r} after %{text}")
            found[text] = value
        return Parsed(
            found.get("k"),
            found.get("v", found.get("s")),
            parse_headers(found.get("h", b"")),
            int(found["p"]) if "p" in found else None,
        )


def parse_headers(text: bytes) -> list[tuple[str, bytes | None]]:
    """``a=1,b=2``; a name without ``=`` has a null value."""
    found: list[tuple[str, bytes | None]] = []
    for item in text.split(b","):
        if item:
            name, equals, value = item.partition(b"=")
            found.append((name.decode(errors="replace"), value if equals else None))
    return found


def split_stream(stream: BinaryIO, delimiter: bytes) -> Iterator[bytes]:
    """Pieces of a stream between delimiters; a last piece without one counts, an empty last one does not.

    Reads what is there (a pipe that trickles is served at once). Raises UsageError above RECORD_TEXT_BYTES_MAX.
    """
    read = getattr(stream, "read1", stream.read)
    buffer = bytearray()
    while chunk := read(_CHUNK_BYTES):
        start = max(0, len(buffer) - len(delimiter) + 1)
        buffer += chunk
        if delimiter not in memoryview(buffer)[start:].tobytes():
            if len(buffer) > RECORD_TEXT_BYTES_MAX:
                raise UsageError(f"input: {RECORD_TEXT_BYTES_MAX} bytes without the delimiter {delimiter!r}")
            continue
        pieces = bytes(buffer).split(delimiter)
        buffer = bytearray(pieces.pop())
        yield from pieces
    if buffer:
        yield bytes(buffer)
