"""How long a key waits when its primary goes: `python -m tests.integration.failover_timing --kills 100`.

A steady stream of records; again and again the primary of the first key is killed (or told to end), the longest gap
between acknowledgements of any key is noted, the broker comes back and catches up. Prints percentiles; exits 1 when a
record was lost, when a goal was missed, or with TERM when the client saw any error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ferryline.cli.checker import percentile
from ferryline.cli.driver import ProcessCluster
from tests.integration.steady import Steady

# seconds: (p50, p99) of the gap as the client sees it
GOALS = {"KILL": (0.8, 1.5), "TERM": (0.5, 0.5), "STOP": (5.0, 5.0)}


@dataclass
class Timing:
    """All gaps of one run, in seconds."""

    signal: str
    gaps: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    out_of_order: int = 0
    good: bool = False

    @property
    def p50(self) -> float:
        return percentile(self.gaps, 0.5)

    @property
    def p99(self) -> float:
        return percentile(self.gaps, 0.99)

    @property
    def fits(self) -> bool:
        p50, p99 = GOALS[self.signal]
        quiet = self.signal != "TERM" or not self.errors
        return self.good and self.p50 <= p50 and self.p99 <= p99 and quiet

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "p50": self.p50, "p99": self.p99, "max": max(self.gaps, default=0.0), "fits": self.fits}


async def measure(
    cluster: ProcessCluster,
    kills: int,
    signal: str,
    *,
    rate: float = 1_000.0,
    tell: Callable[[str], None] = lambda _: None,
) -> Timing:
    """Kill the primary ``kills`` times on a cluster that is up."""
    timing = Timing(signal)
    async with Steady(cluster, rate=rate) as steady:
        for number in range(kills):
            assert await steady.healed(60.0), steady.partitions()
            await steady.flows()
            victim = steady.primary_name()
            steady.traffic.mark()
            if signal == "KILL":
                await cluster.kill(victim)
            elif signal == "STOP":
                await cluster.pause(victim)
            else:
                assert await cluster.terminate(victim) is not None, f"{victim} did not end"
            await steady.flows(30.0)
            timing.gaps.append(steady.traffic.by_key.worst())
            tell(f"{number + 1}: {victim} {timing.gaps[-1]:.3f} s")
            if signal == "STOP":
                await cluster.resume(victim)
            else:
                await cluster.restart(victim)
    timing.errors = dict(steady.traffic.send_errors)
    timing.lost = max(steady.verdict.lost, steady.stored.lost)
    timing.out_of_order = max(steady.verdict.out_of_order, steady.stored.out_of_order)
    timing.good = steady.verdict.good and steady.stored.good
    return timing


async def _run(kills: int, signal: str, rate: float) -> Timing:
    with tempfile.TemporaryDirectory(prefix="ferryline-failover-") as folder:
        cluster = ProcessCluster(Path(folder))
        try:
            await cluster.start()
            return await measure(cluster, kills, signal, rate=rate, tell=lambda line: print(line, flush=True))
        finally:
            await cluster.kill_all()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=sorted(GOALS), default="KILL")
    parser.add_argument("--rate", type=float, default=1_000.0, help="records a second, over 8 keys")
    parser.add_argument("--json", type=Path, help="write every gap to this file")
    options = parser.parse_args()
    timing = asyncio.run(_run(options.kills, options.signal, options.rate))
    if options.json:
        options.json.write_text(json.dumps(timing.as_dict(), indent=2) + "\n")
    goal = GOALS[options.signal]
    print(f"{len(timing.gaps)} x {options.signal}: p50 {timing.p50:.3f} s (goal {goal[0]}), ", end="")
    print(f"p99 {timing.p99:.3f} s (goal {goal[1]}), max {max(timing.gaps, default=0.0):.3f} s")
    print(f"errors {timing.errors or 'none'}, lost {timing.lost}, out of order {timing.out_of_order}")
    return 0 if timing.fits else 1


if __name__ == "__main__":
    sys.exit(main())
