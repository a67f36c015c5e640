"""`ferryline dlq`: list dead letters and parked records, and send them back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.invocation import of
from ferryline.cli.output import stderr
from ferryline.cli.queue import DryRun, Key, Reason, last_line, shown
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.dead_letters import DeadLetter, Progress, Redrive

app = typer.Typer(no_args_is_help=True, help="Dead letters: list them, and send them back.")

COLUMNS = ["state", "partition", "offset", "key", "group", "attempts", "reason", "exception", "from", "value"]
Group = Annotated[str | None, typer.Option("--group", "-g", help="Only what this queue group gave up.")]


def letter_row(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter, as every output form prints it."""
    record = letter.record
    return {
        "state": "copied",
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "key": shown(record.key),
        "value": shown(record.value),
        "group": letter.group,
        "attempts": letter.attempts,
        "reason": letter.reason,
        "exception": last_line(letter.exception),
        "from": f"{letter.origin_topic}/{letter.origin_partition}/{letter.origin_offset}"
        if letter.origin_topic
        else "",
        "history": letter.history,
        "died_ms": record.timestamp_ms,
        "truncated": letter.truncated,
    }


@app.command("list")
def list_letters(
    ctx: typer.Context,
    topic: str,
    group: Group = None,
    key: Key = None,
    reason: Reason = "",
    count: Annotated[int, typer.Option("--count", "-c", help="Stop after this many.", min=1)] = 100,
) -> None:
    """What queues of a topic gave up: copies in its topic of dead letters, and records that are parked in place.

    Copies that were redriven are not listed any more.

    Examples:

      ferryline dlq list orders

      ferryline dlq list orders --group billing --reason 'no stock' -o json
    """
    from ferryline.cli.connection import connected, run

    settings = of(ctx).settings

    async def act() -> list[dict[str, Any]]:
        async with connected(settings) as client:
            rows = await _parked(client, topic, group, key, reason, count)
            return rows + await _copied(client, topic, group, key, reason, count - len(rows))

    of(ctx).output.rows(run(act()), columns=COLUMNS, empty=f"no dead letters of {topic}")


async def _copied(
    client: Client, topic: str, group: str | None, key: str | None, reason: str, count: int
) -> list[dict[str, Any]]:
    from contextlib import aclosing

    from ferryline.protocol.errors import UnknownTopic

    letters = client.dead_letters(topic)
    if await letters.name() != topic:
        await client.learn_topic(topic)
    rows: list[dict[str, Any]] = []
    try:
        async with aclosing(letters.browse(key=key, reason=reason, group=group or "")) as found:
            async for letter in found:
                if len(rows) >= count:
                    break
                rows.append(letter_row(letter))
    except UnknownTopic:
        pass  # nothing has died yet
    return rows


async def _parked(
    client: Client, topic: str, group: str | None, key: str | None, reason: str, count: int
) -> list[dict[str, Any]]:
    from ferryline.protocol.errors import UnknownGroup

    rows: list[dict[str, Any]] = []
    for name in await _groups(client, topic, group):
        queue = client.queue(topic, name)
        try:
            found = await queue.redrive(key=key, reason=reason, dry_run=True)
        except UnknownGroup:
            continue
        for partition, offsets in sorted(found.offsets.items()):
            room = max(0, count - len(rows))
            rows += [await _parked_row(client, topic, name, partition, offset) for offset in offsets[:room]]
    return rows


async def _groups(client: Client, topic: str, group: str | None) -> list[str]:
    from ferryline.dead_letters import REDRIVE_GROUP
    from ferryline.queue_admin import groups_of

    return [group] if group else [name for name in sorted(await groups_of(client, topic)) if name != REDRIVE_GROUP]


async def _parked_row(client: Client, topic: str, group: str, partition: int, offset: int) -> dict[str, Any]:
    queue = client.queue(topic, group)
    told = await queue.explain(partition, offset)
    at = await queue.peek(1, partition=partition, offset=offset)
    record = at[0] if at and at[0].offset == offset else None
    history = told.get("history", [])
    last = history[-1] if history else {}
    return {
        "state": "parked",
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "key": shown(record.key) if record is not None else None,
        "value": shown(record.value) if record is not None else None,
        "group": group,
        "attempts": told.get("attempts", 0),
        "reason": last.get("reason", ""),
        "exception": last_line(str(last.get("detail", ""))),
        "from": f"{topic}/{partition}/{offset}",
        "history": history,
    }


