"""A queue with an acknowledgement for every message: `python -m benchmarks.queues --rate 25000 --seconds 60`.

Three brokers and a coordinator on this machine, TLS, replication 2, flushed. One process sends keyed records at a fixed
rate, some receiver processes lease them, look at each, and acknowledge each; the SDK batches both sides as it does for
everybody. Prints what was reached, the time from `send` to the handler, and the processor time of every process.
``--rate 0`` sends as fast as it goes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.cli.checker import percentile
from ferryline.cli.processes import LocalCluster

TOPIC, GROUP = "queue-bench", "bench"
_SLICE_S = 0.01  # the producer sends this much at a time


def processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def produce(options: argparse.Namespace) -> dict[str, Any]:
    """Send for ``seconds``; a record carries the moment when it was handed to the SDK."""
    sent = failed = 0
    padding = b"x" * max(0, options.value_bytes - 8)
    async with fl.connect(options.url, ca=options.ca) as client, client.producer(linger=0.005) as producer:
        began = time.monotonic()
        used = processor_s()
        last: list[Any] = []
        while (elapsed := time.monotonic() - began) < options.seconds:
            due = int(elapsed * options.rate) - sent if options.rate else 2_000
            futures = []
            for number in range(sent, sent + due):
                value = time.monotonic_ns().to_bytes(8, "little") + padding
                futures.append(producer.send_nowait(TOPIC, value, key=b"k%d" % (number % options.keys)))
            sent += due
            last = (last + futures)[-50_000:]
            if not options.rate and len(last) >= options.window:
                await last[-options.window]
            await asyncio.sleep(_SLICE_S if options.rate else 0)
        results = await asyncio.gather(*last, return_exceptions=True)
        failed = sum(isinstance(one, Exception) for one in results)
        seconds = time.monotonic() - began
    return {"sent": sent, "failed": failed, "seconds": seconds, "cpu_s": processor_s() - used}


async def receive(options: argparse.Namespace) -> dict[str, Any]:
    """Receive and acknowledge until nothing has come for two seconds after the producer's end."""
    latencies: list[float] = []
    counts = {"received": 0, "again": 0}
    ended = [0.0]

    async def one() -> None:
        async with client.receiver(TOPIC, group=GROUP, prefetch=options.prefetch) as receiver:
            quiet_since = time.monotonic()
            while time.monotonic() < deadline or time.monotonic() - quiet_since < 2.0:
                messages = await receiver.receive(max_records=options.prefetch, max_wait=0.5)
                if not messages:
                    continue
                now, quiet_since = time.monotonic_ns(), time.monotonic()
                for message in messages:
                    counts["again"] += message.delivery_count > 1
                    latencies.append((now - int.from_bytes(message.raw[:8], "little")) / 1e6)
                counts["received"] += len(messages)
                await receiver.ack_many(messages)
                ended[0] = time.monotonic()

    async with fl.connect(options.url, ca=options.ca) as client:
        began, used = time.monotonic(), processor_s()
        deadline = began + options.seconds
        await asyncio.gather(*(one() for _ in range(options.receivers)))
    latencies.sort()
    told = (
        {name: round(percentile(latencies, share), 2) for name, share in (("p50", 0.5), ("p99", 0.99))}
        if latencies
        else {}
    )
    return {**counts, "seconds": ended[0] - began, "cpu_s": processor_s() - used, "latency_ms": told}


def work(role: str, options: argparse.Namespace, url: str, ca: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.queues", "--role", role, "--url", url, "--ca", ca]
    for name in ("rate", "seconds", "keys", "value_bytes", "prefetch", "receivers", "window"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def processor_times(cluster: LocalCluster) -> dict[str, float]:
    import psutil

    times = {name: psutil.Process(service.pid).cpu_times() for name, service in cluster.services.items()}
    return {name: float(used.user + used.system) for name, used in times.items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    async def create() -> None:
        async with fl.connect(url, ca=ca) as client:
            await client.admin.create_topic(TOPIC, partitions=options.partitions, replication=2)

    with tempfile.TemporaryDirectory(dir=options.dir) as folder, LocalCluster(Path(folder)) as cluster:
        url, ca = ",".join(cluster.urls), str(cluster.ca)
        asyncio.run(create())
        before = processor_times(cluster)
        receivers = [work("receive", options, url, ca) for _ in range(options.processes)]
        time.sleep(1.0)
        producer = work("produce", options, url, ca)
        sent = json.loads(producer.communicate(timeout=options.seconds + 120)[0])
        got = [json.loads(one.communicate(timeout=120)[0]) for one in receivers]
        used = {name: round(after - before[name], 2) for name, after in processor_times(cluster).items()}
    received = sum(one["received"] for one in got)
    return {
        "sent": sent,
        "received": received,
        "again": sum(one["again"] for one in got),
        "sent_per_s": round(sent["sent"] / sent["seconds"]),
        "received_per_s": round(received / max(one["seconds"] for one in got)),
        "latency_ms": [one["latency_ms"] for one in got],
        "cpu_us_a_record": {
            "producer": round(sent["cpu_s"] / max(1, sent["sent"]) * 1e6, 1),
            "receivers": round(sum(one["cpu_s"] for one in got) / max(1, received) * 1e6, 1),
            "services": round(sum(used.values()) / max(1, received) * 1e6, 1),
        },
        "cpu_s": used,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rate", type=float, default=25_000, help="records a second; 0: as fast as it goes")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--processes", type=int, default=1, help="with receivers")
    parser.add_argument("--receivers", type=int, default=4, help="in each of these processes")
    parser.add_argument("--prefetch", type=int, default=500)
    parser.add_argument("--window", type=int, default=20_000, help="with --rate 0: records that may be unconfirmed")
    parser.add_argument("--dir", help="where the data goes; default: the folder for temporary files")
    parser.add_argument("--role", choices=("produce", "receive"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--ca", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        done = asyncio.run(produce(options) if options.role == "produce" else receive(options))
    else:
        done = run(options)
    sys.stdout.write(json.dumps(done) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
