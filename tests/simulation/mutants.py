"""Seeded bugs: each is patched into the product's own code at run time, and the simulation must notice it.

    python -m tests.simulation.mutants                 all of them; exit status 1 if one is not caught
    python -m tests.simulation.mutants --only NAME --seeds 5000
    python -m tests.simulation.mutants --random 5      five drawn from today's date and the commit: for every build
    python -m tests.simulation.mutants --list

A mutant replaces text inside functions of the product; text that is no longer there is an error, not a pass. A seed
counts as a catch only if it passes without the mutant. Configurations are those in which the rule can matter at all
(replication rules, section 11).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import inspect
import multiprocessing
import os
import random
import sys
import textwrap
import time
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import msgspec

from tests.simulation.mutant_list import MUTANTS, Mutant
from tests.simulation.runner import Outcome, commit, run_seed
from tests.simulation.settings import parse_configs

PACKAGES = ("ferryline_broker.", "ferryline_coordinator.", "ferryline.", "tests.simulation.")


class PatchFailed(Exception):
    """The text that a mutant replaces is not there (any more): the mutant must be rewritten."""


# -- patching ---------------------------------------------------------------------------------------


def _modules() -> list[ModuleType]:
    return [module for name, module in sorted(sys.modules.items()) if name.startswith(PACKAGES) and module is not None]


def find(target: str) -> tuple[Any, str, FunctionType, Any]:
    """``Class.method`` or ``function`` -> (owner, name, function, how it is wrapped)."""
    owner_name, _, name = target.rpartition(".")
    owners: list[Any] = []
    for module in _modules():
        if owner_name:
            owner = vars(module).get(owner_name)
            if inspect.isclass(owner) and owner.__module__ == module.__name__:
                owners.append(owner)
        elif isinstance(vars(module).get(name), FunctionType) and vars(module)[name].__module__ == module.__name__:
            owners.append(module)
    if len(owners) != 1:
        raise PatchFailed(f"{target}: found {len(owners)} times")
    owner = owners[0]
    for base in getattr(owner, "__mro__", (owner,)):
        if name in vars(base):
            owner = base
            break
    else:
        raise PatchFailed(f"{target}: no such function")
    found = vars(owner)[name]
    if isinstance(found, property):
        return owner, name, found.fget, property  # type: ignore[return-value]
    if isinstance(found, classmethod | staticmethod):
        return owner, name, found.__func__, type(found)  # type: ignore[return-value]
    return owner, name, found, None


def patch(target: str, old: str, new: str) -> None:
    """Replace ``old`` by ``new``, exactly once, in the source of one function, and put the result in place."""
    owner, name, function, wrapped = find(target)
    source = textwrap.dedent(_source(function))
    if source.count(old) != 1:
        raise PatchFailed(f"{target}: the text to replace occurs {source.count(old)} times: {old!r}")
    lines = source.replace(old, new)
    code = compile("from __future__ import annotations\n" + lines, f"<mutant of {target}>", "exec")
    module = sys.modules[function.__module__]
    names: dict[str, Any] = {}
    exec(code, vars(module), names)
    changed = names[name]
    made = (
        changed if wrapped is None or isinstance(changed, property | classmethod | staticmethod) else wrapped(changed)
    )
    plain = changed.fget if isinstance(changed, property) else getattr(changed, "__func__", changed)
    plain.__mutant_source__ = lines
    setattr(owner, name, made)
    if isinstance(owner, ModuleType):  # whoever imported the function by name must get the changed one
        for other in _modules():
            for key, value in list(vars(other).items()):
                if value is function:
                    setattr(other, key, changed)


def _source(function: Any) -> str:
    return getattr(function, "__mutant_source__", None) or inspect.getsource(function)


def apply(mutant: Mutant) -> None:
    for target, old, new in mutant.edits:
        patch(target, old, new)


# -- running ----------------------------------------------------------------------------------------


class Verdict(msgspec.Struct):
    name: str
    seeds: int = 0  # run until the catch
    config: str = ""
    seed: int = 0
    rule: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def caught(self) -> bool:
        return bool(self.rule)

    def line(self) -> str:
        if self.error:
            return f"{self.name:32} BROKEN: {self.error}"
        if not self.caught:
            return f"{self.name:32} NOT CAUGHT in {self.seeds} seeds ({self.seconds:.0f} s)"
        return (
            f"{self.name:32} caught after {self.seeds:5} seeds ({self.seconds:.0f} s) by {self.rule} "
            f"[--config {self.config} --seed {self.seed}]"
        )


def _in_child(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a forked process of its own, so that patches stay there."""
    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe(duplex=False)

    def body() -> None:
        try:
            child.send(work())
        except Exception as error:
            child.send(PatchFailed(f"{type(error).__name__}: {error}"))

    process = context.Process(target=body)
    process.start()
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
        outcome, run = _in_child(lambda first=position, left=seeds - done: _until_failure(mutant, first, left))
        done += run
        position += run
        if outcome is None:
            break
        config = parse_configs(outcome.config)[0]
        if run_seed(config, outcome.seed, real_log=mutant.real_log).failure:
            continue  # fails with and without: not this mutant's doing
        took = time.monotonic() - began
        return Verdict(mutant.name, done, outcome.config, outcome.seed, outcome.rule, took)
    return Verdict(mutant.name, done, seconds=time.monotonic() - began)


