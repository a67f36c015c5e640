"""`ferryline chaos` on real processes: a short run keeps every promise, and a run under sabotage does not pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ferryline.cli.chaos.ledger import read

pytestmark = pytest.mark.process
WITHIN_S = 220.0
# Every fault that leaves the disks alone, little load, and room for a slow machine.
GENTLE = ["--minutes", "0.4", "--rate", "600", "--partitions", "2", "--every", "2"]


def chaos(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ferryline.cli", "chaos", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)


def account(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_nothing_acknowledged_is_lost_while_processes_die_and_networks_break(tmp_path: Path) -> None:
    ledger, keep = tmp_path / "ledger.jsonl", tmp_path / "run"
    done = chaos(*GENTLE, "--seed", "7", "--keep", str(keep), "--ledger", str(ledger), "--json")
    found = account(done)
    assert done.returncode == 0, json.dumps({**found, "stderr": done.stderr[-3000:]}, indent=1)
    assert found["acked"] > 1_000
    assert found["copies_read"] >= 2 * found["acked"]
    assert sum(found["faults"].values()) >= 3
    assert found["verdict"]["good"]
    assert found["anomalies"] == 0
    assert found["queue"]["delivered"] >= found["queue"]["ack"] > 100
    assert found["queue"]["lives"] > 4
    assert found["queue"]["dead letters"] > 0
    (line,) = read(ledger)
    assert (line["seed"], line["acked"], line["good"]) == (7, found["acked"], True)
    assert {"history.jsonl", "queue.jsonl", "plan.json", "report.json"} <= {path.name for path in keep.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "seed"),
    [("power,disk-full,disk-error,clock", 3), ("flip,truncate", 4), ("kill,coordinator,pause,move", 5)],
)
def test_disks_fail_files_are_harmed_and_clocks_jump(tmp_path: Path, faults: str, seed: int) -> None:
    done = chaos(*GENTLE, "--faults", faults, "--seed", str(seed), "--keep", str(tmp_path / "run"), "--json")
    found = account(done)
    assert done.returncode == 0, json.dumps({**found, "stderr": done.stderr[-3000:]}, indent=1)
    assert sum(found["faults"].values()) >= 3


@pytest.mark.etcd
def test_nothing_is_lost_while_coordinators_on_etcd_take_over_and_brokers_die(tmp_path: Path) -> None:
    """Seed 20 begins with the death of the active coordinator, and then of a broker before another one leads."""
    faults = ["--coordinators", "3", "--faults", "coordinator,etcd,kill,pause", "--minutes", "0.15", "--rate", "300"]
    done = chaos(
        *faults, "--partitions", "2", "--every", "3", "--seed", "20", "--keep", str(tmp_path / "run"), "--json"
    )
    found = account(done)
    assert done.returncode == 0, json.dumps({**found, "stderr": done.stderr[-3000:]}, indent=1)
    assert found["takeovers"] >= 1
    assert found["acked"] > 300
    assert found["faults"]["kill"] == 1


@pytest.mark.slow
@pytest.mark.etcd
def test_coordinators_and_members_of_etcd_die_are_silent_and_cut_off(tmp_path: Path) -> None:
    faults = ["--coordinators", "3", "--faults", "coordinator,etcd,kill,pause,cut,one-way", "--seed", "6"]
    done = chaos(*GENTLE, *faults, "--keep", str(tmp_path / "run"), "--json")
    found = account(done)
    assert done.returncode == 0, json.dumps({**found, "stderr": done.stderr[-3000:]}, indent=1)
    assert sum(found["faults"].values()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "finding"),
    [("forget-acks", "queue: Q2/Q10 no delivery after an ack"), ("no-lanes", "queue: Q8 order of a lane")],
)
def test_a_broken_promise_of_a_queue_is_found(tmp_path: Path, sabotage: str, finding: str) -> None:
    done = chaos(*GENTLE, "--faults", "kill", "--sabotage", sabotage, "--keep", str(tmp_path / "run"))
    assert done.returncode == 1, done.stderr[-3000:]
    assert finding in done.stdout, done.stdout[-3000:]


def test_members_of_etcd_need_several_coordinators() -> None:
    done = chaos("--faults", "kill,etcd", "--plan")
    assert done.returncode == 2
    assert "several coordinators" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "finding"), [("ack-before-replicate", "inconsistent offset"), ("ack-before-flush", "lost")]
)
def test_a_broken_promise_is_found_and_explained(tmp_path: Path, sabotage: str, finding: str) -> None:
    keep = tmp_path / "run"
    done = chaos(*GENTLE, "--seed", "3", "--sabotage", sabotage, "--keep", str(keep))
    assert done.returncode == 1, done.stderr[-3000:]
    assert "PROMISES WERE BROKEN" in done.stdout
    assert any(line.startswith(finding) for line in done.stdout.splitlines()), done.stdout[-3000:]
    assert "--seed 3 --minutes 0.4 --brokers 3 --every 2 --faults" in done.stderr
    assert (keep / "history.jsonl").stat().st_size > 0


def test_a_plan_is_shown_without_doing_anything_and_is_the_same_every_time() -> None:
    first, second = (chaos("--plan", "--seed", "9", "--minutes", "3", "--faults", "all") for _ in range(2))
    assert first.returncode == 0
    assert first.stdout == second.stdout
    assert "drain (0 s)" in first.stdout


def test_an_unknown_fault_is_wrong_usage() -> None:
    done = chaos("--faults", "kill,flood", "--plan")
    assert done.returncode == 2
    assert "flood" in done.stderr
    assert "half-open" in done.stderr, "it says which ones there are"


def test_the_sums_of_a_ledger_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    line = {"good": True, "seconds": 60, "acked": 12_345, "anomalies": 0, "faults": {"kill": 3}, "commit": "x"}
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    done = chaos("--sum", str(path), "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert (found["runs"], found["acked"], found["faults"]) == (2, 24_690, {"kill": 6})
