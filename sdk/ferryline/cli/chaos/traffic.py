"""The load of a run: producers, members of a group and readers on their own, each with a client of its own.

Every send is of a chunk of records to one partition; the history gets one line for each chunk, so that a hundred
thousand records a second can be written down and judged.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ferryline.cli.chaos.record import FAIL, INFO, OK, Place, Recorder, now_us, number_of, payload
from ferryline.cli.traffic import count
from ferryline.message import TopicPartition
from ferryline.protocol.errors import BufferFull, FerrylineError
from ferryline.protocol.partitioner import partition_of

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.consumer import Consumer
    from ferryline.message import Message
    from ferryline.producer import Producer

GROUP = "chaos"
CHUNKS_PER_S = 10.0  # of one lane, when the rate allows
CHUNK_MAX = 500
IN_FLIGHT = 3  # chunks of one lane
DELIVERY_S = 30.0
RETRY_S = 0.2
QUEUE_TOPIC = "chaos-queue"
QUEUE_KEYS = 16  # of one producer in one partition
QUEUE_RATE = 100.0  # at most: each record of it is a frame or more of its own
QUEUE_SHARE = 0.2  # of the rate, at most
CLAIM_US = 15_000_000  # a claim is answered or given up within this


@dataclass(frozen=True)
class Topic:
    """A topic of a run."""

    name: str
    partitions: int
    replication: int
    min_isr: int
    keys: int = 1  # of one producer in one partition

    @property
    def places(self) -> list[Place]:
        return [(self.name, number) for number in range(self.partitions)]


def topics_for(brokers: int, partitions: int) -> list[Topic]:
    """One topic with two copies that serves with one, one with three (if there are as many brokers) that needs two."""
    found = [Topic("chaos-two", partitions, min(2, brokers), 1)]
    if brokers >= 3:
        found.append(Topic("chaos-three", partitions, 3, 2))
    return found


def queue_topic(brokers: int) -> Topic:
    """One that is read as a queue, too."""
    return Topic(QUEUE_TOPIC, 2, min(2, brokers), 1, QUEUE_KEYS)


def keys_for(producer: int, place: Place, partitions: int, count: int = 1) -> list[bytes]:
    """Keys of this producer that belong to this partition."""
    keys = (b"p%d-%d" % (producer, number) for number in range(1_000_000))
    return list(islice((key for key in keys if partition_of(key, partitions) == place[1]), count))


@dataclass(frozen=True)
class Pace:
    """How one lane sends: ``chunk`` records every ``interval`` seconds."""

    chunk: int
    interval: float


def pace_of(rate: float, lanes: int) -> Pace:
    """``rate`` records a second, shared by so many lanes."""
    interval = max(1 / CHUNKS_PER_S, lanes / rate)
    chunk = max(1, min(CHUNK_MAX, round(rate * interval / lanes)))
    return Pace(chunk, chunk * lanes / rate)


@dataclass(frozen=True)
class Lane:
    """What one producer sends to one partition, with its keys in turns."""

    proc: str
    place: Place
    keys: list[bytes]
    pace: Pace

    def key(self, number: int) -> bytes:
        """Of the record with this number."""
        return self.keys[number % len(self.keys)]


class Traffic:
    """All clients of a run. `start`, then `finish_sending`, then `drained`, then `stop`."""

    def __init__(
        self,
        connect: Callable[[], Client],
        recorder: Recorder,
        topics: Sequence[Topic],
        *,
        rate: float,
        value_bytes: int = 100,
        producers: int = 3,
        members: int = 3,
        delivery_s: float = DELIVERY_S,
    ) -> None:
        """Receipts of each producer are kept beside the history."""
        self.recorder = recorder
        self.receipts = [recorder.path.with_name(f"receipts-{number}.jsonl") for number in range(producers)]
        self.topics = topics
        self.errors: Counter[str] = Counter()
        self.read_errors: dict[str, int] = {}
        self.send_errors: dict[str, int] = {}
        self.highest: dict[Place, int] = {}  # acknowledged
        self.seen: dict[Place, int] = {}  # highest offset that the group was handed
        self._connect = connect
        self._delivery_s = delivery_s
        self._producers, self._members = producers, members
        self._padding = b"." * max(0, value_bytes - 10)
        self.on_stored: Callable[[Place, int, bytes, int], None] | None = None  # offset, key, since when, where keyed
        slow = sum(topic.partitions for topic in topics if topic.keys > 1)
        queued = min(QUEUE_RATE, rate * QUEUE_SHARE) if slow else 0.0
        plain = pace_of(rate - queued, producers * (sum(topic.partitions for topic in topics) - slow))
        self._paces = {topic.name: pace_of(queued, producers * slow) if topic.keys > 1 else plain for topic in topics}
        self._stop = asyncio.Event()
        self._senders: list[asyncio.Task[None]] = []
        self._readers: list[asyncio.Task[None]] = []
        self._clients: list[Client] = []

    async def start(self) -> None:
        """Begin to send and to read."""
        for number in range(self._producers):
            self._senders.append(asyncio.create_task(self._produce(number)))
        for number in range(self._members):
            self._readers.append(asyncio.create_task(self._member(number)))
        for topic in self.topics:
            self._readers.append(asyncio.create_task(self._reader(topic)))

    # -- sending -------------------------------------------------------------------------------------

    async def _produce(self, number: int) -> None:
        proc = f"producer-{number}"
        async with (
            self._connect() as client,
            client.producer(
                linger=0.005, delivery_timeout=self._delivery_s, receipts=self.receipts[number]
            ) as producer,
        ):
            places = [(topic, place) for topic in self.topics for place in topic.places]
            async with asyncio.TaskGroup() as lanes:
                for turn, (topic, place) in enumerate(places):
                    keys = keys_for(number, place, topic.partitions, topic.keys)
                    lane = Lane(proc, place, keys, self._paces[topic.name])
                    lanes.create_task(self._lane(lane, producer, turn / len(places)))

    async def _lane(self, lane: Lane, producer: Producer, shift: float) -> None:
        """Chunks at the rate of this lane, a few in flight; later ones wait while the cluster does not answer."""
        settling: set[asyncio.Task[None]] = set()
        interval, chunk = lane.pace.interval, lane.pace.chunk
        due = time.monotonic() + shift * interval
        while not self._stop.is_set():
            due = max(due + interval, time.monotonic() - 1.0)  # what was missed for longer is not made up for
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while len(settling) >= IN_FLIGHT:
                _, settling = await asyncio.wait(settling, return_when=asyncio.FIRST_COMPLETED)
            first = self.recorder.attempt(lane.proc, lane.place, chunk)
            t0 = now_us()
            futures = await self._hand_over(producer, lane, first)
            settling.add(asyncio.create_task(self._settle(lane, first, t0, futures)))
        if settling:
            await asyncio.wait(settling)

    async def _hand_over(self, producer: Producer, lane: Lane, first: int) -> list[asyncio.Future[Any]]:
        send, topic, padding = producer.send_nowait, lane.place[0], self._padding
        futures: list[asyncio.Future[Any]] = []
        while len(futures) < lane.pace.chunk:
            number = first + len(futures)
            try:
                futures.append(send(topic, payload(number, padding), lane.key(number)))
            except BufferFull:
                await asyncio.sleep(0.005)
            except FerrylineError as error:  # refused before anything was sent
                refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                refused.set_exception(error)
                futures.append(refused)
        return futures

    async def _settle(self, lane: Lane, first: int, t0: int, futures: list[asyncio.Future[Any]]) -> None:
        """Write down what became of a chunk. Its records are answered in order, so the last one is waited for."""
        await asyncio.wait(futures[-1:])
        await asyncio.wait(futures)
        values: dict[str, list[int]] = {OK: [], FAIL: [], INFO: []}
        offsets: list[int] = []
        for number, future in enumerate(futures, first):
            error = future.exception()
            if error is None:
                values[OK].append(number)
                offsets.append(future.result().offset)
                if self.on_stored is not None and len(lane.keys) > 1:
                    self.on_stored(lane.place, offsets[-1], lane.key(number), t0)
            else:
                count(self.send_errors, error)
                definite = isinstance(error, FerrylineError) and error.definite
                values[FAIL if definite else INFO].append(number)
        for outcome, numbers in values.items():
            if numbers:
                self.recorder.sent(lane.proc, lane.place, outcome, t0, numbers, offsets if outcome == OK else ())
        if offsets:
            self.highest[lane.place] = max(self.highest.get(lane.place, -1), *offsets)

    async def finish_sending(self, within_s: float) -> None:
        """Send no more, and wait until every record sent is settled. Raises TimeoutError, and what a sender raised."""
        self._stop.set()
        async with asyncio.timeout(within_s):
            await asyncio.gather(*self._senders)

    # -- reading -------------------------------------------------------------------------------------

    async def _member(self, number: int) -> None:
        """A member of the group: receive, write down, commit; after an error go on as a new member."""
        life = 0
        async with self._connect() as client:
            while True:
                life += 1
                try:
                    await _Member(self, client, f"member-{number}.{life}").run([topic.name for topic in self.topics])
                except FerrylineError as error:
                    count(self.read_errors, error)
                    await asyncio.sleep(RETRY_S)

    async def _reader(self, topic: Topic) -> None:
        """A reader of the first partition on its own, from the start; after an error from the start again."""
        life = 0
        async with self._connect() as client:
            while True:
                life += 1
                proc, place = f"reader-{topic.name}.{life}", topic.places[0]
                try:
                    async with client.consumer(topic.name, partitions=[place[1]], start="start") as consumer:
                        self.recorder.begins(proc, place, now_us(), 0)
                        while True:
                            t0 = now_us()
                            self.write(proc, t0, await consumer.pull(max_records=5_000, max_wait=1.0))
                            await asyncio.sleep(0.05)
                except FerrylineError as error:
                    count(self.read_errors, error)
                    await asyncio.sleep(RETRY_S)

    def write(self, proc: str, t0: int, batch: Sequence[Message[Any]], group: str = "") -> None:
        """Poll lines for a batch: one for each stretch of one partition."""
        first = 0
        while first < len(batch):
            place = (batch[first].topic, batch[first].partition)
            last = first
            while last < len(batch) and batch[last].partition == place[1] and batch[last].topic == place[0]:
                last += 1
            part = batch[first:last]
            offsets = [message.offset for message in part]
            self.recorder.polled_at(proc, place, t0, [number_of(message.raw) for message in part], offsets, group)
            if group:
                self.seen[place] = max(self.seen.get(place, -1), offsets[-1])
            first = last

    def behind(self) -> int:
        """Acknowledged records that lie beyond what the group has been handed."""
        return sum(max(0, highest - self.seen.get(place, -1)) for place, highest in self.highest.items())

    async def drained(self, within_s: float) -> bool:
        """Wait until the group was handed everything that was acknowledged."""
        end = time.monotonic() + within_s
        while self.behind():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.1)
        return True

    async def stop(self) -> None:
        """End whatever still runs."""
        self._stop.set()
        tasks = [*self._senders, *self._readers]
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                count(self.read_errors, result)


class _Member:
    """One life of a member of the group."""

    def __init__(self, traffic: Traffic, client: Client, proc: str) -> None:
        self._traffic = traffic
        self._recorder = traffic.recorder
        self._client = client
        self._proc = proc
        self._consumer: Consumer[bytes]
        self._generations: dict[Place, int] = {}

    async def run(self, topics: list[str]) -> None:
        """Read and commit until something fails."""
        self._consumer = self._client.consumer(
            topics, group=GROUP, auto_commit=False, on_assign=self._assigned, on_revoke=self._revoked
        )
        async with self._consumer as consumer:
            t0 = now_us()
            async for batch in consumer.batches(max_records=5_000, max_wait=0.05):
                self._traffic.write(self._proc, t0, batch, GROUP)
                await self._commit(consumer)
                t0 = now_us()

    def _assigned(self, partitions: list[TopicPartition]) -> None:
        by_place = self._by_place()
        for place in partitions:
            partition = by_place[place]
            self._generations[place] = partition.generation
            # The claim itself was made before we are told, and no longer ago than it may take.
            self._recorder.claimed(
                self._proc, place, GROUP, partition.generation, now_us() - CLAIM_US, partition.position
            )

    def _revoked(self, partitions: list[TopicPartition]) -> None:
        for place in partitions:
            self._recorder.released(self._proc, place, GROUP, self._generations.pop(place, -1))

    def _by_place(self) -> dict[Place, Any]:
        fetcher = self._consumer._fetcher
        found = fetcher.partitions.values() if fetcher is not None else ()
        return {(item.source.topic, item.source.partition): item for item in found}

    async def _commit(self, consumer: Consumer[bytes]) -> None:
        """Commit what was handed out; one line for each partition, unknown where the answer does not say."""
        wanted = {
            place: (item, item.position, item.generation)
            for place, item in self._by_place().items()
            if item.position != item.committed
        }
        t0 = now_us()
        failed: FerrylineError | None = None
        try:
            await consumer.commit()
        except FerrylineError as error:
            failed = error
        for place, (item, offset, generation) in wanted.items():
            outcome = OK if failed is None or item.committed == offset else INFO
            self._recorder.committed(self._proc, place, GROUP, generation, t0, offset, outcome)
        if failed is not None:
            raise failed
