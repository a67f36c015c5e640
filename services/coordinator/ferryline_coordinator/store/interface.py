"""`MetaStore`: what the coordinator needs of a durable store, and nothing that only one back-end could give.

Rules (replication.md, section 12): a commit is whole or not at all; OK means durable; whoever campaigned last wins, and
commits of everybody before are LOST; UNKNOWN means that nobody can tell, and then the only way on is to resign,
campaign again and load again. Nothing is repaired in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

import msgspec


class Outcome(Enum):
    """How a commit ended."""

    OK = "ok"
    CONFLICT = "conflict"  # a guard did not hold; nothing was written
    LOST = "lost"  # another coordinator campaigned since; nothing was written
    UNKNOWN = "unknown"  # it may have been written or not


class Primaryship(msgspec.Struct, frozen=True):
    """The right to commit, until somebody else campaigns. ``revision``: of the store when it was won."""

    coord_epoch: int
    revision: int


class Loaded(msgspec.Struct, frozen=True):
    """All records as of ``revision``: key -> (value, version). The version of a key rises with each write of it."""

    revision: int
    records: dict[str, tuple[bytes, int]]


class Committed(msgspec.Struct, frozen=True):
    """``revision`` is the version of every key that this commit wrote; 0 unless OK."""

    outcome: Outcome
    revision: int = 0


class StoreUnusable(Exception):
    """The store cannot be used: locked by another process, damaged, of an unknown format, or its disk failed.

    The coordinator exits; brokers carry on without it.
    """


class MetaStore(Protocol):
    """One back-end. Calls are made one at a time."""

    async def campaign(self, at_least: int = 0) -> Primaryship:
        """Win primaryship under a coordinator epoch above every earlier one and not below ``at_least``; waits for it.

        Raises StoreUnusable.
        """
        ...

    async def load(self, at_least: int) -> Loaded:
        """All records, not older than revision ``at_least``."""
        ...

    async def commit(
        self, puts: Mapping[str, bytes], deletes: Sequence[str], guards: Sequence[tuple[str, int]] = ()
    ) -> Committed:
        """Write all or nothing, if every guard (key, version) holds. Version 0: the key does not exist."""
        ...

    def holds(self) -> bool:
        """Whether primaryship cannot have ended yet, by the clock. Nothing is answered without it; commits are guarded
        all the same. Costs next to nothing: asked at each event."""
        ...

    def active(self) -> str:
        """URL of the coordinator that is active, as far as this one knows; "" if it does not, or is active itself."""
        ...

    async def members(self) -> list[str] | None:
        """URLs of the coordinators that run on this store now; None where there can be only one."""
        ...

    async def resign(self) -> None:
        """Give up primaryship; others need not wait for a time-out."""
        ...

    async def watch(self) -> None:
        """Return when primaryship may be over: another campaigned, or `holds` says no. A hint: LOST is the truth."""
        ...

    async def close(self) -> None:
        """Resign and let go of everything. Nothing is in flight any more when this returns."""
        ...
