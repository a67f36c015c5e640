"""`ferryline group`: list, describe with lag, seek, delete."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli import offsets
from ferryline.cli.failures import FAILED, NOT_FOUND, Failed
from ferryline.cli.invocation import of
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.cli.offsets import Point
    from ferryline.cli.settings import Settings
    from ferryline.client import Client
    from ferryline.message import TopicPartition

app = typer.Typer(no_args_is_help=True, help="Look at consumer groups and their lag; seek; delete.")

JOIN_S = 15.0


@app.command("list")
def list_groups(ctx: typer.Context) -> None:
    """All groups that the coordinator knows."""
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)

    async def act() -> list[dict[str, Any]]:
        async with connected(invocation.settings) as client:
            return await client.admin.list_groups()

    rows = [_summary(group) for group in run(act())]
    invocation.output.rows(rows, columns=["group", "members", "topics"], empty="no groups")


def _summary(group: dict[str, Any]) -> dict[str, Any]:
    """A group as the table shows it; the coordinator's own fields stay for the other formats."""
    members = group.get("members", [])
    count = len(members) if isinstance(members, list) else members
    topics = sorted({topic for member in members for topic in member.get("topics", [])}) if count else []
    return {**group, "group": group.get("group") or group.get("name"), "members": count, "topics": topics}


@app.command()
def describe(
    ctx: typer.Context,
    group: str,
    topic: Annotated[list[str] | None, typer.Option(help="Topics to look at. [default: those of its members]")] = None,
) -> None:
    """Members of a group, what each owns, where the group stands and how far behind it is.

    A group without members is found by its committed offsets: name its topics.

    Example: ferryline group describe billing --topic orders
    """
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)

    async def act() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        async with connected(invocation.settings) as client:
            known = await _known(client, group)
            topics = topic or _topics(known) or sorted(client.routing.cluster.topic_ids)
            rows = [row for name in topics for row in await _positions(client, group, name, known)]
            if topic is None and not _topics(known):
                rows = [row for row in rows if row["committed"] is not None]
            return known, rows

    known, rows = run(act())
    if not known and not rows:
        raise Failed(f"group {group!r}: no members, no committed offsets", NOT_FOUND, code="UNKNOWN_GROUP")
    if not invocation.output.for_people:
        total = sum(row["lag"] for row in rows)
        invocation.output.one({"group": group, "members": known.get("members", []), "lag": total, "partitions": rows})
        return
    columns = ["topic", "partition", "committed", "end", "lag", "member"]
    total = sum(row["lag"] for row in rows)
    members = len(known.get("members", []))
    invocation.output.rows(rows, columns=columns, title=f"{group}: {members} members, {total:,} records behind")


async def _known(client: Client, group: str) -> dict[str, Any]:
    """What the coordinator knows of a group; {} if it knows nothing."""
    from ferryline.protocol.errors import UnknownGroup

    try:
        return await client.admin.describe_group(group)
    except UnknownGroup:
        return {}


def _topics(known: dict[str, Any]) -> list[str]:
    return sorted({topic for member in known.get("members", []) for topic in member.get("topics", [])})


