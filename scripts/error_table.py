"""Write docs/errors.md from the error tree (``make docs``). A test compares the page with the tree."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from ferryline.protocol import errors
from ferryline.protocol.errors import FerrylineError

TARGET = Path(__file__).resolve().parent.parent / "docs" / "errors.md"

HEAD = """\
# Errors

Written by `make docs` from `ferryline/protocol/errors.py`; do not edit.

Every refusal is a `FerrylineError` with a stable code. REST answers carry it as problem details with the given status.

- **retry**: the same request may succeed later, unchanged. The SDK does that by itself until the deadline of the call.
- **refresh**: the caller's picture of the cluster is probably old. The SDK asks for a new one before it tries again.
- **definite**: the request was surely not applied. Where this is "no", it may have been.

"""


def tree(root: type[FerrylineError]) -> list[tuple[int, type[FerrylineError]]]:
    """The classes below ``root``, in the order of the source, each with its depth."""
    rows: list[tuple[int, type[FerrylineError]]] = []

    def visit(cls: type[FerrylineError], depth: int) -> None:
        rows.append((depth, cls))
        own = [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
        for sub in sorted(own, key=lambda sub: inspect.getsourcelines(sub)[1]):
            visit(sub, depth + 1)

    visit(root, 0)
    return rows


def row(depth: int, cls: type[FerrylineError]) -> str:
    """One line of the table."""
    about = cls.remedy or (
        inspect.cleandoc(cls.__doc__).split("\n\n")[0] if "__doc__" in vars(cls) and cls.__doc__ else ""
    )
    cells = [
        "· " * (depth - 1) + f"`{cls.__name__}`",
        f"`{cls.code}`",
        str(cls.http_status),
        "yes" if cls.retriable else "",
        "yes" if cls.refresh_metadata else "",
        "yes" if cls.definite else "no",
        about.replace("\n", " ").replace("|", "\\|"),
    ]
    return "| " + " | ".join(cells) + " |"


def render() -> str:
    """The whole page."""
    lines = ["| class | code | status | retry | refresh | definite | what to do |", "|---|---|---|---|---|---|---|"]
    lines += [row(depth, cls) for depth, cls in tree(FerrylineError)[1:]]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    sys.stderr.write(f"{TARGET}: written\n")
