"""What the services write to their logs: for the cluster's events, and for Python's own logging instead of stdout.

``logging.getLogger("ferryline.testing")`` has it all, one child for each process; pytest shows it with a failed test.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

import structlog

from ferryline_testing.lives import HERE
from ferryline_testing.world import here

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "exception": 40, "critical": 50}
_kept: list[dict[str, Any]] = []


def take_over() -> None:
    """Until `give_back`, structlog hands its lines to us. Counts: each cluster takes and gives back once."""
    _kept.append(structlog.get_config())
    structlog.configure(processors=[_hand_on], cache_logger_on_first_use=False)


def give_back() -> None:
    structlog.configure(**_kept.pop())


def _hand_on(_: Any, method: str, line: MutableMapping[str, Any]) -> Any:
    life, world = HERE.get(), here()
    if life is None or not life.dead:
        name = life.name if life is not None else "cluster"
        said = str(line.pop("event", ""))
        failure = line.pop("exc_info", None)
        log = logging.getLogger(f"ferryline.testing.{name}")
        told = " ".join([said, *(f"{key}={value}" for key, value in line.items())])
        log.log(_LEVELS.get(method, 20), "%s", told, exc_info=failure if _is_failure(failure) else None)
        if world is not None and life is not None:
            world.heard(said, {"level": method, **line})
    raise structlog.DropEvent


def _is_failure(value: Any) -> bool:
    return isinstance(value, BaseException | tuple) or value is True