async def _positions(client: Client, group: str, topic: str, known: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the group stands in each partition of a topic."""
    from ferryline.positions import committed, lag_of

    meta = await client.learn_topic(topic)
    owners = _owners(known, topic)
    keys = [(meta.id, partition) for partition in range(meta.config.partitions)]
    found = await committed(client, group, keys, client.timeout)
    return [
        {
            "topic": topic,
            "partition": key[1],
            "committed": found[key].offset if found[key].offset >= 0 else None,
            "end": found[key].high_watermark,
            "lag": lag_of(found[key]),
            "member": owners.get(key[1]),
        }
        for key in keys
    ]


def _owners(known: dict[str, Any], topic: str) -> dict[int, str]:
    """Partition -> member, from the assignment in the coordinator's answer."""
    found: dict[int, str] = {}
    for entry in known.get("assignment", []) or known.get("partitions", []):
        if isinstance(entry, dict) and entry.get("topic") == topic and entry.get("member"):
            found[int(entry["partition"])] = str(entry["member"])
    return found


@app.command()
def seek(
    ctx: typer.Context,
    group: str,
    topic: str,
    to: Annotated[
        str, typer.Option("--to", help="start, end, 1000, -10 (ten before the end), @-1h, @2026-01-31T12:00")
    ],
    partition: Annotated[list[int] | None, typer.Option("--partition", "-p", help="Only these; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
) -> None:
    """Move a group to another place in a topic. Its members must be stopped: they would go on where they are.

    Examples:

      ferryline group seek billing orders --to @-2h --dry-run

      ferryline group seek billing orders --to start --partition 3
    """
    from ferryline.cli.connection import run

    point = offsets.parse_point(to, int(time.time() * 1000))
    if point.kind == "committed":
        raise UsageError("--to committed changes nothing")
    invocation = of(ctx)
    rows = run(_seek(invocation.settings, group, topic, point, partition, dry_run))
    title = f"{group} would be moved (dry run)" if dry_run else f"{group} was moved"
    invocation.output.rows(rows, columns=["topic", "partition", "before", "after", "change"], title=title)


async def _seek(
    settings: Settings, group: str, topic: str, point: Point, partitions: list[int] | None, dry_run: bool
) -> list[dict[str, Any]]:
    from ferryline.cli.connection import connected

    async with connected(settings) as client:
        meta = await client.learn_topic(topic)
        chosen = sorted(set(partitions)) if partitions else list(range(meta.config.partitions))
        if wrong := [number for number in chosen if not 0 <= number < meta.config.partitions]:
            raise UsageError(f"--partition {wrong[0]}: {topic} has partitions 0..{meta.config.partitions - 1}")
        known = await _known(client, group)
        if members := known.get("members"):
            raise Failed(
                f"{group} has {len(members)} members", FAILED, code="CONFLICT", remedy="Stop them first, then seek."
            )
        targets = await _targets(client, group, topic, chosen, point)
        if not dry_run:
            await _commit(client, group, topic, meta.config.partitions, {p: after for p, (_, after) in targets.items()})
    return [
        {"topic": topic, "partition": p, "before": before, "after": after, "change": after - (before or 0)}
        for p, (before, after) in sorted(targets.items())
    ]


async def _targets(
    client: Client, group: str, topic: str, chosen: list[int], point: Point
) -> dict[int, tuple[int | None, int]]:
    """(committed now, where to) by partition. Changes nothing."""
    from ferryline.cli.consume import seek_to

    found: dict[int, tuple[int | None, int]] = {}
    async with client.consumer(topic, group=group, partitions=chosen, auto_commit=False) as consumer:
        consumer.pause()
        for place in consumer.assignment:
            before = await consumer.committed(place)
            end = await consumer.seek(place, "end")
            found[place.partition] = (before, min(end, await seek_to(consumer, place, point)))
    return found


async def _commit(client: Client, group: str, topic: str, count: int, targets: dict[int, int]) -> None:
    """Commit as the group's only member: that is what owning the partitions takes."""
    async with client.consumer(topic, group=group, auto_commit=False) as consumer:
        consumer.pause()
        end = time.monotonic() + JOIN_S
        while len(consumer.assignment) < count:
            if time.monotonic() > end:
                raise Failed(
                    f"{group}: not all partitions could be had; another member joined", FAILED, code="CONFLICT"
                )
            consumer.pause()
            await asyncio.sleep(0.05)
        consumer.pause()
        moved: dict[TopicPartition, int] = {}
        for place in consumer.assignment:
            if place.partition in targets:
                moved[place] = await consumer.seek(place, targets[place.partition])
        await consumer.commit(moved)


@app.command()
def delete(
    ctx: typer.Context, group: str, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False
) -> None:
    """Forget a group that has no members. Its consumers would begin anew."""
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)
    if not yes:
        typer.confirm(f"Delete group {group}?", abort=True)

    async def act() -> None:
        async with connected(invocation.settings) as client:
            await client.admin.delete_group(group)

    run(act())
    invocation.output.done(f"group {group} deleted", deleted=group)
