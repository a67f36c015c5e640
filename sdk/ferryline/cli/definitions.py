"""`ferryline definitions`: topics, exchanges and principals of a cluster as one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ferryline.cli.failures import FAILED, Failed
from ferryline.cli.invocation import of
from ferryline.cli.settings import UsageError

app = typer.Typer(no_args_is_help=True, help="Topics, exchanges and principals as one file: out of a cluster, into it.")

COLUMNS = ["kind", "name", "action", "detail", "error"]


@app.command()
def export(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="Where to write it; standard output if left out.")] = None,
) -> None:
    """Write what the cluster is told to be, as JSON. Records are no part of it, and keys of principals are nowhere.

    Examples:

      ferryline definitions export cluster.json

      ferryline definitions export | jq '.topics[].name'
    """
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)

    async def act() -> dict[str, Any]:
        async with connected(invocation.settings) as client:
            return await client.admin.export_definitions()

    document = run(act())
    text = json.dumps(document, indent=2) + "\n"
    if file is None:
        typer.echo(text, nl=False)
        return
    file.write_text(text, encoding="utf-8")
    counts = {kind: len(document[kind]) for kind in ("topics", "exchanges", "principals")}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    invocation.output.done(f"{file}: {told}", file=str(file), **counts)


@app.command("import")
def import_file(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="As `export` wrote it, or a part of that; - for standard input.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    keys_move: Annotated[
        bool, typer.Option("--keys-move", help="Add partitions where the file has more: keys move to other ones.")
    ] = False,
) -> None:
    """Make and change what the file names; delete nothing. Doing it again changes nothing.

    What cannot be done is shown, item by item, and the rest is done; the exit status is 1 then.

    Examples:

      ferryline definitions import cluster.json --dry-run

      ferryline --context staging definitions import cluster.json
    """
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)
    document = _read(file)

    async def act() -> dict[str, Any]:
        async with connected(invocation.settings) as client:
            return await client.admin.import_definitions(document, dry_run=dry_run, keys_move=keys_move)

    answer = run(act())
    rows = [{**row, "error": row.get("error", {}).get("detail")} for row in answer["results"]]
    what = "would be changed (dry run)" if dry_run else "changed"
    title = f"{answer['changed']} {what}, {answer['failed']} refused"
    invocation.output.rows(rows, columns=COLUMNS, title=title, empty="the file names nothing")
    if answer["failed"]:
        raise Failed(f"{answer['failed']} of {len(rows)} items could not be done", FAILED, code="CONFLICT")


def _read(file: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{file}: expected an object with topics, exchanges, principals")
    return document
