"""From a seed to a plan of faults. Pure: the same arguments give the same plan, everywhere and always.

A plan is a row of phases, none of which overlaps another. A phase is a row of steps; each step says when in its phase
it begins, what it does to whom, and after how long it is undone. So every phase mends what it broke before the next
one begins, and whatever was missed is mended in the end: a plan always ends with ``drain``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

COORDINATOR = "coordinator"
ACTIVE = "active"  # of several coordinators the one that is active when the step begins
CLIENT = "client"
ANY = "*"
DRAIN = "drain"
QUIET = "quiet"
ETCD_MEMBERS = ("etcd-1", "etcd-2", "etcd-3")
ALL_ETCD = "all of etcd"

# fault -> what it does; the names of --faults
FAULTS: dict[str, str] = {
    "kill": "kill -9 of a broker, started again after 0.1 to 6 s",
    "coordinator": "kill -9 of the coordinator, started again after 0.1 to 6 s",
    "etcd": "kill -9 of a member of etcd or of all three, with several coordinators only",
    "restart": "SIGTERM of a broker, started again at once",
    "pause": "SIGSTOP of a broker or the coordinator for 1 to 8 s",
    "cut": "nothing passes between two nodes, or between a node and all others",
    "one-way": "nothing passes from one node to another, everything passes back",
    "delay": "bytes between two nodes come 10 to 400 ms late",
    "half-open": "one end of each connection is gone, and the other end is not told",
    "reset": "connections break in the middle of a body",
    "power": "kill -9 that also takes every byte that was not synced, on one broker or all at once",
    "disk-full": "every write of a broker fails with ENOSPC",
    "disk-error": "writes or syncs of a broker fail with EIO; it must leave",
    "flip": "bits of a segment file are turned over, on one broker only",
    "truncate": "a segment file loses its end, on one broker only, while it is stopped",
    "clock": "the wall clock of a broker jumps by up to a day",
    "move": "a broker is drained and taken back: its replicas move away and home",
}
DEFAULT_FAULTS = ("kill", "coordinator", "restart", "pause", "cut", "one-way", "delay", "half-open", "reset", "move")
NEED_ETCD = frozenset({"etcd"})
NEED_LOSSY = frozenset({"power"})
DAMAGE = frozenset({"flip", "truncate"})
PHASE_S = (10.0, 20.0)
QUIET_S = (3.0, 6.0)
LAST_START = 0.8  # of a phase: the rest is left for undoing
ONE_IN_QUIET = 4


@dataclass(frozen=True)
class Step:
    """One fault: ``at_s`` after the start of its phase it is done to ``target``, ``for_s`` later it is undone.

    ``other`` is the far side of what happens to a connection; ``amount`` is in ms for delays and clocks.
    """

    at_s: float
    kind: str
    target: str
    for_s: float = 0.0
    other: str = ""
    amount: int = 0


@dataclass(frozen=True)
class Phase:
    """Steps in the order of their beginning, and how long the phase lasts."""

    name: str
    seconds: float
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What one run will do."""

    seed: int
    brokers: tuple[str, ...]
    faults: tuple[str, ...]
    phases: tuple[Phase, ...] = field(default=())
    coordinators: int = 1  # more than one: on etcd

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Drawing:
    """Draws steps. ``damaged`` is the one broker whose files may be harmed: the other copies stay whole."""

    def __init__(self, seed: int, brokers: Sequence[str], faults: Sequence[str], coordinators: int) -> None:
        self.random = random.Random(seed)
        self.brokers = list(brokers)
        self.coordinators = [COORDINATOR, *(f"{COORDINATOR}-{number}" for number in range(2, coordinators + 1))]
        self.faults = list(faults)
        self.damaged = self.random.choice(self.brokers)
        self.makers: dict[str, Callable[[float], Step]] = {
            "kill": lambda at: Step(at, "kill", self.broker(), self.short(0.1, 6.0)),
            "coordinator": lambda at: Step(at, "coordinator", self.coordinator(), self.short(0.1, 6.0)),
            "etcd": lambda at: Step(at, "etcd", self.members(), self.short(0.1, 6.0)),
            "restart": lambda at: Step(at, "restart", self.broker()),
            "pause": lambda at: Step(at, "pause", self.node(one_in=5), self.short(1.0, 8.0)),
            "cut": self._cut,
            "one-way": self._one_way,
            "delay": self._delay,
            "half-open": lambda at: self._at_once("half-open", at),
            "reset": lambda at: self._at_once("reset", at),
            "power": lambda at: Step(at, "power", self.victims(), self.short(0.1, 4.0)),
            "disk-full": lambda at: Step(at, "disk-full", self.broker(), self.short(1.0, 6.0)),
            "disk-error": self._disk_error,
            "flip": lambda at: Step(at, "flip", self.damaged, amount=self.random.randrange(2**31)),
            "truncate": lambda at: Step(at, "truncate", self.damaged, 1.0, amount=self.random.randrange(2**31)),
            "clock": self._clock,
            "move": lambda at: Step(at, "move", self.broker(), self.short(3.0, 8.0)),
        }

    def short(self, low: float, high: float) -> float:
        return round(self.random.uniform(low, high), 2)

    def broker(self) -> str:
        return self.random.choice(self.brokers)

    def node(self, one_in: int) -> str:
        if self.random.randrange(one_in):
            return self.broker()
        return self.random.choice([self.coordinator(), *ETCD_MEMBERS]) if self.several else COORDINATOR

    @property
    def several(self) -> bool:
        """Whether there are several coordinators, and etcd."""
        return len(self.coordinators) > 1

    def coordinator(self) -> str:
        """Of several mostly the active one: the others have nothing to lose."""
        return self.random.choice([ACTIVE] * 4 + self.coordinators) if self.several else COORDINATOR

    def members(self) -> str:
        """One member of etcd, or all of them one time in four."""
        return ALL_ETCD if not self.random.randrange(4) else self.random.choice(ETCD_MEMBERS)

    def victims(self) -> str:
        """One broker, or all of them one time in three."""
        return ANY if not self.random.randrange(3) else self.broker()

    def pair(self) -> tuple[str, str]:
        """Two nodes: a broker, and another one, the coordinator, the clients or everybody; of several coordinators
        also the active one, or a member of etcd, and everybody."""
        if self.several and not self.random.randrange(3):
            return self.random.choice([ACTIVE, ACTIVE, ACTIVE, *ETCD_MEMBERS]), ANY
        one = self.broker()
        others = [name for name in self.brokers if name != one]
        return one, self.random.choice([*others, *others, self.coordinator(), CLIENT, ANY])

    def _at_once(self, kind: str, at: float) -> Step:
        one, other = self.pair()
        return Step(at, kind, one, 0.0, other)

    def _cut(self, at: float) -> Step:
        one, other = self.pair()
        return Step(at, "cut", one, self.short(0.5, 8.0), other)

    def _one_way(self, at: float) -> Step:
        one, other = self.pair()
        if other != ANY and self.random.randrange(2):
            one, other = other, one
        return Step(at, "one-way", one, self.short(0.5, 8.0), other)

    def _delay(self, at: float) -> Step:
        one, other = self.pair()
        return Step(at, "delay", one, self.short(1.0, 8.0), other, self.random.randrange(10, 400))

    def _disk_error(self, at: float) -> Step:
        return Step(at, "disk-error", self.broker(), self.short(0.5, 3.0), self.random.choice(["write", "sync"]))

    def _clock(self, at: float) -> Step:
        jump = self.random.choice([-1, 1]) * self.random.choice([2_000, 60_000, 3_600_000, 86_400_000])
        return Step(at, "clock", self.broker(), self.short(2.0, 8.0), amount=jump)

    def of(self, kind: str, at: float) -> Step:
        return self.makers[kind](round(at, 2))

    def has(self, *kinds: str) -> bool:
        return all(kind in self.faults for kind in kinds)

    def moments(self, seconds: float, every_s: float) -> list[float]:
        """About one moment in ``every_s`` seconds, sorted."""
        count = max(1, round(seconds * LAST_START / every_s))
        return sorted(self.random.uniform(0.2, seconds * LAST_START) for _ in range(count))


