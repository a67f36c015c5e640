"""Positions of consumers on disk: one file each, replaced as a whole; a gateway that dies repeats and skips nothing.

``<name>`` holds a position whose answer was written to its caller, ``<name>.out`` one whose answer perhaps was not.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

import msgspec

from ferryline.falconq.position import Position
from ferryline.protocol.errors import Conflict, StorageFailed

_OUT = ".out"


class PositionFiles:
    """Positions below one folder, for one gateway at a time. Raises Conflict when another one has it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise Conflict(f"data_dir: another gateway keeps its positions in {folder}", field="data_dir") from None

    def close(self) -> None:
        os.close(self._lock)

    def load(self, fresh: Position) -> tuple[Position, bool]:
        """The position of the consumer that ``fresh`` names, or ``fresh``; and whether its answer was written."""
        path = self._path(fresh)
        for found, written in ((path.with_suffix(_OUT), False), (path, True)):
            try:
                raw = found.read_bytes()
            except FileNotFoundError:
                continue
            try:
                return msgspec.json.decode(raw, type=Position), written
            except msgspec.DecodeError as error:
                raise StorageFailed(f"{found}: {error}; remove it to begin at the group's position") from None
        return fresh, True

    def save(self, position: Position) -> None:
        """Durable when this returns. A position with an answer out counts as not written until `written`."""
        path = self._path(position)
        goal = path.with_suffix(_OUT) if position.token else path
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            stream.write(msgspec.json.encode(position))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(goal)
        if goal == path:
            path.with_suffix(_OUT).unlink(missing_ok=True)
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def written(self, position: Position) -> None:
        """The answer was written to its caller. Lost in a power cut: then it is repeated."""
        path = self._path(position)
        if path.with_suffix(_OUT).exists():
            path.with_suffix(_OUT).replace(path)

    def _path(self, position: Position) -> Path:
        named = f"{position.topic_id}/{position.consumer}/{position.scope}"
        return self._folder / hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
