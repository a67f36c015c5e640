"""`ferryline produce`: lines, files or JSON become records."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import FAILED, Failed, exit_status
from ferryline.cli.invocation import of
from ferryline.cli.output import stderr, warn
from ferryline.cli.records import BadInput, InputForm, open_all, read
from ferryline.cli.settings import UsageError
from ferryline.protocol.errors import BufferFull, FerrylineError

if TYPE_CHECKING:
    from ferryline.cli.formats import Parsed
    from ferryline.cli.settings import Settings
    from ferryline.producer import Producer

YIELD_EVERY = 500
SHOWN_FAILURES_MAX = 10


@dataclass(frozen=True)
class Target:
    """Where records go and what each of them gets."""

    topic: str
    key: bytes | None
    partition: int | None
    headers: tuple[tuple[str, bytes | None], ...]
    compression: str
    linger: float
    receipts: Path | None = None


@dataclass
class Tally:
    """What became of the records so far."""

    sent: int = 0
    acknowledged: int = 0
    bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    first: FerrylineError | None = None

    @property
    def failed(self) -> int:
        return self.failures.total()

    def fail(self, code: str, message: str) -> None:
        self.failures[code] += 1
        if self.failed <= SHOWN_FAILURES_MAX:
            warn(f"{code}: {message}")

    def settled(self, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self.acknowledged += 1
            return
        if isinstance(error, FerrylineError):
            self.first = self.first or error
            self.fail(error.code, error.message)
        else:
            self.fail(type(error).__name__, str(error))


def app(
    ctx: typer.Context,
    topic: str,
    files: Annotated[list[Path] | None, typer.Argument(help="Input files; - or nothing is stdin.")] = None,
    template: Annotated[
        str | None, typer.Option("--format", "-f", help="Fields %k %v %h %p and what stands between them.")
    ] = None,
    key_separator: Annotated[str | None, typer.Option("--key-separator", "-K", help="Text before the value.")] = None,
    key_field: Annotated[str | None, typer.Option(help="JSON lines: field that is the key; a.b for nested.")] = None,
    whole_files: Annotated[bool, typer.Option("--whole-files", help="One record per file, named as key.")] = False,
    key: Annotated[str | None, typer.Option("--key", "-k", help="The same key for every record.")] = None,
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="name=value, for every record.")] = None,
    partition: Annotated[int | None, typer.Option("--partition", "-p", help="Instead of the key's.", min=0)] = None,
    compression: Annotated[str, typer.Option("--compression", "-z", help="none, gzip, snappy, lz4, zstd.")] = "none",
    linger: Annotated[float, typer.Option(help="Seconds to wait for more records of a batch.", min=0)] = 0.005,
    receipts: Annotated[Path | None, typer.Option(help="Keep proof of what was acknowledged in this file.")] = None,
) -> None:
    """Send records. Each is acknowledged only when every in-sync replica has it.

    Without options each line of input is the value of a record without a key. Exit status 1, or that of the first
    error, when a record was not acknowledged.

    Examples:

      echo hello | ferryline produce greetings

      printf 'c1 hello\\nc2 world\\n' | ferryline produce orders -f '%k %v\\n'

      ferryline produce orders -K: orders.txt more.txt

      ferryline produce orders --key-field customer.id orders.jsonl

      ferryline produce blobs --whole-files *.png -H type=image/png
    """
    form = InputForm(template, key_separator, key_field, whole_files)
    form.check()
    target = Target(
        topic,
        key.encode() if key is not None else None,
        partition,
        tuple(_header(text) for text in header or ()),
        compression,
        linger,
        receipts,
    )
    invocation = of(ctx)
    settings = invocation.settings
    from ferryline.cli.connection import run

    started = time.perf_counter()
    tally = run(_produce(settings, target, form, files or []))
    seconds = time.perf_counter() - started
    _summary(tally, seconds, settings)


def _header(text: str) -> tuple[str, bytes | None]:
    name, equals, value = text.partition("=")
    if not name:
        raise UsageError(f"--header: {text!r} is not name=value")
    return name, value.encode() if equals else None


async def _produce(settings: Settings, target: Target, form: InputForm, files: list[Path]) -> Tally:
    from ferryline.cli.connection import connected

    tally = Tally()
    async with connected(settings) as client:
        # A topic that does not exist is told before stdin is read.
        await client.admin.describe_topic(target.topic)
        producer = client.producer(linger=target.linger, compression=target.compression, receipts=target.receipts)
        async with producer:
            watch = asyncio.create_task(_show(tally))
            try:
                await _pump(producer, target, form, files, tally)
                await producer.flush()
            finally:
                watch.cancel()
    await asyncio.sleep(0)  # the callbacks of the last futures
    return tally


async def _pump(producer: Producer, target: Target, form: InputForm, files: list[Path], tally: Tally) -> None:
    """Read and send, a piece as soon as it is there."""
    feed = Feed(read(open_all(files), form))
    while chunk := await feed.take():
        for piece in chunk:
            if isinstance(piece, BadInput):
                tally.fail("BAD_INPUT", str(piece))
                continue
            await _send(producer, target, piece, tally)
            if not tally.sent % YIELD_EVERY:
                await asyncio.sleep(0)


class Feed:
    """Input on a thread of its own: a terminal or a slow pipe stops neither acknowledgements nor what came before."""

    def __init__(self, pieces: Iterator[Parsed | BadInput]) -> None:
        self._pieces = pieces
        self._queue: queue.Queue[Parsed | BadInput] = queue.Queue(maxsize=4 * YIELD_EVERY)
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None
        # A daemon: a thread that waits for a terminal cannot be ended otherwise.
        threading.Thread(target=self._read, name="input", daemon=True).start()

    def _read(self) -> None:
        try:
            for piece in self._pieces:
                self._queue.put(piece)
                if not self._news.is_set():
                    self._loop.call_soon_threadsafe(self._news.set)
        except BaseException as error:
            self._error = error
        self._ended = True
        with suppress(RuntimeError):  # the loop is gone: nobody waits any more
            self._loop.call_soon_threadsafe(self._news.set)

    async def take(self) -> list[Parsed | BadInput]:
        """What has arrived, at least one piece; nothing at the end. Raises what reading raised."""
        while True:
            ended = self._ended  # asked before the queue, so that nothing slips in between
            self._news.clear()
            chunk: list[Parsed | BadInput] = []
            while len(chunk) < YIELD_EVERY and not self._queue.empty():
                chunk.append(self._queue.get_nowait())
            if chunk:
                return chunk
            if ended:
                if self._error is not None:
                    raise self._error
                return []
            await self._news.wait()


async def _send(producer: Producer, target: Target, piece: Parsed, tally: Tally) -> None:
    headers = [*piece.headers, *target.headers]
    key = target.key if target.key is not None else piece.key
    partition = target.partition if target.partition is not None else piece.partition
    tally.sent += 1
    tally.bytes += len(piece.value or b"") + len(key or b"")
    while True:
        try:
            future = producer.send_nowait(target.topic, piece.value, key, headers or None, partition=partition)
        except BufferFull:
            await asyncio.sleep(0.002)
            continue
        except FerrylineError as error:
            tally.first = tally.first or error
            tally.fail(error.code, error.message)
            return
        future.add_done_callback(tally.settled)
        return


async def _show(tally: Tally) -> None:
    """A running count on a terminal."""
    if not sys.stderr.isatty() or sys.stdin.isatty():
        return
    with stderr().status("") as status:
        while True:
            status.update(f"sent {tally.sent:,}  acknowledged {tally.acknowledged:,}  failed {tally.failed:,}")
            await asyncio.sleep(0.1)


def _summary(tally: Tally, seconds: float, settings: Settings) -> None:
    if settings.output == "table":
        rate = tally.acknowledged / seconds if seconds else 0.0
        failed = ", ".join(f"{count} {code}" for code, count in sorted(tally.failures.items()))
        warn(
            f"{tally.acknowledged:,} of {tally.sent:,} records acknowledged in {seconds:.1f} s ({rate:,.0f}/s)"
            + (f"; failed: {failed}" if failed else "")
        )
    else:
        from ferryline.cli.output import Output

        Output(settings.output).one(
            {
                "sent": tally.sent,
                "acknowledged": tally.acknowledged,
                "failed": tally.failed,
                "errors": dict(tally.failures),
                "bytes": tally.bytes,
                "seconds": seconds,
            }
        )
    if tally.failed:
        status = exit_status(tally.first) if tally.first is not None else FAILED
        raise Failed(f"{tally.failed:,} records failed", status, remedy=tally.first.remedy if tally.first else "")
