"""`fl.Retry`: checked where it is written, in seconds there and in ms for the cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import ferryline as fl
from ferryline.cli.quantities import parse_backoff
from ferryline.cli.settings import UsageError
from ferryline.protocol.metadata import RetryPolicy, TopicConfig
from ferryline.retry import holds, with_retry


def test_what_is_not_said_is_the_default_of_the_cluster() -> None:
    assert fl.Retry().settings() == msgspec.structs.asdict(RetryPolicy())
    assert fl.Retry.of(RetryPolicy()) == fl.Retry()


def test_seconds_become_milliseconds_and_come_back() -> None:
    retry = fl.Retry(8, fl.exponential(0.25, 86_400), "park", "graveyard")
    policy = RetryPolicy(**retry.settings())
    assert policy == RetryPolicy(8, 250, 86_400_000, "park", "graveyard")
    assert fl.Retry.of(policy) == retry


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (lambda: fl.Retry(0), "retry.attempts"),
        (lambda: fl.Retry(1_001), "retry.attempts"),
        (lambda: fl.Retry(on_dead="drop"), "retry.on_dead"),
        (lambda: fl.Retry(dead_letters="a/b"), "retry.dead_letters"),
        (lambda: fl.Retry(dead_letters=""), "retry.dead_letters"),
        (lambda: fl.Retry(backoff=5), "retry.backoff"),  # type: ignore[arg-type]
        (lambda: fl.exponential(-1, 5), "backoff.first"),
        (lambda: fl.exponential(1, 86_401), "backoff.longest"),
        (lambda: fl.exponential(2, 1), "backoff.longest"),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_written(wrong: Callable[[], Any], field: str) -> None:
    with pytest.raises(fl.errors.InvalidRequest) as refused:
        wrong()
    assert refused.value.details["field"] == field


def test_a_change_shows_once_every_wanted_field_is_there() -> None:
    config = TopicConfig(retry=RetryPolicy(attempts=8))
    assert holds(config, with_retry({"min_isr": 1}, {"attempts": 8}))
    assert not holds(config, with_retry({}, {"attempts": 7}))
    assert not holds(config, with_retry({}, fl.Retry(8, on_dead="park")))
    assert not holds(config, with_retry({"min_isr": 2}, None))
    assert holds(config, {"of_a_later_release": 5})


def test_waits_are_written_from_and_up_to() -> None:
    assert parse_backoff("1s..60s") == (1_000, 60_000)
    assert parse_backoff("250ms..1h30m") == (250, 5_400_000)
    assert parse_backoff("5s") == (5_000, 5_000)
    for wrong in ("60s..1s", "1..60", "..60s", "1s..", "", "1s...2s"):
        with pytest.raises(UsageError):
            parse_backoff(wrong)
