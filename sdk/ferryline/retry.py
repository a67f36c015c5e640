"""How a topic retries what its queues could not process: `Retry`, a setting of topics.

::

    await client.admin.create_topic("jobs", retry=fl.Retry(attempts=8, backoff=fl.exponential(1, 60)))
    await client.admin.alter_topic("jobs", retry=fl.Retry(on_dead="park"))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ferryline.options import check_seconds
from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import check_name, check_range
from ferryline.protocol.metadata import ON_DEAD_PARK, ON_DEAD_SKIP, RetryPolicy

ATTEMPTS_MAX = 1_000
BACKOFF_MAX_S = 86_400.0


class Exponential(msgspec.Struct, frozen=True):
    """A wait that doubles from ``first`` up to ``longest`` seconds. Made by `exponential`."""

    first: float
    longest: float


def exponential(first: float, longest: float) -> Exponential:
    """Wait at most ``first`` seconds before the second attempt, twice as long before the next, up to ``longest``.

    Each wait is drawn evenly from zero to that. Raises InvalidArgument, naming the limit.
    """
    check_seconds(first, "backoff.first", 0, BACKOFF_MAX_S)
    check_seconds(longest, "backoff.longest", 0, BACKOFF_MAX_S)
    if longest < first:
        raise InvalidArgument(f"backoff.longest: {longest:g} s is below first, {first:g} s", field="backoff.longest")
    return Exponential(first, longest)


BACKOFF_DEFAULT = exponential(1, 60)


class Retry(msgspec.Struct, frozen=True):
    """``attempts``: how often a record is handed out, all together. ``backoff``: the waits between them.

    ``on_dead``: "skip" copies a record that used them up to the topic ``dead_letters`` (default: ``<topic>.dlq``, which
    is made when it is first needed) and goes on; "park" stops the lane of its key until somebody redrives it.

    Raises InvalidArgument or InvalidName, naming the field and its limits.
    """

    attempts: int = 5
    backoff: Exponential = BACKOFF_DEFAULT
    on_dead: str = ON_DEAD_SKIP
    dead_letters: str | None = None

    def __post_init__(self) -> None:
        check_range(self.attempts, "retry.attempts", 1, ATTEMPTS_MAX)
        if not isinstance(self.backoff, Exponential):
            raise InvalidArgument("retry.backoff: expected exponential(first, longest)", field="retry.backoff")
        if self.on_dead not in (ON_DEAD_SKIP, ON_DEAD_PARK):
            raise InvalidArgument(
                f"retry.on_dead: expected '{ON_DEAD_SKIP}' or '{ON_DEAD_PARK}'", field="retry.on_dead"
            )
        if self.dead_letters is not None:
            check_name(self.dead_letters, "retry.dead_letters")

    def settings(self) -> dict[str, Any]:
        """As the coordinator takes it: all fields of RetryPolicy, times in ms."""
        return {
            "attempts": self.attempts,
            "backoff_ms": round(self.backoff.first * 1000),
            "backoff_max_ms": round(self.backoff.longest * 1000),
            "on_dead": self.on_dead,
            "dead_letters": self.dead_letters or "",
        }

    @classmethod
    def of(cls, policy: RetryPolicy) -> Retry:
        """What a topic has: ``Retry.of((await admin.describe_topic("jobs")).config.retry)``."""
        backoff = Exponential(policy.backoff_ms / 1000, policy.backoff_max_ms / 1000)
        return cls(policy.attempts, backoff, policy.on_dead, policy.dead_letters or None)


RetryLike = Retry | Mapping[str, Any]  # a mapping: fields of RetryPolicy, in ms; those that are left out stay


def with_retry(settings: dict[str, Any], retry: RetryLike | None) -> dict[str, Any]:
    """The settings of a request, with ``retry`` among them if it was given."""
    if retry is None:
        return settings
    return {**settings, "retry": retry.settings() if isinstance(retry, Retry) else dict(retry)}


def holds(config: msgspec.Struct, wanted: Mapping[str, Any]) -> bool:
    """Whether ``config`` has what was ``wanted``; fields that this client does not know are taken as there."""
    for name, value in wanted.items():
        held = getattr(config, name, value)
        if not (holds(held, value) if isinstance(held, msgspec.Struct) else held == value):
            return False
    return True
