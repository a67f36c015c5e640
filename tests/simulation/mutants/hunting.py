"""Run seeds against a mutant until one fails that passes without it."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import msgspec

from tests.simulation.mutants import MUTANTS
from tests.simulation.mutants.model import Mutant
from tests.simulation.mutants.patching import PatchFailed, apply
from tests.simulation.runner import Outcome, calm_collector, run_seed
from tests.simulation.settings import parse_configs

SEEDS_BETWEEN_COLLECTIONS = 8


class Verdict(msgspec.Struct):
    """``seeds``: run until the catch, or all. ``rule``: the check that caught it, "" if none did."""

    name: str
    seeds: int = 0
    config: str = ""
    seed: int = 0
    weather: str = ""
    rule: str = ""
    seconds: float = 0.0
    error: str = ""
    commit: str = ""

    @property
    def caught(self) -> bool:
        return bool(self.rule)

    def line(self) -> str:
        if self.error:
            return f"{self.name:32} BROKEN: {self.error}"
        if not self.caught:
            return f"{self.name:32} NOT CAUGHT in {self.seeds} seeds ({self.seconds:.0f} s)"
        weather = f" --weather {self.weather}" if self.weather else ""
        return (
            f"{self.name:32} caught after {self.seeds:5} seeds ({self.seconds:.0f} s) by {self.rule} "
            f"[--config {self.config} --seed {self.seed}{weather}]"
        )


def in_child(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a forked process, so that patches stay there. Raises what it raised, as PatchFailed."""
    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe(duplex=False)

    def body() -> None:
        try:
            child.send(work())
        except Exception as error:
            child.send(PatchFailed(f"{type(error).__name__}: {error}"))

    process = context.Process(target=body)
    process.start()
    child.close()
    try:
        result = parent.recv()
    except EOFError:
        result = PatchFailed("the process ended without a result")
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def hunt(mutant: Mutant, seeds: int, start: int) -> Verdict:
    """Seeds in turn over the mutant's configurations until one fails that passes without it."""
    began, done, position = time.monotonic(), 0, start
    while done < seeds:
        outcome, run = in_child(lambda first=position, left=seeds - done: _until_failure(mutant, first, left))
        done += run
        position += run
        if outcome is None:
            break
        config = parse_configs(outcome.config)[0]
        if run_seed(config, outcome.seed, real_log=mutant.real_log, profile=mutant.weather).failure:
            continue  # fails with and without: not this mutant's doing
        took = round(time.monotonic() - began, 1)
        weather = mutant.weather or ""
        return Verdict(mutant.name, done, outcome.config, outcome.seed, weather, outcome.rule, took)
    return Verdict(mutant.name, done, seconds=round(time.monotonic() - began, 1))


def _until_failure(mutant: Mutant, start: int, seeds: int) -> tuple[Outcome | None, int]:
    apply(mutant)
    calm_collector()
    configs = parse_configs(mutant.configs)
    for run, seed in enumerate(range(start, start + seeds), 1):
        config = configs[seed % len(configs)]
        outcome = run_seed(config, seed, real_log=mutant.real_log, profile=mutant.weather)
        if outcome.failure:
            return outcome, run
        if run % SEEDS_BETWEEN_COLLECTIONS == 0:
            gc.collect()
    return None, seeds


def judge(name: str, seeds: int, start: int) -> Verdict:
    """`hunt` in a process of its own, so that two may run beside each other. A mutant that does not fit is an error."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    try:
        verdict: Verdict = in_child(lambda: hunt(mutant, seeds, start))
    except PatchFailed as error:
        return Verdict(name, error=str(error))
    return verdict


def check_patches() -> list[str]:
    """Names of mutants whose text is gone, with the reason."""
    found = []
    for mutant in MUTANTS:
        try:
            in_child(lambda mutant=mutant: apply(mutant))
        except PatchFailed as error:
            found.append(f"{mutant.name}: {error}")
    return found
