"""One run from the command line: the cluster, the progress line, the ledger."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferryline.cli.chaos import HISTORY, Sabotage
from ferryline.cli.chaos.bed import ProcessBed, running
from ferryline.cli.chaos.campaign import Account, Campaign, Load, Now, Tell
from ferryline.cli.chaos.containers import POSSIBLE, DockerBed
from ferryline.cli.chaos.ledger import append, commit_of
from ferryline.cli.connection import run as run_coroutine
from ferryline.cli.etcd import REMEDY, etcd_program
from ferryline.cli.failures import USAGE, Failed
from ferryline.cli.output import stderr, warn
from ferryline.cli.processes import missing_services

if TYPE_CHECKING:
    from ferryline.cli.chaos.schedule import Plan


def run(
    plan: Plan, load: Load, root: Path, driver: str, project: str, sabotage: Sabotage | None, *, quiet: bool
) -> Account:
    """Run it with progress on stderr. Raises Failed when the programs to break are not there."""
    if driver == "process" and (missing := missing_services()):
        told = f"{' and '.join(missing)}: not installed"
        raise Failed(told, code="NOT_INSTALLED", remedy="Install: pip install 'ferryline[server]'")
    if plan.coordinators > 1 and etcd_program() is None:
        raise Failed("etcd: not installed", code="NOT_INSTALLED", remedy=REMEDY)
    with _Progress(quiet) as tell:
        return run_coroutine(_run(plan, load, root, driver, project, sabotage, tell))


async def _run(
    plan: Plan, load: Load, root: Path, driver: str, project: str, sabotage: Sabotage | None, tell: Tell
) -> Account:
    history = root / HISTORY
    if driver == "docker":
        return await _run_containers(plan, load, history, project, tell)
    env = {"FERRYLINE_SABOTAGE": sabotage.value} if sabotage is not None else {}
    brokers, coordinators = len(plan.brokers), plan.coordinators
    bed = ProcessBed(root, brokers=brokers, faults=plan.faults, env=env, coordinators=coordinators)
    async with running(bed):
        return await Campaign(plan, load, bed, history, tell).run()


async def _run_containers(plan: Plan, load: Load, history: Path, project: str, tell: Tell) -> Account:
    impossible = sorted(set(plan.faults) - POSSIBLE)
    if impossible:
        told = f"the docker driver cannot do {', '.join(impossible)}"
        raise Failed(told, USAGE, remedy=f"Choose among: --faults {','.join(sorted(POSSIBLE))}")
    if plan.coordinators > 1:
        raise Failed("the docker driver knows one coordinator", USAGE, remedy="Leave --coordinators out")
    bed = DockerBed(project)
    found = bed.find()
    if tuple(found) != plan.brokers:
        raise Failed(f"project {project!r} has {len(found)} brokers", USAGE, remedy=f"Say --brokers {len(found)}")
    return await Campaign(plan, load, bed, history, tell).run()


def note(path: Path, plan: Plan, load: Load, account: Account, driver: str, sabotage: Sabotage | None) -> None:
    """Append the run to a ledger."""
    entry: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit_of(Path(__file__).parent),
        "seed": plan.seed,
        "brokers": len(plan.brokers),
        "coordinators": plan.coordinators,
        "driver": driver,
        "rate": load.rate,
        "seconds": account.seconds,
        "faults": account.faults,
        "acked": account.acked,
        "refused": account.refused,
        "unknown": account.unknown,
        "polled": account.polled,
        "copies_read": account.copies_read,
        "receipts": account.receipts,
        "elections": account.elections,
        "takeovers": account.takeovers,
        "queue": account.queue,
        "longest_gap_s": account.longest_gap_s,
        "longest_gap_in": account.longest_gap_in,
        "anomalies": account.anomalies,
        "good": account.good,
    }
    if sabotage is not None:
        entry["sabotage"] = sabotage.value
    append(path, entry)


class _Progress:
    """A line that changes on a terminal, a line for each phase elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._shown = ""
        self._status: Any = None

    def __enter__(self) -> Tell:
        if self._live:
            self._status = stderr().status("starting")
            self._status.start()
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def _tell(self, now: Now) -> None:
        text = f"{now.number}/{now.phases} {now.phase}: {now.faults} faults, {now.acked:,} acknowledged"
        text += f", {now.refused + now.unknown:,} not, longest gap {now.longest_gap_s:.1f} s"
        if self._status is not None:
            self._status.update(text)
        elif not self._quiet and now.phase != self._shown:
            self._shown = now.phase
            warn(text)
