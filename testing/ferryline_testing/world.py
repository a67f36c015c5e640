"""Clocks and chance of whatever runs in a cluster's event loop; everywhere else they are the real ones.

The modules of Ferryline read clocks and draw numbers by names of the standard library. While any cluster runs, these
names lead to stand-ins in those modules, which ask the world of the running loop. The modules themselves know nothing
of it, and pay nothing for it otherwise.
"""

from __future__ import annotations

import asyncio
import builtins
import importlib
import pkgutil
import random
import secrets
import sys
import time
import uuid
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ferryline
from ferryline_testing.lives import HERE
from ferryline_testing.virtual_time import VirtualTime

_OURS = ("ferryline.", "ferryline_broker.", "ferryline_coordinator.", "ferryline_service.")
_NOT_OURS = ("ferryline.cli.", "ferryline.proof.")
_LOADED = ("app", "core", "protocol", "queues")  # packages of the SDK that are used here
_NOT_LOADED = ("simple", "sync", "testing")  # of its modules: for threads, and what leads here
# What coordinator and node core do is keep each other alive: they do not notice a leap (`leaps`).
_STEADY = ("ferryline_coordinator.",)
# Tells of objects apart where two deadlines are equal, and seeds jitter: memory addresses differ in each run.
_BY_ADDRESS = ("ferryline.fetcher", "ferryline.heartbeats", "ferryline.requests", "ferryline_broker.driver")


def _load_sdk() -> None:
    """What the SDK loads when it is first used has to be there before its clocks are replaced."""
    folders = [(list(ferryline.__path__), "ferryline.")]
    folders += [([f"{ferryline.__path__[0]}/{name}"], f"ferryline.{name}.") for name in _LOADED]
    for folder, prefix in folders:
        for found in pkgutil.iter_modules(folder, prefix):
            if not found.ispkg and found.name.removeprefix("ferryline.") not in _NOT_LOADED:
                importlib.import_module(found.name)


class World:
    """Time and chance of one cluster. ``begin_ms``: the wall clock at its start."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: VirtualTime, seed: int, begin_ms: int) -> None:
        self.loop, self.clock, self.seed = loop, clock, seed
        self.heard: Callable[[str, dict[str, Any]], None] = _ignore  # log lines of the services
        self._begin_ms = begin_ms
        self._began_ns = self.boot_ns()
        self._chances: dict[str, random.Random] = {}
        self._numbers = 0

    def boot_ns(self) -> int:
        return round(self.clock.now_s * 1e9)

    def steady_ns(self) -> int:
        """Without leaps."""
        return round((self.clock.now_s - self.clock.leapt_s) * 1e9)

    def wall_ns(self) -> int:
        return self._begin_ms * 1_000_000 + self.boot_ns() - self._began_ns

    def chance(self) -> random.Random:
        """Of the process that asks: what another one draws changes nothing."""
        life = HERE.get()
        name = life.name if life is not None else "test"
        found = self._chances.get(name)
        if found is None:
            found = self._chances[name] = random.Random(f"{self.seed}/{name}")
        return found

    def number(self) -> int:
        self._numbers += 1
        return self._numbers


_worlds: dict[asyncio.AbstractEventLoop, World] = {}
_undo: list[Callable[[], None]] = []


def here() -> World | None:
    """The world of the running loop."""
    loop = asyncio._get_running_loop()
    return _worlds.get(loop) if loop is not None else None


def enter(world: World) -> None:
    """Raises RuntimeError if the loop has a world already."""
    if world.loop in _worlds:
        raise RuntimeError("a cluster runs in this event loop already; virtual time is for one at a time")
    if not _worlds:
        _install()
    _worlds[world.loop] = world


def leave(world: World) -> None:
    del _worlds[world.loop]
    if not _worlds:
        while _undo:
            _undo.pop()()


# -- stand-ins --------------------------------------------------------------------------------------


class _StandIn:
    """A module of the standard library with some names replaced."""

    def __init__(self, real: ModuleType, **replaced: Callable[..., Any]) -> None:
        self._real = real
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _wall_ns() -> int:
    world = here()
    return time.time_ns() if world is None else world.wall_ns()


def _wall_s() -> float:
    return _wall_ns() / 1e9


def _boot_ns(clock: int) -> int:
    world = here()
    return time.clock_gettime_ns(clock) if world is None else world.boot_ns()


def _steady_ns(clock: int) -> int:
    world = here()
    return time.clock_gettime_ns(clock) if world is None else world.steady_ns()


def _monotonic_s() -> float:
    world = here()
    return time.monotonic() if world is None else world.clock.now_s


def _cost_s() -> float:
    """Nothing costs time here, so that no decision hangs on how fast this machine is."""
    world = here()
    return time.perf_counter() if world is None else world.clock.now_s


def _steady_ms() -> int:
    return _steady_ns(time.CLOCK_BOOTTIME) // 1_000_000


def _randbits(count: int) -> int:
    world = here()
    return secrets.randbits(count) if world is None else world.chance().getrandbits(count)


def _token_bytes(count: int = 32) -> bytes:
    world = here()
    return secrets.token_bytes(count) if world is None else world.chance().randbytes(count)


def _token_hex(count: int = 32) -> str:
    return _token_bytes(count).hex()


def _uuid4() -> uuid.UUID:
    world = here()
    return uuid.uuid4() if world is None else uuid.UUID(int=world.chance().getrandbits(128), version=4)


def _uniform(low: float, high: float) -> float:
    world = here()
    return (random if world is None else world.chance()).uniform(low, high)


def _number_of(thing: object) -> int:
    world = here()
    return builtins.id(thing) if world is None else world.number()


def _stand_ins() -> dict[int, Any]:
    """id of the real thing -> what takes its place."""
    clocks = {"time": _wall_s, "time_ns": _wall_ns, "monotonic": _monotonic_s, "perf_counter": _cost_s}
    found: dict[int, Any] = {id(getattr(time, name)): replaced for name, replaced in clocks.items()}
    found[id(time.clock_gettime_ns)] = _boot_ns
    found[id(time)] = _StandIn(time, **clocks, clock_gettime_ns=_boot_ns)
    found[id(secrets)] = _StandIn(secrets, randbits=_randbits, token_bytes=_token_bytes, token_hex=_token_hex)
    found[id(uuid)] = _StandIn(uuid, uuid4=_uuid4)
    found[id(random)] = _StandIn(random, uniform=_uniform)
    return found


def _install() -> None:
    stand_ins = _stand_ins()
    steady = _StandIn(time, clock_gettime_ns=_steady_ns, time=_wall_s, time_ns=_wall_ns)
    for name, module in sorted(sys.modules.items()):
        if name == "tenacity.wait" or (name.startswith(_OURS) and not name.startswith(_NOT_OURS)):
            for known, value in list(vars(module).items()):
                stand_in = stand_ins.get(id(value))
                if stand_in is not None:
                    _replace(module, known, steady if value is time and name.startswith(_STEADY) else stand_in)
    for name in _BY_ADDRESS:
        _replace(sys.modules[name], "id", _number_of)
    _replace(sys.modules["ferryline_broker.node_driver"], "now_ms", _steady_ms)


def _replace(module: ModuleType, name: str, stand_in: Any) -> None:
    names = vars(module)
    if name in names:
        real = names[name]
        _undo.append(lambda: setattr(module, name, real))
    else:
        _undo.append(lambda: delattr(module, name))
    setattr(module, name, stand_in)


def _ignore(*_: object) -> None:
    return


_load_sdk()
