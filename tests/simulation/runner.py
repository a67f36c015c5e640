"""Run seeds: one at a time or over several processes, with progress, a summary and the story of what failed."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import msgspec

from tests.simulation.engine import SimulationStuck, render
from tests.simulation.settings import Config, draw
from tests.simulation.weather import profile_of, shape
from tests.simulation.world import World

STORY_LINES = 60
SEEDS_BETWEEN_COLLECTIONS = 8
HEADLINES = (
    "elections", "killed", "power cuts", "power cuts that lost something", "coordinator killed", "start clean",
    "truncations", "resets", "in-sync set changed", "in-sync set grew", "eligible set filled", "recoveries",
    "declared losses", "refused COMMIT_UNKNOWN", "refused NOT_ENOUGH_REPLICAS", "refused OUT_OF_ORDER_SEQUENCE",
    "duplicates answered across epochs", "claims answered", "group commits answered", "refused STALE_MEMBER",
    "commits of zombies refused", "batches acknowledged", "batches polled", "frames lost", "frames doubled",
)  # fmt: skip


class Outcome(msgspec.Struct):
    """One run. ``failure`` is empty when everything held."""

    config: str
    seed: int
    failure: str = ""
    rule: str = ""
    story: str = ""
    steps: int = 0
    hash: int = 0
    virtual_ms: int = 0
    profile: str = ""
    fault_steps: int = 0
    struck: list[str] = []  # the tape of faults
    without: list[str] = []  # what was left out of it
    sends: dict[str, int] = {}
    counts: dict[str, int] = {}


FAULT_STEPS = ("fault ", "ambush ", "frames ", "slow ", "failed ", "lie ")


def fault_steps(counts: dict[str, int]) -> int:
    """How often something was done to this run: faults that struck, ambushes, frames that were lost, doubled, late,
    held by a cut or by a stopped process, sessions that broke or could not be opened, slow and failed writes, flushes
    and commits. What mends itself is not counted again."""
    return sum(count for name, count in counts.items() if name.startswith(FAULT_STEPS))


def run_seed(
    config: Config, seed: int, *, trace: Callable[[str], None] | None = None, real_log: bool = False,
    profile: str | None = None, without: frozenset[str] = frozenset(),
) -> Outcome:  # fmt: skip
    """One seed under one configuration, in its own weather or that of ``profile``. Never raises for a failed run: the
    outcome tells. ``without``: see `World`."""
    world = World(config, seed, real_log=real_log, profile=profile, without=without)
    world.engine.trace = trace
    outcome = Outcome(config.name, seed, profile=world.weather.profile, without=sorted(without))
    try:
        world.run()
    except (AssertionError, SimulationStuck) as error:
        outcome.failure = f"{type(error).__name__}: {error}"
        outcome.rule = getattr(error, "rule", type(error).__name__)
        outcome.story = _story(world, error)
    except Exception as error:  # a core or a driver that breaks is a failed run too
        outcome.failure = f"{type(error).__name__}: {error}"
        outcome.rule = type(error).__name__
        outcome.story = _story(world, error)
    engine = world.engine
    outcome.struck = world.faults.struck
    outcome.steps, outcome.hash, outcome.virtual_ms = engine.steps, engine.hash, engine.now_ms
    outcome.sends = world.history.counts()
    outcome.counts = dict(world.counts)
    outcome.counts.update({f"frames {name}": count for name, count in world.network.counts.items()})
    outcome.fault_steps = fault_steps(outcome.counts)
    return outcome


def _story(world: World, error: BaseException) -> str:
    lines = [render(entry) for entry in list(world.engine.story)[-STORY_LINES:]]
    where = "".join(traceback.format_exception(error)[-6:])
    return "\n".join([*lines, "", where.rstrip(), "", world.picture()])


def commit() -> str:
    """The commit that is being simulated, for the replay command."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = ["git", "status", "--porcelain", "-uno", "--", ".", ":!tests/simulation/ledger.jsonl"]
        dirty = subprocess.run(changes, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def replay_of(outcome: Outcome, *, real_log: bool = False) -> str:
    """The command that repeats a run."""
    replay = f"python -m tests.simulation --config {outcome.config} --seed {outcome.seed} --trace"
    if outcome.profile != profile_of(outcome.seed):
        replay += f" --weather {outcome.profile or 'plain'}"
    if outcome.without:
        replay += f" --without {','.join(outcome.without)}"
    return replay + (" --real-log" if real_log else "")


def tell_failure(outcome: Outcome, *, real_log: bool = False) -> str:
    weather = draw_again(outcome)
    return "\n".join(
        [
            f"FAILED seed {outcome.seed} configuration {outcome.config} commit {commit()}",
            f"  after {outcome.steps} events, {outcome.virtual_ms} virtual ms",
            f"  weather: {weather}",
            outcome.story,
            f"  {outcome.failure.splitlines()[0] if outcome.failure else ''}",
            f"replay: {replay_of(outcome, real_log=real_log)}",
        ]
    )


def draw_again(outcome: Outcome) -> str:
    import random

    from tests.simulation.settings import parse_configs

    config = parse_configs(outcome.config)[0]
    weather = shape(draw(random.Random(outcome.seed), config), outcome.profile, outcome.seed)
    weights = {name: round(weight, 2) for name, weight in weather.weights.items() if weight}
    fields = {name: getattr(weather, name) for name in weather.__struct_fields__ if name != "weights"}
    return f"{fields} faults {weights}"


class Summary:
    """Adds up outcomes."""

    def __init__(self) -> None:
        self.seeds = 0
        self.steps = 0
        self.fault_steps = 0
        self.failed: list[Outcome] = []
        self.counts: Counter[str] = Counter()
        self.sends: Counter[str] = Counter()
        self.by_config: Counter[str] = Counter()
        self.began = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.steps += outcome.steps
        self.fault_steps += outcome.fault_steps
        self.by_config[outcome.config] += 1
        self.counts.update(outcome.counts)
        self.sends.update(outcome.sends)
        if outcome.failure:
            self.failed.append(outcome)

    def text(self, *, everything: bool = False) -> str:
        took = max(time.monotonic() - self.began, 0.001)
        lines = [
            f"{self.seeds} seeds, {self.steps} events in {took:.1f} s: {self.seeds / took:.1f} seeds/s, "
            f"{self.steps // max(self.seeds, 1)} events and {self.fault_steps // max(self.seeds, 1)} fault steps per "
            f"seed, {len(self.failed)} failed",
            "  configurations: " + ", ".join(f"{name} {count}" for name, count in sorted(self.by_config.items())),
            "  records: " + ", ".join(f"{name} {self.sends[name]}" for name in ("ok", "fail", "info", "open")),
        ]
        names: Iterable[str] = sorted(self.counts) if everything else HEADLINES
        lines += [f"  {name}: {self.counts[name]}" for name in names]
        return "\n".join(lines)


Job = tuple[Config, int, bool]


def _run_job(job: Job) -> Outcome:
    config, seed, real_log = job
    outcome = run_seed(config, seed, real_log=real_log)
    if seed % SEEDS_BETWEEN_COLLECTIONS == 0:
        gc.collect()
    return outcome


def calm_collector() -> None:
    """Collecting in the middle of a run costs a fifth of it and frees nothing; what stands now is never looked at."""
    gc.collect()
    gc.freeze()
    gc.disable()


def run_all(jobs: Iterable[Job], processes: int) -> Iterator[Outcome]:
    """Outcomes as they come; in order of the jobs with one process."""
    calm_collector()
    if processes <= 1:
        for job in jobs:
            yield _run_job(job)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(_run_job, jobs, chunksize=4)
