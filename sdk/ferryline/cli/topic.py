"""`ferryline topic`: create, list, describe, alter, add partitions, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import NOT_FOUND, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import cell
from ferryline.cli.quantities import parse_backoff, parse_size, parse_time, show_size, show_time
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.protocol.metadata import ClusterMetadata, TopicMeta

app = typer.Typer(no_args_is_help=True, help="Create, list, describe, alter and delete topics.")

Retention = Annotated[str | None, typer.Option(help="Keep records this long: 7d, 12h, unlimited.")]
RetentionBytes = Annotated[str | None, typer.Option(help="Keep this much per partition: 10GiB, unlimited.")]
MinIsr = Annotated[int | None, typer.Option(help="Refuse records while fewer copies are in sync.", min=1)]
Flush = Annotated[
    str | None, typer.Option(help="fsync: on disk when acknowledged. replicated: in memory of all copies.")
]
SegmentBytes = Annotated[str | None, typer.Option(help="Size of a log file.")]
SegmentTime = Annotated[str | None, typer.Option("--segment-time", help="Age at which a log file is closed.")]
MaxRecord = Annotated[str | None, typer.Option("--max-record-bytes", help="Largest record: key, value, headers.")]
RetryAttempts = Annotated[
    int | None, typer.Option("--retry-attempts", help="How often queues hand a record out, all together.", min=1)
]
RetryBackoff = Annotated[
    str | None, typer.Option("--retry-backoff", help="Wait between attempts, from and up to: 1s..60s.", metavar="WAIT")
]
OnDead = Annotated[str | None, typer.Option("--on-dead", help="skip: copy to the dead letters. park: stop the lane.")]
DeadLetters = Annotated[
    str | None, typer.Option("--dead-letters", help='Topic for the dead letters; "" for NAME.dlq.', metavar="TOPIC")
]


def settings_of(
    *,
    retention: str | None,
    retention_bytes: str | None,
    min_isr: int | None,
    flush: str | None,
    segment_bytes: str | None,
    segment_time: str | None,
    max_record_bytes: str | None,
    retry_attempts: int | None,
    retry_backoff: str | None,
    on_dead: str | None,
    dead_letters: str | None,
) -> dict[str, Any]:
    """Settings that were given, in the units of the cluster."""
    given: dict[str, Any] = {
        "retention_ms": parse_time(retention) if retention else None,
        "retention_bytes": parse_size(retention_bytes) if retention_bytes else None,
        "min_isr": min_isr,
        "flush": flush,
        "segment_bytes": parse_size(segment_bytes) if segment_bytes else None,
        "segment_ms": parse_time(segment_time) if segment_time else None,
        "max_record_bytes": parse_size(max_record_bytes) if max_record_bytes else None,
        "retry": _retry_of(retry_attempts, retry_backoff, on_dead, dead_letters) or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _retry_of(
    attempts: int | None, backoff: str | None, on_dead: str | None, dead_letters: str | None
) -> dict[str, Any]:
    first, longest = parse_backoff(backoff) if backoff else (None, None)
    given = {
        "attempts": attempts,
        "backoff_ms": first,
        "backoff_max_ms": longest,
        "on_dead": on_dead,
        "dead_letters": dead_letters,
    }
    return {name: value for name, value in given.items() if value is not None}


def topic_row(topic: TopicMeta) -> dict[str, Any]:
    """A topic with its settings, as every output form prints it."""
    from ferryline.protocol.dead_letters import dead_letters_of

    config = topic.config
    return {
        "name": topic.name,
        "id": topic.id,
        "owner": topic.owner,
        "partitions": config.partitions,
        "replication": config.replication,
        "min_isr": config.min_isr,
        "flush": config.flush,
        "retention_ms": config.retention_ms,
        "retention_bytes": config.retention_bytes,
        "segment_bytes": config.segment_bytes,
        "segment_ms": config.segment_ms,
        "max_record_bytes": config.max_record_bytes,
        "retry": {
            "attempts": config.retry.attempts,
            "backoff_ms": config.retry.backoff_ms,
            "backoff_max_ms": config.retry.backoff_max_ms,
            "on_dead": config.retry.on_dead,
            "dead_letters": dead_letters_of(topic.name, config.retry),
        },
    }


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "owner": row["owner"] or "nobody",
        "retention_ms": show_time(row["retention_ms"]),
        "segment_ms": show_time(row["segment_ms"]),
        "retention_bytes": show_size(row["retention_bytes"]),
        "segment_bytes": show_size(row["segment_bytes"]),
        "max_record_bytes": show_size(row["max_record_bytes"]),
        "retry": _readable_retry(row["retry"]),
    }


def _readable_retry(retry: dict[str, Any]) -> str:
    waits = f"{show_time(retry['backoff_ms'])}..{show_time(retry['backoff_max_ms'])}"
    then = "then park" if retry["on_dead"] == "park" else f"then to {retry['dead_letters']}"
    return f"{retry['attempts']} attempts, {waits} apart, {then}"


@app.command()
def create(
    ctx: typer.Context,
    name: str,
    partitions: Annotated[int, typer.Option("--partitions", "-p", help="Each is one ordered log.")] = 3,
    replication: Annotated[int, typer.Option("--replication", "-r", help="Copies of each partition.")] = 2,
    min_isr: MinIsr = None,
    flush: Flush = None,
    retention: Retention = None,
    retention_bytes: RetentionBytes = None,
    segment_bytes: SegmentBytes = None,
    segment_time: SegmentTime = None,
    max_record_bytes: MaxRecord = None,
    retry_attempts: RetryAttempts = None,
    retry_backoff: RetryBackoff = None,
    on_dead: OnDead = None,
    dead_letters: DeadLetters = None,
    if_not_exists: Annotated[bool, typer.Option("--if-not-exists", help="Do nothing when it is there.")] = False,
) -> None:
    """Create a topic.

    A key always goes to the same partition, so the number of partitions bounds how many consumers of a group can share
    the work; raising it later moves keys.

    Examples:

      ferryline topic create orders -p 12

      ferryline topic create audit -p 3 -r 3 --min-isr 2 --retention unlimited

      ferryline topic create jobs --retry-attempts 8 --retry-backoff 1s..5m --on-dead park
    """
    from ferryline.cli.connection import connected, run
    from ferryline.protocol.errors import TopicExists

    invocation = of(ctx)
    settings = settings_of(
        retention=retention,
        retention_bytes=retention_bytes,
        min_isr=min_isr,
        flush=flush,
        segment_bytes=segment_bytes,
        segment_time=segment_time,
        max_record_bytes=max_record_bytes,
        retry_attempts=retry_attempts,
        retry_backoff=retry_backoff,
        on_dead=on_dead,
        dead_letters=dead_letters,
    )

    async def act() -> bool:
        async with connected(invocation.settings) as client:
            try:
                await client.admin.create_topic(name, partitions=partitions, replication=replication, **settings)
            except TopicExists:
                if not if_not_exists:
                    raise
                return False
            return True

    made = run(act())
    sentence = f"{name}: {partitions} partitions, {replication} copies each" if made else f"{name} exists already"
    invocation.output.done(sentence, name=name, created=made)


@app.command("list")
def list_topics(ctx: typer.Context) -> None:
    """All topics with their settings."""
    from ferryline.cli.cluster import metadata_of
    from ferryline.cli.connection import run

    invocation = of(ctx)
    cluster = run(metadata_of(invocation.settings))
    rows = [topic_row(topic) for topic in sorted(cluster.topics.values(), key=lambda topic: topic.name)]
    if invocation.output.for_people:
        rows = [_readable(row) for row in rows]
    columns = ["name", "partitions", "replication", "min_isr", "flush", "retention_ms", "retention_bytes"]
    invocation.output.rows(rows, columns=columns, empty="no topics; ferryline topic create NAME makes one")


def _found(cluster: ClusterMetadata, name: str) -> TopicMeta:
    topic = cluster.topic(name)
    if topic is None:
        known = ", ".join(sorted(cluster.topic_ids)[:10]) or "none"
        raise Failed(f"topic {name!r} does not exist", NOT_FOUND, code="UNKNOWN_TOPIC", remedy=f"Known: {known}.")
    return topic


@app.command()
def describe(ctx: typer.Context, name: str) -> None:
    """One topic: settings, and each partition with its primary and in-sync set."""
    from ferryline.cli.cluster import PARTITION_COLUMNS, metadata_of, partition_row
    from ferryline.cli.connection import run

    invocation = of(ctx)
    cluster = run(metadata_of(invocation.settings))
    topic = _found(cluster, name)
    parts = [partition_row(part, name) for part in cluster.partitions_of(topic.id)]
    if not invocation.output.for_people:
        invocation.output.one({**topic_row(topic), "partition_list": parts})
        return
    invocation.output.one(_readable(topic_row(topic)))
    typer.echo()
    invocation.output.rows(parts, columns=[column for column in PARTITION_COLUMNS if column != "topic"])


@app.command()
def alter(
    ctx: typer.Context,
    name: str,
    min_isr: MinIsr = None,
    flush: Flush = None,
    retention: Retention = None,
    retention_bytes: RetentionBytes = None,
    segment_bytes: SegmentBytes = None,
    segment_time: SegmentTime = None,
    max_record_bytes: MaxRecord = None,
    retry_attempts: RetryAttempts = None,
    retry_backoff: RetryBackoff = None,
    on_dead: OnDead = None,
    dead_letters: DeadLetters = None,
) -> None:
    """Change settings of a topic; what is not named stays.

    Example: ferryline topic alter orders --retention 30d --min-isr 2
    """
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)
    changes = settings_of(
        retention=retention,
        retention_bytes=retention_bytes,
        min_isr=min_isr,
        flush=flush,
        segment_bytes=segment_bytes,
        segment_time=segment_time,
        max_record_bytes=max_record_bytes,
        retry_attempts=retry_attempts,
        retry_backoff=retry_backoff,
        on_dead=on_dead,
        dead_letters=dead_letters,
    )
    if not changes:
        raise UsageError("nothing to change: name at least one setting (ferryline topic alter --help)")

    async def act() -> None:
        async with connected(invocation.settings) as client:
            await client.admin.alter_topic(name, **changes)

    run(act())
    invocation.output.done(
        f"{name}: {', '.join(f'{key} = {cell(value)}' for key, value in changes.items())}", **changes
    )


@app.command("add-partitions")
def add_partitions(
    ctx: typer.Context,
    name: str,
    partitions: Annotated[int, typer.Argument(help="How many it shall have in all.")],
    keys_move: Annotated[
        bool, typer.Option("--keys-move", help="Yes: keys go to other partitions from now on; order across is lost.")
    ] = False,
) -> None:
    """Raise the number of partitions. Keys then live on other partitions, so this must be confirmed.

    Example: ferryline topic add-partitions orders 24 --keys-move
    """
    from ferryline.cli.connection import connected, run

    if not keys_move:
        raise UsageError("keys would move to other partitions: confirm that with --keys-move")
    invocation = of(ctx)

    async def act() -> None:
        async with connected(invocation.settings) as client:
            await client.admin.add_partitions(name, partitions, keys_move=keys_move)

    run(act())
    invocation.output.done(f"{name} has {partitions} partitions now", name=name, partitions=partitions)


@app.command()
def delete(
    ctx: typer.Context,
    name: str,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a topic with all its records. A topic made again under this name is another one."""
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)
    if not yes:
        typer.confirm(f"Delete {name} and all its records?", abort=True)

    async def act() -> None:
        async with connected(invocation.settings) as client:
            await client.admin.delete_topic(name)

    run(act())
    invocation.output.done(f"{name} deleted", deleted=name)
