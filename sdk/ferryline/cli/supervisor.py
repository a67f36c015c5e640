"""The processes of `ferryline worker run`: started, watched, restarted, and as many as the backlog needs.

Signals go to the processes that were started here, by their pid. They die with this process (Linux).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from ferryline.app.scaling import Load, Restarts, Scaler
from ferryline.cli.failures import USAGE, Failed
from ferryline.cli.service import die_with_parent

log = logging.getLogger("ferryline.worker")

TICK_S = 0.1
LOOK_S = 1.0  # between two looks at the files
ASK_S = 5.0  # between two questions for the backlog
KILL_AFTER_S = 15.0  # beyond the grace: what brokers and hooks may take
FILES_MAX = 20_000
_SKIPPED = frozenset(("__pycache__", "node_modules", "site-packages"))
Loads = Callable[[], Awaitable[Mapping[str, Load]]]


class Unit:
    """One worker process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.since = time.monotonic()
        self.kill_at: float | None = None  # set once it was asked to end

    def ask_to_end(self, within_s: float) -> None:
        """SIGTERM, once; SIGKILL follows if that is not heard."""
        if self.kill_at is None:
            self.kill_at = time.monotonic() + within_s
            self.process.send_signal(signal.SIGTERM)


class Supervisor:
    """Keeps ``scaler.low`` processes of ``command``, or as many as the backlog calls for (`follow`).

    With ``watched`` folders all are replaced when a Python file there changes.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        scaler: Scaler,
        *,
        grace: float,
        watched: Sequence[Path] = (),
    ) -> None:
        self._command = list(command)
        self._env = dict(env)
        self._scaler = scaler
        self._end_s = grace + KILL_AFTER_S
        self._loads: Loads | None = None
        self._watched = list(watched)
        self._units: list[Unit] = []
        self._wanted = scaler.low
        self._restarts = Restarts()
        self._start_at = 0.0
        self._stopping = False
        self._files: dict[Path, int] = {}
        self._waits_for_change = False

    def follow(self, loads: Loads) -> None:
        """Ask this for the backlog of every queue, now and then."""
        self._loads = loads

    async def run(self) -> None:
        """Returns when everything has ended after a signal. Raises Failed when no process can start as asked."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        self._files = python_files(self._watched)
        asking = asyncio.create_task(self._ask()) if self._loads is not None else None
        look_at = time.monotonic() + LOOK_S
        try:
            while not (self._stopping and not self._units):
                self._reap()
                if not self._stopping:
                    if self._watched and time.monotonic() >= look_at:
                        self._look()
                        look_at = time.monotonic() + LOOK_S
                    self._adjust()
                await asyncio.sleep(TICK_S)
        finally:
            if asking is not None:
                asking.cancel()
            for unit in self._units:
                unit.process.kill()
            for unit in self._units:
                unit.process.wait()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    # -- steps -------------------------------------------------------------------------------------

    def _stop(self) -> None:
        if self._stopping:  # asked twice: now
            for unit in self._units:
                unit.kill_at = 0.0
        self._stopping = True
        log.info("stopping; asked again, this kills what has not ended")
        for unit in self._units:
            unit.ask_to_end(self._end_s)

    def _reap(self) -> None:
        for unit in list(self._units):
            status = unit.process.poll()
            if status is None:
                if unit.kill_at is not None and time.monotonic() >= unit.kill_at:
                    log.warning("worker %d does not end; it is killed", unit.process.pid)
                    unit.process.kill()
                    unit.kill_at = time.monotonic() + self._end_s
                continue
            self._units.remove(unit)
            if unit.kill_at is None:
                self._ended(unit, status)

    def _ended(self, unit: Unit, status: int) -> None:
        if status == USAGE:
            if not self._watched:
                self._stop()
                raise Failed("the worker cannot run as asked; what is wrong stands above", USAGE)
            log.warning("the worker cannot run; waiting for a change of its files")
            self._waits_for_change = True
            return
        delay_s = self._restarts.delay_s(time.monotonic() - unit.since)
        self._start_at = time.monotonic() + delay_s
        how = f"signal {-status}" if status < 0 else f"status {status}"
        log.warning("worker %d ended with %s; another one starts in %g s", unit.process.pid, how, delay_s)

    def _adjust(self) -> None:
        staying = [unit for unit in self._units if unit.kill_at is None]
        for unit in staying[self._wanted :]:
            unit.ask_to_end(self._end_s)
        if len(staying) < self._wanted and time.monotonic() >= self._start_at and not self._waits_for_change:
            process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal reaches only us; we stop them in order
                preexec_fn=die_with_parent(signal.SIGTERM),
            )
            self._units.append(Unit(process))
            log.info("worker %d starts", process.pid)

    def _look(self) -> None:
        files = python_files(self._watched)
        if files == self._files:
            return
        changed = sorted(str(path) for path in {*files, *self._files} if files.get(path) != self._files.get(path))
        log.info("%s changed: all workers are replaced", changed[0])
        self._files = files
        self._waits_for_change = False
        self._start_at = 0.0
        for unit in self._units:
            unit.ask_to_end(self._end_s)

    async def _ask(self) -> None:
        """Follow the backlog."""
        assert self._loads is not None
        while True:
            try:
                loads = await self._loads()
            except Exception as error:
                log.warning("the backlog is not known: %s", error)
            else:
                running = len([unit for unit in self._units if unit.kill_at is None])
                wanted = self._scaler.decide(loads, running, time.monotonic())
                if wanted != self._wanted:
                    told = ", ".join(
                        f"{name}: {load.backlog}, {self._scaler.drain_s(name, load):.0f} s"
                        for name, load in loads.items()
                    )
                    log.info("%d workers instead of %d (%s)", wanted, self._wanted, told)
                self._wanted = wanted
            await asyncio.sleep(ASK_S)


def python_files(folders: Sequence[Path]) -> dict[Path, int]:
    """When each Python file below these folders last changed, in ns. Hidden folders and packages are left out."""
    found: dict[Path, int] = {}
    for folder in folders:
        for root, names, files in os.walk(folder):
            names[:] = [name for name in names if not name.startswith(".") and name not in _SKIPPED]
            for name in files:
                if name.endswith(".py") and len(found) < FILES_MAX:
                    path = Path(root, name)
                    try:
                        found[path] = path.stat().st_mtime_ns
                    except OSError:  # gone in the meantime
                        continue
    return found
