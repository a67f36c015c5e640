"""`ferryline cluster rolling-restart`: end one service of `ferryline up` after the other; `up` starts it again.

Which process a service is stands in the last READY line of its ``stdout``. It is asked to end only if it still is the
program that it was: numbers of processes are used again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferryline.cli.connection import connected
from ferryline.cli.failures import FAILED, NOT_FOUND, UNAVAILABLE, Failed
from ferryline.cli.output import warn
from ferryline.protocol.errors import FerrylineError

if TYPE_CHECKING:
    from ferryline.cli.settings import Settings
    from ferryline.client import Client

PROGRAMS = {"broker": "ferryline_broker", "coordinator": "ferryline_coordinator"}
POLL_S = 0.1


async def restart_all(settings: Settings, root: Path, coordinators: bool, timeout_s: float) -> list[dict[str, Any]]:
    """Every broker, then the coordinators; one row each. Raises Failed where one does not come back: those that were
    not restarted by then run on."""
    brokers, others = outputs(root, "broker-*"), outputs(root, "coordinator*") if coordinators else []
    if not brokers:
        raise Failed(f"{root}: no cluster of `ferryline up`", NOT_FOUND, remedy="--data-dir names its folder.")
    done = []
    async with connected(settings) as client:
        for path in [*brokers, *others]:
            await _until(lambda: _good(client), timeout_s, "the cluster is not fully in sync", client)
            done.append(await _restart(client, path, timeout_s))
        await _until(lambda: _good(client), timeout_s, "the cluster is not fully in sync", client)
    return done


def _good(client: Client) -> bool:
    """Every broker serves, and every partition has all of its copies in sync."""
    cluster = client.routing.cluster
    serving = all(not broker.fenced and not broker.stopping for broker in cluster.brokers.values())
    return serving and all(set(part.replicas) == set(part.isr) for part in cluster.partitions.values())


async def _restart(client: Client, path: Path, timeout_s: float) -> dict[str, Any]:
    name, before, began = path.parent.name, ready_line(path), time.monotonic()
    pid = before["pid"]
    if not is_program(pid, PROGRAMS[name.partition("-")[0]]):
        raise Failed(f"{name} does not run", FAILED, remedy="Is `ferryline up` running there?")
    warn(f"{name}: handing over")
    os.kill(pid, signal.SIGTERM)
    what = f"{name} did not come back"
    await _until(lambda: ready_line(path)["pid"] != pid, timeout_s, what, client)
    after = ready_line(path)
    broker = after.get("broker_id")
    if broker is not None:
        await _until(lambda: _serves(client, broker), timeout_s, what, client)
    seconds = round(time.monotonic() - began, 1)
    warn(f"{name}: back after {seconds:g} s")
    return {"service": name, "pid_before": pid, "pid": after["pid"], "seconds": seconds}


def _serves(client: Client, broker_id: int) -> bool:
    broker = client.routing.cluster.brokers.get(broker_id)
    return broker is not None and not broker.fenced and not broker.stopping


async def _until(condition: Callable[[], bool], within_s: float, what: str, client: Client) -> None:
    end = time.monotonic() + within_s
    while True:
        try:
            await client.watch.ask(timeout=5.0)
        except FerrylineError:
            pass  # nobody who knows is up at the moment; time decides
        else:
            if condition():
                return
        if time.monotonic() > end:
            raise Failed(f"{what} within {within_s:g} s", UNAVAILABLE, remedy="ferryline doctor says what is missing.")
        await asyncio.sleep(POLL_S)


def outputs(root: Path, services: str) -> list[Path]:
    """Where services that were started below ``root`` say that they are ready."""
    return sorted(root.glob(f"{services}/stdout"))


def ready_line(path: Path) -> dict[str, Any]:
    """What a service said of itself when it was ready last. Raises Failed."""
    for line in reversed(path.read_text(errors="replace").splitlines()):
        if line.startswith("READY "):
            found: dict[str, Any] = json.loads(line[6:])
            return found
    raise Failed(f"{path}: this service has never been ready", FAILED)


def is_program(pid: int, module: str) -> bool:
    """Whether that process runs this module."""
    import psutil

    try:
        return module in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
