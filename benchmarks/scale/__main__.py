"""How cost grows: `python -m benchmarks.scale --all [--quick] [--budget-minutes 12]`, or one part by name.

partitions   10 to 10,000 partitions, three brokers, replication 2: start, create, idle cost, metadata, fail-over
connections  10 to 2,000 client sessions: cost of each, news to all of them
log          1 to 20 GiB of log on one broker: time to start
core         the coordinator's core alone, up to 100 brokers and 1,000,000 partitions

Writes JSON, plots and a table to benchmarks/results/scale/. Nothing else should run on the machine. Points that the
budget leaves no time for are named as left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scale import connections, core, log_bytes, partitions, report

RESULTS = Path(__file__).resolve().parents[1] / "results" / "scale"
Point = tuple[Any, float]  # what to measure, and about how many seconds that takes

PARTS: dict[str, tuple[list[Point], list[Point]]] = {  # all points, and those of --quick
    "partitions": (
        [(10, 30), (100, 30), (300, 30), (1_000, 40), (3_000, 60), (10_000, 130)],
        [(10, 30), (300, 40)],
    ),
    "connections": ([([10, 100, 500, 2_000], 110)], [([10, 100], 40)]),
    "log": ([([1, 5, 10, 20], 200)], [([1], 30)]),
    "core": ([((3, 10_000), 5), ((10, 100_000), 15), ((100, 1_000_000), 90)], [((3, 10_000), 5)]),
}


def measured(part: str, point: Any) -> list[dict[str, Any]]:
    """The figures of one point."""
    run: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "partitions": lambda: [asyncio.run(partitions.measure(point))],
        "connections": lambda: asyncio.run(connections.measure(point)),
        "log": lambda: asyncio.run(log_bytes.measure(point)),
        "core": lambda: [core.measure(*point)],
    }
    return run[part]()


def main() -> int:
    """Exit status 1 when a point could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts; default with --all: every one")
    parser.add_argument("--all", action="store_true", help="every part")
    parser.add_argument("--quick", action="store_true", help="a few small points of each")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="leave out what does not fit")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    chosen = list(PARTS) if options.all else options.parts
    if not chosen:
        parser.error("name a part, or --all")
    options.results.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), 0
    for part in chosen:
        rows: list[dict[str, Any]] = []
        left_out: list[Any] = []
        for point, seconds in PARTS[part][1 if options.quick else 0]:
            if time.monotonic() - began + seconds > options.budget_minutes * 60:
                left_out.append(point)
                continue
            print(f"== {part} {point}", flush=True)
            try:
                rows += measured(part, point)
            except Exception as error:  # the others are worth having
                failed += 1
                rows.append({"point": point, "failed": f"{type(error).__name__}: {error}"})
                print(f"== {part} {point} failed: {error!r}", flush=True)
        found = {"machine": machine(), "rows": rows, "left_out": left_out}
        (options.results / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(report.write(options.results))
    return 1 if failed else 0


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(main())
