"""Coordinators on etcd are killed, stopped and ended under traffic: `python -m tests.integration.takeover_campaign`.

    --takeovers 20 --seed 1       a mix of kill -9, SIGSTOP beyond the lease, SIGTERM, with and without faults of etcd

Prints a line for each take-over and appends one to a ledger. Exits 1 if an acknowledged record was lost, out of order
or doubled, an acknowledged change of metadata is gone, anything shown went back, or a take-over took too long.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from tests.integration.steady import Steady
from tests.integration.takeovers import Changes, Watch

LEDGER = Path(__file__).resolve().parents[2] / "benchmarks/results/takeover-ledger.jsonl"
BOUND_S = 13.0
KINDS = ("kill", "stop", "term", "kill+etcd-kill", "stop+etcd-stop", "etcd-leader-kill", "etcd-restart")
WEIGHTS = (6, 4, 4, 2, 1, 2, 1)
_SETTLE_S = 1.5


@dataclass
class Round:
    """One fault and what followed. ``takeover`` says whether another coordinator, or another term, came of it."""

    kind: str
    takeover: bool = True
    active_s: float = 0.0  # until a later coordinator said that it is active
    change_s: float = 0.0  # until a change was acknowledged again
    zombie_refused: bool | None = None  # only where a stopped one came back


@dataclass
class Campaign:
    """Everything of one run."""

    seed: int
    rounds: list[Round] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def plan(seed: int, kinds: list[str]) -> Iterator[str]:
    """Which faults, in which order, without end: each kind once, then by weight."""
    rng = random.Random(seed)
    weights = [WEIGHTS[KINDS.index(kind)] for kind in kinds]
    first = list(kinds)
    rng.shuffle(first)
    yield from first
    while True:
        yield from rng.choices(kinds, weights)


async def run(takeovers: int, seed: int, *, kinds: list[str], rate: float, folder: Path) -> Campaign:
    campaign = Campaign(seed)
    rng = random.Random(seed)
    cluster = ProcessCluster(folder, brokers=3, coordinators=3, store="etcd")
    try:
        await cluster.start()
        async with (
            Watch(cluster) as watch,
            fl.connect(cluster.urls, ca=cluster.ca) as client,
            Steady(cluster, rate=rate) as steady,
        ):
            changes = Changes(client)
            await changes.start()
            for kind in plan(seed, kinds):
                if sum(r.takeover for r in campaign.rounds) >= takeovers and len(campaign.rounds) >= len(kinds):
                    break
                await steady.run_for(_SETTLE_S)
                round_ = await one(kind, cluster, watch, changes, rng)
                await steady.flows(60.0)
                campaign.rounds.append(round_)
                sys.stdout.write(
                    f"{len(campaign.rounds):3}  {kind:18} active {round_.active_s:6.2f} s  "
                    f"change {round_.change_s:6.2f} s  zombie refused: {round_.zombie_refused}\n"
                )
                sys.stdout.flush()
            await changes.stop()
            if not await changes.kept():
                campaign.wrong.append("an acknowledged change of metadata is gone")
        account(campaign, watch, steady, changes)
    finally:
        await cluster.kill_all()
    return campaign


async def one(kind: str, cluster: ProcessCluster, watch: Watch, changes: Changes, rng: random.Random) -> Round:
    """One fault, the wait for its end, and everything back as it was."""
    name, epoch = await watch.until_active(0, 60.0)
    member = rng.choice([f"etcd-{number}" for number in (1, 2, 3)])
    round_ = Round(kind)
    what, _, etcd = kind.partition("+")
    if etcd == "etcd-kill":
        await cluster.kill(member)
    elif etcd == "etcd-stop":
        await cluster.pause(member)
    began = time.monotonic()
    if what == "kill":
        await cluster.kill(name)
    elif what == "stop":
        await cluster.pause(name)
    elif what == "term":
        cluster.local.terminate(name)
    elif what == "etcd-leader-kill":
        round_.takeover = False
        for number in (1, 2, 3):  # whoever leads is among them; one at a time, so that two are always up
            await cluster.kill(f"etcd-{number}")
            await asyncio.sleep(2.0)
            await cluster.restart(f"etcd-{number}")
    elif what == "etcd-restart":
        for number in (1, 2, 3):
            await cluster.kill(f"etcd-{number}")
        await asyncio.sleep(rng.uniform(0.5, 7.0))
        for number in (1, 2, 3):
            cluster.local.spawn(f"etcd-{number}")
        round_.takeover = False
        began = time.monotonic()
    if round_.takeover:
        _, _ = await watch.until_active(epoch, 60.0)
        round_.active_s = time.monotonic() - began
    round_.change_s = await changes.after(began, 60.0)
    if not round_.takeover:
        _, later = await watch.until_active(0, 60.0)
        round_.takeover = later > epoch  # etcd was away for longer than primaryship lasts without it
    if what == "stop":
        round_.zombie_refused = await _zombie_refused(name, cluster, watch)
    elif what in ("kill", "term"):
        await cluster.terminate(name)
        await cluster.restart(name)
    if etcd == "etcd-kill":
        await cluster.restart(member)
    elif etcd == "etcd-stop":
        await cluster.resume(member)
    return round_


async def _zombie_refused(name: str, cluster: ProcessCluster, watch: Watch) -> bool:
    """Resume a coordinator that was stopped beyond its lease: it must refuse at once, and stay on standby."""
    await asyncio.sleep(1.0)
    await cluster.resume(name)
    end = time.monotonic() + 30.0
    refused = False
    while time.monotonic() < end:
        status, body = await watch.get(name, "/v1/topics")
        if status == 200:
            return False
        status, body = await watch.get(name, "/readyz")
        refused = body.get("status") == "standby"
        if refused:
            break
        await asyncio.sleep(0.05)
    return refused and await watch.metric(name, "ferryline_primaryships_lost_total") >= 1


def account(campaign: Campaign, watch: Watch, steady: Steady, changes: Changes) -> None:
    """What must hold, and what there is to tell."""
    wrong = campaign.wrong
    if not steady.verdict.good or not steady.stored.good:
        wrong.append(f"records: {steady.verdict}; {steady.stored}")
    wrong += watch.regressions[:10]
    if steady.traffic.send_errors:
        wrong.append(f"sends failed: {steady.traffic.send_errors}")
    if any(r.zombie_refused is False for r in campaign.rounds):
        wrong.append("a zombie answered, or did not step down")
    late = [r for r in campaign.rounds if max(r.active_s, r.change_s) > BOUND_S]
    wrong += [f"{r.kind} took {max(r.active_s, r.change_s):.1f} s" for r in late]
    by_kind: dict[str, list[float]] = {}
    for r in campaign.rounds:
        by_kind.setdefault(r.kind, []).append(round(max(r.active_s, r.change_s), 3))
    verdict = steady.verdict
    campaign.facts = {
        "rounds": len(campaign.rounds),
        "takeovers": sum(r.takeover for r in campaign.rounds),
        "seconds": {kind: sorted(times) for kind, times in sorted(by_kind.items())},
        "zombies_refused": sum(bool(r.zombie_refused) for r in campaign.rounds),
        "acknowledged": verdict.acknowledged,
        "lost": verdict.lost,
        "out_of_order": verdict.out_of_order,
        "stored_twice": max(verdict.stored_twice, steady.stored.stored_twice),
        "redelivered": verdict.redelivered,
        "send_errors": steady.traffic.send_errors,
        "changes": changes.made,
        "change_errors": changes.errors,
        "metadata_answers": watch.answers,
        "metadata_regressions": len(watch.regressions),
        "refusals": watch.refusals,
    }


def commit() -> str:
    """Short id of the tree, with a plus if it is not clean."""
    root = LEDGER.parents[2]
    told = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--takeovers", type=int, default=20, help="at least this many; faults of etcd alone need not be any"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=500.0, help="records a second")
    parser.add_argument("--only", default="", help=f"kinds, separated by commas, of: {', '.join(KINDS)}")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    parser.add_argument("--keep", type=Path, help="run in this folder and leave it there")
    options = parser.parse_args()
    kinds = [kind for kind in options.only.split(",") if kind] or list(KINDS)
    with tempfile.TemporaryDirectory(prefix="ferryline-takeover-") as temporary:
        folder = options.keep or Path(temporary)
        campaign = asyncio.run(run(options.takeovers, options.seed, kinds=kinds, rate=options.rate, folder=folder))
    line = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "seed": options.seed,
        **campaign.facts,
        "wrong": campaign.wrong,
    }
    with options.ledger.open("a") as ledger:
        ledger.write(json.dumps(line) + "\n")
    sys.stdout.write(json.dumps(line, indent=2) + "\n")
    sys.stdout.write("every promise was kept\n" if not campaign.wrong else f"BROKEN: {campaign.wrong}\n")
    return 1 if campaign.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
