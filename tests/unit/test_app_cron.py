"""When schedules fire: fields, days, and clocks that jump."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryline.app.cron import ALIASES, Cron, Every
from ferryline.protocol.errors import InvalidArgument

BERLIN = ZoneInfo("Europe/Berlin")


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def firings(expression: str, after: str, count: int, tz: str = "UTC") -> list[str]:
    """The next ``count`` firings, as local times with their offset from UTC."""
    cron, at = Cron(expression, tz), utc(after)
    found = []
    for _ in range(count):
        at = cron.next_after(at)
        found.append(at.astimezone(cron.zone).strftime("%Y-%m-%d %H:%M%z")[:-2])
    return found


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("*/5 * * * *", "2026-01-01T00:00", "2026-01-01T00:05"),
        ("*/5 * * * *", "2025-12-31T23:59:59.999", "2026-01-01T00:00"),
        ("0 9-17/4 * * *", "2026-01-01T09:00", "2026-01-01T13:00"),
        ("0 9-17/4 * * *", "2026-01-01T17:00", "2026-01-02T09:00"),
        ("15,45 3 * * *", "2026-01-01T03:15", "2026-01-01T03:45"),
        ("0 0 1 jan,JUL *", "2026-01-01T00:00", "2026-07-01T00:00"),
        ("0 0 * * mon-fri", "2026-01-02T00:00", "2026-01-05T00:00"),  # after a Friday
        ("0 0 * * 7", "2026-01-01T00:00", "2026-01-04T00:00"),
        ("0 0 * * 0", "2026-01-01T00:00", "2026-01-04T00:00"),
        ("0 0 13 * fri", "2026-01-09T00:00", "2026-01-13T00:00"),  # both restricted: either is enough
        ("0 0 13 * fri", "2026-01-13T00:00", "2026-01-16T00:00"),
        ("0 0 */2 * mon", "2026-01-05T00:00", "2026-01-19T00:00"),  # a field with a star restricts: both must hold
        ("0 0 29 2 *", "2026-03-01T00:00", "2028-02-29T00:00"),
        ("0 0 29 2 *", "2096-03-01T00:00", "2104-02-29T00:00"),  # 2100 has none
        ("59 23 31 12 *", "2026-12-31T23:59", "2027-12-31T23:59"),
        ("@hourly", "2026-01-01T00:00", "2026-01-01T01:00"),
        ("@Weekly", "2026-01-01T00:00", "2026-01-04T00:00"),
        ("  0   0 * * *  ", "2026-01-01T00:00", "2026-01-02T00:00"),
    ],
)
def test_the_next_firing_is_the_first_time_that_all_fields_match(expression: str, after: str, expected: str) -> None:
    assert Cron(expression).next_after(utc(after)) == utc(expected)


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("* * * *", "4 fields"),
        ("* * * * * *", "6 fields"),
        ("", "0 fields"),
        ("60 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * 0 * *", "day of month"),
        ("* * * 13 *", "month"),
        ("* * * * 8", "day of week"),
        ("5-1 * * * *", "minute"),
        ("*/0 * * * *", "minute"),
        ("*/60 * * * *", "minute"),
        ("5/2 * * * *", "step"),
        ("*-5 * * * *", "minute"),
        ("1,,2 * * * *", "minute"),
        ("-1 * * * *", "minute"),
        ("* * * foo *", "month"),
        ("mon * * * *", "minute"),
        ("\u0661 * * * *", "minute"),
        ("0 0 31 2 *", "no such day"),
        ("0 0 31 4,6,9,11 *", "no such day"),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_field(expression: str, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        Cron(expression)


@pytest.mark.parametrize("tz", ["Mars/Olympus", "", "../etc/passwd", "/etc/localtime"])
def test_an_unknown_time_zone_is_refused(tz: str) -> None:
    with pytest.raises(InvalidArgument, match="tz"):
        Cron("* * * * *", tz)


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_each_alias_is_what_it_stands_for(alias: str) -> None:
    assert Cron(alias).next_after(utc("2026-05-05T05:05")) == Cron(ALIASES[alias]).next_after(utc("2026-05-05T05:05"))


# -- clocks that jump: 2026-03-29 02:00 -> 03:00 and 2026-10-25 03:00 -> 02:00 in Berlin -------------------


def test_a_fixed_time_that_is_left_out_comes_as_much_later_as_the_clock_was_moved() -> None:
    assert firings("30 2 * * *", "2026-03-28T00:00", 3, "Europe/Berlin") == [
        "2026-03-28 02:30+01", "2026-03-29 03:30+02", "2026-03-30 02:30+02",
    ]  # fmt: skip


def test_two_fixed_times_that_fall_together_fire_once() -> None:
    assert firings("30 2,3 * * *", "2026-03-28T12:00", 3, "Europe/Berlin") == [
        "2026-03-29 03:30+02", "2026-03-30 02:30+02", "2026-03-30 03:30+02",
    ]  # fmt: skip


def test_a_fixed_time_that_comes_twice_fires_the_first_time() -> None:
    assert firings("30 2 * * *", "2026-10-24T12:00", 2, "Europe/Berlin") == [
        "2026-10-25 02:30+02", "2026-10-26 02:30+01",
    ]  # fmt: skip


def test_asked_between_the_two_it_does_not_fire_again() -> None:
    assert firings("30 2 * * *", "2026-10-25T00:45", 1, "Europe/Berlin") == ["2026-10-26 02:30+01"]


def test_every_hour_follows_the_hours_that_really_pass() -> None:
    assert firings("30 * * * *", "2026-03-28T23:45", 3, "Europe/Berlin") == [
        "2026-03-29 01:30+01", "2026-03-29 03:30+02", "2026-03-29 04:30+02",
    ]  # fmt: skip
    assert firings("30 * * * *", "2026-10-24T23:45", 3, "Europe/Berlin") == [
        "2026-10-25 02:30+02", "2026-10-25 02:30+01", "2026-10-25 03:30+01",
    ]  # fmt: skip


def test_a_clock_that_moves_by_half_an_hour() -> None:  # Lord Howe: 02:00 -> 02:30 on 2026-10-04
    assert firings("15 2 * * *", "2026-10-03T12:00", 2, "Australia/Lord_Howe") == [
        "2026-10-04 02:45+11", "2026-10-05 02:15+11",
    ]  # fmt: skip


def test_a_clock_that_moves_at_midnight() -> None:  # Beirut: 00:00 -> 01:00 on 2026-03-29
    assert firings("0,30 0,23 * * *", "2026-03-28T20:45", 4, "Asia/Beirut") == [
        "2026-03-28 23:00+02", "2026-03-28 23:30+02", "2026-03-29 01:00+03", "2026-03-29 01:30+03",
    ]  # fmt: skip


def test_a_clock_that_moves_over_midnight() -> None:  # Nuuk: 23:00 -> 00:00 on 2026-03-28
    expected = ["2026-03-29 00:30-01", "2026-03-29 23:30-01"]
    assert firings("30 23 * * *", "2026-03-28T12:00", 2, "America/Nuuk") == expected
    assert firings("30 23 * * *", "2026-03-29T01:10", 2, "America/Nuuk") == expected  # there it is the 29th already


def test_a_day_that_was_left_out_altogether() -> None:  # Apia had no 2011-12-30
    assert firings("0 10 * * *", "2011-12-29T00:00", 3, "Pacific/Apia") == [
        "2011-12-29 10:00-10", "2011-12-31 10:00+14", "2012-01-01 10:00+14",
    ]  # fmt: skip


ZONES = [
    "UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Beirut", "Asia/Kathmandu", "Africa/Cairo",
    "America/Nuuk",
]  # fmt: skip
FIELDS = st.tuples(
    st.sampled_from(["*", "*/7", "0", "30", "5,35,59", "10-20"]),
    st.sampled_from(["*", "0", "2", "1-3", "*/6", "0,23"]),
    st.sampled_from(["*", "1", "15-31"]),
    st.sampled_from(["*", "3", "10,11"]),
    st.sampled_from(["*", "sun", "1-5"]),
)
MOMENTS = st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1)).map(lambda at: at.replace(tzinfo=UTC))  # noqa: DTZ001


@given(FIELDS, st.sampled_from(ZONES), MOMENTS)
def test_firings_rise_and_asking_in_between_changes_nothing(fields: tuple[str, ...], tz: str, moment: datetime) -> None:
    cron = Cron(" ".join(fields), tz)
    first = cron.next_after(moment)
    second = cron.next_after(first)
    assert moment < first < second
    assert cron.next_after(first - timedelta(milliseconds=1)) == first
    assert cron.next_after(first + (second - first) / 2) == second


@given(FIELDS, st.sampled_from(ZONES), MOMENTS)
def test_no_minute_before_the_next_firing_matches(fields: tuple[str, ...], tz: str, moment: datetime) -> None:
    """By trying each: a minute whose local time matches and exists is a firing, unless it is the second of two."""
    cron = Cron(" ".join(fields), tz)
    end = min(cron.next_after(moment), moment + timedelta(hours=30))
    at = moment.replace(second=0, microsecond=0) + timedelta(minutes=1)
    while at < end:
        local = at.astimezone(cron.zone)
        matches = (
            local.minute in cron._minutes and local.hour in cron._hours and local.month in cron._months
            and cron._matches(local.date())
        )  # fmt: skip
        assert not matches or (local.fold == 1 and not cron._every_hour), local
        at += timedelta(minutes=1)


# -- every ---------------------------------------------------------------------------------------------------


@given(st.one_of(st.integers(1, 100_000), st.floats(1, 100_000)), MOMENTS)
def test_everybody_means_the_same_moments(seconds: float, moment: datetime) -> None:
    every = Every(seconds)
    found = every.next_after(moment)
    assert found > moment
    assert found - moment <= timedelta(seconds=seconds + 0.001)
    assert every.next_after(found - timedelta(milliseconds=1)) == found
    assert Every(seconds).next_after(moment + (found - moment) / 2) == found


@pytest.mark.parametrize("seconds", [0, 0.5, -1, float("nan"), float("inf"), 10**9, True, "60"])
def test_an_interval_that_is_none_is_refused(seconds: object) -> None:
    with pytest.raises(InvalidArgument, match="every"):
        Every(seconds)  # type: ignore[arg-type]
