"""Measurements of the Ferryline client: what one Python process gets out of a cluster."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ferryline.cli.bench.load import Load, Measured, Stopwatch, latency_of
from ferryline.protocol.errors import BufferFull, DeadlineExceeded

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.producer import Producer

YIELD_EVERY = 500  # records between two turns of the loop: answers are read and batches leave meanwhile


def _connect(load: Load) -> Client:
    import ferryline as fl

    return fl.connect(load.url, ca=load.ca or None, token=load.token or None)


def _producer(client: Client, load: Load, *, linger: float | None = None) -> Producer:
    return client.producer(linger=load.linger_ms / 1000 if linger is None else linger, compression=load.compression)


async def _send_all(producer: Producer, load: Load, count: int) -> int:
    return await send_all(producer, load.topic, load.value(), load.key_of, range(count))


async def send_all(producer: Producer, topic: str, value: bytes, key_of: Callable[[int], bytes], numbers: range) -> int:
    """Send a record for each number, with a future each, and wait until all are settled. Returns how many failed."""
    send = producer.send_nowait
    waiting: deque[asyncio.Future[Any]] = deque()
    failed = 0
    for number in numbers:
        while True:
            try:
                waiting.append(send(topic, value, key_of(number)))
                break
            except BufferFull:
                await asyncio.sleep(0.001)
        if not number % YIELD_EVERY:
            await asyncio.sleep(0)
            while waiting and waiting[0].done():
                failed += waiting.popleft().exception() is not None
    await producer.flush()
    return failed + sum(1 for future in waiting if future.exception() is not None)


async def produce(load: Load) -> Measured:
    """Records a second, from the first send to the last acknowledgement."""
    async with _connect(load) as client, _producer(client, load) as producer:
        await _send_all(producer, load, load.warm_up)
        watch = Stopwatch()
        failed = await _send_all(producer, load, load.records)
        return watch.measured(load.records, load.records * load.value_bytes, errors=failed)


async def latency(load: Load) -> Measured:
    """One record at a time, send to acknowledgement."""
    times: list[float] = []
    value = load.value()
    async with _connect(load) as client, _producer(client, load, linger=0) as producer:
        for number in range(load.warm_up + load.records):
            started = time.perf_counter()
            await producer.send(load.topic, value, load.key_of(number))
            times.append(time.perf_counter() - started)
    return latency_of(times[load.warm_up :])


async def consume(load: Load) -> Measured:
    """Records a second out of a filled topic, in batches, with key and value of each looked at."""
    seen = size = counted_from = 0
    watch: Stopwatch | None = None
    async with _connect(load) as client, client.consumer(load.topic, group=f"bench-{time.time_ns()}") as consumer:
        deadline = time.monotonic() + load.timeout_s
        async for batch in consumer.batches(max_records=10_000, max_wait=0.2):
            if watch is None:  # joining the group is not what is measured; neither is the first batch
                watch = Stopwatch()
                seen = counted_from = len(batch)
                continue
            for message in batch:
                size += len(message.key or b"") + len(message.raw or b"")
            seen += len(batch)
            if seen >= load.records or time.monotonic() > deadline:
                break
    if watch is None:
        raise DeadlineExceeded("nothing arrived")
    return watch.measured(seen - counted_from, size, errors=max(0, load.records - seen))


async def end_to_end(load: Load) -> Measured:
    """From send to a consumer's hands, at a steady rate; one consumer, linger 0."""
    times: list[float] = []
    total = load.warm_up + load.records
    rate = load.rate or 1_000.0
    async with (
        _connect(load) as sending,
        _connect(load) as reading,
        reading.consumer(load.topic, start="end") as consumer,
        _producer(sending, load, linger=0) as producer,
    ):
        sender = asyncio.create_task(_paced(producer, load, total, rate))
        deadline = time.monotonic() + load.timeout_s
        async for message in consumer:
            sent_ns = int((message.raw or b"0").split(b" ", 1)[0])
            times.append((time.perf_counter_ns() - sent_ns) / 1e9)
            if len(times) >= total or time.monotonic() > deadline:
                break
        await sender
    return latency_of(times[load.warm_up :], errors=total - len(times))


async def _paced(producer: Producer, load: Load, total: int, rate: float) -> None:
    pad = load.value()
    await asyncio.sleep(0.5)  # the consumer stands at the end before the first record comes
    started = time.perf_counter()
    for number in range(total):
        due = started + number / rate
        if (pause := due - time.perf_counter()) > 0:
            await asyncio.sleep(pause)
        stamp = b"%d " % time.perf_counter_ns()
        producer.send_nowait(load.topic, stamp + pad[len(stamp) :], load.key_of(number))
    await producer.flush()
