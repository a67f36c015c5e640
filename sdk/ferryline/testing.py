"""A whole cluster in a test's own process, on virtual time and without sockets::

    import ferryline as fl

    async with fl.testing.Cluster(brokers=3, seed=7, topics=["orders"]) as cluster:
        async with cluster.client() as client: ...

It is a distribution of its own, because it brings coordinator and broker along: ``pip install ferryline[testing]``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferryline_testing import Cluster as Cluster
    from ferryline_testing import Event as Event
    from ferryline_testing import EventLog as EventLog
    from ferryline_testing import Faults as Faults

__all__ = ["Cluster", "Event", "EventLog", "Faults"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ferryline.testing' has no attribute {name!r}")
    try:
        package = importlib.import_module("ferryline_testing")
    except ModuleNotFoundError as error:
        if error.name != "ferryline_testing":
            raise
        raise ModuleNotFoundError(
            f"ferryline.testing.{name} needs what is not installed: pip install ferryline[testing]",
            name="ferryline_testing",
        ) from None
    value = globals()[name] = getattr(package, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
