"""The ledger: what was simulated, on which commit, and what came of it. One JSON line per stretch of seeds.

    python -m tests.simulation --ledger FILE --resume --seeds 20000 --jobs 2      goes on where the ledger ends
    python -m tests.simulation --ledger FILE --summary                            adds it up

A line is written when its stretch is done, so a run may be ended at any time. Seeds of all configurations count
together. A failed seed stands in its line with its replay command; its story goes to standard output only.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.simulation.runner import Summary, commit, replay_of, run_all, tell_failure
from tests.simulation.settings import Config, config_of

STRETCH = 500  # seeds of a line
COUNTED = (
    "elections", "killed", "power cuts", "coordinator killed", "truncations", "batches acknowledged", "declared losses",
    "refused COMMIT_UNKNOWN", "duplicates answered across epochs", "retention by age", "retention by size",
    "rotten batches", "topics deleted, in time", "failed commits, of unknown outcome", "commits of zombies refused",
    "group commits answered",
)  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def next_seed(path: Path) -> int:
    """The seed behind the last one of the ledger; 1 for an empty one."""
    return max((line["to"] for line in read(path)), default=0) + 1


def line_of(first: int, last: int, summary: Summary, seconds: float, where: str) -> dict[str, Any]:
    return {
        "commit": where,
        "from": first,
        "to": last,
        "seeds": summary.seeds,
        "configs": dict(sorted(summary.by_config.items())),
        "events": summary.steps,
        "fault_steps": summary.fault_steps,
        "counts": {name: summary.counts[name] for name in COUNTED},
        "records": dict(summary.sends),
        "failed": [
            {"rule": outcome.rule, "replay": replay_of(outcome), "failure": outcome.failure.splitlines()[0][:200]}
            for outcome in summary.failed
        ],
        "seconds": round(seconds, 1),
    }


def _stretches(first: int, seeds: int) -> Iterator[tuple[int, int]]:
    while seeds > 0:
        size = min(seeds, STRETCH)
        yield first, first + size - 1
        first, seeds = first + size, seeds - size


def campaign(path: Path, configs: list[Config], first: int, seeds: int, jobs: int) -> int:
    """Run ``seeds`` seeds from ``first`` on, a line for each stretch. Returns how many failed."""
    failed, where = 0, commit()
    path.parent.mkdir(parents=True, exist_ok=True)
    for low, high in _stretches(first, seeds):
        began, summary = time.monotonic(), Summary()
        work = [(config_of(configs, seed), seed, False) for seed in range(low, high + 1)]
        for outcome in run_all(work, jobs):
            summary.add(outcome)
            if outcome.failure:
                print(tell_failure(outcome), flush=True)
        line = line_of(low, high, summary, time.monotonic() - began, where)
        with path.open("a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
        print(f"seeds {low} to {high}: {len(summary.failed)} failed, {line['seconds']} s", flush=True)
        failed += len(summary.failed)
    return failed


def summary(path: Path) -> str:
    """The whole ledger in a few lines."""
    lines = read(path)
    seeds = sum(line["seeds"] for line in lines)
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line["counts"])
    commits = Counter[str]()
    for line in lines:
        commits[line["commit"]] += line["seeds"]
    failed = [failure for line in lines for failure in line["failed"]]
    steps = sum(line["fault_steps"] for line in lines)
    text = [
        f"{seeds} seeds in {len(lines)} stretches, {sum(line['events'] for line in lines)} events, "
        f"{steps} fault steps ({steps // max(1, seeds)} per seed), {len(failed)} failed, "
        f"{sum(line['seconds'] for line in lines) / 3600:.1f} h",
        "  commits: " + ", ".join(f"{name} {count}" for name, count in commits.items()),
        "  " + ", ".join(f"{name}: {counts[name]}" for name in COUNTED),
    ]
    text += [f"  failed: {failure['replay']}: {failure['failure']}" for failure in failed]
    return "\n".join(text)
