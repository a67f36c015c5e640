"""`ferryline queue`: list, stats, peek, pause, resume, redrive, purge, delete."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.invocation import of

if TYPE_CHECKING:
    from ferryline.queue_admin import Queue, QueuePart, StoredRecord

app = typer.Typer(no_args_is_help=True, help="Look at queue groups; pause, redrive, purge and delete them.")

COLUMNS = ["partition", "unsettled", "ready", "waiting", "delayed", "leased", "parked", "dying", "paused", "members"]
TEXT_BYTES = 60  # of a key or value in a table
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")]
Key = Annotated[str | None, typer.Option("--key", "-k", help="Only records of this key.")]
Reason = Annotated[str, typer.Option("--reason", help="Only those with a reason that contains this.")]


def part_row(part: QueuePart) -> dict[str, Any]:
    """One partition of a queue, as every output form prints it."""
    return {
        "partition": part.partition,
        "unsettled": part.unsettled,
        "ready": part.ready,
        "waiting": part.waiting,
        "delayed": part.delayed,
        "leased": part.leased,
        "parked": part.parked,
        "dying": part.dying,
        "paused": part.paused,
        "ordering": part.ordering,
        "start": part.start,
        "high_watermark": part.high_watermark,
        "members": part.members,
    }


def shown(data: bytes | None) -> str | None:
    """A key or value for a table: text if it is some, not too long."""
    if data is None:
        return None
    text = data[: TEXT_BYTES * 4].decode(errors="replace")
    readable = text if text.isprintable() else repr(data[:TEXT_BYTES])
    return readable if len(readable) <= TEXT_BYTES else readable[: TEXT_BYTES - 3] + "..."


def last_line(text: str) -> str:
    """Of a traceback, what was raised."""
    lines = text.strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""


def record_row(record: StoredRecord) -> dict[str, Any]:
    """Where a record stands and what is in it."""
    return {
        "partition": record.partition,
        "offset": record.offset,
        "key": shown(record.key),
        "value": shown(record.value),
        "headers": {name: shown(value) for name, value in record.headers.pairs},
    }


def act_on(ctx: typer.Context, topic: str, group: str, act: Callable[[Queue], Awaitable[Any]]) -> Any:
    """Connect and do something with a queue."""
    from ferryline.cli.connection import connected, run

    settings = of(ctx).settings

    async def work() -> Any:
        async with connected(settings) as client:
            return await act(client.queue(topic, group))

    return run(work())


@app.command("list")
def list_groups(ctx: typer.Context, topic: str) -> None:
    """The queue groups that have received from a topic, with what each has before it."""
    from ferryline.cli.connection import connected, run

    settings = of(ctx).settings

    async def act() -> list[dict[str, Any]]:
        from ferryline.queue_admin import groups_of

        async with connected(settings) as client:
            groups = await groups_of(client, topic)
            return [_summed(group, await client.queue(topic, group).stats()) for group in sorted(groups)]

    columns = ["group", "unsettled", "ready", "waiting", "delayed", "leased", "parked", "dying", "paused", "members"]
    of(ctx).output.rows(run(act()), columns=columns, empty=f"no queue group has received from {topic}")


def _summed(group: str, parts: list[QueuePart]) -> dict[str, Any]:
    members = {member for part in parts for member in part.members}
    return {
        "group": group,
        "ordering": parts[0].ordering if parts else "",
        "paused": any(part.paused for part in parts),
        "members": len(members),
        **{
            name: sum(getattr(part, name) for part in parts)
            for name in ("unsettled", "ready", "waiting", "delayed", "leased", "parked", "dying")
        },
    }


@app.command()
def stats(ctx: typer.Context, topic: str, group: str) -> None:
    """One queue group, partition by partition.

    ready: may be handed out now. waiting: behind another record of their key. delayed: not due yet. leased: with a
    receiver. parked: given up, their keys stand still until a redrive. dying: on their way to the dead letters. What is
    unsettled and in none of these was not looked at yet.

    Example: ferryline queue stats jobs media
    """
    parts = act_on(ctx, topic, group, lambda queue: queue.stats())
    total = sum(part.unsettled for part in parts)
    ordering = parts[0].ordering if parts else ""
    title = f"{group} on {topic}: {total:,} unsettled, ordering {ordering}"
    of(ctx).output.rows([part_row(part) for part in parts], columns=COLUMNS, title=title)


@app.command()
def peek(
    ctx: typer.Context,
    topic: str,
    group: str,
    count: Annotated[int, typer.Option("--count", "-c", help="At most so many.", min=1, max=10_000)] = 10,
    partition: Annotated[int | None, typer.Option("--partition", "-p", help="Only this one.", min=0)] = None,
    offset: Annotated[int, typer.Option("--offset", "-O", help="From this offset on.")] = -1,
) -> None:
    """The first records that are not settled. Nothing is handed out by looking.

    Example: ferryline queue peek jobs media --count 3
    """
    found = act_on(ctx, topic, group, lambda queue: queue.peek(count, partition=partition, offset=offset))
    of(ctx).output.rows([record_row(one) for one in found], empty="everything is settled")


@app.command()
def pause(ctx: typer.Context, topic: str, group: str) -> None:
    """Hand out no more records of this group. What is with receivers may be settled."""
    act_on(ctx, topic, group, lambda queue: queue.pause())
    of(ctx).output.done(f"{group} on {topic} is paused; ferryline queue resume goes on", topic=topic, paused=True)


@app.command()
def resume(ctx: typer.Context, topic: str, group: str) -> None:
    """Go on after pause."""
    act_on(ctx, topic, group, lambda queue: queue.resume())
    of(ctx).output.done(f"{group} on {topic} goes on", topic=topic, paused=False)


@app.command()
def redrive(
    ctx: typer.Context,
    topic: str,
    group: str,
    key: Key = None,
    reason: Reason = "",
    count: Annotated[int, typer.Option("--count", "-c", help="At most so many; 0 for all.", min=0, max=10_000)] = 0,
    dry_run: DryRun = False,
) -> None:
    """Let parked records be handed out again, where they stand: their keys go on in order.

    Example: ferryline queue redrive jobs media --key customer-7 --dry-run
    """
    found = act_on(ctx, topic, group, lambda queue: queue.redrive(count=count, key=key, reason=reason, dry_run=dry_run))
    rows = [{"partition": number, "offset": at} for number, offsets in sorted(found.offsets.items()) for at in offsets]
    title = f"{found.count} would be redriven (dry run)" if dry_run else f"{found.count} redriven"
    of(ctx).output.rows(rows, title=title, empty="nothing is parked that was meant")


@app.command()
def purge(ctx: typer.Context, topic: str, group: str, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Settle everything that is there now, unread. The records stay in the topic, for other groups.

    Example: ferryline queue purge jobs media --dry-run
    """
    if not (yes or dry_run):
        typer.confirm(f"Settle everything that {group} has before it in {topic}?", abort=True)
    gone = act_on(ctx, topic, group, lambda queue: queue.purge(dry_run=dry_run))
    sentence = f"{gone:,} records would be purged (dry run)" if dry_run else f"{gone:,} records purged"
    of(ctx).output.done(sentence, topic=topic, purged=gone, dry_run=dry_run)


@app.command()
def delete(ctx: typer.Context, topic: str, group: str, yes: Yes = False) -> None:
    """Forget a group: what it settled, leased and parked. A receiver that comes back begins anew."""
    if not yes:
        typer.confirm(f"Delete {group} on {topic}?", abort=True)
    act_on(ctx, topic, group, lambda queue: queue.delete())
    of(ctx).output.done(f"{group} on {topic} deleted", topic=topic, deleted=group)
