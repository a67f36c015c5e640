"""A process with some receivers of the lanes campaign: works on records, and writes down what it did and when.

A line of the journal is ``ns what member key sequence``; ns is the monotonic clock, which all processes share.
``got`` when a record was handed out; ``ack?`` and ``ack!`` around an acknowledgement, ``ack-`` if it failed; ``nack?``
before a nack and ``nack!`` behind it; ``wait`` and ``took`` around a request for records.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import time
from pathlib import Path

import ferryline as fl
from ferryline.protocol.errors import FerrylineError

TOPIC, GROUP = "lanes", "lanes"


class Journal:
    """Appends whole lines with one write each, so that a kill -9 loses none that was written."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, what: str, member: str, key: str, sequence: int) -> None:
        os.write(self._fd, f"{time.monotonic_ns()} {what} {member} {key} {sequence}\n".encode())


async def work(
    client: fl.Client, member: str, journal: Journal, chance: random.Random, options: argparse.Namespace
) -> None:
    async with client.receiver(TOPIC, group=GROUP, lease=options.lease, prefetch=options.prefetch) as receiver:
        handlers: set[asyncio.Task[None]] = set()
        while True:
            journal.note("wait", member, "-", 0)
            messages = await receiver.receive(max_records=options.prefetch, max_wait=5.0)
            journal.note("took", member, "-", len(messages))
            for message in messages:
                journal.note("got", member, message.key.decode(), int(message.value))
            for message in messages:
                task = asyncio.create_task(_handle(message, member, journal, chance.random() < options.nacks))
                handlers.add(task)
                task.add_done_callback(handlers.discard)
            while len(handlers) >= options.prefetch:
                await asyncio.wait(handlers, return_when=asyncio.FIRST_COMPLETED)


async def _handle(message: fl.QueueMessage[bytes], member: str, journal: Journal, refuse: bool) -> None:
    key, sequence = (message.key or b"").decode(), int(message.value)
    try:
        if refuse and message.delivery_count < 3:
            journal.note("nack?", member, key, sequence)
            await message.nack(delay=random.random() * 0.5)
            journal.note("nack!", member, key, sequence)
            return
        journal.note("ack?", member, key, sequence)
        await message.ack()
        journal.note("ack!", member, key, sequence)
    except FerrylineError as error:
        journal.note(f"ack-{error.code}", member, key, sequence)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--ca", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--receivers", type=int, default=8)
    parser.add_argument("--prefetch", type=int, default=32)
    parser.add_argument("--lease", type=float, default=5.0)
    parser.add_argument("--nacks", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    journal, chance = Journal(options.journal), random.Random(options.seed)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with fl.connect(options.url, ca=options.ca) as client, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(work(client, f"{options.name}.{number}", journal, chance, options))
            for number in range(options.receivers)
        ]
        await stop.wait()
        for task in tasks:
            task.cancel()


if __name__ == "__main__":
    asyncio.run(main())
