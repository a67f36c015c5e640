"""What a seeded bug is."""

from __future__ import annotations

import msgspec

ALL = "2/1/fsync,2/1/replicated,2/2/fsync,2/2/replicated,3/2/fsync,3/2/replicated"
FSYNC = "2/1/fsync,2/2/fsync,3/2/fsync"
REPLICATED = "2/2/replicated,3/2/replicated"
ISR_MATTERS = "2/1/fsync,3/2/fsync"  # with 2/2/fsync every commit needs both, so no mistake about the set can lose data
GROUPS = ALL
QUEUES = ",".join(f"{name}/queues" for name in ALL.split(","))

Edit = tuple[str, str, str]


class Mutant(msgspec.Struct, frozen=True):
    """``edits``: (function, text, other text). ``configs``: those in which the rule can matter at all. ``weather``: a
    profile (`weather.py`) that its seeds run in; None: the weather that each seed draws."""

    name: str
    rule: str
    about: str
    configs: str
    edits: tuple[Edit, ...]
    weather: str | None = None
    real_log: bool = False


def mutant(
    name: str, rule: str, about: str, configs: str, *edits: Edit, weather: str | None = None, real_log: bool = False
) -> Mutant:
    return Mutant(name, rule, about, configs, edits, weather, real_log)
