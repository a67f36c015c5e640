"""What commands print: tables for people, JSON, YAML or NDJSON for programs.

Results go to stdout, everything about the run (progress, warnings, errors) to stderr, so that a pipe gets only data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]


def to_yaml(value: Any, indent: int = 0) -> str:
    """Block YAML for JSON-like values. Texts are always quoted as in JSON, which every YAML reader takes."""
    pad = "  " * indent
    if isinstance(value, Mapping):
        if not value:
            return f"{pad}{{}}\n"
        return "".join(f"{pad}{_yaml_key(key)}:{_yaml_tail(item, indent)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        if not value:
            return f"{pad}[]\n"
        return "".join(f"{pad}-{_yaml_tail(item, indent)}" for item in value)
    return f"{pad}{json.dumps(value, default=str)}\n"


def _yaml_key(key: Any) -> str:
    text = str(key)
    return text if text.replace("_", "a").isalnum() and not text[0].isdigit() else json.dumps(text)


def _yaml_tail(value: Any, indent: int) -> str:
    if isinstance(value, Mapping | list | tuple) and value:
        return "\n" + to_yaml(value, indent + 1)
    return " " + to_yaml(value, 0)


def cell(value: Any) -> str:
    """One value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value) or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={cell(item)}" for key, item in value.items()) or "-"
    return str(value)


class Output:
    """Prints results in the chosen format."""

    def __init__(self, form: str = "table") -> None:
        self.form = form

    @property
    def for_people(self) -> bool:
        return self.form == "table"

    def rows(
        self, rows: Iterable[Row], *, title: str = "", columns: Sequence[str] = (), empty: str = "nothing"
    ) -> None:
        """A list of things. ``columns`` picks and orders what the table shows; the other formats print everything."""
        found = list(rows)
        if self.form != "table":
            self._structured(found)
            return
        if not found:
            say(f"{empty}.")
            return
        from rich.table import Table
        from rich.text import Text

        shown = list(columns) or list(found[0])
        table = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
        for name in shown:
            numeric = all(isinstance(row.get(name), int | float | None) for row in found)
            table.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
        for row in found:
            table.add_row(*(Text(cell(row.get(name))) for name in shown))
        stdout().print(table)

    def one(self, thing: Row, *, title: str = "") -> None:
        """One thing with its fields."""
        if self.form != "table":
            self._structured(thing)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in thing.items():
            table.add_row(name.replace("_", " "), Text(cell(value)))
        stdout().print(table)

    def done(self, sentence: str, **fields: Any) -> None:
        """A change was made: a sentence for people, its fields for programs."""
        if self.form == "table":
            say(sentence)
        else:
            self._structured(fields)

    def _structured(self, value: Any) -> None:
        if self.form == "yaml":
            sys.stdout.write(to_yaml(value))
        elif self.form == "ndjson":
            for item in value if isinstance(value, list) else [value]:
                sys.stdout.write(json.dumps(item, default=str) + "\n")
        else:
            sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
        sys.stdout.flush()


def stdout() -> Console:
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False)


def say(text: str) -> None:
    """A plain line on stdout, for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def warn(text: str) -> None:
    """A plain line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