def _until_failure(mutant: Mutant, start: int, seeds: int) -> tuple[Outcome | None, int]:
    gc.disable()
    apply(mutant)
    configs = parse_configs(mutant.configs)
    for run, seed in enumerate(range(start, start + seeds), 1):
        outcome = run_seed(configs[seed % len(configs)], seed, real_log=mutant.real_log)
        if outcome.failure:
            return outcome, run
        if run % 16 == 0:
            gc.collect()
    return None, seeds


def _guarded(job: tuple[str, int, int]) -> Verdict:
    name, seeds, start = job
    try:
        return hunt(next(mutant for mutant in MUTANTS if mutant.name == name), seeds, start)
    except PatchFailed as error:
        return Verdict(name, error=str(error))


def check_patches() -> list[str]:
    """Names of mutants whose text is gone, with the reason."""
    found = []
    for mutant in MUTANTS:
        try:
            _in_child(lambda mutant=mutant: apply(mutant))
        except PatchFailed as error:
            found.append(f"{mutant.name}: {error}")
    return found


def chosen(options: argparse.Namespace) -> list[Mutant]:
    if options.only:
        names = options.only.split(",")
        unknown = sorted(set(names) - {mutant.name for mutant in MUTANTS})
        if unknown:
            raise SystemExit(f"no mutant is called {', '.join(unknown)}; see --list")
        return [mutant for mutant in MUTANTS if mutant.name in names]
    required = [mutant for mutant in MUTANTS if mutant.required]
    if options.random:
        seed = hashlib.sha256(f"{time.strftime('%Y-%m-%d')} {commit()}".encode()).digest()
        return random.Random(seed).sample(required, min(options.random, len(required)))
    return required


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants", description=__doc__)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=5000, help="limit for each")
    parser.add_argument("--start", type=int, default=1)
    parser.add_argument("--random", type=int, metavar="K")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="only look whether every text is still there")
    options = parser.parse_args(arguments)
    if options.list:
        for mutant in MUTANTS:
            print(f"{mutant.name:32} {mutant.rule:18} {mutant.configs:34} {mutant.about}")
        return 0
    if options.check:
        broken = check_patches()
        print("\n".join(broken) or f"{len(MUTANTS)} mutants fit")
        return 1 if broken else 0
    jobs = [(mutant.name, options.seeds, options.start) for mutant in chosen(options)]
    verdicts = []
    if options.jobs > 1:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(options.jobs) as pool:  # each thread only waits for its forked processes
            results = [pool.submit(_guarded_child, job) for job in jobs]
            for result in results:
                verdicts.append(result.result())
                print(verdicts[-1].line(), flush=True)
    else:
        for job in jobs:
            verdicts.append(_guarded(job))
            print(verdicts[-1].line(), flush=True)
    missed = [verdict for verdict in verdicts if not verdict.caught]
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} mutants caught")
    return 1 if missed else 0


def _guarded_child(job: tuple[str, int, int]) -> Verdict:
    """In a process of its own, so that two hunts run beside each other."""
    result: Verdict = _in_child(lambda: _guarded(job))
    return result


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation.mutants", *sys.argv[1:]])
    sys.exit(main())
