"""`ferryline consume`: records as text, from any offset or time, alone or in a group."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli import offsets
from ferryline.cli.formats import Shown, writer
from ferryline.cli.invocation import of
from ferryline.cli.output import warn
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.cli.offsets import Point, Span
    from ferryline.cli.settings import Settings
    from ferryline.client import Client
    from ferryline.consumer import Consumer
    from ferryline.message import Message, TopicPartition

BATCH = 1_000


@dataclass(frozen=True)
class Request:
    """What to read and when to stop."""

    topic: str
    span: Span
    partitions: list[int] | None
    group: str | None
    commit: bool
    count: int | None
    exit_at_end: bool
    idle_s: float | None


def app(
    ctx: typer.Context,
    topic: str,
    start: Annotated[str, typer.Option("--from", "--offset", "-O", help=offsets.HELP)] = "",
    group: Annotated[str | None, typer.Option("--group", "-g", help="As a member of this group; commits.")] = None,
    partition: Annotated[list[int] | None, typer.Option("--partition", "-p", help="Only these; repeatable.")] = None,
    template: Annotated[
        str | None, typer.Option("--format", "-f", help="%t %p %o %k %v %h %T %d %K %S and text between.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", "-J", help="One JSON object for each record.")] = False,
    count: Annotated[int | None, typer.Option("--count", "-c", help="Stop after this many records.", min=1)] = None,
    exit_at_end: Annotated[bool, typer.Option("--exit", "-e", help="Stop at what is now the end.")] = False,
    idle: Annotated[float | None, typer.Option(help="Stop when nothing came for this many seconds.", min=0.1)] = None,
    commit: Annotated[bool, typer.Option(help="With --group: commit what was printed.")] = True,
) -> None:
    """Print records. Without a group it reads every partition from now on, and leaves no trace.

    Where to start: start, end, -10 (the last ten of each partition), 1000, 1000:2000 (half-open), @-1h, @-2h..@-1h,
    @2026-01-31T12:00. With --group the group's committed offsets win.

    Examples:

      ferryline consume orders --from start --exit

      ferryline consume orders --from -10 -e -f '%p@%o %k=%v\\n'

      ferryline consume orders --from @-1h --json | jq .value

      ferryline consume orders --group billing --count 100
    """
    if template is not None and as_json:
        raise UsageError("--format and --json cannot be combined")
    invocation = of(ctx)
    settings = invocation.settings
    span = offsets.parse_span(start or ("start" if group else "end"), int(time.time() * 1000))
    if group is not None and (span.stop is not None or span.start.kind in ("last", "offset")):
        raise UsageError("--from with --group: only start, end or a time; the group knows where it stands")
    request = Request(
        topic, span, sorted(set(partition)) if partition else None, group, commit, count, exit_at_end, idle
    )
    structured = as_json or (settings.output in ("json", "ndjson") and template is None)
    show = _json_line if structured else writer(template if template is not None else "%v\\n")
    from ferryline.cli.connection import run

    try:
        printed = run(_consume(settings, request, show))
    except KeyboardInterrupt:
        return
    if sys.stderr.isatty() and not sys.stdout.isatty():
        warn(f"{printed:,} records")


async def _consume(settings: Settings, request: Request, show: Callable[[Shown], bytes]) -> int:
    from ferryline.cli.connection import connected

    async with connected(settings) as client, _consumer(client, request) as consumer:
        stops: dict[TopicPartition, int] = {}
        if request.group is None:
            stops = await _position(consumer, request)
        return await _print(consumer, request, stops, show)


def _consumer(client: Client, request: Request) -> Consumer[Any]:
    start = _where(request.span.start) if request.group is not None else "end"
    return client.consumer(
        request.topic, group=request.group, start=start, partitions=request.partitions, auto_commit=request.commit
    )


def _where(point: Point) -> Any:
    from ferryline.message import at

    if point.kind == "time":
        return at(datetime.fromtimestamp(point.value / 1000, UTC))
    return point.value if point.kind == "offset" else "end" if point.kind == "last" else point.kind


async def _position(consumer: Consumer[Any], request: Request) -> dict[TopicPartition, int]:
    """Put every partition at its start; returns where each is to stop, if there is an end."""
    stops: dict[TopicPartition, int] = {}
    span = request.span
    if span.start.kind == "committed":
        raise UsageError("--from committed needs --group")
    consumer.pause()
    for place in consumer.assignment:
        end: int | None = None
        if request.exit_at_end or span.stop is not None:
            end = await consumer.seek(place, "end")
        if span.stop is not None:
            stop = await seek_to(consumer, place, span.stop)
            # A range that ends beyond the log is waited for, unless --exit says that the log's end is the end.
            end = min(stop, end) if request.exit_at_end and end is not None else stop
        if end is not None:
            stops[place] = end
        await seek_to(consumer, place, span.start)
    consumer.resume()
    return stops


async def seek_to(consumer: Consumer[Any], place: TopicPartition, point: Point) -> int:
    """Go to a point, not before the start of the log. Returns the offset."""
    where = _where(point)
    if point.kind not in ("last", "offset"):
        return await consumer.seek(place, where)
    lowest = await consumer.seek(place, "start")
    wanted = await consumer.seek(place, "end") - point.value if point.kind == "last" else point.value
    return await consumer.seek(place, max(wanted, lowest))


async def _print(
    consumer: Consumer[Any], request: Request, stops: dict[TopicPartition, int], show: Callable[[Shown], bytes]
) -> int:
    out = sys.stdout.buffer
    printed = 0
    last_news = time.monotonic()
    bounded = bool(stops)
    while not (bounded and _all_reached(consumer, stops)):
        batch = await consumer.pull(_room(request, printed), 0.2)
        if not batch:
            if request.idle_s is not None and time.monotonic() - last_news > request.idle_s:
                break
            if (
                request.group is not None
                and request.exit_at_end
                and consumer.assignment
                and not await _behind(consumer)
            ):
                break
            continue
        last_news = time.monotonic()
        wanted = [message for message in batch if not _beyond(message, stops)]
        if request.count is not None:
            wanted = wanted[: request.count - printed]
        out.write(b"".join(show(_shown(message)) for message in wanted))
        out.flush()
        printed += len(wanted)
        if request.count is not None and printed >= request.count:
            break
        await asyncio.sleep(0)
    if request.group is not None and request.commit:
        await consumer.commit()
    return printed


def _room(request: Request, printed: int) -> int:
    """In a group nothing may be taken that is not printed: it would be committed."""
    return BATCH if request.count is None else min(BATCH, request.count - printed)


def _beyond(message: Message[Any], stops: dict[TopicPartition, int]) -> bool:
    from ferryline.message import TopicPartition

    stop = stops.get(TopicPartition(message.topic, message.partition))
    return stop is not None and message.offset >= stop


def _all_reached(consumer: Consumer[Any], stops: dict[TopicPartition, int]) -> bool:
    return all(consumer.position(place) >= stop for place, stop in stops.items())


async def _behind(consumer: Consumer[Any]) -> bool:
    return any((await consumer.lag()).values())


def _shown(message: Message[Any]) -> Shown:
    return Shown(
        message.topic,
        message.partition,
        message.offset,
        message.timestamp_ms,
        message.key,
        message.raw,
        message.headers.pairs,
    )


def _json_line(record: Shown) -> bytes:
    """One record as JSON. What is no UTF-8 appears in Base64 under ``key_base64`` or ``value_base64``."""
    found: dict[str, Any] = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": datetime.fromtimestamp(record.timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds"),
    }
    for name, data in (("key", record.key), ("value", record.value)):
        text = _text(data)
        if data is not None and text is None:
            found[f"{name}_base64"] = base64.b64encode(data).decode()
        else:
            found[name] = text
    found["headers"] = [[name, (value or b"").decode(errors="replace")] for name, value in record.headers]
    return json.dumps(found, ensure_ascii=False).encode() + b"\n"


def _text(data: bytes | None) -> str | None:
    try:
        return data.decode() if data is not None else None
    except UnicodeDecodeError:
        return None
