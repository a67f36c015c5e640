"""One million records, a primary killed with -9 half way, for many seeds: `python -m tests.integration.kill_campaign`.

Prints a table, one line for each seed, and exits 1 if anything acknowledged was lost, out of order or stored twice, if
a consumer saw more records again than were in flight, or if the copies did not come back by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from ferryline.cli.drill import Account, Plan, run_drill
from ferryline.cli.driver import ProcessCluster

FAULTS = ("kill", "kill-ahead", "terminate", "kill-all")
HEADINGS = (
    "seed",
    "sent",
    "acked",
    "received",
    "lost",
    "disorder",
    "twice",
    "again",
    "in flight",
    "gap s",
    "healed s",
    "records/s",
)


async def run_seed(plan: Plan, *, brokers: int = 3, env: dict[str, str] | None = None) -> Account:
    """One drill on a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="ferryline-kill-") as folder:
        cluster = ProcessCluster(Path(folder), brokers=brokers, env=env)
        try:
            await cluster.start()
            return await run_drill(plan, cluster)
        finally:
            await cluster.kill_all()


def fits(account: Account) -> bool:
    """Whether a run keeps every promise."""
    again = account.verdict.redelivered <= account.in_flight_at_fault
    return account.good and again and account.healed_s is not None


def row(plan: Plan, account: Account) -> list[str]:
    verdict = account.verdict
    return [
        str(plan.seed),
        str(verdict.sent),
        str(verdict.acknowledged),
        str(verdict.received),
        str(account.lost),
        str(account.out_of_order),
        str(max(verdict.stored_twice, account.stored.stored_twice)),
        str(verdict.redelivered),
        str(account.in_flight_at_fault),
        f"{account.failover_s:.2f}",
        "never" if account.healed_s is None else f"{account.healed_s:.1f}",
        f"{account.send_rate:.0f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=8)
    parser.add_argument("--brokers", type=int, default=3)
    parser.add_argument("--fault", choices=FAULTS, default="kill")
    parser.add_argument("--sabotage", default="", help="e.g. ack-before-replicate; with --fault kill-ahead: exit 1")
    parser.add_argument("--json", type=Path, help="write every account to this file")
    options = parser.parse_args()
    env = {"FERRYLINE_ALLOW_SABOTAGE": "1", "FERRYLINE_SABOTAGE": options.sabotage} if options.sabotage else None
    sys.stdout.write("  ".join(f"{name:>9}" for name in HEADINGS) + "\n")
    accounts: list[dict[str, object]] = []
    bad = 0
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        plan = Plan(
            records=options.records, keys=options.keys, victim_share=0.5, partitions=8, seed=seed, fault=options.fault
        )
        account = asyncio.run(run_seed(plan, brokers=options.brokers, env=env))
        kept = fits(account)
        bad += not kept
        sys.stdout.write("  ".join(f"{text:>9}" for text in row(plan, account)) + ("" if kept else "  BROKEN") + "\n")
        if not kept:
            sys.stdout.write(f"  {account.verdict}\n  {account.stored}\n")
        sys.stdout.flush()
        accounts.append({"seed": seed, "kept": kept, **account.as_dict()})
    if options.json:
        options.json.write_text(json.dumps(accounts, indent=2) + "\n")
    sys.stdout.write(f"{options.seeds - bad} of {options.seeds} runs kept every promise\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
