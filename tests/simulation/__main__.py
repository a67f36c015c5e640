"""``python -m tests.simulation``: seeds against the real cores; exit status 1 if any failed.

python -m tests.simulation --seeds 2000 --jobs 2          all configurations take turns
python -m tests.simulation --config 2/1/fsync --seed 7 --trace
python -m tests.simulation --config 2/1/fsync --seed 7 --shrink 30
python -m tests.simulation --ledger tests/simulation/ledger.jsonl --resume --seeds 20000 --jobs 2
python -m tests.simulation --check-determinism 20
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.simulation import ledger
from tests.simulation.kept_seeds import KEPT
from tests.simulation.runner import Summary, run_all, run_seed, tell_failure
from tests.simulation.settings import ALL, Config, config_of, parse_configs
from tests.simulation.shrink import shrink
from tests.simulation.weather import PROFILES

FAILURES_MAX = 5  # after that many the campaign stops: they are probably the same one


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=60, help="how many, over all configurations together")
    parser.add_argument("--start", type=int, default=1, help="the first seed")
    parser.add_argument("--configs", default="all", help="all, or names separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--config", help="one configuration, with --seed")
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--trace", action="store_true", help="print every event, with --seed")
    parser.add_argument("--real-log", action="store_true", help="the product's log code on its MemoryStorage")
    parser.add_argument("--weather", choices=[*PROFILES, "plain"], help="this profile instead of the drawn one")
    parser.add_argument("--check-determinism", type=int, metavar="N", help="run N seeds twice and compare the traces")
    parser.add_argument("--kept", action="store_true", help="run the seeds that once found a bug (kept_seeds.py)")
    parser.add_argument("--keep-going", action="store_true", help=f"do not stop after {FAILURES_MAX} failures")
    parser.add_argument("--without", default="", help="faults of the tape and rates to leave out, with --seed")
    parser.add_argument("--shrink", type=float, metavar="S", help="make a failing --seed smaller, for so many seconds")
    parser.add_argument("--ledger", type=Path, help="append what was run to this file, a line for every 500 seeds")
    parser.add_argument("--resume", action="store_true", help="go on behind the last seed of the ledger")
    parser.add_argument("--summary", action="store_true", help="add up the ledger and run nothing")
    parser.add_argument("--all-counts", action="store_true", help="print every counter")
    options = parser.parse_args(arguments)
    try:
        configs = parse_configs(options.config or options.configs)
    except ValueError as error:
        parser.error(str(error))
    if options.seed is not None:
        return _one(options, configs[0])
    if options.ledger is not None:
        if options.summary:
            print(ledger.summary(options.ledger))
            return 0
        first = ledger.next_seed(options.ledger) if options.resume else options.start
        return 1 if ledger.campaign(options.ledger, configs, first, options.seeds, options.jobs) else 0
    if options.check_determinism:
        return _twice(options.check_determinism, options.start, options.real_log)
    return _campaign(options, configs)


def _one(options: argparse.Namespace, config: Config) -> int:
    profile = "" if options.weather == "plain" else options.weather
    trace = print if options.trace else None
    without = frozenset(filter(None, options.without.split(",")))
    outcome = run_seed(
        config, options.seed, trace=trace, real_log=options.real_log, profile=profile, without=without
    )  # fmt: skip
    if outcome.failure and options.shrink:
        faults, events = len(outcome.struck), outcome.steps
        outcome = shrink(config, outcome, real_log=options.real_log, seconds=options.shrink)
        print(f"shrunk from {faults} faults and {events} events to {len(outcome.struck)} and {outcome.steps}")
    if outcome.failure:
        print(tell_failure(outcome, real_log=options.real_log))
        return 1
    summary = Summary()
    summary.add(outcome)
    print(summary.text(everything=True))
    print(f"trace hash {outcome.hash & 0xFFFFFFFFFFFFFFFF:016x}")
    return 0


def _twice(seeds: int, start: int, real_log: bool) -> int:
    for seed in range(start, start + seeds):
        config = config_of(list(ALL), seed)
        hashes = {run_seed(config, seed, real_log=real_log).hash for _ in range(2)}
        if len(hashes) != 1:
            print(f"seed {seed} of {config.name} ran in two ways")
            return 1
    print(f"{seeds} seeds ran twice with the same trace")
    return 0


def _campaign(options: argparse.Namespace, configs: list[Config]) -> int:
    if options.kept:
        jobs = [(parse_configs(name)[0], seed, real_log) for name, seed, real_log, _ in KEPT]
    else:
        seeds = range(options.start, options.start + options.seeds)
        jobs = [(config_of(configs, seed), seed, options.real_log) for seed in seeds]
    summary = Summary()
    for outcome in run_all(jobs, options.jobs):
        summary.add(outcome)
        if outcome.failure:
            print(tell_failure(outcome, real_log=options.real_log), flush=True)
            if len(summary.failed) >= FAILURES_MAX and not options.keep_going:
                break
        if summary.seeds % 100 == 0:
            print(f"... {summary.seeds} of {len(jobs)}, {len(summary.failed)} failed", flush=True)
    print(summary.text(everything=options.all_counts))
    for outcome in summary.failed:
        print(f"failed: --config {outcome.config} --seed {outcome.seed}: {outcome.failure.splitlines()[0][:200]}")
    return 1 if summary.failed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main())
