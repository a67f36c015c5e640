"""`ferryline worker`: run the subscribers, tasks and schedules of an app; say what it declares."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ferryline.cli.invocation import of
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.app.app import App
    from ferryline.app.scaling import Load
    from ferryline.cli.settings import Settings
    from ferryline.client import Client

app = typer.Typer(no_args_is_help=True, help="Run the subscribers, tasks and schedules of an app.")

PROCESSES_MAX = 256
Target = Annotated[str, typer.Argument(metavar="MODULE:APP", help="Where the fl.App is: a module and a name in it.")]


@app.command()
def run(
    ctx: typer.Context,
    target: Target,
    concurrency: Annotated[
        int,
        typer.Option("--concurrency", "-c", help="Records at once, of each subscriber and queue.", min=1, max=10_000),
    ] = 16,
    grace: Annotated[float, typer.Option(help="Seconds that the work in hand may take after SIGTERM.", min=0)] = 30.0,
    autoscale: Annotated[
        str, typer.Option(metavar="MIN:MAX", help="Processes, as the backlog needs; or one number.")
    ] = "1",
    drain: Annotated[
        float, typer.Option(help="With --autoscale: seconds in which a backlog should be done.", min=1)
    ] = 30.0,
    reload: Annotated[bool, typer.Option("--reload", help="Start again when a Python file changes.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="Serve Prometheus metrics on 127.0.0.1, from this port on: one for each process.", min=1024, max=65535
        ),
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="In this process, which ends when the work fails.")] = False,
) -> None:
    """Work until SIGTERM or Ctrl-C; then take nothing more, finish what is in hand, and hand back the rest.

    Processes that end are started again, later and later while they keep ending. What a process had in hand when it was
    killed goes to others after the lease.

    Examples:

      ferryline worker run shop:app

      ferryline worker run shop.jobs:app --concurrency 4 --autoscale 0:8

      ferryline worker run shop:app --reload
    """
    settings = of(ctx).settings
    low, high = _autoscale(autoscale)
    _log(settings.verbose)
    if here:
        if (low, high) != (1, 1) or reload:
            raise UsageError("--here: one process, without --autoscale and --reload")
        _run_here(target, settings, concurrency, grace, metrics_port)
        return
    from ferryline.app.scaling import Scaler
    from ferryline.cli.connection import run as run_loop
    from ferryline.cli.supervisor import Supervisor

    command = [sys.executable, "-m", "ferryline.cli", "worker", "run", target, "--here"]
    command += ["--concurrency", str(concurrency), "--grace", str(grace)]
    if metrics_port is not None:
        command += ["--metrics-port", str(metrics_port)]
    if settings.verbose:
        command.append("--verbose")
    scaler = Scaler(low, high, target_s=drain)
    watched = [Path.cwd()] if reload else []
    supervisor = Supervisor(command, _environment(settings), scaler, grace=grace, watched=watched)
    if low == high:
        run_loop(supervisor.run())
        return
    queues = _queues(_find(target))
    run_loop(_run_scaled(supervisor, settings, queues))


@app.command()
def show(ctx: typer.Context, target: Target) -> None:
    """What an app declares: subscribers, tasks and schedules. Connects to nothing.

    Examples:

      ferryline worker show shop:app
    """
    found = _find(target)
    found.check()
    of(ctx).output.rows(_rows(found), empty="it declares nothing")


# -- the app ----------------------------------------------------------------------------------------


def _find(target: str) -> App:
    """Import the module, also from the working directory, and take the app. Raises UsageError."""
    from ferryline.app.app import App

    module, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise UsageError(f"{target}: there is no module {error.name}, seen from {os.getcwd()}") from None
        raise
    found: Any = loaded
    for part in (name or "app").split("."):
        found = getattr(found, part, None)
    if not isinstance(found, App):
        apps = sorted(key for key, value in vars(loaded).items() if isinstance(value, App))
        hint = f"; {module}:{apps[0]} is" if apps else ""
        raise UsageError(f"{target}: that is no fl.App{hint}")
    return found


def _rows(found: App) -> list[dict[str, Any]]:
    from datetime import UTC, datetime

    from ferryline.app.queue import GROUP

    rows: list[dict[str, Any]] = [
        {"kind": "subscriber", "name": one.name, "reads": one.topic, "group": one.group,
         "attempts": one.retry.attempts if one.retry else None, "timeout": one.timeout, "next": None}
        for one in found.subscribers
    ]  # fmt: skip
    now = datetime.now(UTC)
    for task in found.tasks.values():
        firings = [schedule.times.next_after(now) for schedule in found.schedules if schedule.task is task]
        rows.append(
            {"kind": "task", "name": task.name, "reads": task.queue.topic, "group": GROUP,
             "attempts": task.retry.attempts if task.retry else None, "timeout": task.timeout,
             "next": min(firings).isoformat() if firings else None}
        )  # fmt: skip
    return rows


def _run_here(target: str, settings: Settings, concurrency: int, grace: float, metrics_port: int | None) -> None:
    os.environ.update(_environment(settings))
    found = _find(target)
    try:
        found.run(concurrency=concurrency, grace=grace, metrics_port=metrics_port)
    except BaseException:
        if _threads_are_left():
            logging.getLogger("ferryline.worker").exception("the work has failed")
            _end(1)
        raise
    if _threads_are_left():
        _end(0)


def _threads_are_left() -> bool:
    """Whether a handler in a thread goes on, which nobody can stop. Its record has been given back."""
    return any(one.name.startswith("ferryline-") and not one.daemon for one in threading.enumerate())


def _end(status: int) -> NoReturn:
    """End now: the interpreter would wait for threads."""
    logging.shutdown()
    os._exit(status)


# -- processes ---------------------------------------------------------------------------------------


def _autoscale(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    if not low.isdigit() or (colon and not high.isdigit()):
        raise UsageError(f"--autoscale {text}: expected MIN:MAX, or one number")
    found = int(low), int(high) if colon else int(low)
    if not 0 <= found[0] <= found[1] <= PROCESSES_MAX or found[1] == 0:
        raise UsageError(f"--autoscale {text}: expected 0 <= MIN <= MAX <= {PROCESSES_MAX}, and MAX at least 1")
    return found


def _environment(settings: Settings) -> dict[str, str]:
    """Ours, with the cluster that was chosen, for apps that do not name one."""
    chosen = {"FERRYLINE_URL": ",".join(settings.url), "FERRYLINE_CA": str(settings.ca or "")}
    if settings.token:
        chosen["FERRYLINE_TOKEN"] = settings.token
    return {**os.environ, **chosen}


def _log(verbose: bool) -> None:
    if not verbose:  # else the root command has seen to it
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )


def _queues(found: App) -> list[tuple[str, str]]:
    """(topic, group) of everything that the app takes records from."""
    from ferryline.app.queue import GROUP

    pairs = [(one.topic, one.group) for one in found.subscribers] + [(name, GROUP) for name in found.queues]
    return list(dict.fromkeys(pairs))


async def _run_scaled(supervisor: Any, settings: Settings, queues: list[tuple[str, str]]) -> None:
    from ferryline.cli.connection import connected

    async with connected(settings) as client:

        async def loads() -> Mapping[str, Load]:
            return {f"{topic} of {group}": await _load(client, topic, group) for topic, group in queues}

        supervisor.follow(loads)
        await supervisor.run()


async def _load(client: Client, topic: str, group: str) -> Load:
    """What there is to do in one queue. Topics that are not there yet have nothing."""
    from ferryline.app.scaling import Load
    from ferryline.positions import look_up
    from ferryline.protocol.errors import UnknownGroup, UnknownTopic
    from ferryline.queue_admin import Queue

    try:
        parts = await Queue(client, topic, group).stats()
    except UnknownTopic:
        return Load(0, 0)
    except UnknownGroup:  # nobody has ever asked: everything waits
        meta = await client.learn_topic(topic)
        keys = [(meta.id, number) for number in range(meta.config.partitions)]
        ends = await look_up(client, dict.fromkeys(keys, "end"), client.timeout)
        return Load(sum(one.high_watermark - max(0, one.log_start) for one in ends.values()), 0)
    backlog = sum(max(0, part.unsettled - part.delayed - part.parked - part.dying) for part in parts)
    return Load(backlog, sum(part.start + part.settled_above_start for part in parts))
