"""Settings of a log, its checkpoint, and the hooks through which the owner of a log hears of durable changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from ferryline.protocol.messages import LOG_OK
from ferryline.protocol.metadata import FLUSH_FSYNC
from ferryline_broker.log.index import NO_TIMESTAMP

MIB = 1024 * 1024
DIRTY_BYTES_MAX = 8 * MIB  # unflushed bytes of one log; more would make a single fdatasync hold the loop over 50 ms


@dataclass(frozen=True)
class LogConfig:
    """Settings of one log. Sizes in bytes, times in ms, -1 is no limit."""

    segment_bytes: int = 128 * MIB
    segment_ms: int = 86_400_000
    retention_ms: int = 7 * 86_400_000
    retention_bytes: int = -1
    flush: str = FLUSH_FSYNC
    dirty_bytes_max: int = DIRTY_BYTES_MAX

    def __post_init__(self) -> None:
        assert 0 < self.segment_bytes <= 2**31, "positions in the index are 32 bits"


class LogCheckpoint(msgspec.Struct, array_like=True, frozen=True):
    """How far one log was on disk: everything below ``offset``, which stands at ``position`` of segment ``segment``.

    Recovery trusts what is below it and reads what is above it. ``hw`` is the high watermark at that time; it may be
    above ``offset`` (a secondary learns it before its own flush ends).
    """

    offset: int = 0
    segment: int = -1  # base offset; -1: nothing was flushed
    position: int = 0
    chain: int = 0
    hw: int = 0
    index_bytes: int = 0  # of the index file, as written
    index_crc: int = 0
    max_timestamp: int = NO_TIMESTAMP
    created_ms: int = 0
    appended_ms: int = 0


NO_CHECKPOINT = LogCheckpoint()


def _ignore_cut(checkpoint: LogCheckpoint, state: str) -> None:
    pass


def _ignore_roll() -> None:
    pass


@dataclass
class LogHooks:
    """What the owner of a log does at durable steps.

    ``before_cut`` makes a lower checkpoint durable before the log is cut: otherwise a crash in between would make the
    cut look like lost data. ``rolled`` is called when a segment was sealed.
    """

    before_cut: Callable[[LogCheckpoint, str], None] = field(default=_ignore_cut)
    rolled: Callable[[], None] = field(default=_ignore_roll)


@dataclass(frozen=True)
class Damage:
    """The first place at which the log cannot be trusted."""

    offset: int
    reason: str


@dataclass(frozen=True)
class RecoveryReport:
    """What recovery found. ``log_state`` is one of the LOG_* constants; ``log_end`` per log (records, state)."""

    log_state: str = LOG_OK
    log_end: tuple[int, int] = (0, 0)
    reason: str = ""


@dataclass(frozen=True)
class SegmentInfo:
    """A segment as retention sees it."""

    base: int
    end: int
    size: int
    appended_ms: int
