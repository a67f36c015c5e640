"""How fast one receiver in one process settles, by the form in which it does: `python -m benchmarks.queue_acks`.

Three brokers and a coordinator on this machine, TLS, replication 2, flushed; the records are there before. Forms:
``many`` takes batches and acknowledges each with `ack_many`; ``nowait`` iterates and fires `ack_nowait`; ``processing``
iterates with a `processing` block around each; ``each`` waits for every ack, in as many tasks as records may be here.
Prints records a second and the processor time of the receiver's process for each record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.cli.processes import LocalCluster

TOPIC = "queue-acks"


def processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def many(receiver: fl.Receiver[bytes], count: int, prefetch: int) -> None:
    done = 0
    while done < count:
        batch = await receiver.receive(prefetch, 5.0)
        done += len(batch)
        await receiver.ack_many(batch)


async def nowait(receiver: fl.Receiver[bytes], count: int, prefetch: int) -> None:
    async for message in receiver:
        message.ack_nowait()
        count -= 1
        if not count:
            return


async def processing(receiver: fl.Receiver[bytes], count: int, prefetch: int) -> None:
    async for message in receiver:
        async with message.processing():
            count -= 1
        if not count:
            return


async def each(receiver: fl.Receiver[bytes], count: int, prefetch: int) -> None:
    done = 0

    async def one() -> None:
        nonlocal done
        async for message in receiver:
            await message.ack()
            done += 1
            if done == count:
                await receiver.close()

    await asyncio.gather(*(one() for _ in range(prefetch)))


FORMS: dict[str, Callable[[fl.Receiver[bytes], int, int], Awaitable[None]]] = {
    "many": many,
    "nowait": nowait,
    "processing": processing,
    "each": each,
}


async def measure(client: fl.Client, form: str, options: argparse.Namespace) -> dict[str, Any]:
    receiver = client.receiver(TOPIC, group=f"by-{form}", prefetch=options.prefetch)
    await receiver.start()
    began, used = time.monotonic(), processor_s()
    await FORMS[form](receiver, options.records, options.prefetch)
    await receiver.flush()
    seconds, used = time.monotonic() - began, processor_s() - used
    await receiver.close()
    return {"per_s": round(options.records / seconds), "cpu_us_a_record": round(used / options.records * 1e6, 1)}


async def run(options: argparse.Namespace, urls: str, ca: str) -> dict[str, Any]:
    async with fl.connect(urls, ca=ca) as client:
        await client.admin.create_topic(TOPIC, partitions=options.partitions, replication=2)
        async with client.producer() as producer:
            for number in range(options.records):
                future = producer.send_nowait(TOPIC, b"x" * 100, b"k%d" % (number % options.keys))
                if number % 5_000 == 0:
                    await future
            await producer.flush()
        return {form: await measure(client, form, options) for form in options.forms}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--keys", type=int, default=20_000)
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--prefetch", type=int, default=1_000)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        found = asyncio.run(run(options, ",".join(cluster.urls), str(cluster.ca)))
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
