"""A whole Ferryline cluster in one process, on virtual time and without sockets. Users write ``ferryline.testing``.

Names are loaded when they are first used: pytest imports the plugin in every run, also where nothing uses it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferryline_testing.cluster import Cluster as Cluster
    from ferryline_testing.events import Event as Event
    from ferryline_testing.events import EventLog as EventLog
    from ferryline_testing.faults import Faults as Faults

_MODULES = {
    "Cluster": "ferryline_testing.cluster",
    "Event": "ferryline_testing.events",
    "EventLog": "ferryline_testing.events",
    "Faults": "ferryline_testing.faults",
}

__all__ = ["Cluster", "Event", "EventLog", "Faults"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ferryline_testing' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value
