"""Where to read from: `start`, `end`, `-10`, `1000`, `1000:2000`, `@-1h`, `@2026-01-31T12:00`.

Pure: the present moment is an argument. Ranges are half-open, as offsets are everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ferryline.cli.settings import UsageError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
HELP = "start, end, committed, -10 (the last ten), 1000, 1000:2000, @-1h, @2026-01-31T12:00"


@dataclass(frozen=True)
class Point:
    """A place in every partition read. ``kind``: start, end, committed, offset, last, time (``value`` in ms)."""

    kind: str
    value: int = 0


@dataclass(frozen=True)
class Span:
    """From a point up to, and without, another one; no end means: go on."""

    start: Point
    stop: Point | None = None


def parse_duration_ms(text: str) -> int:
    """`90s`, `1h30m`, `7d` in ms. Raises UsageError."""
    found = _DURATION.findall(text)
    if not found or "".join(number + unit for number, unit in found) != text:
        raise UsageError(f"{text!r} is not a duration like 90s, 1h30m or 7d")
    return int(sum(float(number) * _UNIT_MS[unit] for number, unit in found))


def parse_time_ms(text: str, now_ms: int) -> int:
    """`-1h`, an ISO time (local unless it says otherwise) or ms since 1970, as ms since 1970. Raises UsageError."""
    if text.startswith("-"):
        return now_ms - parse_duration_ms(text[1:])
    if text.isdigit() and len(text) > 8:
        return int(text)
    if text == "now":
        return now_ms
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a time like -1h, 2026-01-31T12:00 or 1769860800000") from None
    if moment.tzinfo is None:
        moment = moment.astimezone()
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1))


def parse_point(text: str, now_ms: int) -> Point:
    """One place. Raises UsageError."""
    if text in ("start", "beginning", "earliest"):
        return Point("start")
    if text in ("end", "latest"):
        return Point("end")
    if text in ("committed", "stored"):
        return Point("committed")
    if text.startswith("@"):
        return Point("time", parse_time_ms(text[1:], now_ms))
    if re.fullmatch(r"-\d{1,18}", text):
        return Point("last", int(text[1:]))
    if re.fullmatch(r"\d{1,18}", text):
        return Point("offset", int(text))
    raise UsageError(f"{text!r} is not an offset; allowed: {HELP}")


def parse_span(text: str, now_ms: int) -> Span:
    """A place or a half-open range of places. Raises UsageError."""
    if text.startswith("@"):
        first, dots, second = text.partition("..")  # times contain colons
        return Span(parse_point(first, now_ms), parse_point(second, now_ms) if dots and second else None)
    first, colon, second = text.partition(":")
    start = parse_point(first or "start", now_ms)
    stop = parse_point(second, now_ms) if colon and second else None
    if stop is not None and start.kind == stop.kind == "offset" and stop.value < start.value:
        raise UsageError(f"{text!r} ends before it begins")
    return Span(start, stop)
