"""Take a backup of a running cluster.

Order is what makes it one picture, though no two logs are read at the same time:

1. Most of the records of every partition, however long that takes.
2. The state log of every partition: who has settled what. Topics that came into being meanwhile (dead letters) join in.
3. The rest of the records, up to each high watermark as it is then. That is the mark.

So every record that a state log names is in the backup, and so is every copy in the dead letters that it calls made.
What was settled after step 2 comes back as not settled.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.backup.calls import BackupCalls, Standing
from ferryline.backup.files import (
    FORMAT,
    LOGS,
    PROGRESS,
    BackupError,
    LogEntry,
    LogWriter,
    Manifest,
    PartitionEntry,
    read_manifest,
    write_manifest,
)
from ferryline.protocol.errors import OffsetOutOfRange
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.records import split_batches

if TYPE_CHECKING:
    from ferryline.client import Client

AT_ONCE = 4
PROGRESS_S = 5.0  # between two notes of how far it has come
EMPTY = LogEntry(0, 0, -1, -1)
RECORDS, STATE = LOGS
Told = Callable[[int, str], None]  # bytes that came in just now, and what is being done


class Taking:
    """One run. ``rate``: bytes a second at most, 0 for as fast as it goes."""

    def __init__(
        self, client: Client, folder: Path, *, rate: int = 0, patience_s: float = 60.0, told: Told = lambda *_: None
    ) -> None:
        self._calls = BackupCalls(client, patience_s)
        self._folder = folder
        self._told = told
        self._throttle = Throttle(rate)
        self._writers: dict[tuple[str, int], dict[str, LogWriter]] = {}
        self._topics: dict[str, TopicMeta] = {}
        self._known: dict[tuple[str, int], PartitionEntry] = {}
        self._noted_s = 0.0
        self._run = 1
        self._cluster: dict[str, Any] = {}
        self._started = _now()

    async def run(self) -> Manifest:
        """The backup that the folder holds from now on. Raises FerrylineError, BackupError; what has been read so far
        stays, and the next run goes on from there."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._begin()
        await self._each(list(self._writers), self._bulk, "records")
        done: set[tuple[str, int]] = set()
        while new := [key for key in self._writers if key not in done]:
            await self._each(new, self._state, "state")
            done.update(new)
            self._take_topics(await self._calls.coordinator("GET", "/v1/backup"))
        await self._each(list(self._writers), self._tail, "last records")
        manifest = self._manifest(_now())
        write_manifest(self._folder, manifest)
        (self._folder / PROGRESS).unlink(missing_ok=True)
        self._drop_others(manifest)
        return manifest

    # -- steps --------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        cluster = await self._calls.coordinator("GET", "/v1/backup")
        complete, partial = read_manifest(self._folder), read_manifest(self._folder, PROGRESS)
        last = max((m for m in (complete, partial) if m is not None), key=lambda m: m.run, default=None)
        if last is not None:
            if last.cluster_id != cluster["cluster_id"]:
                raise BackupError(f"{self._folder} holds a backup of cluster {last.cluster_id}; use another folder")
            self._run = last.run + 1
            self._known = {(part.topic_id, part.partition): part for part in last.partitions}
        self._take_topics(cluster)

    def _take_topics(self, cluster: dict[str, Any]) -> None:
        """Every topic that there is now, and none that is gone."""
        records = cluster["records"]
        metas = [_topic(value) for key, value in sorted(records.items()) if key.startswith("topic/")]
        self._cluster, self._topics = cluster, {topic.id: topic for topic in metas}
        keys = [(topic.id, number) for topic in metas for number in range(topic.config.partitions)]
        for key in keys:
            if key not in self._writers:
                known, folder = self._known.get(key), self._folder / f"{key[0]}-{key[1]}"
                self._writers[key] = {
                    RECORDS: LogWriter(folder, RECORDS, self._run, known.records if known is not None else None),
                    STATE: LogWriter(folder, STATE, self._run, None),  # small, and rewritten by its owner
                }
        for key in [key for key in self._writers if key not in set(keys)]:
            del self._writers[key]

    async def _each(self, keys: list[tuple[str, int]], step: Any, doing: str) -> None:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(key: tuple[str, int]) -> None:
            async with room:
                topic = self._topics.get(key[0])
                if topic is not None:
                    await step(key, f"{doing} of {topic.name}/{key[1]}")

        async with asyncio.TaskGroup() as group:
            for key in keys:
                group.create_task(one(key))

    async def _bulk(self, key: tuple[str, int], doing: str) -> None:
        await self._check_known(key)
        await self._follow(key, RECORDS, doing)

    async def _state(self, key: tuple[str, int], doing: str) -> None:
        self._writers[key][STATE] = LogWriter(self._folder / f"{key[0]}-{key[1]}", STATE, self._run, None)
        await self._follow(key, STATE, doing)

    async def _tail(self, key: tuple[str, int], doing: str) -> None:
        await self._follow(key, RECORDS, doing)

    # -- one log ------------------------------------------------------------------------------------

    async def _check_known(self, key: tuple[str, int]) -> None:
        """Does the cluster still hold what an earlier run took? Not after records were given up to recover it."""
        writer = self._writers[key][RECORDS]
        if not writer.last:
            return
        base = split_batches(writer.last)[0][1].base_offset
        try:
            now = await self._calls.read(*key, RECORDS, from_=base, limit=1)
        except OffsetOutOfRange as gone:
            if gone.details.get("log_start", 0) <= writer.end:
                return  # retention has taken it, and no more than it
        else:
            if now.data.startswith(writer.last):
                return
        writer.begin(0, -1)

    async def _follow(self, key: tuple[str, int], log: str, doing: str) -> None:
        """Read on from where the writer ends, up to the high watermark as the first answer tells it."""
        writer, target = self._writers[key][log], -1
        while target < 0 or writer.end < target:
            try:
                found = await self._calls.read(*key, log, from_=writer.end)
            except OffsetOutOfRange as gone:
                found = await self._calls.read(*key, log, limit=0)  # from its log start
                if found.log_start <= writer.end <= found.high_watermark:
                    raise BackupError(f"{doing}: {gone.message}") from None
                writer.begin(found.log_start, found.epoch_before)
                target = -1
                continue
            if target < 0:
                target = found.high_watermark
            await self._take(writer, found, doing)

    async def _take(self, writer: LogWriter, found: Standing, doing: str) -> None:
        if found.data:
            headers = split_batches(found.data)
            first = headers[0][1].base_offset
            if first != writer.end:
                raise BackupError(f"{doing}: asked from {writer.end}, got a batch at {first}")
            writer.append(found.data, headers)
            self._told(len(found.data), doing)
            await self._throttle.spend(len(found.data))
            self._note_progress()

    # -- manifests ----------------------------------------------------------------------------------

    def _note_progress(self) -> None:
        if time.monotonic() - self._noted_s > PROGRESS_S:
            write_manifest(self._folder, self._manifest(""), PROGRESS)
            self._noted_s = time.monotonic()

    def _manifest(self, ended: str) -> Manifest:
        parts = []
        for key in sorted(self._writers):
            logs = {log: writer.seal() for log, writer in self._writers[key].items()}
            parts.append(PartitionEntry(self._topics[key[0]].name, *key, logs[RECORDS], logs[STATE]))
        records = {name: value for name, value in sorted(self._cluster["records"].items())}
        cluster_id, level = self._cluster["cluster_id"], self._cluster["feature_level"]
        return Manifest(FORMAT, self._run, cluster_id, level, self._started, ended, records, tuple(parts))

    def _drop_others(self, manifest: Manifest) -> None:
        """Files of earlier runs that this backup does not need."""
        needed = manifest.files()
        for path in self._folder.glob("*/*.batches"):
            if str(path.relative_to(self._folder)) not in needed:
                path.unlink()


class Throttle:
    """Wait so that, from the first byte on, no more than ``rate`` bytes a second were spent; 0: no limit."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._free_s = 0.0

    async def spend(self, size: int) -> None:
        if self._rate <= 0:
            return
        now = time.monotonic()
        self._free_s = max(self._free_s, now) + size / self._rate
        if self._free_s > now:
            await asyncio.sleep(self._free_s - now)


def _topic(value: str) -> TopicMeta:
    return msgspec.msgpack.decode(base64.b64decode(value), type=TopicMeta)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
