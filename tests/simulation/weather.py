"""Named weather: rates of faults that make one kind of rare schedule likely.

The plain draw (`settings.draw`) spreads its faults evenly, so a bug that needs three of them in a row, in order and
within milliseconds, hides for tens of thousands of seeds. A profile puts exactly that row into the weather; `ambush.py`
strikes when its moment has come. Two seeds in five have a profile; the seeded bugs name the one that they need.

A profile draws from a source of its own, so a seed without one runs as if there were none.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from tests.simulation.settings import Weather

SHARE = 0.4  # of all seeds have a profile


class Mischief(msgspec.Struct):
    """Probabilities per occasion, 0: never."""

    echo: float = 0.0  # a proposal that adds somebody is held up and repeated, while that broker is fenced wrongly
    echo_coordinator: float = 0.0  # ... and the coordinator is replaced before the repetitions
    fence_one_ms: int = 0  # mean time between wrong fences of one broker: its probe is refused at once
    handovers_ms: int = 0  # how often primaries are asked to hand over; 0: as the coordinator likes
    late_flush: float = 0.0  # a secondary's flush takes long, so that it may end in another epoch
    hold_diverging: float = 0.0  # a primary is slow to say that the logs differ
    second_death: float = 0.0  # kill -9 right after the start that followed a power cut
    repeat_diverging: float = 0.0  # ... and says it again, up to a second later
    operator_ms: int = 0  # how often an operator recovers what has no candidate left; 0: after the faults
    hold_resign: float = 0.0  # a resignation travels so long that its sender serves again
    late_fetch: float = 0.0  # fetches arrive a second time, up to seconds later
    flip_back: float = 0.0  # whoever made a secondary cut its log is fenced wrongly at once
    half_open: float = 0.0  # a secondary opens a new session while frames of the old one are still under way
    stale_address: float = 0.0  # a broker connects to a coordinator that was replaced
    twins: bool = False  # at the end all brokers die at once, and one comes back alone


def _late_flushes(weather: Weather, rng: random.Random) -> None:
    weather.flush_us = rng.choice((8_000, 20_000))
    _often(weather, kill=1.5, stop=1.0, cut_one_way=1.0)
    weather.produce_gap_ms, weather.members, weather.partitions = 60, max(weather.members, 2), 1
    weather.fault_gap_ms = 400
    weather.ordered = {"replica": rng.random() < 0.5, "coordinator": rng.random() < 0.5}
    weather.mischief = Mischief(fence_one_ms=700, late_flush=0.35, hold_diverging=0.6, repeat_diverging=0.5)


def _echoes(weather: Weather, rng: random.Random) -> None:
    _often(weather, kill=1.0, end_sessions=0.5)
    weather.producers, weather.partitions, weather.produce_gap_ms = 3, 1, 60
    weather.slow_flush, weather.slow_flush_us = 0.2, 200_000
    weather.lag_max_ms = 1_500
    weather.fault_gap_ms = 1_000
    weather.mischief = Mischief(echo=0.7, echo_coordinator=rng.choice((0.0, 0.6)), fence_one_ms=1_000)


def _twice_down(weather: Weather, rng: random.Random) -> None:
    _often(weather, power_cut=3.0, power_cut_all=rng.choice((0.0, 1.0)), kill=0.5)
    weather.produce_gap_ms = 60
    weather.fault_gap_ms = 1_000
    weather.mischief = Mischief(second_death=0.7)


def _flips(weather: Weather, rng: random.Random) -> None:
    for name in weather.weights:
        weather.weights[name] = 0.0
    weather.brokers, weather.ambush = max(3, min(weather.brokers, 4)), 0.0
    weather.ordered = {"replica": False, "coordinator": False}
    weather.loss, weather.session_loss, weather.slow_flush = 0.01, 0.0, 0.0
    weather.delay_us, weather.slow, weather.late_us = 1_000, 0.1, 100_000
    weather.flush_us = 1_000
    weather.producers, weather.produce_gap_ms, weather.partitions = 3, 60, 1
    weather.lag_max_ms, weather.handover_ms = 10_000, 300
    weather.duration_ms = 24_000
    weather.mischief = Mischief(hold_resign=0.9, late_fetch=0.5, flip_back=0.9, handovers_ms=2_600)


def _half_open(weather: Weather, rng: random.Random) -> None:
    _often(weather, kill=1.0, stop=0.5)
    weather.producers, weather.produce_gap_ms = 3, 60
    weather.flush_us = 20_000
    weather.mischief = Mischief(fence_one_ms=700, late_flush=0.8, hold_diverging=0.9, half_open=0.9)


def _moves(weather: Weather, rng: random.Random) -> None:
    _often(weather, drain=3.0, false_probe=0.3)
    weather.brokers += 1 if weather.brokers < 4 else 0
    weather.producers, weather.partitions = 1, rng.choice((1, 2))
    weather.produce_gap_ms = rng.choice((900, 2_500))
    weather.lag_max_ms = 10_000
    weather.fault_gap_ms, weather.fault_ms = 1_000, 800
    weather.duration_ms = 24_000


def _two_coordinators(weather: Weather, rng: random.Random) -> None:
    _often(weather, zombie=3.0, end_sessions=1.0, kill=1.0, pause=0.5)
    weather.fault_gap_ms = 1_000
    weather.mischief = Mischief(stale_address=0.4)


def _twins(weather: Weather, rng: random.Random) -> None:
    weather.mischief = Mischief(twins=True)
    weather.duration_ms = 6_000


def _often(weather: Weather, **weights: float) -> None:
    """These faults, and only a little of what the seed drew."""
    for name in weather.weights:
        weather.weights[name] *= 0.15
    weather.weights.update(weights)


def _blackouts(weather: Weather, rng: random.Random) -> None:
    _often(weather, power_cut_all=2.0, kill=0.3)
    weather.members, weather.partitions = max(weather.members, 2), 1
    weather.produce_gap_ms, weather.producers = 120, 3
    weather.fault_gap_ms, weather.fault_ms = 3_000, 200
    weather.mischief = Mischief(operator_ms=700)


def _joiners(weather: Weather, rng: random.Random) -> None:
    _often(weather, power_cut=1.0, end_sessions=0.5)
    weather.produce_gap_ms, weather.partitions = 60, 1
    weather.ambush = 0.6
    weather.mischief = Mischief(fence_one_ms=900)


def _short_logs(weather: Weather, rng: random.Random) -> None:
    _often(weather, kill=2.0, cut_pair=1.5, pause=1.0)
    weather.snapshot_bytes = 300
    weather.produce_gap_ms, weather.members, weather.partitions = 60, max(weather.members, 2), 1
    weather.lag_max_ms, weather.fault_ms, weather.fault_gap_ms = 1_500, 5_000, 900
    weather.chores_ms, weather.retention_bytes = 300, 500
    weather.mischief = Mischief(fence_one_ms=2_000)


def _bad_disks(weather: Weather, rng: random.Random) -> None:
    """One disaster is all that a run has for its disks."""
    rot = rng.random() < 0.6
    _often(weather, rot=3.0 * rot, foreign_disk=3.0 * (not rot), kill=0.5)
    weather.chores_ms, weather.fault_gap_ms = 500, 1_000


PROFILES: dict[str, Callable[[Weather, random.Random], None]] = {
    "late-flushes": _late_flushes,
    "echoes": _echoes,
    "twice-down": _twice_down,
    "flips": _flips,
    "half-open": _half_open,
    "moves": _moves,
    "two-coordinators": _two_coordinators,
    "twins": _twins,
    "blackouts": _blackouts,
    "joiners": _joiners,
    "short-logs": _short_logs,
    "bad-disks": _bad_disks,
}


def profile_of(seed: int) -> str:
    """The profile that a seed draws, "" for none."""
    rng = random.Random(f"profile of {seed}")
    return rng.choice(sorted(PROFILES)) if rng.random() < SHARE else ""


def shape(weather: Weather, name: str, seed: int) -> Weather:
    """Turn the drawn weather into that of a profile; "" leaves it alone. Raises KeyError for an unknown one."""
    if name:
        PROFILES[name](weather, random.Random(f"{name} {seed}"))
        weather.profile = name
    return weather
