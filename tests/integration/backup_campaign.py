"""A backup under load, put into an empty cluster and compared: `python -m tests.integration.backup_campaign`.

Producers, a consumer group that commits, receivers that acknowledge and reject; a broker is killed with -9 while the
backup is being taken, and started again. Then, up to the mark of the backup:

* bytes: every batch of every partition is the same in the restored cluster, byte for byte, at the same offset;
* offsets: each group stands where it stood at the mark, and not before anything it was told is committed;
* settled: no record comes back to a receiver that was settled at the mark, or acknowledged before state was read;
* lost: every other record comes, or its copy is among the dead letters;
* records: topics, exchanges, bindings and principals are the same, and a key of the source opens the restored cluster;
  a cluster with topics refuses the backup.

Prints a JSON line, and exits 1 unless all of them hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.backup.calls import BackupCalls
from ferryline.backup.files import Manifest, PartitionEntry, pieces, verify
from ferryline.backup.restoring import Restoring
from ferryline.backup.taking import Taking
from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.access import READ, TOPIC, WRITE, Grant
from ferryline.protocol.dead_letters import HEADER_GROUP, HEADER_ORIGIN_OFFSET, HEADER_ORIGIN_PARTITION
from ferryline.protocol.errors import Conflict, FerrylineError
from ferryline.protocol.records import decode_batch, split_batches
from ferryline_broker.core.epochs import EpochIndex
from ferryline_broker.core.groups import GroupTable
from tests.integration.ledgers import tell

LOG_TOPIC, QUEUE_TOPIC, LETTERS, EXCHANGE = "orders", "jobs", "jobs.dlq", "events"
LOG_GROUP, QUEUE_GROUP = "billing", "packing"
ADMIN = "principal/admin"
DRAIN_S, IDLE_S = 120.0, 1.5
WRONG = ("bytes_differ", "offsets_differ", "settled_again", "lost", "records_differ")
Place = tuple[int, int]  # partition, offset


class Load:
    """Clients of the source cluster, and what they were told. Times are monotonic, of the answers."""

    def __init__(self, client: fl.Client, rate: float, seed: int) -> None:
        self._client, self._rate, self._random = client, rate, random.Random(seed)
        self.sent = 0
        self.acked: dict[Place, float] = {}
        self.committed: list[tuple[float, int, int]] = []  # when, partition, offset
        self.failed: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()

    def start(self) -> None:
        sending = (self._produce(LOG_TOPIC), self._produce(QUEUE_TOPIC))
        works = (*sending, self._consume(), self._receive(), self._receive())
        self._tasks = [asyncio.create_task(work) for work in works]

    async def stop(self) -> None:
        self._stop.set()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, BaseException):
                self.failed.append(repr(outcome))

    async def _produce(self, topic: str) -> None:
        async with self._client.producer() as producer:
            number = 0
            while not self._stop.is_set():
                count = max(1, int(self._rate / 40))
                values = [f"{topic}-{number + n}-{'x' * self._random.randrange(200)}" for n in range(count)]
                sends = (producer.send(topic, value, key=f"k{n % 500}") for n, value in enumerate(values))
                await asyncio.gather(*sends)
                number += count
                self.sent += count
                await asyncio.sleep(0.05)

    async def _consume(self) -> None:
        async with self._client.consumer(LOG_TOPIC, group=LOG_GROUP, auto_commit=False) as consumer:
            while not self._stop.is_set():
                batch = await consumer.pull(200, 0.2)
                if not batch:
                    continue
                with contextlib.suppress(FerrylineError):  # a rebalance or a fail-over: the next one says more
                    await consumer.commit()
                    now = time.monotonic()
                    ends = {message.partition: message.offset + 1 for message in batch}
                    self.committed += [(now, partition, offset) for partition, offset in ends.items()]

    async def _receive(self) -> None:
        async with self._client.receiver(QUEUE_TOPIC, group=QUEUE_GROUP, lease=5.0, prefetch=64) as receiver:
            async for message in _until(receiver, self._stop):
                with contextlib.suppress(FerrylineError):  # unknown: it may come again, and the checks allow for both
                    if message.offset % 23 == 7:
                        await message.reject("every 23rd")
                    elif message.offset % 5:
                        await message.ack()
                        self.acked[(message.partition, message.offset)] = time.monotonic()
                    else:
                        await message.nack(delay=0.5)


async def _until(receiver: Any, stop: asyncio.Event) -> AsyncIterator[Any]:
    """What it hands out until ``stop`` is set."""
    ended = asyncio.create_task(stop.wait())
    try:
        while not stop.is_set():
            asked = asyncio.ensure_future(receiver.__anext__())
            await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                return
            yield asked.result()
    finally:
        ended.cancel()


# -- what a backup says ------------------------------------------------------------------------------


def tables(folder: Path, manifest: Manifest, topic: str) -> dict[int, tuple[GroupTable, PartitionEntry]]:
    """The delivery state at the mark, as a broker reads it."""
    found = {}
    for part in manifest.partitions:
        if part.topic == topic:
            entries = [
                (record.offset, header.epoch, record.value or b"")
                for data, headers in batches(folder, part, "state")
                for at, header in headers
                if not header.is_control
                for record in decode_batch(data[at : at + header.size], header)
            ]
            epochs = EpochIndex((), part.records.epoch_before)
            for _, headers in batches(folder, part, "records"):
                for _, header in headers:
                    epochs.observe(header.epoch, header.base_offset)
            table = GroupTable.replay(entries, epochs, part.records.start, part.records.end)
            found[part.partition] = (table, part)
    return found


def batches(folder: Path, part: PartitionEntry, log: str) -> Any:
    for file in part.log(log).files:
        yield from pieces(folder / part.folder / file.name, file.size)


def data_offsets(folder: Path, part: PartitionEntry) -> set[int]:
    return {
        offset
        for _, headers in batches(folder, part, "records")
        for _, header in headers
        if not header.is_control
        for offset in range(header.base_offset, header.next_offset)
    }


async def same_bytes(calls: BackupCalls, folder: Path, part: PartitionEntry) -> int:
    """Compare a restored log of records with the source, piece by piece; returns bytes that differ or are missing."""
    wrong = 0
    for data, headers in batches(folder, part, "records"):
        at, base = 0, headers[0][1].base_offset
        while at < len(data):
            found = await calls.read(part.topic_id, part.partition, "records", from_=base, limit=len(data) - at)
            size = min(len(found.data), len(data) - at)
            if not size or found.data[:size] != data[at : at + size]:
                return wrong + len(data) - at
            base = split_batches(found.data)[-1][1].next_offset
            at += size
    return wrong


# -- the story ---------------------------------------------------------------------------------------


def guarded(root: Path) -> tuple[ProcessCluster, Path]:
    """A cluster that lets nobody in without a token, and the file of the first one."""
    access, key = root / "access.toml", root / "admin.key"
    root.mkdir(parents=True)
    access.write_text("open_metrics = false\n")
    args = ["--access", str(access), "--bootstrap-admin", str(key)]
    return ProcessCluster(root / "cluster", brokers=3, coordinator_args=args), key


async def shop_of(client: fl.Client) -> str:
    """Another principal; its key."""
    await client.admin.create_principal("shop", [Grant(TOPIC, f"{LOG_TOPIC}*", (READ, WRITE))])
    return (await client.admin.create_key("shop")).key


async def is_known(cluster: ProcessCluster, token: str) -> bool:
    """Whether a token of the source opens the restored cluster, for what it was made for."""
    async with fl.connect(cluster.urls, ca=cluster.ca, token=token) as client:
        async with client.producer() as producer:
            await producer.send(LOG_TOPIC, b"after the restore")
        return (await client.admin.whoami()).principal == "shop"


async def prepare(client: fl.Client, partitions: int) -> None:
    await client.admin.create_topic(LOG_TOPIC, partitions=partitions, segment_bytes=2**20)
    await client.admin.create_topic(
        QUEUE_TOPIC, partitions=partitions, retry=fl.Retry(3, backoff=fl.exponential(0.2, 1.0))
    )
    await client.admin.create_exchange(EXCHANGE, "topic")
    await client.admin.bind(EXCHANGE, topic=LOG_TOPIC, routing_key="eu.#")


class Backup:
    """A backup being taken: when state was first read, and a kill on the way."""

    def __init__(self, folder: Path, cluster: ProcessCluster, kill_after: int) -> None:
        self.folder, self.cluster, self._kill_after = folder, cluster, kill_after
        self.state_from = 0.0
        self._bytes = 0
        self._killing: asyncio.Task[None] | None = None

    def told(self, size: int, doing: str) -> None:
        self._bytes += size
        if doing.startswith("records of"):
            self.state_from = time.monotonic()
        if self._bytes > self._kill_after and self._killing is None:
            self._killing = asyncio.create_task(self._kill())

    async def _kill(self) -> None:
        name = self.cluster.brokers[1]
        await self.cluster.kill(name)
        await asyncio.sleep(1.0)
        await self.cluster.restart(name)

    async def take(self, client: fl.Client, rate: int) -> Manifest:
        manifest = await Taking(client, self.folder, rate=rate, told=self.told).run()
        if self._killing is not None:
            await self._killing
        return manifest

    @property
    def killed(self) -> bool:
        return self._killing is not None


async def drain(
    client: fl.Client, wanted: dict[int, set[int]], dead: set[Place], look: Callable[[], Awaitable[set[Place]]]
) -> set[Place]:
    """Everything that the restored queue hands out, until all that is wanted came or died, and nothing more comes."""
    got: set[Place] = set()
    missing = {(partition, offset) for partition, offsets in wanted.items() for offset in offsets}
    end = time.monotonic() + DRAIN_S
    async with client.receiver(QUEUE_TOPIC, group=QUEUE_GROUP, lease=10.0, prefetch=256) as receiver:
        while time.monotonic() < end:
            try:
                async with asyncio.timeout(IDLE_S):
                    message = await receiver.__anext__()
            except TimeoutError:
                if not missing - got - dead - await look():
                    break
                continue
            got.add((message.partition, message.offset))
            message.ack_nowait()
    return got


async def copies(calls: BackupCalls, manifest: Manifest) -> set[Place]:
    """Origins of the dead letters that the restored cluster holds now: some died there, of a lease of the old one."""
    found = set()
    for part in manifest.partitions:
        if part.topic != LETTERS:
            continue
        at = part.records.start
        while (read := await calls.read(part.topic_id, part.partition, "records", from_=at)).data:
            for place, header in split_batches(read.data):
                at = header.next_offset
                if header.is_control:
                    continue
                for record in decode_batch(read.data[place : place + header.size], header):
                    told = dict(record.headers)
                    assert told[HEADER_GROUP] == QUEUE_GROUP.encode()
                    found.add((int(told[HEADER_ORIGIN_PARTITION] or b""), int(told[HEADER_ORIGIN_OFFSET] or b"")))
    return found


async def compare(
    client: fl.Client, source: dict[str, Any], manifest: Manifest, folder: Path, load: Load, state_from: float
) -> dict[str, Any]:
    """Counts of what does not agree; all 0 when it should."""
    calls = BackupCalls(client, 60.0)
    found: dict[str, Any] = dict.fromkeys(WRONG, 0)
    for part in manifest.partitions:
        found["bytes_differ"] += await same_bytes(calls, folder, part)
    now = await calls.coordinator("GET", "/v1/backup")
    ours = {key: value for key, value in now["records"].items() if key != ADMIN}  # each cluster has made its own
    found["records_differ"] += ours != {key: value for key, value in manifest.records.items() if key != ADMIN}
    found["records_differ"] += now["cluster_id"] == source["cluster_id"]
    async with client.consumer(LOG_TOPIC, group=LOG_GROUP, auto_commit=False) as consumer:
        for partition, (table, _) in tables(folder, manifest, LOG_TOPIC).items():
            stood = table.offset(LOG_GROUP).offset
            told = await _committed(consumer, partition)
            early = [offset for when, p, offset in load.committed if p == partition and when < state_from]
            found["offsets_differ"] += told != (stood if stood >= 0 else None) or stood < max(early, default=-1)
    wanted: dict[int, set[int]] = {}
    settled: set[Place] = set()
    for partition, (table, part) in tables(folder, manifest, QUEUE_TOPIC).items():
        queue = table.queues[QUEUE_GROUP]
        offsets = data_offsets(folder, part)
        gone = {offset for offset in offsets if queue.is_settled(offset)}
        dying = {offset for offset, story in queue.stories.items() if story.dying is not None}
        settled |= {(partition, offset) for offset in gone}
        wanted[partition] = offsets - gone - dying
    early_acks = {place for place, when in load.acked.items() if when < state_from}
    letters = await copies(calls, manifest)
    at_mark = len(letters)
    got = await drain(client, wanted, letters, lambda: copies(calls, manifest))
    letters |= await copies(calls, manifest)
    dead = settled - set(load.acked) - letters  # settled, not by an acknowledgement that anybody was told of
    found["settled_again"] = len(got & settled) + len(early_acks - settled)
    found["lost"] = len({(p, o) for p, some in wanted.items() for o in some} - got - letters)
    return {
        **found,
        "settled": len(settled),
        "came": len(got),
        "letters": at_mark,
        "died_later": len(letters) - at_mark,
        "acks_unheard": len(dead),
    }


async def _committed(consumer: Any, partition: int) -> int | None:
    """Once this consumer holds the partition."""
    end = time.monotonic() + 60.0
    while (LOG_TOPIC, partition) not in [(tp.topic, tp.partition) for tp in consumer.assignment]:
        assert time.monotonic() < end, f"{LOG_TOPIC}/{partition} was not assigned"
        await asyncio.sleep(0.05)
    committed: int | None = await consumer.committed(fl.TopicPartition(LOG_TOPIC, partition))
    return committed


async def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The whole story, once."""
    folder = root / "backup"
    (source, source_key), (target, target_key) = guarded(root / "source"), guarded(root / "target")
    try:
        await source.start()
        async with fl.connect(source.urls, ca=source.ca, token=source_key.read_text().strip()) as client:
            await prepare(client, options.partitions)
            shop = await shop_of(client)
            load = Load(client, options.rate, options.seed)
            load.start()
            await asyncio.sleep(options.before)
            first = await Taking(client, folder).run() if options.incremental else None
            backup = Backup(folder, source, options.kill_after)
            began = time.monotonic()
            manifest = await backup.take(client, options.bytes_per_s)
            took = time.monotonic() - began
            await asyncio.sleep(options.after)
            await load.stop()
            records = await BackupCalls(client, 60.0).coordinator("GET", "/v1/backup")
        await source.stop()
        checked = sum(verify(folder, manifest))
        await target.start()
        async with fl.connect(target.urls, ca=target.ca, token=target_key.read_text().strip()) as client:
            first_try = Restoring(client, folder, manifest, told=interrupt_at(len(manifest.partitions)))
            resumed = await interrupted(first_try.run)
            began = time.monotonic()
            restoring = Restoring(client, folder, manifest)
            await restoring.run()
            restored = time.monotonic() - began
            refused = await _refused(client, folder, manifest)
            found = await compare(client, records, manifest, folder, load, backup.state_from)
        known = await is_known(target, shop)
        return {
            "sent": load.sent,
            "acked": len(load.acked),
            "client_failures": load.failed,
            "killed": backup.killed,
            "first_bytes": first.size if first is not None else 0,
            "bytes": manifest.size,
            "bytes_checked": checked,
            "partitions": len(manifest.partitions),
            "offsets": sum(part.records.end for part in manifest.partitions),
            "backup_s": round(took, 2),
            "restore_s": round(restored, 2),
            "resumed": resumed,
            "refused_when_not_empty": refused,
            "keys_open_it": known,
            **found,
        }
    finally:
        await source.kill_all()
        await target.kill_all()


