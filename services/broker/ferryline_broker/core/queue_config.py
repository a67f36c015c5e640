"""Limits of a queue in one partition, and how long it waits before it tries again. Pure."""

from __future__ import annotations

import hashlib

import msgspec

from ferryline.protocol.metadata import RetryPolicy


class QueueConfig(msgspec.Struct, frozen=True):
    """Limits of one queue in one partition."""

    heads: int = 20_000  # ready records in the window: what priorities choose from
    waiting: int = 1_000_000  # records in lanes behind them, 8 bytes each
    read_bytes: int = 1024 * 1024  # of log, at a time
    overdue_ms: int = 10_000  # ready for this long behind higher priorities: every second record is such a one
    dedupe_ms: int = 300_000  # an id that comes again within this time is a duplicate
    ids: int = 100_000  # that are remembered, the newest ones
    idle_ms: int = 7 * 86_400_000  # nobody asked: it holds back retention no longer


def backoff_ms(group: str, offset: int, attempts: int, policy: RetryPolicy) -> int:
    """Drawn evenly from [0, limit], by a hash: the same on every replica and in every test."""
    limit: int = min(policy.backoff_max_ms, policy.backoff_ms << min(attempts - 1, 40))
    named = f"{group}/{offset}/{attempts}".encode()
    draw = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")
    return draw * (limit + 1) >> 64
