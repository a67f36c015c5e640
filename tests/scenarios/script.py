"""The text of scenarios: a command, ``----``, what it prints, an empty line; ``#`` begins a comment.

::

    cluster replication=2 min_isr=1 flush=fsync
    produce a b
    ----
    a: acknowledged at 1
    b: acknowledged at 2

Several commands may stand above one ``----``; their outputs follow each other. `rewritten` gives the same text with
what is printed now.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.scenarios.stage import Stage
from tests.simulation.settings import Config

SEPARATOR = "----"


class Block:
    """Comment lines and commands, and the output that belongs to them."""

    def __init__(self) -> None:
        self.head: list[str] = []
        self.expected: list[str] = []

    @property
    def commands(self) -> list[str]:
        return [line for line in self.head if line.strip() and not line.startswith("#")]


def blocks(text: str) -> Iterator[Block]:
    block, in_output = Block(), False
    for line in text.splitlines():
        if in_output and not line.strip():
            yield block
            block, in_output = Block(), False
        elif in_output:
            block.expected.append(line)
        elif line == SEPARATOR:
            in_output = True
        else:
            block.head.append(line)
    if block.head:
        yield block


class Play:
    """Runs the commands of one file, on one stage after the other."""

    def __init__(self) -> None:
        self.stage: Stage | None = None

    def run(self, line: str) -> str:
        """Raises ValueError for what is no command."""
        name, *words = line.split()
        options = dict(word.split("=", 1) for word in words if "=" in word)
        plain = [word for word in words if "=" not in word]
        if name == "cluster":
            config = Config(int(options["replication"]), int(options["min_isr"]), options["flush"])
            self.stage = Stage(config, int(options.get("brokers", config.replication)))
            return ""
        if self.stage is None:
            raise ValueError("the first command is `cluster`")
        return _on(self.stage, name, plain, options)


def _on(stage: Stage, name: str, plain: list[str], options: dict[str, str]) -> str:
    match name:
        case "produce":
            return stage.produce(plain, options.get("to", ""))
        case "send":
            return stage.produce(plain, options.get("to", ""), wait=False)
        case "heard":
            return stage.heard(plain)
        case "read":
            return stage.read(plain[0])
        case "state":
            return stage.state()
        case "wait":
            return stage.wait(plain[0])
        case "kill":
            return stage.kill(plain[0])
        case "power-cut":
            return stage.power_cut(plain)
        case "start":
            return stage.start(plain[0])
        case "stop":
            return stage.stop(plain[0])
        case "pause":
            return stage.pause(plain[0])
        case "resume":
            return stage.resume(plain[0])
        case "exchange-disk":
            return stage.exchange_disk(plain[0])
        case "cut":
            one, arrow, other = plain
            return stage.cut(one, other, both=arrow == "<->")
        case "heal":
            return stage.heal()
        case "hold-proposals":
            return stage.hold_proposals(plain[0])
        case "lose-answer":
            return stage.lose_answer(plain[0])
        case "release":
            return stage.release()
        case "recover":
            return stage.recover(accept_data_loss="accept-data-loss" in plain)
        case _:
            raise ValueError(f"unknown command {name!r}")


def rewritten(text: str) -> str:
    """``text`` with the output of every block as it is now."""
    play, parts = Play(), []
    for block in blocks(text):
        if not block.commands:
            parts.append("\n".join(block.head))
            continue
        output = [out for out in (play.run(line) for line in block.commands) if out]
        parts.append("\n".join([*block.head, SEPARATOR, *output]))
    return "\n\n".join(parts) + "\n"
