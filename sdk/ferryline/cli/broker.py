"""`ferryline broker`: list, drain, undrain."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ferryline.cli.failures import NOT_FOUND, UNAVAILABLE, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import stderr, warn

if TYPE_CHECKING:
    from ferryline.cli.settings import Settings

app = typer.Typer(no_args_is_help=True, help="List brokers; drain one for maintenance; forget one that is gone.")


@app.command("list")
def list_brokers(ctx: typer.Context) -> None:
    """All brokers with their addresses and how many partitions each holds."""
    from ferryline.cli.cluster import broker_state, metadata_of
    from ferryline.cli.connection import run

    invocation = of(ctx)
    cluster = run(metadata_of(invocation.settings))
    parts = list(cluster.partitions.values())
    invocation.output.rows(
        [
            {
                "id": broker.id,
                "state": broker_state(broker),
                "url": broker.external,
                "internal_url": broker.internal,
                "primary_of": sum(part.primary == broker.id for part in parts),
                "replicas": sum(broker.id in part.replicas for part in parts),
                "broker_epoch": broker.broker_epoch,
            }
            for broker in sorted(cluster.brokers.values(), key=lambda broker: broker.id)
        ],
        columns=["id", "state", "url", "primary_of", "replicas"],
        empty="no brokers",
    )


@app.command()
def drain(
    ctx: typer.Context,
    broker_id: int,
    wait: Annotated[bool, typer.Option(help="Wait until nothing is left on it.")] = True,
    wait_timeout: Annotated[float, typer.Option(help="Seconds to wait at most.")] = 600.0,
) -> None:
    """Move everything off a broker: its primaries at once, its copies as fast as others catch up. Traffic goes on.

    Outlives restarts of the broker until `undrain`.

    Example: ferryline broker drain 2 && systemctl stop ferryline-broker
    """
    from ferryline.cli.connection import run

    invocation = of(ctx)
    run(_drain(invocation.settings, broker_id, wait, wait_timeout))
    sentence = f"broker {broker_id} holds nothing any more" if wait else f"broker {broker_id} is draining"
    invocation.output.done(sentence, broker=broker_id, draining=True)


async def _drain(settings: Settings, broker_id: int, wait: bool, wait_timeout: float) -> None:
    from ferryline.cli.connection import connected

    async with connected(settings) as client:
        await client.admin.drain_broker(broker_id)
        if not wait:
            return
        end = time.monotonic() + wait_timeout
        shown = -1
        with stderr().status("") as status:
            while True:
                left = sum(broker_id in part.replicas for part in client.routing.cluster.partitions.values())
                if not left:
                    return
                status.update(f"{left} partitions are still on broker {broker_id}")
                if left != shown and not sys.stderr.isatty():
                    warn(f"{left} partitions are still on broker {broker_id}")
                shown = left
                if time.monotonic() > end:
                    raise Failed(
                        f"{left} partitions are still on broker {broker_id}",
                        UNAVAILABLE,
                        remedy="Draining goes on. Are there enough other brokers? ferryline doctor.",
                    )
                await asyncio.sleep(0.2)


@app.command()
def undrain(ctx: typer.Context, broker_id: int) -> None:
    """Let a drained broker take part again; partitions move back to it by themselves."""
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)

    async def act() -> None:
        async with connected(invocation.settings) as client:
            if broker_id not in client.routing.cluster.brokers:
                raise Failed(f"no broker {broker_id}", NOT_FOUND, code="UNKNOWN_BROKER")
            await client.admin.undrain_broker(broker_id)

    run(act())
    invocation.output.done(f"broker {broker_id} takes part again", broker=broker_id, draining=False)


@app.command()
def forget(ctx: typer.Context, broker_id: int) -> None:
    """Forget a broker that will not come back. It must be down and hold no copies any more: those are made elsewhere.

    Refused (CONFLICT) while it still has some: wait, or drain it.
    """
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)

    async def act() -> None:
        async with connected(invocation.settings) as client:
            await client.admin.forget_broker(broker_id)

    run(act())
    invocation.output.done(f"broker {broker_id} is forgotten", broker=broker_id)
