"""`ferryline falconq`: FalconQ's HTTP on this machine, in front of a cluster, until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ferryline.cli.failures import FAILED, USAGE, Failed
from ferryline.cli.invocation import of

if TYPE_CHECKING:
    from ferryline.cli.settings import Settings

PORT = 8080


def app(
    ctx: typer.Context,
    host: Annotated[str, typer.Option(help="A loopback address: this is HTTP in the clear.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.", min=0, max=65_535)] = PORT,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where consumers' positions are kept. [default: ~/.ferryline/falconq]", show_default=False),
    ] = None,
    partitions: Annotated[int, typer.Option(help="Of topics that a publish creates.", min=1, max=1_000)] = 1,
) -> None:
    """Serve FalconQ's HTTP: publish with two priorities, consume by consumerID, peek.

    Only on this machine and without TLS, for programs that speak FalconQ; everything else is better served by the
    brokers. One gateway at a time keeps the positions in a folder.

    Examples:

      ferryline falconq

      curl -d '{"message": "hello", "priority": "high"}' localhost:8080/topic/orders/publish

      curl 'localhost:8080/topic/orders/consume?consumerID=billing&batch=10'
    """
    from ferryline.cli.connection import run
    from ferryline.falconq.gateway import is_loopback

    if not is_loopback(f"[{host}]" if ":" in host else host):
        raise Failed(
            f"--host {host}: not a loopback address",
            USAGE,
            code="INVALID_ARGUMENT",
            remedy="FalconQ is HTTP in the clear: 127.0.0.1, ::1 or localhost. From elsewhere, use the brokers' REST.",
        )
    home = Path(os.environ.get("FERRYLINE_HOME") or "~/.ferryline").expanduser()
    folder = (data_dir or home / "falconq").expanduser().absolute()
    run(_serve(of(ctx).settings, host, port, folder, partitions))


async def _serve(settings: Settings, host: str, port: int, folder: Path, partitions: int) -> None:
    from aiohttp import web

    from ferryline.cli.connection import connected
    from ferryline.falconq.files import PositionFiles
    from ferryline.falconq.gateway import Gateway

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    listening = _listen(host, port)
    async with AsyncExitStack() as stack:
        stack.callback(listening.close)
        files = PositionFiles(folder)
        stack.callback(files.close)
        client = await stack.enter_async_context(connected(settings))
        producer = await stack.enter_async_context(client.producer(linger=0, delivery_timeout=settings.timeout))
        runner = web.AppRunner(
            Gateway(client, producer, files, partitions).application(), access_log=None, shutdown_timeout=5.0
        )  # fmt: skip
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, listening).start()
        bound = listening.getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        ready = {"service": "falconq", "url": f"http://{shown}:{bound[1]}", "pid": os.getpid(), "port": bound[1]}
        sys.stdout.write(f"READY {json.dumps(ready)}\n")
        sys.stdout.flush()
        await stop.wait()


def _listen(host: str, port: int) -> socket.socket:
    """Raises Failed when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise Failed(
            f"{host}:{port}: {error.strerror}", FAILED, code="PORT_IN_USE", remedy="Another port: --port."
        ) from None
