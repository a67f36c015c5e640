"""`ferryline chaos`: break a cluster in every way there is, under load, and prove that nothing was lost."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.chaos.schedule import DEFAULT_FAULTS, FAULTS, NEED_ETCD, Plan, make_plan
from ferryline.cli.failures import FAILED, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import Output, say
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.cli.chaos.campaign import Account, Load

REPORT, HISTORY, PLAN = "report.json", "history.jsonl", "plan.json"


class Sabotage(StrEnum):
    """Ways to break the promise on purpose, to see that the verdict notices."""

    replicate = "ack-before-replicate"
    flush = "ack-before-flush"
    lanes = "no-lanes"
    acks = "forget-acks"


# Faults without which the damage of a sabotage cannot show, and the phases that show it first.
SHOWN_BY = {
    Sabotage.replicate: (("kill", "pause"), ("kill the one that went on",)),
    Sabotage.flush: (("power",), ("power alone",)),
    Sabotage.lanes: ((), ()),  # these two of queues show without any
    Sabotage.acks: ((), ()),
}


class Driver(StrEnum):
    """What runs the cluster."""

    process = "process"
    docker = "docker"


def app(
    ctx: typer.Context,
    minutes: Annotated[float, typer.Option(help="How long faults happen; healing and judging come on top.")] = 5.0,
    seed: Annotated[int | None, typer.Option(help="Repeat the faults of an earlier run.")] = None,
    faults: Annotated[str, typer.Option(help="Comma separated; all, or see below.")] = ",".join(DEFAULT_FAULTS),
    brokers: Annotated[int, typer.Option(help="How many brokers.", min=2, max=9)] = 3,
    coordinators: Annotated[int, typer.Option(help="How many; several are on etcd, three members.", min=1, max=5)] = 1,
    rate: Annotated[float, typer.Option(help="Records a second, all producers together.", min=1)] = 3_000.0,
    value_bytes: Annotated[int, typer.Option(help="Size of a record's value.", min=10, max=1_000_000)] = 100,
    partitions: Annotated[int, typer.Option(help="Partitions of each topic.", min=1, max=100)] = 4,
    every: Annotated[float, typer.Option(help="Seconds from one fault to the next, about.", min=0.2)] = 4.0,
    driver: Annotated[Driver, typer.Option(help="process starts a cluster here; docker breaks one that is up.")] = (
        Driver.process
    ),
    project: Annotated[str, typer.Option(help="Compose project of the docker driver.")] = "ferryline",
    keep: Annotated[Path | None, typer.Option(help="Keep plan, history, data and logs in this folder.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Append a line about the run to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
    show_plan: Annotated[bool, typer.Option("--plan", help="Print what would be done, and do nothing.")] = False,
    total: Annotated[Path | None, typer.Option("--sum", help="Print the sums of a ledger, and do nothing.")] = None,
    sabotage: Annotated[Sabotage | None, typer.Option(help="Break the promise on purpose: must end in 1.")] = None,
) -> None:
    """Break a cluster under load and prove that nothing acknowledged is lost.

    Starts a coordinator and brokers in a temporary folder, over TLS, with a proxy between all of them. Producers,
    consumers in a group, readers on their own and receivers of a queue run all the time, and write down what they sent
    and saw. The seed decides what is done to the cluster: kill -9, stopped processes, cut and slow networks, failing
    disks. In the end all is mended, the rest is read, every copy of every partition is read from its beginning, and
    checkers judge.

    Exit status 1 if an acknowledged record was lost, doubled or out of order anywhere, if a queue broke a promise, or
    if the cluster did not come back by itself. The history and the logs of such a run are kept, and the command that
    repeats its faults is shown.

    Faults: kill, coordinator, restart, pause, cut, one-way, delay, half-open, reset, move; with several coordinators
    etcd (its members die); and, less gently, power (what was not synced is gone), disk-full, disk-error, flip (bits of
    files), truncate, clock.

    Examples:

      ferryline chaos --minutes 1

      ferryline chaos --minutes 10 --seed 7 --faults kill,pause,cut --brokers 5

      ferryline chaos --coordinators 3 --minutes 3

      ferryline chaos --faults all --rate 20000 --keep /var/tmp/chaos --ledger runs.jsonl

      ferryline chaos --minutes 0.5 --sabotage ack-before-flush
    """
    form = of(ctx).flags.get("output") or "table"
    output = Output("json" if as_json else str(form))
    if total is not None:
        from ferryline.cli.chaos import ledger as ledgers

        output.one(ledgers.total(ledgers.read(total)), title=str(total))
        return
    plan = _plan(seed, faults, (brokers, coordinators), minutes, every, sabotage)
    if show_plan:
        _show_plan(plan, output)
        return
    from ferryline.cli.chaos.campaign import Load

    load = Load(rate, value_bytes, partitions)
    if sabotage is not None:
        load = replace(load, delivery_s=15.0, heal_s=20.0)  # a cluster that broke its promise may never heal
    root = keep.absolute() if keep is not None else Path(tempfile.mkdtemp(prefix="ferryline-chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    (root / PLAN).write_text(json.dumps(plan.as_dict(), indent=1) + "\n")
    from ferryline.cli.chaos import session

    account = session.run(plan, load, root, driver.value, project, sabotage, quiet=not output.for_people)
    (root / REPORT).write_text(json.dumps(account.as_dict(), indent=2, default=str) + "\n")
    if ledger is not None:
        session.note(ledger, plan, load, account, driver.value, sabotage)
    _report(account, plan, output)
    if account.good and keep is None:
        shutil.rmtree(root, ignore_errors=True)
    if not account.good:
        raise Failed("a promise was broken", FAILED, remedy=_remedy(plan, minutes, every, load, root, sabotage))


def _plan(
    seed: int | None, faults: str, nodes: tuple[int, int], minutes: float, every: float, sabotage: Sabotage | None
) -> Plan:
    """``nodes``: how many brokers and coordinators. Raises UsageError."""
    brokers, coordinators = nodes
    chosen = list(FAULTS) if faults == "all" else [name.strip() for name in faults.split(",") if name.strip()]
    if faults == "all" and coordinators == 1:
        chosen = [name for name in chosen if name not in NEED_ETCD]
    if chosen == list(DEFAULT_FAULTS) and coordinators > 1:
        chosen += sorted(NEED_ETCD)
    needed, first = SHOWN_BY[sabotage] if sabotage is not None else ((), ())
    try:
        return make_plan(
            random.randrange(2**32) if seed is None else seed,
            brokers=[f"broker-{number}" for number in range(1, brokers + 1)],
            faults=[*dict.fromkeys([*chosen, *needed])],
            seconds=minutes * 60,
            every_s=every,
            first=first,
            coordinators=coordinators,
        )
    except ValueError as error:
        raise UsageError(f"faults: {error}") from None


def _show_plan(plan: Plan, output: Output) -> None:
    if not output.for_people:
        output.one(plan.as_dict())
        return
    for phase in plan.phases:
        say(f"{phase.name} ({phase.seconds:g} s)")
        for step in phase.steps:
            other = f" and {step.other}" if step.other else ""
            lasting = f" for {step.for_s:g} s" if step.for_s else ""
            say(f"  {step.at_s:6.2f}  {step.kind} {step.target}{other}{lasting}")


def _report(account: Account, plan: Plan, output: Output) -> None:
    if not output.for_people:
        output.one({"seed": plan.seed, **account.as_dict()})
        return
    rows: dict[str, Any] = {
        "acknowledged": account.acked,
        "refused, unknown": f"{account.refused:,}, {account.unknown:,}",
        "received": account.polled,
        "read from copies": account.copies_read,
        "receipts honoured": account.receipts,
        "faults": account.faults,
        "queue": account.queue,
        "longest gap": f"{account.longest_gap_s:.2f} s without any acknowledgement ({account.longest_gap_in})",
        "anomalies": account.anomalies,
        "seed": str(plan.seed),
        "took": f"{account.seconds:.0f} s",
    }
    if account.send_errors or account.read_errors:
        rows["errors"] = {**account.send_errors, **account.read_errors}
    output.one(rows)
    for line in account.trouble:
        say(f"TROUBLE: {line}")
    if account.verdict is not None:
        say("\n" + "\n".join(account.verdict.explain()))


def _remedy(plan: Plan, minutes: float, every: float, load: Load, root: Path, sabotage: Sabotage | None) -> str:
    again = f"ferryline chaos --seed {plan.seed} --minutes {minutes:g} --brokers {len(plan.brokers)} --every {every:g}"
    again += f" --coordinators {plan.coordinators}" if plan.coordinators > 1 else ""
    again += f" --faults {','.join(plan.faults)} --rate {load.rate:g} --partitions {load.partitions}"
    again += f" --value-bytes {load.value_bytes}" + (f" --sabotage {sabotage.value}" if sabotage else "")
    return f"History, logs and data: {root}\nThe same faults again: {again}"
