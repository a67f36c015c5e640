"""`ferryline restore`: put a backup into an empty cluster."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ferryline.cli.backup import Patience, Rate, checked, opened, summary, told_in_numbers, usable
from ferryline.cli.invocation import of
from ferryline.cli.output import warn
from ferryline.cli.quantities import parse_size

if TYPE_CHECKING:
    from ferryline.backup.files import Manifest
    from ferryline.cli.settings import Settings

COPIES_S = 600.0  # to wait for the other copies


def app(
    ctx: typer.Context,
    folder: Path,
    rate: Rate = "unlimited",
    patience: Patience = 60.0,
    check: Annotated[bool, typer.Option(help="Read the whole backup first, and stop if it is damaged.")] = True,
) -> None:
    """Put a backup into a cluster without topics: same topics, offsets, group offsets, exchanges and principals.

    It has to have as many brokers as the topics have copies; `ferryline up --data-dir NEW` makes one to try. An
    interrupted run is gone on with. Returns once every partition serves and all of its copies are in sync.

    Examples:

      ferryline restore /backups/orders --url https://new:8443 --ca new-ca.crt
    """
    from ferryline.cli.connection import run

    invocation = of(ctx)
    with usable():
        manifest = checked(folder) if check else opened(folder)
    run(_restore(invocation.settings, folder, manifest, max(0, parse_size(rate)), patience))
    invocation.output.one({**summary(folder, manifest), "state": "restored"})


async def _restore(settings: Settings, folder: Path, manifest: Manifest, rate: int, patience: float) -> None:
    from ferryline.backup.restoring import Restoring
    from ferryline.cli.connection import connected

    with told_in_numbers("put in") as told, usable():
        async with connected(settings) as client:
            restoring = Restoring(client, folder, manifest, rate=rate, patience_s=patience, told=told)
            await restoring.run()
            end = time.monotonic() + COPIES_S
            while not restoring.in_sync():
                told(0, "waiting for the other copies")
                if time.monotonic() > end:
                    warn("everything serves, but not all copies are in sync yet: ferryline cluster health")
                    return
                await asyncio.sleep(0.2)
