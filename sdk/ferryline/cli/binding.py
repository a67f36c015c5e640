"""`ferryline binding`: add, remove and list the ways out of exchanges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import NOT_FOUND, Failed
from ferryline.cli.invocation import of
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.protocol.exchanges import BindingMeta

app = typer.Typer(no_args_is_help=True, help="Add, remove and list bindings of exchanges.")

BINDING_COLUMNS = ["exchange", "topic", "to_exchange", "routing_key", "headers", "match"]
Topic = Annotated[str | None, typer.Option(help="The topic that it leads to.")]
ToExchange = Annotated[str | None, typer.Option("--to-exchange", help="Or the exchange that it leads to.")]
RoutingKey = Annotated[str, typer.Option("--routing-key", "-r", help="Key, or pattern with * and # (type topic).")]
Header = Annotated[list[str] | None, typer.Option("--header", "-H", help="name=value; name alone: any value.")]
Match = Annotated[str, typer.Option("--match", help="all or any of the headers.")]


def headers_of(given: list[str] | None) -> dict[str, str | None]:
    """``name=value`` options as a mapping; a name alone has no value. Raises UsageError."""
    headers: dict[str, str | None] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not name or name in headers:
            raise UsageError(
                f"--header: {text!r} is not name=value" if not name else f"--header: {name!r} stands twice"
            )
        headers[name] = value if equals else None
    return headers


def binding_row(exchange: str, binding: BindingMeta) -> dict[str, Any]:
    """A binding as every output form prints it."""
    return {
        "exchange": exchange,
        "topic": None if binding.to_exchange else binding.target,
        "to_exchange": binding.target if binding.to_exchange else None,
        "routing_key": binding.routing_key or None,
        "headers": dict(binding.headers),
        "match": binding.match if binding.headers else None,
        "id": binding.id,
    }


@app.command()
def add(
    ctx: typer.Context,
    exchange: str,
    topic: Topic = None,
    to_exchange: ToExchange = None,
    routing_key: RoutingKey = "",
    header: Header = None,
    match: Match = "all",
) -> None:
    """Bind a topic, or another exchange, to an exchange. A binding that is there already stays as it is.

    Examples:

      ferryline binding add events --topic eu-orders -r 'eu.order.#'

      ferryline binding add reports --topic pdfs -H format=pdf -H kind=invoice --match any

      ferryline binding add everything --to-exchange events
    """
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)
    headers = headers_of(header)

    async def act() -> None:
        async with connected(invocation.settings) as client:
            await client.admin.bind(
                exchange, topic=topic, to_exchange=to_exchange, routing_key=routing_key, headers=headers, match=match
            )

    run(act())
    invocation.output.done(
        f"{exchange} leads to {topic or to_exchange}", exchange=exchange, target=topic or to_exchange
    )


@app.command()
def remove(
    ctx: typer.Context,
    exchange: str,
    topic: Topic = None,
    to_exchange: ToExchange = None,
    routing_key: RoutingKey = "",
    header: Header = None,
    match: Match = "all",
) -> None:
    """Remove the binding that was added with these options.

    Example: ferryline binding remove events --topic eu-orders -r 'eu.order.#'
    """
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)
    headers = headers_of(header)

    async def act() -> None:
        async with connected(invocation.settings) as client:
            await client.admin.unbind(
                exchange, topic=topic, to_exchange=to_exchange, routing_key=routing_key, headers=headers, match=match
            )

    run(act())
    invocation.output.done(
        f"{exchange} leads to {topic or to_exchange} no more by this", exchange=exchange, removed=True
    )


@app.command("list")
def list_bindings(
    ctx: typer.Context,
    exchange: Annotated[str | None, typer.Argument(help="Only of this one.")] = None,
    topic: Annotated[str | None, typer.Option(help="Only those that lead to this topic.")] = None,
) -> None:
    """Bindings of all exchanges, or of one."""
    from ferryline.cli.cluster import metadata_of
    from ferryline.cli.connection import run

    invocation = of(ctx)
    cluster = run(metadata_of(invocation.settings))
    if exchange is not None and exchange not in cluster.exchanges:
        known = ", ".join(sorted(cluster.exchanges)[:10]) or "none"
        raise Failed(
            f"exchange {exchange!r} does not exist", NOT_FOUND, code="UNKNOWN_EXCHANGE", remedy=f"Known: {known}."
        )
    rows = [
        binding_row(name, binding)
        for name in sorted(cluster.exchanges)
        if exchange in (None, name)
        for binding in cluster.exchanges[name].bindings
    ]
    rows = [row for row in rows if topic in (None, row["topic"])]
    invocation.output.rows(rows, columns=BINDING_COLUMNS, empty="no bindings; ferryline binding add makes one")
