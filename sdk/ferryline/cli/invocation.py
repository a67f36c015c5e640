"""One run of the program: its flags, and what they lead to once somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import typer

from ferryline.cli.output import Output
from ferryline.cli.settings import Settings, load


class Invocation:
    """Flags of the root command. Settings are read on first use: `context` must work with a broken config file."""

    def __init__(
        self, flags: Mapping[str, Any] | None = None, context: str | None = None, file: Path | None = None
    ) -> None:
        self.flags = dict(flags or {})
        self.context = context
        self.file = file

    @cached_property
    def settings(self) -> Settings:
        return load(self.flags, context=self.context, file=self.file)

    @cached_property
    def output(self) -> Output:
        return Output(self.settings.output)


def of(ctx: typer.Context) -> Invocation:
    """The invocation that the root callback left in the context."""
    return cast(Invocation, ctx.obj)
