"""Cron expressions: when a schedule fires next. Pure: the time is an argument.

Five fields: minute, hour, day of month, month, day of week; each ``*``, a number, a range ``a-b``, a step ``*/n`` or
``a-b/n``, or several of these with commas. Months and days of the week have names, Sunday is 0 and 7. When both days
are restricted, either is enough. ``@hourly`` and the like stand for what they always did.

The clock of a time zone jumps. A schedule for fixed hours fires once for each time of the local day: what falls into
the hour that is left out comes as much later as the clock was moved, and of an hour that comes twice the first counts.
A schedule for every hour follows the hours that really pass: none that is left out, both of one that comes twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ferryline.protocol.errors import InvalidArgument

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
# name, lowest, highest, names, number of the first name
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...], int], ...] = (
    ("minute", 0, 59, (), 0),
    ("hour", 0, 23, (), 0),
    ("day of month", 1, 31, (), 0),
    ("month", 1, 12, MONTHS, 1),
    ("day of week", 0, 7, DAYS, 0),
)
_PART = re.compile(r"(?P<first>\*|\w+)(-(?P<last>\w+))?(/(?P<step>\d+))?", re.ASCII)
_EVERY_HOUR = frozenset(range(24))
_SEARCH_DAYS = 8 * 366 + 40  # a 29th of February may be eight years away
_JUMP_MAX = timedelta(hours=26)  # no clock was ever moved by more at once


class Cron:
    """A parsed expression in a time zone. Raises InvalidArgument, naming the field, for what is none or never comes."""

    def __init__(self, text: str, tz: str = "UTC") -> None:
        self.text = text
        self.zone = zone_of(tz)
        fields = ALIASES.get(text.strip().lower(), text).split()
        if len(fields) != len(_FIELDS):
            raise _refused(text, f"{len(fields)} fields; minute, hour, day of month, month, day of week are five")
        minutes, hours, days, months, weekdays = (
            _parse(text, field, *spec) for field, spec in zip(fields, _FIELDS, strict=True)
        )
        self._minutes = sorted(minutes)
        self._hours = sorted(hours)
        self._days, self._months = days, months
        self._weekdays = frozenset(day % 7 for day in weekdays)
        self._either_day = not (fields[2].startswith("*") or fields[4].startswith("*"))
        self._every_hour = hours == _EVERY_HOUR
        if self._first_day(date(2024, 1, 1)) is None:
            raise _refused(text, "no such day ever comes")

    def __repr__(self) -> str:
        return f"Cron({self.text!r}, {self.zone})"

    def next_after(self, moment: datetime) -> datetime:
        """The first firing after ``moment`` (with a time zone), in UTC."""
        moment = moment.astimezone(UTC)
        # What is left out of a day may come in the next one, where clocks are put forward over midnight.
        day = moment.astimezone(self.zone).date() - timedelta(days=1)
        while True:
            found_day = self._first_day(day)
            assert found_day is not None, (self, moment)
            day = found_day + timedelta(days=1)
            found = min((at for at in self._of_day(found_day, moment) if at > moment), default=None)
            if found is not None:
                return found

    def _first_day(self, day: date) -> date | None:
        """The first day from ``day`` on that matches; None: there is none."""
        for _ in range(_SEARCH_DAYS):
            if day.month in self._months and self._matches(day):
                return day
            day += timedelta(days=1)
        return None

    def _matches(self, day: date) -> bool:
        of_month, of_week = day.day in self._days, day.isoweekday() % 7 in self._weekdays
        return of_month or of_week if self._either_day else of_month and of_week

    def _of_day(self, day: date, moment: datetime) -> Iterator[datetime]:
        """Firings of a local day, in UTC, in the local order; those long before ``moment`` are left out."""
        floor = (moment - _JUMP_MAX).astimezone(self.zone).replace(tzinfo=None)
        for hour in self._hours:
            if datetime.combine(day, time(hour, 59)) < floor:
                continue
            for minute in self._minutes:
                local = datetime.combine(day, time(hour, minute))
                yield from instants(local, self.zone, twice=self._every_hour, missing=not self._every_hour)


class Every:
    """A firing every so many seconds, counted from 1970 on, so that everybody means the same moments."""

    def __init__(self, seconds: float) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 1 <= seconds <= 366 * 86_400:
            raise InvalidArgument(f"every: {seconds!r} is not a number of seconds in 1..{366 * 86_400}", field="every")
        self.seconds = seconds
        self._ms = round(seconds * 1000)

    def __repr__(self) -> str:
        return f"Every({self.seconds:g} s)"

    def next_after(self, moment: datetime) -> datetime:
        """The first firing after ``moment``, in UTC."""
        ms = (moment.astimezone(UTC) - _EPOCH) // timedelta(milliseconds=1)
        return _EPOCH + timedelta(milliseconds=(ms // self._ms + 1) * self._ms)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def zone_of(name: str) -> tzinfo:
    """A time zone by its name in the tz database. Raises InvalidArgument."""
    if name.upper() == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidArgument(f"tz: {name!r:.80} is no time zone of this machine", field="tz") from error


def instants(local: datetime, zone: tzinfo, *, twice: bool, missing: bool) -> list[datetime]:
    """The moments, in UTC, at which clocks in ``zone`` show ``local``.

    ``twice``: both, when it comes twice; otherwise the first. ``missing``: a time that is left out comes as much later
    as the clock was moved; otherwise never.
    """
    first = local.replace(tzinfo=zone, fold=0).astimezone(UTC)
    if first.astimezone(zone).replace(tzinfo=None) != local:
        return [first] if missing else []
    second = local.replace(tzinfo=zone, fold=1).astimezone(UTC)
    return [first, second] if twice and second != first else [first]


def _parse(
    text: str, field: str, name: str, lowest: int, highest: int, names: tuple[str, ...], first_name: int
) -> frozenset[int]:
    found: set[int] = set()
    for part in field.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise _refused(text, f"{name}: {part!r:.40} is neither a number, a range, nor a step")
        step = int(match["step"] or 1)
        if match["first"] == "*":
            low, high = lowest, highest
            if match["last"]:
                raise _refused(text, f"{name}: {part!r:.40} is no range")
        else:
            low = _number(text, name, match["first"], names, first_name)
            high = _number(text, name, match["last"], names, first_name) if match["last"] else low
            if match["step"] and not match["last"]:
                raise _refused(text, f"{name}: {part!r:.40}: a step needs a range or *")
        if not lowest <= low <= high <= highest:
            raise _refused(text, f"{name}: {part!r:.40} is outside {lowest}..{highest}, or the wrong way round")
        if not 0 < step <= highest:
            raise _refused(text, f"{name}: a step of {step} is outside 1..{highest}")
        found.update(range(low, high + 1, step))
    return frozenset(found)


def _number(text: str, name: str, token: str, names: tuple[str, ...], first_name: int) -> int:
    if token.isdigit():
        return int(token)
    if token.lower() in names:
        return names.index(token.lower()) + first_name
    raise _refused(text, f"{name}: {token!r:.40} is no number")


def _refused(text: str, reason: str) -> InvalidArgument:
    return InvalidArgument(f"cron: {text!r:.80}: {reason}", field="cron")
