"""The yardstick: confluent-kafka against librdkafka's own mock cluster.

The mock lives in the process of the client that asked for it, keeps the newest 5 MiB or 100,000 records of a partition
in memory, replicates nothing and flushes nothing: it bounds what a Python client can reach, not what a cluster can.
Other processes find it by the broker addresses of its metadata. It speaks plain TCP, and gives a topic 4 partitions:
what is to be consumed later is spread over enough topics to be kept.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from ferryline.cli.bench.load import Load, Measured, Stopwatch, latency_of

BROKERS = 3
POLL_EVERY = 1_000
KEPT_BYTES = 4 * 4 * 1024 * 1024  # of one topic, with a margin for the batches' own bytes and uneven keys


def _producer(load: Load, linger_ms: float) -> Any:
    from confluent_kafka import Producer

    return Producer(
        {
            "test.mock.num.brokers": BROKERS,
            "linger.ms": linger_ms,
            "acks": "all",
            "enable.idempotence": True,
            "queue.buffering.max.messages": 2_000_000,
            "queue.buffering.max.kbytes": 1_048_576,
            "log_level": 0,
        }
    )


def _ready(producer: Any, load: Load) -> str:
    """Create the topic by using it; returns the mock's addresses. The mock makes topics of 4 partitions."""
    done: list[Any] = []
    producer.produce(load.topic, b"x", b"x", on_delivery=lambda error, _: done.append(error))
    producer.flush(30)
    if not done or done[0] is not None:
        raise RuntimeError(f"the mock cluster does not answer: {done}")
    brokers = producer.list_topics(timeout=10).brokers.values()
    return ",".join(f"{broker.host}:{broker.port}" for broker in brokers)


def topics_of(load: Load) -> list[str]:
    """As many topics as it takes for the mock to keep every record."""
    count = -(-load.records * (load.value_bytes + 24) // KEPT_BYTES)
    return [f"{load.topic}-{number}" for number in range(count)]


def _send_all(producer: Any, load: Load, count: int, topics: list[str] | None = None) -> list[Any]:
    """Produce ``count`` records with a callback each, and wait until all have been called. Returns the failures."""
    failures: list[Any] = []
    settled = 0

    def on_delivery(error: Any, _: Any) -> None:
        nonlocal settled
        settled += 1
        if error is not None:
            failures.append(error)

    topics = topics or [load.topic]
    each = -(-count // len(topics))
    value, key_of = load.value(), load.key_of
    produce, poll = producer.produce, producer.poll
    for number in range(count):
        topic = topics[number // each]
        while True:
            try:
                produce(topic, value, key_of(number), on_delivery=on_delivery)
                break
            except BufferError:
                poll(0.01)
        if not number % POLL_EVERY:
            poll(0)
    while settled < count:
        producer.poll(0.1)
    return failures


def produce(load: Load) -> Measured:
    """Records a second, from the first produce to the last delivery callback."""
    producer = _producer(load, load.linger_ms)
    _ready(producer, load)
    _send_all(producer, load, load.warm_up)
    watch = Stopwatch()
    failures = _send_all(producer, load, load.records)
    return watch.measured(load.records, load.records * load.value_bytes, errors=len(failures))


def latency(load: Load) -> Measured:
    """One record at a time, produce to delivery callback."""
    producer = _producer(load, 0)
    _ready(producer, load)
    times: list[float] = []
    value = load.value()
    for number in range(load.warm_up + load.records):
        done: list[Any] = []
        started = time.perf_counter()
        producer.produce(load.topic, value, load.key_of(number), on_delivery=lambda error, _, d=done: d.append(error))
        while not done:
            producer.poll(1.0)
        times.append(time.perf_counter() - started)
    return latency_of(times[load.warm_up :])


def serve(load: Load) -> None:
    """Fill a mock cluster, print its addresses, and keep it until stdin closes: `consume` runs in another process."""
    producer = _producer(load, load.linger_ms)
    addresses = _ready(producer, load)
    failures = _send_all(producer, load, load.records, topics_of(load))
    sys.stdout.write(json.dumps({"addresses": addresses, "errors": len(failures)}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


def consume(load: Load) -> Measured:
    """Records a second out of a filled cluster, in batches, with key and value of each looked at."""
    from confluent_kafka import Consumer

    consumer = Consumer(
        {
            "bootstrap.servers": load.url,
            "group.id": f"bench-{time.time_ns()}",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 10,
            "queued.min.messages": 1_000_000,
            "queued.max.messages.kbytes": 1_048_576,
            "log_level": 0,
        }
    )
    consumer.subscribe(topics_of(load))
    seen = size = 0
    watch: Stopwatch | None = None
    counted_from = 0
    deadline = time.monotonic() + load.timeout_s
    while seen < load.records and time.monotonic() < deadline:
        found = consumer.consume(num_messages=10_000, timeout=0.2)
        if found and watch is None:  # joining the group is not what is measured; neither is the first batch
            watch = Stopwatch()
            seen = counted_from = len(found)
            continue
        for message in found:
            size += len(message.key() or b"") + len(message.value() or b"")
        seen += len(found)
    consumer.close()
    if watch is None:
        raise RuntimeError("nothing arrived")
    return watch.measured(seen - counted_from, size, errors=max(0, load.records - seen))
