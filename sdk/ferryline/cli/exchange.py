"""`ferryline exchange`: create, list, show, delete, and test which topics a record would reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.binding import BINDING_COLUMNS, Header, binding_row, headers_of
from ferryline.cli.failures import NOT_FOUND, Failed
from ferryline.cli.invocation import of

if TYPE_CHECKING:
    from ferryline.protocol.exchanges import ExchangeMeta

app = typer.Typer(no_args_is_help=True, help="Create, list, show and delete exchanges; test where records go.")


def exchange_row(exchange: ExchangeMeta) -> dict[str, Any]:
    """An exchange as every output form prints it."""
    return {
        "name": exchange.name,
        "type": exchange.type,
        "alternate": exchange.alternate or None,
        "bindings": len(exchange.bindings),
        "version": exchange.version,
    }


@app.command()
def create(
    ctx: typer.Context,
    name: str,
    kind: Annotated[str, typer.Option("--type", "-t", help="direct, topic, fanout or headers.")],
    alternate: Annotated[str | None, typer.Option(help="Exchange that gets what no binding takes.")] = None,
    if_not_exists: Annotated[bool, typer.Option("--if-not-exists", help="Do nothing when it is there.")] = False,
) -> None:
    """Create an exchange. Bindings then say which topics its records go to.

    direct: equal routing key. topic: patterns over dotted words, * for one word and # for any number. fanout:
    everything. headers: records that have the headers of the binding.

    Examples:

      ferryline exchange create events --type topic

      ferryline exchange create orders --type direct --alternate unrouted
    """
    from ferryline.cli.connection import connected, run
    from ferryline.protocol.errors import ExchangeExists

    invocation = of(ctx)

    async def act() -> bool:
        async with connected(invocation.settings) as client:
            try:
                await client.admin.create_exchange(name, kind, alternate=alternate)
            except ExchangeExists as there:
                same = (there.details.get("type"), there.details.get("alternate")) == (kind, alternate or "")
                if not (if_not_exists and same):
                    raise
                return False
            return True

    made = run(act())
    sentence = f"{name}: a {kind} exchange without bindings" if made else f"{name} exists already"
    invocation.output.done(sentence, name=name, created=made)


@app.command("list")
def list_exchanges(ctx: typer.Context) -> None:
    """All exchanges."""
    from ferryline.cli.cluster import metadata_of
    from ferryline.cli.connection import run

    invocation = of(ctx)
    cluster = run(metadata_of(invocation.settings))
    rows = [exchange_row(cluster.exchanges[name]) for name in sorted(cluster.exchanges)]
    invocation.output.rows(rows, empty="no exchanges; ferryline exchange create NAME --type topic makes one")


@app.command()
def show(ctx: typer.Context, name: str) -> None:
    """One exchange with its bindings."""
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)

    async def act() -> ExchangeMeta:
        async with connected(invocation.settings) as client:
            return await client.admin.describe_exchange(name)

    exchange = run(act())
    rows = [binding_row(exchange.name, binding) for binding in exchange.bindings]
    if not invocation.output.for_people:
        invocation.output.one({**exchange_row(exchange), "binding_list": rows})
        return
    invocation.output.one(exchange_row(exchange))
    typer.echo()
    invocation.output.rows(rows, columns=BINDING_COLUMNS[1:], empty="no bindings: its records reach no topic")


@app.command()
def delete(
    ctx: typer.Context, name: str, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False
) -> None:
    """Delete an exchange and the bindings from and to it. The topics and their records stay."""
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)
    if not yes:
        typer.confirm(f"Delete exchange {name}?", abort=True)

    async def act() -> None:
        async with connected(invocation.settings) as client:
            await client.admin.delete_exchange(name)

    run(act())
    invocation.output.done(f"exchange {name} deleted", deleted=name)


@app.command("test")
def would_reach(
    ctx: typer.Context,
    name: str,
    routing_key: Annotated[str, typer.Option("--routing-key", "-r", help="Of the record.")] = "",
    header: Header = None,
) -> None:
    """Say which topics a record would reach; send nothing. Exit status 3 if it would reach none.

    Examples:

      ferryline exchange test events -r eu.order.created

      ferryline exchange test reports -H format=pdf -H kind=invoice
    """
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)
    headers = headers_of(header)

    async def act() -> list[str]:
        async with connected(invocation.settings) as client:
            return await client.admin.topics_reached(name, routing_key, headers)

    topics = run(act())
    invocation.output.rows([{"topic": topic} for topic in topics], empty="no topic")
    if not topics:
        raise Failed(f"{name}: such a record reaches no topic", NOT_FOUND, code="UNROUTABLE")
