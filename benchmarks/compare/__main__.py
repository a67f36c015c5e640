"""`python -m benchmarks.compare`: Ferryline beside Kafka, RabbitMQ, NATS and Redis, in one run (`make bench-compare`).

Measures what can be started here, says what was left out, and writes JSON, tables and plots. `--render FILE` makes
tables and plots from a JSON again. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.facts import facts
from benchmarks.compare.limits import limits
from benchmarks.compare.plan import SYSTEMS, VARIANTS, Cell, cells, chosen_workloads
from benchmarks.compare.queue_plan import chosen_queue_workloads, queue_cells
from benchmarks.compare.render import render, write_all
from benchmarks.compare.runner import DATA, Comparison, fitting
from benchmarks.compare.spec import KEY_BYTES

RESULTS = Path(__file__).resolve().parents[1] / "results/compare"
LIMIT_SIZES = (100, 1_024, 16_384)
QUICK_SCALE, FIRST_SCALE = 0.1, 0.1
QUICK_WARM_UP_S, UNLIMITED_S = 40.0, 600.0


def options_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-compare", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="small counts, one round, central rows: about 3 minutes")
    parser.add_argument("--only", default="", help=f"systems beside ferryline, of {', '.join(SYSTEMS)}; default: all")
    parser.add_argument("--workloads", default="", help="workloads or groups of them; default: all")
    parser.add_argument("--variants", default="", help="rows by the beginning of their names; default: all")
    parser.add_argument("--only-queues", action="store_true", help="queues with acknowledgements, and tasks, instead")
    parser.add_argument("--main-only", action="store_true", help="without the rows of the central workloads alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=25.0,
        help="counts are scaled so that all fits; of queues rounds left out",
    )
    parser.add_argument("--scale", type=float, help="of the counts, instead of a budget")
    parser.add_argument(
        "--no-warm-up", action="store_true", help="for trying out only: a cold JVM is three times slower"
    )
    parser.add_argument("--name", default="", help="of the files; default: compare, or compare-quick")
    parser.add_argument("--render", type=Path, help="only make tables and plots from this JSON again")
    return parser.parse_args(argv)


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for. Raises ValueError."""
    only = [name for name in options.only.split(",") if name] or list(SYSTEMS)
    if unknown := set(only) - set(SYSTEMS):
        raise ValueError(f"{', '.join(sorted(unknown))}: no such system; known: {', '.join(SYSTEMS)}")
    starts = tuple(name for name in options.variants.split(",") if name)
    names = [name for name in options.workloads.split(",") if name]
    if options.only_queues:
        return queue_cells(chosen_queue_workloads(names), {"ferryline", *only}, starts)
    variants = [one for one in VARIANTS if not starts or one.name.startswith(starts)]
    if options.quick or options.main_only:
        variants = [one for one in variants if one.main]
    return cells(chosen_workloads(names), {"ferryline", *only}, variants)


def warm_up_s(options: argparse.Namespace) -> float:
    return 0.0 if options.no_warm_up else QUICK_WARM_UP_S if options.quick else UNLIMITED_S


def tell(line: str) -> None:
    sys.stderr.write(time.strftime("%H:%M:%S ") + line + "\n")
    sys.stderr.flush()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, as it goes into the JSON."""
    started = time.monotonic()
    comparison = Comparison(chosen(options), warm_up_s=warm_up_s(options), tell=tell)
    rounds = 1 if options.quick else options.rounds
    before = facts()
    with comparison.running():
        tell("what the machine does without any queue")
        short = options.quick or options.only_queues
        sizes = LIMIT_SIZES[:1] if options.only_queues else LIMIT_SIZES
        physical = limits(sizes, 32 * 2**20 if short else 128 * 2**20, min(3, rounds), Path(DATA))
        scale = options.scale or (QUICK_SCALE if options.quick else 1.0)
        if not (options.quick or options.scale or options.only_queues):
            took = comparison.round(0, FIRST_SCALE)
            comparison.found.rounds.clear()  # a rehearsal: it warms up what the warm-up has not touched
            comparison.found.failures.clear()
            left = options.budget_minutes * 60 - (time.monotonic() - started)
            scale = fitting(comparison.cells, took, left, rounds, tried=FIRST_SCALE)
        for number in range(1, rounds + 1):
            took = comparison.round(number, scale)
            tell(f"round {number} of {rounds} took {took:.0f} s at scale {scale:.2f}")
            if options.only_queues and time.monotonic() - started + took > options.budget_minutes * 60:
                rounds = number  # what takes time there is starting processes, so smaller counts would save little
                break
    found = comparison.found
    return {
        "machine": {**before, "load_average_after": facts()["load_average"]},
        "settings": {
            "rounds": rounds,
            "scale": scale,
            "warm_up_s": warm_up_s(options),
            "minutes": round((time.monotonic() - started) / 60, 1),
            "arguments": sys.argv[1:],
            "key_bytes": KEY_BYTES,
        },
        "versions": found.versions | before["versions"],
        "left_out": found.left_out,
        "idle_cpu": found.idle_cpu,
        "failures": found.failures,
        "limits": physical,
        "rounds": found.rounds,
    }


def _interrupted(number: int, _: object) -> None:
    """SIGTERM ends us like Ctrl-C: through every `finally`, servers included."""
    raise SystemExit(128 + number)


def main(argv: list[str]) -> int:
    """Returns 1 when a measurement failed, 2 for a wrong option."""
    signal.signal(signal.SIGTERM, _interrupted)
    options = options_of(argv)
    if options.render:
        report = json.loads(options.render.read_text())
        write_all(report, options.render.parent, options.render.stem)
        print(render(report))
        return 0
    try:
        chosen(options)
    except ValueError as error:
        tell(str(error))
        return 2
    name = options.name or ("queues" if options.only_queues else "compare") + ("-quick" if options.quick else "")
    report = run(options)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    write_all(report, RESULTS, name)
    print(render(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
