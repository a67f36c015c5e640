"""Stepwise operations and the wall clock: the two things every store takes from outside."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TypeVar, cast

T = TypeVar("T")


def drained(steps: Generator[None, None, T]) -> T:
    """Run a stepwise operation to its end in one go."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return cast(T, stop.value)


def wall_clock_ms() -> int:
    """Only for the age of segments, never for safety."""
    return time.time_ns() // 1_000_000