class Interrupted(Exception):
    """Instead of a Ctrl-C."""


def interrupt_at(number: int) -> Callable[[int, str], None]:
    """What is told of progress, until it is told so often."""
    left = number

    def told(_: int, __: str) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise Interrupted

    return told


async def interrupted(work: Callable[[], Awaitable[Any]]) -> bool:
    """Whether ``work`` was interrupted, and not by anything else."""
    stopped = False
    try:
        await work()
    except* Interrupted:
        stopped = True
    return stopped


async def _refused(client: fl.Client, folder: Path, manifest: Manifest) -> bool:
    try:
        await Restoring(client, folder, manifest, patience_s=5.0).run()
    except Conflict as conflict:
        return "not empty" in conflict.message
    return False


def good(result: dict[str, Any]) -> bool:
    """Whether a result is what it has to be: nothing differs, and there was something that could have."""
    held = not any(result[name] for name in WRONG) and not result["client_failures"]
    return (
        held
        and result["refused_when_not_empty"]
        and result["keys_open_it"]
        and result["resumed"]
        and result["killed"]
        and min(result["settled"], result["came"]) > 0
    )


def options_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2_000, help="records a second and topic")
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--before", type=float, default=30.0, help="seconds of load before the backup")
    parser.add_argument("--after", type=float, default=3.0, help="seconds of load after it")
    parser.add_argument("--bytes-per-s", type=int, default=2_000_000, help="of the backup, so that it takes a while")
    parser.add_argument("--kill-after", type=int, default=500_000, help="bytes of the backup before the kill")
    parser.add_argument("--incremental", action="store_true", help="take one before, and bring it up to date")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ledger", type=Path, help="append the results to this file")
    return parser.parse_args(argv)


def main() -> int:
    options = options_of()
    bad = 0
    for number in range(options.rounds):
        options.seed += number
        options.incremental = bool(number % 2)
        if options.incremental:
            options.kill_after = min(options.kill_after, 20_000)  # there is little that is new
        with tempfile.TemporaryDirectory(prefix="ferryline-backup-") as folder:
            result = asyncio.run(run(options, Path(folder)))
        about = {"good": good(result), "seed": options.seed, "incremental": options.incremental}
        tell({**about, **result}, options.ledger)
        bad += not good(result)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
