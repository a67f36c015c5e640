"""The simulation as a test: a few dozen seeds, the same trace twice, and a few seeded bugs that must be noticed.

Each runs the program as a user would, in a process of its own, because a trace is only reproducible under a fixed
PYTHONHASHSEED, and because seeded bugs must not stay in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 240  # a machine that is busy with something else; alone each takes a few seconds


def _run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.timeout(LIMIT_S + 10)
def test_the_cores_keep_every_promise_over_sixty_seeds() -> None:
    ran = _run("tests.simulation", "--seeds", "60")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "60 seeds" in ran.stdout


@pytest.mark.timeout(LIMIT_S + 10)
def test_queues_keep_every_promise_over_thirty_seeds() -> None:
    ran = _run("tests.simulation", "--configs", "queues", "--seeds", "30", "--all-counts")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    counts = dict(
        line.strip().rsplit(": ", 1) for line in ran.stdout.splitlines() if line.startswith("  ") and ": " in line
    )
    for what in (
        "settled ack",
        "settled nack",
        "settled reject",
        "settled release",
        "settled extend",
        "records leased",
    ):
        assert int(counts[what]) >= 10, what
    assert int(counts["dead letters copied"]) >= 10


@pytest.mark.timeout(LIMIT_S + 10)
def test_the_cores_keep_every_promise_on_the_real_log() -> None:
    ran = _run("tests.simulation", "--seeds", "12", "--start", "500", "--real-log")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


@pytest.mark.timeout(LIMIT_S + 10)
def test_the_same_seed_gives_the_same_trace() -> None:
    ran = _run("tests.simulation", "--check-determinism", "6", "--start", "900")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


@pytest.mark.timeout(LIMIT_S + 10)
def test_seeds_that_once_found_a_bug_stay_clean() -> None:
    ran = _run("tests.simulation", "--kept")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


@pytest.mark.timeout(LIMIT_S + 10)
def test_every_seeded_bug_still_finds_the_text_that_it_changes() -> None:
    ran = _run("tests.simulation.mutants", "--check")
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


@pytest.mark.timeout(LIMIT_S + 10)
def test_seeded_bugs_are_noticed() -> None:
    names = "truncate-to-watermark,ack-before-fsync,unclean-election,no-dedupe,ack-before-replicate"
    ran = _run("tests.simulation.mutants", "--only", names, "--seeds", "60")
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "5 of 5 mutants caught" in ran.stdout


@pytest.mark.timeout(LIMIT_S + 10)
def test_seeded_bugs_of_queues_are_noticed() -> None:
    names = "lease-answered-early,acks-not-replayed,start-over-unsettled,copied-before-committed,run-with-two-receivers"
    ran = _run("tests.simulation.mutants", "--only", names, "--seeds", "60")
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "5 of 5 mutants caught" in ran.stdout


@pytest.mark.timeout(3 * LIMIT_S)
def test_a_ledger_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for seeds, first in (("4", 1), ("2", 5)):
        ran = _run("tests.simulation", "--ledger", str(path), "--resume", "--seeds", seeds)
        assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
        assert json.loads(path.read_text().splitlines()[-1])["from"] == first
    ran = _run("tests.simulation", "--ledger", str(path), "--summary")
    assert ran.stdout.startswith("6 seeds in 2 stretches")
    assert ", 0 failed" in ran.stdout


SHRINKING = """
from tests.simulation.mutants.patching import apply
from tests.simulation.mutants import MUTANTS
from tests.simulation.runner import replay_of, run_seed
from tests.simulation.settings import parse_configs
from tests.simulation.shrink import shrink

apply(next(mutant for mutant in MUTANTS if mutant.name == "ack-before-replicate"))
config = parse_configs("2/1/fsync")[0]
failing = next(one for seed in range(1, 200) if (one := run_seed(config, seed, profile="")).failure and one.struck)
small = shrink(config, failing, seconds=120)
assert small.rule == failing.rule, (small.rule, failing.rule)
assert len(small.struck) < len(failing.struck), (small.struck, failing.struck)
again = run_seed(config, small.seed, profile="", without=frozenset(small.without))
assert (again.hash, again.failure) == (small.hash, small.failure)
assert "--without" in replay_of(small)
print("shrunk")
"""


@pytest.mark.timeout(LIMIT_S + 10)
def test_a_failing_run_is_made_smaller_and_can_be_repeated() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SHRINKING],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ran.stdout.strip() == "shrunk", ran.stdout[-2000:] + ran.stderr[-4000:]
