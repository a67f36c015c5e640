"""`ferryline audit`: who changed what, and who was refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.invocation import of
from ferryline.cli.output import say
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ferryline.cli.output import Output
    from ferryline.client import Client

OUTCOMES = ("done", "failed", "refused", "lost")
LOOK_S = 1.0
PAGE = 500


def app(
    ctx: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens from now on.")] = False,
    broker: Annotated[int | None, typer.Option(help="Only what this broker decided.", min=1)] = None,
    coordinator: Annotated[bool, typer.Option("--coordinator", help="Only what the coordinator decided.")] = False,
    principal: Annotated[str, typer.Option(help="Only what this one did or was refused.")] = "",
    outcome: Annotated[str, typer.Option(help=f"Only {', '.join(OUTCOMES)}.")] = "",
    count: Annotated[int, typer.Option("--count", "-c", help="At most so many of each service.", min=1, max=500)] = 50,
) -> None:
    """Show changes and refusals, newest last, of the coordinator and of all brokers.

    Each service keeps what it decided itself. done: somebody changed something. failed: it was allowed, and did not
    work. refused: it was not allowed. Times are UTC. -o json shows addresses, request ids and what was changed as they
    are. Needs manage on the cluster.

    Examples:

      ferryline audit --count 20

      ferryline audit --follow --outcome refused

      ferryline audit --principal billing --broker 2 -o ndjson
    """
    from ferryline.cli.connection import run

    if outcome not in ("", *OUTCOMES):
        raise UsageError(f"--outcome {outcome!r}: one of {', '.join(OUTCOMES)}")
    if broker is not None and coordinator:
        raise UsageError("--broker and --coordinator: one of them")
    if follow and of(ctx).output.form not in ("table", "ndjson"):
        raise UsageError(f"--follow: as a table or with -o ndjson, not {of(ctx).output.form}")
    run(_show(ctx, follow, broker, coordinator, {"principal": principal, "outcome": outcome}, count))


async def _show(
    ctx: typer.Context, follow: bool, broker: int | None, coordinator: bool, only: dict[str, str], count: int
) -> None:
    import asyncio

    from ferryline.cli.connection import connected

    output = of(ctx).output
    async with connected(of(ctx).settings) as client:
        cursors: dict[int, str | None] = {}
        for service in _services(client, broker, coordinator):
            cursors[service] = None
        rows = [row async for row in _new(client, cursors, only, count, strict=broker is not None or coordinator)]
        rows.sort(key=lambda row: row["time"])
        _print(output, rows)
        if not rows and output.for_people:
            say("nothing yet.")
        while follow:
            await asyncio.sleep(LOOK_S)
            for service in _services(client, broker, coordinator):
                cursors.setdefault(service, "0")  # a broker that was added meanwhile
            fresh = [row async for row in _new(client, cursors, only, PAGE, strict=False)]
            if fresh:
                _print(output, sorted(fresh, key=lambda row: row["time"]))


def _print(output: Output, rows: list[dict[str, Any]]) -> None:
    """For people a line each, as of a log: a table would be wider than most terminals."""
    if not output.for_people:
        output.rows(rows)
        return
    for row in rows:
        say(_line(row))


def _line(row: dict[str, Any]) -> str:
    """`11-28 22:14:25 coordinator  refused FORBIDDEN  shop@10.0.0.7  create_topic topic:other`"""
    times = f" x{row['count']}" if row["count"] != 1 else ""
    outcome = f"{row['outcome']} {row['code']}".rstrip() + times
    who = f"{row['principal']}@{row['remote']}" if row["remote"] else str(row["principal"])
    what = f"{row['resource']}:{row['name']}" if row["name"] else str(row["resource"])
    return f"{row['time'][5:10]} {row['time'][11:19]} {row['service']:<11}  {outcome}  {who}  {row['action']} {what}"


def _services(client: Client, broker: int | None, coordinator: bool) -> list[int]:
    """Whom to ask: numbers of brokers, 0 for the coordinator."""
    if broker is not None or coordinator:
        return [broker or 0]
    return [0, *sorted(id for id, meta in client.routing.cluster.brokers.items() if not meta.fenced)]


async def _new(
    client: Client, cursors: dict[int, str | None], only: dict[str, str], limit: int, *, strict: bool
) -> AsyncIterator[dict[str, Any]]:
    """What is behind the cursors, which go on. One service that does not answer hides no other one."""
    from ferryline.cli.output import warn
    from ferryline.protocol.errors import FerrylineError, Unauthorized

    for service, after in list(cursors.items()):
        name = f"broker-{service}" if service else "coordinator"
        try:
            while True:
                page = await client.admin.audit(
                    after,
                    limit=limit,
                    broker=service or None,
                    principal=only["principal"],
                    outcome=only["outcome"],
                )
                for record in page.records:
                    yield {**record, "service": name}
                again = after is not None and page.more
                cursors[service] = after = page.next
                if not again:
                    break
        except FerrylineError as error:
            if strict or isinstance(error, Unauthorized):
                raise
            warn(f"{name}: {error}")
