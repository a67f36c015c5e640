"""Where the coordinator keeps what must survive it: keys and values, guarded commits, one primary at a time.

Every back-end promises: a commit is whole, durable when OK is returned, and refused (LOST) for whoever campaigned
before the last one. UNKNOWN means that nobody can say; then nothing is repaired in place: resign, campaign, load again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Protocol

import msgspec


class Outcome(Enum):
    """What became of a commit."""

    OK = "ok"
    CONFLICT = "conflict"  # a guard did not hold; nothing was written
    LOST = "lost"  # another coordinator has campaigned since; nothing was written
    UNKNOWN = "unknown"  # it may or may not have been written


class Primaryship(msgspec.Struct, frozen=True):
    """The right to commit. ``coord_epoch`` is above every one given before."""

    coord_epoch: int


class Row(msgspec.Struct, frozen=True):
    """``version``: store revision of the last commit that wrote the key."""

    key: str
    value: bytes
    version: int


class Committed(msgspec.Struct, frozen=True):
    """``revision`` is the store's after the commit, 0 unless OK."""

    outcome: Outcome
    revision: int = 0


class StoreFailed(Exception):
    """The store cannot be used any more (I/O error, corruption, full disk): the process must exit; brokers carry on."""


class MetaStore(Protocol):
    """One coordinator's access to the store."""

    async def campaign(self, floor: int = 0) -> Primaryship:
        """Wait to become primary. The new coord_epoch is durable, and at least ``floor``, when this returns."""
        ...

    async def load(self, at_least: int = 0) -> list[Row]:
        """Everything, as of a revision not below ``at_least``."""
        ...

    async def commit(
        self, puts: Mapping[str, bytes], deletes: Iterable[str] = (), guards: Iterable[tuple[str, int]] = ()
    ) -> Committed:
        """Write all or nothing. A guard (key, version) holds if the key has that version (0: does not exist)."""
        ...

    async def resign(self) -> None:
        """Give up primaryship, if held. Nothing can be committed afterwards before the next campaign."""
        ...

    async def changed(self, timeout_s: float) -> bool:
        """Wait until the primaryship may have changed hands (a hint only), at most ``timeout_s`` seconds."""
        ...

    async def close(self) -> None:
        """Resign and give back what is open."""
        ...
