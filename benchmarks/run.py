"""Every figure of RESULTS.md, measured again: `python -m benchmarks.run [--quick]`.

Writes the raw results to benchmarks/results/ and a table to stdout. Nothing else should run on the machine.

1. throughput and latency beside confluent-kafka (`ferryline bench`), 100 B and 1 KiB
2. fail-over after kill -9 and after SIGTERM, as a client sees it (tests.integration.failover_timing)
3. one million records with a kill in the middle, for many seeds (tests.integration.kill_campaign)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parents[1]


def run(name: str, module: str, *args: str) -> dict[str, Any]:
    """One program; its exit status is part of the result."""
    started = time.monotonic()
    command = [sys.executable, "-m", module, *args]
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False)
    print(f"== {name}: exit status {done.returncode} after {time.monotonic() - started:.0f} s", flush=True)
    return {"name": name, "status": done.returncode}


def bench(name: str, *args: str) -> dict[str, Any]:
    """`ferryline bench`, with its JSON kept."""
    return run(name, "ferryline.cli", "bench", *args, "--save", str(RESULTS / f"{name}.json"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="minutes instead of half an hour")
    parser.add_argument("only", nargs="*", help="names of measurements; default: all")
    options = parser.parse_args()
    quick = options.quick
    rounds = ["--rounds", "2" if quick else "5"]
    RESULTS.mkdir(exist_ok=True)
    plan: dict[str, tuple[str, ...]] = {
        "bench-100B": (*rounds, "--records", "200000" if quick else "1000000"),
        "bench-1KiB": (
            "produce",
            "consume",
            *rounds,
            "--records",
            "50000" if quick else "200000",
            "--value-bytes",
            "1024",
        ),
    }
    chosen = set(options.only)
    outcomes = [bench(name, *args) for name, args in plan.items() if not chosen or name in chosen]
    programs: dict[str, tuple[str, ...]] = {
        "failover-kill": ("tests.integration.failover_timing", "--kills", "10" if quick else "100"),
        "failover-term": ("tests.integration.failover_timing", "--signal", "TERM", "--kills", "10" if quick else "100"),
        "kill-campaign": (
            "tests.integration.kill_campaign",
            *(["--seeds", "2", "--records", "200000"] if quick else []),
        ),
    }
    for name, (module, *args) in programs.items():
        if not chosen or name in chosen:
            outcomes.append(run(name, module, *args, "--json", str(RESULTS / f"{name}.json")))
    print("\n" + summary())
    return max((int(outcome["status"]) for outcome in outcomes), default=0)


def summary() -> str:
    """The results folder as the tables of RESULTS.md."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("bench-*.json")):
        lines += bench_table(path.stem, json.loads(path.read_text()))
    for path in sorted(RESULTS.glob("failover-*.json")):
        found = json.loads(path.read_text())
        lines.append(
            f"{path.stem}: {len(found['gaps'])} times, p50 {found['p50']:.3f} s, p99 {found['p99']:.3f} s, "
            f"max {found['max']:.3f} s; errors {found['errors'] or 'none'}, lost {found['lost']}"
        )
    path = RESULTS / "kill-campaign.json"
    if path.exists():
        runs = json.loads(path.read_text())
        kept = sum(one["kept"] for one in runs)
        lines.append(f"kill-campaign: {kept} of {len(runs)} runs kept every promise")
    return "\n".join(lines)


def bench_table(name: str, report: dict[str, Any]) -> list[str]:
    """One bench report as a Markdown table."""
    facts = report["machine"]
    lines = [f"### {name}", "", f"{facts['processor']}, {facts['cores']} cores, Python {facts['python']}, "
             f"{report['rounds']} rounds, load average at the end {facts['load_average'][0]:.1f}", ""]  # fmt: skip
    lines += ["| scenario | client | median | range | ratio | errors |", "|---|---|---|---|---|---|"]
    for scenario, found in report["results"].items():
        for client in ("ferryline", "confluent"):
            if client in found:
                one = found[client]
                unit, form = ("/s", ",.0f") if scenario in ("produce", "consume") else (" ms p50", ".2f")
                ratio = f"{found['ratio']:.2f}" if "ratio" in found and client == "ferryline" else ""
                median, low, high = (format(one[key], form) for key in ("median", "lowest", "highest"))
                lines.append(
                    f"| {scenario} | {client} | {median}{unit} | {low} .. {high} | {ratio} | {one['errors']} |"
                )
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
