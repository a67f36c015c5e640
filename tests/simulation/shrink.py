"""Make a failing run smaller: leave out faults of its tape, and rates of its weather, as long as it fails the same way.

Delta debugging: halves first, then quarters, down to single faults, until nothing more can go or the time is over. Each
fault draws from a source of its own (see `faults.py`), but what is left out still changes when other things happen; so
a smaller run is one that fails for the same rule, not the same run with less in it.
"""

from __future__ import annotations

import time

from tests.simulation.runner import Outcome, run_seed
from tests.simulation.settings import RATES, Config

SECONDS = 30.0


def shrink(config: Config, outcome: Outcome, *, real_log: bool = False, seconds: float = SECONDS) -> Outcome:
    """The smallest failing run found in ``seconds``; ``outcome`` itself if nothing can be left out."""
    until = time.monotonic() + seconds
    best = outcome

    def fails(without: frozenset[str]) -> bool:
        nonlocal best
        found = run_seed(
            config, outcome.seed, real_log=real_log, profile=outcome.profile, without=without
        )  # fmt: skip
        if found.failure and found.rule == outcome.rule:
            best = found
            return True
        return False

    for rate in sorted(RATES):
        if time.monotonic() < until:
            fails(frozenset(best.without) | {rate})
    size = max(1, len(best.struck) // 2)
    while time.monotonic() < until and best.struck:
        at, cut = 0, False
        while at < len(best.struck) and time.monotonic() < until:
            if fails(frozenset(best.without) | set(best.struck[at : at + size])):
                cut = True  # what followed has moved up to ``at``
            else:
                at += size
        if size == 1 and not cut:
            break
        size = max(1, size // 2)
    return best
