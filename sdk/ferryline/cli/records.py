"""Text in, records out: how `ferryline produce` reads its input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ferryline.cli.formats import Parsed, Reader, split_stream, unescape
from ferryline.cli.settings import UsageError


@dataclass(frozen=True)
class InputForm:
    """How input becomes records; at most one of ``template``, ``key_separator``, ``key_field``, ``whole_files``."""

    template: str | None = None
    key_separator: str | None = None
    key_field: str | None = None
    whole_files: bool = False

    def check(self) -> None:
        """Raises UsageError when two ways are asked for at once."""
        given = {
            "--format": self.template,
            "--key-separator": self.key_separator,
            "--key-field": self.key_field,
            "--whole-files": self.whole_files or None,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} cannot be combined")


class BadInput(Exception):
    """A piece of input that is no record; ``where`` counts from 1."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


def read(streams: Iterable[tuple[str, BinaryIO]], form: InputForm) -> Iterator[Parsed | BadInput]:
    """Records of all streams, one after the other; what is no record comes as BadInput and the rest goes on."""
    form.check()
    for name, stream in streams:
        if form.whole_files:
            yield Parsed(name.encode() if name != "-" else None, stream.read(), [])
            continue
        yield from _split(name, stream, form)


def _split(name: str, stream: BinaryIO, form: InputForm) -> Iterator[Parsed | BadInput]:
    reader = Reader(form.template) if form.template is not None else None
    separator = unescape(form.key_separator).encode() if form.key_separator is not None else None
    delimiter = reader.delimiter if reader is not None else b"\n"
    path = form.key_field.split(".") if form.key_field is not None else None
    for number, piece in enumerate(split_stream(stream, delimiter), 1):
        try:
            if reader is not None:
                yield reader.parse(piece)
            elif separator is not None:
                yield _by_separator(piece, separator)
            elif path is not None:
                yield Parsed(_field(piece, path), piece, [("content-type", b"application/json")])
            else:
                yield Parsed(None, piece, [])
        except ValueError as error:
            yield BadInput(f"{name}:{number}", str(error))


def _by_separator(piece: bytes, separator: bytes) -> Parsed:
    key, found, value = piece.partition(separator)
    if not found:
        raise ValueError(f"has no separator {separator.decode(errors='replace')!r}")
    return Parsed(key, value, [])


def _field(piece: bytes, path: Sequence[str]) -> bytes:
    """The key inside a JSON object: texts as they are, numbers and booleans as JSON writes them."""
    try:
        value: Any = json.loads(piece)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    for name in path:
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"has no field {'.'.join(path)!r}")
        value = value[name]
    if isinstance(value, dict | list) or value is None:
        raise ValueError(f"field {'.'.join(path)!r} is {type(value).__name__}, not a text or a number")
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def open_all(files: Sequence[Path]) -> Iterator[tuple[str, BinaryIO]]:
    """(name, stream) of each file; ``-`` and no file at all are stdin. Raises OSError naming the file."""
    import sys

    for path in files or [Path("-")]:
        if str(path) == "-":
            yield "-", sys.stdin.buffer
        else:
            with path.open("rb") as stream:
                yield str(path), stream
