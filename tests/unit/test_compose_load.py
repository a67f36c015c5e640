"""The account of the load beside containers: what it must find wrong, and what it must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.compose_load import LOG, QUEUE, Load

KEY = b"key-1"


def good() -> Load:
    """Three records of a log consumed, three jobs done."""
    load = Load(lambda: pytest.fail("nobody connects"), 1.0)
    for topic in (LOG, QUEUE):
        load.acknowledged[topic][KEY] = [0, 1, 2]
    load.consumed[KEY] = [0, 1, 1, 2]  # again after a take-over: a log may do that
    load.begun[KEY] = [0, 1, 1, 2]  # again after a lost lease
    load.done[KEY] = [0, 2, 1]  # the answer to 1 came last
    return load


def test_what_was_kept_is_right() -> None:
    assert good().wrong() == []
    assert good().outstanding() == ""


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda load: load.consumed[KEY].remove(2), "1 of orders"),
        (lambda load: load.consumed[KEY].reverse(), "out of order"),
        (lambda load: load.done[KEY].remove(1), "1 of jobs"),
        (lambda load: load.done[KEY].append(2), "done twice"),
        (lambda load: load.begun[KEY].reverse(), "handed out out of order"),
        (lambda load: load.errors.update(["send: Throttled"]), "1 times send"),
        (lambda load: setattr(load, "redelivered", 1), "came again"),
    ],
)
def test_whatever_is_not_kept_is_found(spoil: Callable[[Load], object], said: str) -> None:
    load = good()
    spoil(load)
    assert said in "\n".join(load.wrong())