@app.command()
def redrive(
    ctx: typer.Context,
    topic: str,
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    key: Key = None,
    reason: Reason = "",
    group: Group = None,
    count: Annotated[int, typer.Option("--count", "-c", help="At most so many.", min=0)] = 0,
    rate: Annotated[float, typer.Option("--rate", help="Copies a second; 0 for no limit.", min=0)] = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Send dead letters back: parked records go on in place, copies are sent to where they came from.

    A copy becomes a new record at the end of its topic, so its order within its key is lost; a parked record keeps it.
    What was sent back is settled among the dead letters and not sent again. A run that breaks off is simply repeated.

    Examples:

      ferryline dlq redrive orders --all --dry-run

      ferryline dlq redrive orders --reason 'no stock' --rate 50
    """
    from ferryline.cli.connection import connected, run

    if not (everything or key is not None or reason or group or count):
        raise UsageError("say which: --all, --key, --reason, --group or --count (try --dry-run first)")
    settings = of(ctx).settings

    async def act() -> tuple[dict[str, int], Redrive | None]:
        async with connected(settings) as client:
            parked = await _redrive_parked(client, topic, group, key, reason, count, dry_run)
            left = count - sum(parked.values())
            if count and left <= 0:
                return parked, None
            options: dict[str, Any] = {
                "key": key,
                "reason": reason,
                "group": group or "",
                "count": left if count else 0,
            }
            return parked, await _redrive_copies(client, topic, options, rate, dry_run)

    parked, copies = run(act())
    _report(ctx, topic, parked, copies, dry_run)


async def _redrive_parked(
    client: Client, topic: str, group: str | None, key: str | None, reason: str, count: int, dry_run: bool
) -> dict[str, int]:
    from ferryline.protocol.errors import UnknownGroup

    done: dict[str, int] = {}
    for name in await _groups(client, topic, group):
        left = count - sum(done.values())
        if count and left <= 0:
            break
        try:
            limit = min(left, 10_000) if count else 0
            found = await client.queue(topic, name).redrive(count=limit, key=key, reason=reason, dry_run=dry_run)
        except UnknownGroup:
            continue
        if found.count:
            done[name] = found.count
    return done


async def _redrive_copies(
    client: Client, topic: str, options: dict[str, Any], rate: float, dry_run: bool
) -> Redrive | None:
    from ferryline.protocol.errors import UnknownTopic

    letters = client.dead_letters(topic)
    name = await letters.name()
    try:
        await client.learn_topic(name)
    except UnknownTopic:
        return None  # nothing has died yet
    with _progress(name, dry_run) as progress:
        return await letters.redrive(**options, rate=rate, dry_run=dry_run, progress=progress)


@contextmanager
def _progress(name: str, dry_run: bool) -> Iterator[Progress]:
    """A line that counts, for people who watch."""
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=stderr(), disable=dry_run or not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(f"{name}: reading")

        def progress(done: Redrive) -> None:
            bar.update(task, description=f"{name}: {done.redriven:,} sent back, {done.left:,} left alone")

        yield progress


def _report(ctx: typer.Context, topic: str, parked: dict[str, int], copies: Redrive | None, dry_run: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"what": "parked", "group": group, "to": topic, "records": count} for group, count in sorted(parked.items())
    ]
    if copies is not None:
        rows += [
            {"what": "copies", "group": None, "to": origin, "records": count}
            for origin, count in sorted(copies.origins.items())
        ]
        rows += [
            {"what": "refused", "group": letter.group, "to": letter.origin_topic, "records": 1, "why": why,
             "partition": letter.record.partition, "offset": letter.record.offset}
            for letter, why in copies.refused
        ]  # fmt: skip
    total = sum(parked.values()) + (copies.redriven if copies is not None else 0)
    title = f"{total:,} would be redriven (dry run)" if dry_run else f"{total:,} redriven"
    columns = ["what", "group", "to", "records"] + (["why"] if copies is not None and copies.refused else [])
    of(ctx).output.rows(rows, columns=columns, title=title, empty=f"no dead letters of {topic} that were meant")
