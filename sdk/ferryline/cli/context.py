"""`ferryline context`: named clusters in the config file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ferryline.cli.failures import NOT_FOUND, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import Output
from ferryline.cli.settings import OUTPUTS, UsageError, config_path, read_file, write_file

app = typer.Typer(no_args_is_help=True, help="Name clusters in the config file and switch between them.")


def _content(ctx: typer.Context) -> tuple[Path, dict[str, Any], Output]:
    invocation = of(ctx)
    path = config_path(invocation.file)
    content = read_file(path)
    content.setdefault("contexts", {})
    form = invocation.flags.get("output") or "table"
    if form not in OUTPUTS:
        raise UsageError(f"output: {form!r} is not one of {', '.join(OUTPUTS)}")
    return path, content, Output(form)


def _known(content: dict[str, Any], name: str) -> None:
    if name not in content["contexts"]:
        known = ", ".join(sorted(content["contexts"])) or "none"
        raise Failed(f"no context {name!r}", NOT_FOUND, code="NOT_FOUND", remedy=f"Known: {known}.")


@app.command("list")
def list_contexts(ctx: typer.Context) -> None:
    """All contexts; the current one is marked."""
    _, content, output = _content(ctx)
    current = content.get("current")
    output.rows(
        (
            {"name": name, "current": name == current, "url": values.get("url", []), "ca": values.get("ca")}
            for name, values in sorted(content["contexts"].items())
        ),
        empty="no contexts; ferryline context add NAME --url URL --ca FILE makes one",
    )


@app.command()
def add(
    ctx: typer.Context,
    name: str,
    use: Annotated[bool, typer.Option(help="Make it the current one.")] = True,
) -> None:
    """Save a cluster under a name, or change one. URL, CA and token come from the global options.

    Example: ferryline context add staging --url https://mq1:8443,https://mq2:8443 --ca ~/staging.crt
    """
    path, content, output = _content(ctx)
    flags = of(ctx).flags
    values = dict(content["contexts"].get(name, {}))
    if flags.get("url"):
        values["url"] = [part for part in str(flags["url"]).replace(",", " ").split() if part]
    for key in ("ca", "token", "timeout"):
        if flags.get(key) is not None:
            values[key] = flags[key]
    if flags.get("ca"):
        values["ca"] = str(Path(str(flags["ca"])).expanduser().absolute())
    if "url" not in values:
        raise UsageError("--url is missing: a context needs the address of its cluster")
    content["contexts"][name] = values
    if use or "current" not in content:
        content["current"] = name
    write_file(path, content)
    output.done(f"{name} saved in {path}" + (", and in use" if content["current"] == name else ""), name=name)


@app.command("use")
def use_context(ctx: typer.Context, name: str) -> None:
    """Switch to another cluster."""
    path, content, output = _content(ctx)
    _known(content, name)
    content["current"] = name
    write_file(path, content)
    output.done(f"using {name}", current=name)


@app.command()
def show(ctx: typer.Context) -> None:
    """The cluster in use, and where each setting comes from."""
    settings = of(ctx).settings
    of(ctx).output.one({name: item["value"] for name, item in settings.shown().items()})


@app.command()
def remove(ctx: typer.Context, name: str) -> None:
    """Forget a cluster."""
    path, content, output = _content(ctx)
    _known(content, name)
    del content["contexts"][name]
    if content.get("current") == name:
        del content["current"]
    write_file(path, content)
    output.done(f"{name} removed", removed=name)
