"""Numbered lines in files of bounded size: what the audit log is made of.

    refused.jsonl                      the newest lines
    refused-000000000000041.jsonl      older ones, named by the number of their first line

A line is a JSON object that begins with its number: ``{"seq":41,...}``. Numbers rise, so a number is a cursor that
stays good when files change their names. A line that was torn by a crash or a full disk is left and passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

FILE_BYTES_MAX = 10_000_000
FILES_MAX = 10
_TAIL_BYTES = 1_000_000  # many times the longest line
_SEQ = re.compile(rb'\A\{"seq":(\d{1,18}),')


def seq_of(line: bytes) -> int | None:
    """Number of a whole line; None for what is none."""
    found = _SEQ.match(line)
    return int(found.group(1)) if found and line.endswith(b"}\n") else None


class Journal:
    """Lines of one kind. Every method but the constructor may raise OSError; the lines that were there stay.

    Lines are handed to the kernel one by one: they outlive this process, and a power cut may take the newest ones.
    """

    def __init__(self, folder: Path, name: str, *, file_bytes: int = FILE_BYTES_MAX, files: int = FILES_MAX) -> None:
        self.folder = folder
        self._current = folder / f"{name}.jsonl"
        self._older = re.compile(rf"\A{re.escape(name)}-\d{{15}}\.jsonl\Z")
        self._name = name
        self._file_bytes, self._files = file_bytes, files
        self._descriptor = -1
        self._size = 0
        self._first = 0  # number of the first line in the current file; 0: it has none
        self._torn = False  # the current file does not end with a line's end

    def open(self) -> int:
        """Find what is there. Returns the number of the last line, 0 if there is none."""
        self._open_current()
        return max((_last(path) for path in self._paths()[-2:]), default=0)

    def _open_current(self) -> None:
        self.close()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._descriptor = os.open(self._current, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._descriptor).st_size
        self._torn = self._size > 0 and os.pread(self._descriptor, 1, self._size - 1) != b"\n"
        self._first = next((number for number, _ in _lines(self._current, 0)), 0)

    def append(self, number: int, line: bytes) -> None:
        """Add ``line``, which begins with ``number`` and ends with a newline."""
        if self._descriptor < 0 or self._is_gone():
            self._open_current()
        if self._size and self._size + len(line) > self._file_bytes:
            self._rotate(number)
        data = b"\n" + line if self._torn else line
        written = os.write(self._descriptor, data)
        self._size += written
        self._torn = written < len(data)
        if self._torn:
            raise OSError(f"{self._current}: {written} of {len(data)} bytes were taken")
        self._first = self._first or number

    def after(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Lines above ``number``, oldest first. Costs a look at few lines before the first of them."""
        paths = self._paths()
        starts = [self._started(path) for path in paths]
        for index, path in enumerate(paths):
            if index + 1 < len(paths) and 0 < starts[index + 1] <= number + 1:
                continue  # the next file begins at or before what is asked for
            yield from _lines(path, number)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _is_gone(self) -> bool:
        """Whether somebody took the current file away; lines would go where nobody finds them."""
        try:
            return not os.path.samestat(os.stat(self._current), os.fstat(self._descriptor))
        except FileNotFoundError:
            return True

    def _rotate(self, number: int) -> None:
        os.rename(self._current, self.folder / f"{self._name}-{self._first or number:015}.jsonl")
        self._open_current()
        for path in self._paths()[: -self._files]:
            path.unlink()

    def _paths(self) -> list[Path]:
        """Files that hold lines, oldest first; the current one is the last."""
        there = self.folder.iterdir() if self.folder.exists() else ()
        older = sorted(path for path in there if self._older.match(path.name))
        return [*older, self._current] if self._current.exists() else older

    def _started(self, path: Path) -> int:
        """Number of the first line of a file, 0 if it has none."""
        return self._first if path == self._current else int(path.stem.rpartition("-")[2])


def _lines(path: Path, number: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a file above ``number``."""
    with path.open("rb") as stream:
        _seek_after(stream, os.fstat(stream.fileno()).st_size, number)
        for line in stream:
            found = seq_of(line)
            if found is not None and found > number:
                yield found, line


def _last(path: Path) -> int:
    """Number of the last whole line, 0 if there is none in the last _TAIL_BYTES."""
    with path.open("rb") as stream:
        _next_line(stream, max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
        return max((seq_of(line) or 0 for line in stream), default=0)


def _seek_after(stream: BinaryIO, size: int, number: int) -> None:
    """Go to where the first line above ``number`` begins, or before it where lines are torn."""
    low, high = 0, size  # the least place from which the next line is above ``number``
    while low < high:
        middle = (low + high) // 2
        _next_line(stream, middle)
        found = next((seq for line in stream if (seq := seq_of(line)) is not None), None)
        if found is None or found > number:
            high = middle
        else:
            low = middle + 1
    _next_line(stream, low)


def _next_line(stream: BinaryIO, place: int) -> None:
    """Go to the first line that begins at ``place`` or after it."""
    stream.seek(max(0, place - 1))
    if place:
        stream.readline()