def _alone(kind: str) -> Callable[[_Drawing, float, float], list[Step]]:
    def shape(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
        return [draw.of(kind, at) for at in draw.moments(seconds, every_s)]

    return shape


def _cut_and_kill(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    """One broker is cut off; while it is, another dies."""
    out = []
    for at in draw.moments(seconds, max(every_s, 5.0)):
        cut_off, dying = draw.random.sample(draw.brokers, 2)
        out.append(Step(round(at, 2), "cut", cut_off, draw.short(2.0, 6.0), ANY))
        out.append(Step(round(at + draw.short(0.3, 1.5), 2), "kill", dying, draw.short(0.5, 3.0)))
    return out


def _kill_ahead(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    """A minority stands still while the rest goes on; then the one in the middle loses power; then they wake."""
    order = draw.random.sample(draw.brokers, len(draw.brokers))
    kind = "power" if draw.has("power") else "kill"
    asleep = draw.short(2.5, min(6.0, seconds / 2))
    minority = order[: max(1, (len(order) - 1) // 2)]
    steps = [Step(0.2, "pause", name, asleep) for name in minority]
    steps.append(Step(round(0.2 + asleep * 0.9, 2), kind, order[len(minority)], draw.short(0.5, 3.0)))
    return steps


def _kill_alone_ahead(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    """All but one stand still for a moment too short to be noticed; the one that went on dies, and they wake."""
    victim = draw.broker()
    steps = []
    for at in draw.moments(seconds, 5.0):
        steps += [Step(round(at, 2), "pause", name, 1.1) for name in draw.brokers if name != victim]
        steps.append(Step(round(at + 0.9, 2), "kill", victim, draw.short(1.0, 3.0)))
    return steps


def _rolling_kill(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    """Every broker in turn, each shortly after the last one has come back."""
    gap = seconds * LAST_START / len(draw.brokers)
    return [
        Step(round(0.2 + number * gap, 2), "kill", name, round(min(1.0, gap * 0.4), 2))
        for number, name in enumerate(draw.random.sample(draw.brokers, len(draw.brokers)))
    ]


def _kill_in_start(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    """A broker is killed, started, and killed again while it starts, recovers or registers."""
    moments = draw.moments(seconds, max(every_s, 4.0))
    return [Step(round(at, 2), "kill-start", draw.broker(), draw.short(0.1, 2.5)) for at in moments]


def _kill_at_isr_change(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    """A broker is silent for about as long as it takes to be fenced; then a second one or the coordinator dies."""
    one, two = draw.random.sample(draw.brokers, 2)
    silent = "pause" if draw.has("pause") else "cut"
    second = (two, "kill")
    if not draw.random.randrange(2) and draw.has("coordinator"):
        second = (draw.coordinator(), "coordinator")
    return [
        Step(0.2, silent, one, draw.short(3.0, 5.0), ANY if silent == "cut" else ""),
        Step(draw.short(2.5, 4.5), second[1], second[0], draw.short(0.3, 2.0)),
    ]


def _moves_and(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    """Replicas move while everything else happens."""
    others = [kind for kind in draw.faults if kind not in DAMAGE | {"move"}] or ["move"]
    steps = [draw.of(draw.random.choice(others), at) for at in draw.moments(seconds, every_s)]
    return [Step(0.2, "move", draw.broker(), round(seconds * 0.5, 2)), *steps]


def _together(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    kinds = [kind for kind in draw.faults if kind not in DAMAGE]
    return [draw.of(draw.random.choice(kinds), at) for at in draw.moments(seconds, every_s / 2)] if kinds else []


def _take_over_and_kill(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    """The active coordinator dies, or is silent for longer than its lease; before another one leads, a broker dies."""
    silent = draw.random.randrange(2)
    first = Step(0.2, "pause", ACTIVE, draw.short(6.5, 9.0)) if silent else Step(0.2, "coordinator", ACTIVE, 3.0)
    return [first, Step(draw.short(0.3, 5.0 if silent else 1.2), "kill", draw.broker(), draw.short(0.5, 3.0))]


def _take_over_without_etcd(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    """The active coordinator dies while a member of etcd is down, or all of etcd dies and then a broker."""
    if draw.random.randrange(2):
        member = draw.random.choice(ETCD_MEMBERS)
        return [Step(0.2, "etcd", member, 6.0), Step(draw.short(0.3, 2.0), "coordinator", ACTIVE, 4.0)]
    away = draw.short(3.0, 7.0)
    return [Step(0.2, "etcd", ALL_ETCD, away), Step(draw.short(0.3, away), "kill", draw.broker(), draw.short(0.5, 3.0))]


# name -> (faults it needs, shape); beside these there is one shape for each fault alone
SHAPES: dict[str, tuple[tuple[str, ...], Callable[[_Drawing, float, float], list[Step]]]] = {
    "cut and kill": (("cut", "kill"), _cut_and_kill),
    "pause, write, kill, resume": (("pause", "kill"), _kill_ahead),
    "kill the one that went on": (("pause", "kill"), _kill_alone_ahead),
    "rolling kill": (("kill",), _rolling_kill),
    "kill during start": (("kill",), _kill_in_start),
    "kill at a change of the in-sync set": (("kill",), _kill_at_isr_change),
    "take-over and kill": (("etcd", "coordinator", "pause", "kill"), _take_over_and_kill),
    "take-over without etcd": (("etcd", "coordinator", "kill"), _take_over_without_etcd),
    "moves and faults": (("move",), _moves_and),
    "all together": ((), _together),
}


def make_plan(
    seed: int,
    *,
    brokers: Sequence[str],
    faults: Sequence[str],
    seconds: float,
    every_s: float = 4.0,
    first: Sequence[str] = (),
    coordinators: int = 1,
) -> Plan:
    """A plan of about ``seconds``, in which a fault begins about every ``every_s`` in phases that are not quiet.

    ``first`` names shapes to begin with; the others come in turns of a random order, so that a long run has them all.
    Raises ValueError for a fault that is unknown or needs more brokers or coordinators.
    """
    unknown = sorted(set(faults) - set(FAULTS))
    if unknown:
        raise ValueError(f"unknown faults: {', '.join(unknown)}; known: {', '.join(FAULTS)}")
    if len(brokers) < 2 and set(faults) & {"cut", "one-way", "move", "kill"}:
        raise ValueError("these faults need at least two brokers")
    if coordinators == 1 and set(faults) & NEED_ETCD:
        raise ValueError("etcd needs several coordinators")
    draw = _Drawing(seed, brokers, faults, coordinators)
    shapes = {f"{kind} alone": _alone(kind) for kind in faults}
    shapes.update({name: shape for name, (needs, shape) in SHAPES.items() if draw.has(*needs) and len(brokers) > 1})
    if not faults:
        shapes = {"none": _alone_none}
    waiting = [name for name in first if name in shapes]
    phases: list[Phase] = []
    left = seconds
    while left > 0:
        if phases and phases[-1].name != QUIET and not draw.random.randrange(ONE_IN_QUIET - 1):
            name, length = QUIET, draw.short(*QUIET_S)
            phases.append(Phase(name, length))
        else:
            if not waiting:
                waiting = draw.random.sample(sorted(shapes), len(shapes))
            name, length = waiting.pop(0), draw.short(*PHASE_S)
            steps = shapes[name](draw, length, every_s)
            phases.append(Phase(name, length, tuple(sorted(steps, key=lambda step: step.at_s))))
        left -= length
    return Plan(seed, tuple(brokers), tuple(faults), (*phases, Phase(DRAIN, 0.0)), coordinators)


def _alone_none(draw: _Drawing, seconds: float, every_s: float) -> list[Step]:
    return []
