"""One measurement in a process of its own: `python -m ferryline.cli.bench.worker CLIENT WHAT LOAD`, JSON to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from ferryline.cli.bench.load import Load, Measured


def ferryline_worker(what: str, load: Load) -> Measured:
    """Run one coroutine of `client` as a tuned program would."""
    import ferryline as fl
    from ferryline.cli.bench import client
    from ferryline.cli.connection import run

    fl.tune_process()
    measured: Measured = run(getattr(client, what)(load))
    return measured


def confluent_worker(what: str, load: Load) -> Measured | None:
    """Run one function of `confluent`, with the same settings of the process."""
    import ferryline as fl
    from ferryline.cli.bench import confluent

    fl.tune_process()
    function: Callable[[Load], Any] = getattr(confluent, what)
    result: Measured | None = function(load)
    return result


def main(argv: list[str]) -> int:
    """Returns the exit status; a failure is a line on stderr."""
    who, what, text = argv
    load = Load(**json.loads(text))
    result = ferryline_worker(what, load) if who == "ferryline" else confluent_worker(what, load)
    if result is not None:
        sys.stdout.write(json.dumps(result.as_dict()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
