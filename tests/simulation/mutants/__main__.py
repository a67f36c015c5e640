"""``python -m tests.simulation.mutants``: see the package's docstring."""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import tests.simulation.mutants as package
from tests.simulation.mutants import MUTANTS, report
from tests.simulation.mutants.hunting import Verdict, check_patches, judge
from tests.simulation.mutants.model import Mutant
from tests.simulation.runner import commit


def chosen(options: argparse.Namespace) -> list[Mutant]:
    if options.only:
        names = options.only.split(",")
        unknown = sorted(set(names) - {mutant.name for mutant in MUTANTS})
        if unknown:
            raise SystemExit(f"no mutant is called {', '.join(unknown)}; see --list")
        return [mutant for mutant in MUTANTS if mutant.name in names]
    if options.random:
        seed = hashlib.sha256(f"{time.strftime('%Y-%m-%d')} {commit()}".encode()).digest()
        return random.Random(seed).sample(MUTANTS, min(options.random, len(MUTANTS)))
    return list(MUTANTS)


def verdicts(options: argparse.Namespace) -> Iterator[Verdict]:
    names = [mutant.name for mutant in chosen(options)]
    with ThreadPoolExecutor(options.jobs) as pool:  # each thread only waits for its forked processes
        yield from pool.map(lambda name: judge(name, options.seeds, options.start), names)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants", description=package.__doc__)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=5000, help="limit for each")
    parser.add_argument("--start", type=int, default=1)
    parser.add_argument("--random", type=int, metavar="K")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="keep what is found, and renew docs/simulation-mutants.md")
    parser.add_argument("--check", action="store_true", help="only look whether every text is still there")
    options = parser.parse_args(arguments)
    if options.list:
        for mutant in MUTANTS:
            print(
                f"{mutant.name:32} {mutant.rule:18} {mutant.weather or 'drawn':16} {mutant.configs:34} {mutant.about}"
            )
        return 0
    if options.check:
        broken = check_patches()
        print("\n".join(broken) or f"{len(MUTANTS)} mutants fit")
        return 1 if broken else 0
    run = caught = 0
    for verdict in verdicts(options):
        print(verdict.line(), flush=True)
        run, caught = run + 1, caught + verdict.caught
        if options.save:
            report.save(verdict, commit())
    print(f"{caught} of {run} mutants caught")
    return 0 if caught == run else 1


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation.mutants", *sys.argv[1:]])
    sys.exit(main())
