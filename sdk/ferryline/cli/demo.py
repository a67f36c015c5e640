"""`ferryline demo`: a cluster, a broker killed with -9 under load, and the count of what was lost."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import FAILED, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import Output, say, stderr, warn

if TYPE_CHECKING:
    from ferryline.cli.drill import Account, Plan, Progress


class Sabotage(StrEnum):
    """Ways to break the promise on purpose, to see that the count notices."""

    replicate = "ack-before-replicate"
    flush = "ack-before-flush"


# What shows the damage: a secondary that is behind when the primary dies; memory that is gone on all brokers at once.
FAULTS = {None: "kill", Sabotage.replicate: "kill-ahead", Sabotage.flush: "kill-all"}


def app(
    ctx: typer.Context,
    records: Annotated[int, typer.Option(help="How many records to send.", min=1_000)] = 300_000,
    brokers: Annotated[int, typer.Option(help="How many brokers.", min=2, max=20)] = 3,
    consumers: Annotated[int, typer.Option(help="How many consumers share the topic.", min=1, max=50)] = 4,
    seed: Annotated[int | None, typer.Option(help="Repeat the choices of an earlier run.")] = None,
    rate: Annotated[float, typer.Option(help="Records a second; 0 is as fast as it goes.", min=0)] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the cluster's data and logs.")] = False,
    sabotage: Annotated[Sabotage | None, typer.Option(help="Break the promise on purpose: must end in 1.")] = None,
) -> None:
    """Show that nothing acknowledged is lost.

    Starts a coordinator and brokers in a temporary folder, over TLS: a topic of 12 partitions with two copies each.
    Sends keyed records to it while four consumers in a group read them and commit. Half way, the broker that is
    primary of the most partitions is killed with kill -9; at the end it returns. Then every record is accounted for,
    as the consumers saw it and as the logs have it.

    Exit status 1 if anything acknowledged was lost or out of order.

    Examples:

      ferryline demo

      ferryline demo --records 1000000 --brokers 5

      ferryline demo --sabotage ack-before-replicate
    """
    from ferryline.cli.drill import Plan
    from ferryline.cli.processes import missing_services

    if missing := missing_services():
        raise Failed(
            f"{' and '.join(missing)}: not installed",
            code="NOT_INSTALLED",
            remedy="Install: pip install 'ferryline[server]'",
        )
    fault, patience = FAULTS[sabotage], 30.0 if sabotage is None else 10.0
    chosen = random.randrange(2**32) if seed is None else seed
    plan = Plan(
        records=records,
        consumers=consumers,
        seed=chosen,
        rate=rate,
        fault=fault,
        delivery_s=patience,
        recovery_s=patience,
    )
    form = of(ctx).flags.get("output") or "table"
    output = Output("json" if as_json else str(form))
    root = Path(tempfile.mkdtemp(prefix="ferryline-demo-"))
    started = time.perf_counter()
    try:
        account = _run(plan, root, brokers, _sabotage_environment(sabotage), quiet=not output.for_people)
    finally:
        if keep:
            warn(f"data and logs: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    _report(account, plan, time.perf_counter() - started, output)
    if not account.good:
        raise Failed("the promise was broken", FAILED, remedy=json.dumps(account.verdict.examples, indent=2))
    if account.healed_s is None:
        raise Failed("nothing was lost, but not every partition has its copies back", FAILED)


def _sabotage_environment(sabotage: Sabotage | None) -> dict[str, str]:
    if sabotage is None:
        return {}
    found = {"FERRYLINE_ALLOW_SABOTAGE": "1", "FERRYLINE_SABOTAGE": sabotage.value}
    if sabotage is Sabotage.flush:
        found["FERRYLINE_TEST_LOSSY_STORAGE"] = "1"  # what was not flushed dies with the process
    return found


def _run(plan: Plan, root: Path, brokers: int, env: dict[str, str], *, quiet: bool) -> Account:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("acknowledged {task.fields[acked]:,}  received {task.fields[received]:,}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr(), disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("starting", total=plan.records, acked=0, received=0)
        shown = ""

        def progress(phase: str, sent: int, acked: int, received: int) -> None:
            nonlocal shown
            bar.update(task, description=phase, completed=sent, acked=acked, received=received)
            if bar.disable and not quiet and phase != shown:
                shown = phase
                warn(f"{phase}: sent {sent:,}, acknowledged {acked:,}, received {received:,}")

        return asyncio.run(_drill(plan, root, brokers, env, progress))


async def _drill(plan: Plan, root: Path, brokers: int, env: dict[str, str], progress: Progress) -> Account:
    from ferryline.cli.drill import run_drill
    from ferryline.cli.driver import ProcessCluster

    cluster = ProcessCluster(root, brokers=brokers, env=env)
    try:
        await cluster.start()
        return await run_drill(plan, cluster, progress)
    finally:
        await cluster.kill_all()


def _report(account: Account, plan: Plan, total_s: float, output: Output) -> None:
    if not output.for_people:
        output.one({"plan": plan.__dict__, "total_s": total_s, **account.as_dict()})
        return
    verdict, stored = account.verdict, account.stored
    rows: dict[str, Any] = {
        "sent": verdict.sent,
        "acknowledged": verdict.acknowledged,
        "received": verdict.received,
        "lost": account.lost,
        "duplicated": max(verdict.stored_twice, stored.stored_twice),
        "out of order": account.out_of_order,
        "delivered again": f"{verdict.redelivered:,} (in flight when it happened: {account.in_flight_at_fault:,})",
        "fail-over": f"{account.failover_s:.2f} s without acknowledgements at worst ({account.killed} was killed)",
        "copies restored": "never" if account.healed_s is None else f"{account.healed_s:.1f} s after its return",
        "throughput": f"{account.send_rate:,.0f} records/s acknowledged, {plan.consumers} consumers reading along",
        "seed": str(plan.seed),
        "took": f"{total_s:.1f} s",
    }
    unusual = {
        "refused": verdict.refused,
        "unknown": verdict.unknown,
        "phantoms": verdict.phantom + stored.phantom,
        "refused, yet read": verdict.aborted_read + stored.aborted_read,
        "at another offset": verdict.moved + stored.moved,
    }
    rows.update({name: value for name, value in unusual.items() if value})
    if account.send_errors or account.read_errors:
        rows["errors"] = {**account.send_errors, **account.read_errors}
    output.one(rows)
    if account.good:
        say("\nNothing that was acknowledged was lost, and every key stayed in order.")
