"""Put a backup into an empty cluster: records of the coordinator, then the logs, then let each partition be led.

One broker takes in the logs of a partition, and leads it afterwards; the others fetch from it as from any primary. What
was interrupted is gone on with: the broker says how far its copy has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ferryline.backup.calls import BackupCalls, Standing
from ferryline.backup.files import LOGS, LogEntry, Manifest, PartitionEntry, pieces
from ferryline.backup.taking import AT_ONCE, Throttle
from ferryline.protocol.errors import Conflict, FerrylineError, NotReady
from ferryline.protocol.records import split_batches

if TYPE_CHECKING:
    from ferryline.client import Client

PARTITIONS_AT_ONCE = 200  # in one request to the coordinator
RECORDS, STATE = LOGS
Told = Callable[[int, str], None]


class Restoring:
    """One run. ``rate``: bytes a second at most, 0 for as fast as it goes."""

    def __init__(
        self,
        client: Client,
        folder: Path,
        manifest: Manifest,
        *,
        rate: int = 0,
        patience_s: float = 60.0,
        told: Told = lambda *_: None,
    ) -> None:
        self._client = client
        self._calls = BackupCalls(client, patience_s)
        self._folder = folder
        self._manifest = manifest
        self._throttle = Throttle(rate)
        self._told = told

    async def run(self) -> None:
        """Returns once every partition is led. Raises Conflict for a cluster that is not empty, FerrylineError,
        BackupError; what is there by then stays, and the next run goes on from there."""
        takers = await self._begin()
        room = asyncio.Semaphore(AT_ONCE)

        async def one(part: PartitionEntry) -> None:
            async with room:
                await self._partition(takers[(part.topic_id, part.partition)], part)

        async with asyncio.TaskGroup() as group:
            for part in self._manifest.partitions:
                if takers[(part.topic_id, part.partition)]:
                    group.create_task(one(part))

    def in_sync(self) -> bool:
        """Whether every partition has all of its copies in sync, as far as is known now."""
        parts = self._client.routing.cluster.partitions
        return all(
            (meta := parts.get((part.topic_id, part.partition))) is not None and set(meta.isr) == set(meta.replicas)
            for part in self._manifest.partitions
        )

    # -- inside -------------------------------------------------------------------------------------

    async def _begin(self) -> dict[tuple[str, int], int]:
        """Topics and partitions first, what leads to topics last. Returns which broker takes which logs; 0: an earlier
        run has put them in."""
        takers: dict[tuple[str, int], int] = {}
        batch: dict[str, str] = {}
        epochs: dict[str, int] = {}
        by_topic: dict[str, list[PartitionEntry]] = {}
        for part in self._manifest.partitions:
            by_topic.setdefault(part.topic_id, []).append(part)

        async def send() -> None:
            body = {"records": batch, "epochs": epochs}
            answer = await self._calls.coordinator("POST", "/v1/restore", body)
            takers.update({(topic_id, number): broker for topic_id, number, broker in answer["partitions"]})
            batch.clear()
            epochs.clear()

        records = self._manifest.records
        for key in sorted(records, key=lambda key: (not key.startswith("topic/"), key)):
            batch[key] = records[key]
            parts = by_topic.get(key.partition("/")[2], ())
            epochs.update({f"{part.topic_id}/{part.partition}": part.epoch for part in parts})
            if len(epochs) >= PARTITIONS_AT_ONCE or len(batch) >= PARTITIONS_AT_ONCE:
                await send()
        if batch:
            await send()
        return takers

    async def _partition(self, broker: int, part: PartitionEntry) -> None:
        name = f"{part.topic}/{part.partition}"
        if not await self._finished(broker, part):
            for log in LOGS:
                await self._log(broker, part, log, f"{log} of {name}")
            await self._calls.patiently(lambda: self._calls.restored(broker, part.topic_id, part.partition))
        body = {"topic_id": part.topic_id, "partition": part.partition, "broker": broker}
        await self._calls.coordinator("POST", "/v1/restore/finish", body)

    async def _finished(self, broker: int, part: PartitionEntry) -> bool:
        """Whether an earlier run has put everything in."""
        state = await self._standing(broker, part, STATE)
        return state.log_end > part.state.end

    async def _standing(self, broker: int, part: PartitionEntry, log: str) -> Standing:
        async def once() -> Standing:
            try:
                return await self._calls.read_of(broker, part.topic_id, part.partition, log, limit=0)
            except FerrylineError as error:
                if error.http_status == 404:
                    raise NotReady(f"broker {broker} does not know of it yet") from None
                raise

        return await self._calls.patiently(once)

    async def _log(self, broker: int, part: PartitionEntry, log: str, doing: str) -> None:
        entry = part.log(log)
        key = (part.topic_id, part.partition)
        standing = await self._standing(broker, part, log)
        if standing.tail_epoch < 0 and standing.log_end != entry.start:
            await self._put(broker, key, log, b"", entry.start, entry.epoch_before)
        at = standing.log_end if standing.tail_epoch >= 0 and standing.log_end > entry.start else entry.start
        if at > entry.end:
            raise Conflict(f"{doing}: broker {broker} holds offsets up to {at}, the backup up to {entry.end}")
        for data, base in self._rest(part, entry, at):
            await self._put(broker, key, log, data, base, entry.epoch_before if base == entry.start else -1)
            self._told(len(data), doing)
            await self._throttle.spend(len(data))

    def _rest(self, part: PartitionEntry, entry: LogEntry, at: int) -> Iterator[tuple[bytes, int]]:
        """Pieces of the log from offset ``at`` on, and where each begins. Raises BackupError if none begins there."""
        for number, file in enumerate(entry.files):
            following = entry.files[number + 1].base if number + 1 < len(entry.files) else entry.end
            if following <= at:
                continue
            for data, headers in pieces(self._folder / part.folder / file.name, file.size):
                if headers[-1][1].next_offset <= at:
                    continue
                start = next((place for place, header in headers if header.base_offset >= at), len(data))
                base = next(header.base_offset for place, header in headers if place == start)
                yield data[start:], base

    async def _put(
        self, broker: int, key: tuple[str, int], log: str, data: bytes, base: int, epoch_before: int
    ) -> None:
        """Put a piece in; one that is there already, because its answer was lost, is left out."""
        end = split_batches(data)[-1][1].next_offset if data else base

        async def once() -> None:
            try:
                await self._calls.put(broker, key, log, data, base, epoch_before)
            except Conflict as conflict:
                if conflict.details.get("log_end") != end:
                    raise

        await self._calls.patiently(once)
