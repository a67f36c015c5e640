"""Sizes and durations as people write them: `10MiB`, `7d`, `unlimited`."""

from __future__ import annotations

import re

from ferryline.cli.offsets import parse_duration_ms
from ferryline.cli.settings import UsageError

UNLIMITED = -1
_SIZE = re.compile(r"\A(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\Z")
_UNITS = {"": 1, "b": 1, "k": 1024, "kib": 1024, "kb": 1000, "m": 1024**2, "mib": 1024**2, "mb": 1000**2}
_UNITS |= {"g": 1024**3, "gib": 1024**3, "gb": 1000**3, "t": 1024**4, "tib": 1024**4, "tb": 1000**4}


def parse_size(text: str) -> int:
    """Bytes; -1 for `unlimited`. Raises UsageError."""
    if text in ("unlimited", "-1"):
        return UNLIMITED
    found = _SIZE.match(text)
    if not found or found.group(2).lower() not in _UNITS:
        raise UsageError(f"{text!r} is not a size like 512KiB, 10MB or unlimited")
    return int(float(found.group(1)) * _UNITS[found.group(2).lower()])


def parse_time(text: str) -> int:
    """Milliseconds; -1 for `unlimited`. Raises UsageError."""
    return UNLIMITED if text in ("unlimited", "-1") else parse_duration_ms(text)


def parse_backoff(text: str) -> tuple[int, int]:
    """`1s..60s`, shortest and longest wait, in ms; a single time stands for both. Raises UsageError."""
    first, dots, longest = text.partition("..")
    found = parse_duration_ms(first), parse_duration_ms(longest if dots else first)
    if found[1] < found[0]:
        raise UsageError(f"{text!r}: the longest wait is below the first")
    return found


def show_size(value: int) -> str:
    """Bytes in the largest binary unit that is at least one."""
    if value < 0:
        return "unlimited"
    for unit, size in (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value} B"


def show_time(value_ms: int) -> str:
    """Milliseconds in the largest unit that divides them."""
    if value_ms < 0:
        return "unlimited"
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)):
        if value_ms >= size and value_ms % size == 0:
            return f"{value_ms // size}{unit}"
    return f"{value_ms}ms"
