"""`ferryline backup`: take a backup of a running cluster into a folder, and check one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import FAILED, NOT_FOUND, Failed
from ferryline.cli.invocation import of
from ferryline.cli.quantities import parse_size, show_size

if TYPE_CHECKING:
    from ferryline.backup.files import Manifest
    from ferryline.cli.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Take backups of a running cluster, and check them.")

Rate = Annotated[str, typer.Option(help="Bytes a second at most, such as 20MB.")]
Patience = Annotated[float, typer.Option(help="Seconds to wait for a broker that is away.", min=0)]


@app.command()
def take(
    ctx: typer.Context,
    folder: Path,
    rate: Rate = "unlimited",
    patience: Patience = 60.0,
) -> None:
    """Back up topics, exchanges, principals, records and the state of groups and queues. Traffic may go on.

    A folder that holds a backup of the same cluster is brought up to date: only what is new is read. An interrupted
    run is gone on with; until one has ended, the folder still holds the backup before it.

    Examples:

      ferryline backup take /backups/orders

      ferryline backup take /backups/orders --rate 20MB
    """
    from ferryline.cli.connection import run

    invocation = of(ctx)
    manifest = run(_take(invocation.settings, folder, max(0, parse_size(rate)), patience))
    invocation.output.one(summary(folder, manifest))


async def _take(settings: Settings, folder: Path, rate: int, patience: float) -> Manifest:
    from ferryline.backup.taking import Taking
    from ferryline.cli.connection import connected

    with told_in_numbers("read") as told, usable():
        async with connected(settings) as client:
            return await Taking(client, folder, rate=rate, patience_s=patience, told=told).run()


@app.command()
def verify(ctx: typer.Context, folder: Path) -> None:
    """Read a backup from end to end and check every checksum. Needs no cluster. Exit status 1 for damage."""
    manifest = checked(folder)
    of(ctx).output.one({**summary(folder, manifest), "state": "sound"})


@app.command()
def show(
    ctx: typer.Context,
    folder: Path,
    partitions: Annotated[bool, typer.Option("--partitions", help="Every partition, up to its mark.")] = False,
) -> None:
    """What a backup holds, without reading its records."""
    with usable():
        manifest = opened(folder)
    if not partitions:
        of(ctx).output.one(summary(folder, manifest))
        return
    of(ctx).output.rows(
        {
            "topic": part.topic,
            "partition": part.partition,
            "from": part.records.start,
            "mark": part.records.end,
            "state_mark": part.state.end,
            "bytes": part.records.size + part.state.size,
        }
        for part in manifest.partitions
    )


# -- for `restore`, too --------------------------------------------------------------------------------


def opened(folder: Path) -> Manifest:
    """The backup in a folder. Raises Failed when there is none."""
    from ferryline.backup.files import read_manifest

    manifest = read_manifest(folder)
    if manifest is None:
        raise Failed(f"{folder}: no complete backup", NOT_FOUND, remedy="ferryline backup take makes one.")
    return manifest


def checked(folder: Path) -> Manifest:
    """`opened`, and every byte was read. Raises Failed."""
    from ferryline.backup.files import verify

    with told_in_numbers("checked") as told, usable():
        manifest = opened(folder)
        for size in verify(folder, manifest):
            told(size, "files")
    return manifest


def summary(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """A backup in a few fields."""
    topics = {part.topic for part in manifest.partitions}
    return {
        "folder": str(folder),
        "cluster": manifest.cluster_id,
        "started": manifest.started,
        "ended": manifest.ended,
        "topics": len(topics),
        "partitions": len(manifest.partitions),
        "offsets": sum(part.records.end - part.records.start for part in manifest.partitions),
        "bytes": manifest.size,
    }


@contextmanager
def told_in_numbers(verb: str) -> Iterator[Callable[[int, str], None]]:
    """How much was done so far, on stderr, if somebody looks."""
    from ferryline.cli.output import stderr

    done = 0
    with stderr().status("") as status:

        def told(size: int, doing: str) -> None:
            nonlocal done
            done += size
            status.update(f"{show_size(done)} {verb}; {doing}")

        yield told


@contextmanager
def usable() -> Iterator[None]:
    """What is wrong with files, and what several partitions ran into at once, as one failure of the command."""
    from ferryline.backup.files import BackupError

    try:
        yield
    except BackupError as error:
        raise Failed(str(error), FAILED) from None
    except ExceptionGroup as several:
        first = several.exceptions[0]
        if isinstance(first, BackupError):
            raise Failed(str(first), FAILED) from None
        raise first from None
