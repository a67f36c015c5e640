"""What a consumer reads: the partitions that its group gives it, or those chosen by hand, and their commits."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from ferryline.core.membership import OpenPartition
from ferryline.fetcher import Fetcher
from ferryline.membership import Membership
from ferryline.message import Source, TopicPartition
from ferryline.options import ConsumerOptions
from ferryline.partition import Partition, located
from ferryline.positions import commit_alone, committed, look_up
from ferryline.protocol.errors import FerrylineError, StaleMember, UnknownPartition
from ferryline.protocol.messages import CommittedResult
from ferryline.protocol.metadata import TopicMeta
from ferryline.reader import Reader
from ferryline.requests import Key
from ferryline.tasks import Tasks

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.consumer")

CLOSE_COMMIT_S = 3.0


class Assignment:
    """Adds partitions to the fetcher and takes them away again.

    While the application holds records of a revoked partition, the reader tells `finished` when it is back.
    """

    def __init__(
        self,
        client: Client,
        options: ConsumerOptions,
        fetcher: Fetcher,
        reader: Reader,
    ) -> None:
        self._client = client
        self._options = options
        self._fetcher = fetcher
        self._reader = reader
        self._tasks = Tasks()
        self._closed = False
        self._membership: Membership | None = None
        if options.group is not None and options.partitions is None:
            self._membership = Membership(
                client,
                options.group,
                options.topics,
                instance_id=options.instance_id,
                session_ms=options.session_ms,
                max_processing_s=options.max_processing,
                progress=reader.progress,
                opened=self._opened,
                revoked=self._revoked,
                dropped=self._dropped,
                failed=reader.fail,
            )

    async def start(self, metas: list[TopicMeta]) -> None:
        """Join the group, or look up where to begin."""
        if self._membership is not None:
            await self._membership.start()
        else:
            await self._read_alone(metas)
            if self._options.partitions is None:
                self._client.watch.on_change.append(self._metadata_changed)
        if self._options.auto_commit:
            self._tasks.spawn(self._commit_now_and_then())

    async def close(self) -> None:
        """Commit what was processed (with auto-commit) and leave the group."""
        self._closed = True
        if self._metadata_changed in self._client.watch.on_change:
            self._client.watch.on_change.remove(self._metadata_changed)
        self._tasks.cancel()
        try:
            if self._options.auto_commit:
                await self.commit_processed(CLOSE_COMMIT_S)
        except FerrylineError as error:
            log.warning("closing: %s", error)
        finally:
            if self._membership is not None:
                await self._membership.leave()

    # -- alone -------------------------------------------------------------------------------------

    async def _read_alone(self, metas: list[TopicMeta]) -> None:
        """Read partitions without a membership. With a group, go on where it stands."""
        options, timeout = self._options, self._client.timeout
        sources: dict[Key, Source] = {}
        for meta in metas:
            for number in options.partitions if options.partitions is not None else range(meta.config.partitions):
                if not 0 <= number < meta.config.partitions:
                    raise UnknownPartition(
                        f"partitions: {number} is not in 0..{meta.config.partitions - 1} of topic {meta.name}",
                        field="partitions",
                    )
                sources[meta.id, number] = Source(meta.name, number, options.decode)
        known: dict[Key, CommittedResult] = {}
        if options.group is not None:
            known = await committed(self._client, options.group, list(sources), timeout)
        fresh = [key for key in sources if key not in known or known[key].offset < 0]
        found = await look_up(self._client, dict.fromkeys(fresh, options.start), timeout) if fresh else {}
        for key, source in sources.items():
            if key in found:
                partition = Partition(key, source, found[key].offset, check=options.check_crcs)
                partition.policy = True
            else:
                mine = known[key]
                partition = Partition(key, source, mine.offset, mine.offset_epoch, check=options.check_crcs)
                partition.committed = mine.offset
            self._fetcher.add(partition)

    def _metadata_changed(self) -> None:
        """A reader of whole topics also reads the partitions that are added to them, from their start."""
        for name in self._options.topics:
            meta = self._client.routing.topic(name)
            for number in range(meta.config.partitions) if meta is not None else ():
                if meta is not None and (meta.id, number) not in self._fetcher.partitions:
                    source = Source(name, number, self._options.decode)
                    partition = Partition((meta.id, number), source, 0, check=self._options.check_crcs)
                    partition.policy = True
                    self._fetcher.add(partition)

    # -- as a member -------------------------------------------------------------------------------

    def _opened(self, opening: OpenPartition) -> None:
        meta = self._client.routing.cluster.topics.get(opening.key[0])
        if meta is None:
            return  # deleted meanwhile: the next assignment will not name it
        source = Source(meta.name, opening.key[1], self._options.decode)
        if opening.offset >= 0:
            self._open(opening, source, opening.offset, fresh=False)
        elif self._options.start == "start":
            self._open(opening, source, max(opening.log_start, 0), fresh=True)
        elif self._options.start == "end":
            self._open(opening, source, max(opening.high_watermark, 0), fresh=True)
        else:
            self._tasks.spawn(self._open_at(opening, source))

    async def _open_at(self, opening: OpenPartition, source: Source) -> None:
        """The start policy is a moment or an offset: the broker knows where that is."""
        while not self._closed and self._is_ours(opening):
            try:
                found = await look_up(self._client, {opening.key: self._options.start}, self._client.timeout)
            except FerrylineError as error:
                log.warning("%s/%d: %s", source.topic, source.partition, error)
                await asyncio.sleep(0.2)
                continue
            if self._is_ours(opening):
                self._open(opening, source, found[opening.key].offset, fresh=True)
            return

    def _is_ours(self, opening: OpenPartition) -> bool:
        return self._membership is not None and self._membership.generation(opening.key) == opening.generation

    def _open(self, opening: OpenPartition, source: Source, offset: int, *, fresh: bool) -> None:
        epoch = -1 if fresh else opening.offset_epoch
        partition = Partition(opening.key, source, offset, epoch, check=self._options.check_crcs)
        partition.generation = opening.generation
        partition.committed = opening.offset
        partition.policy = fresh
        partition.high_watermark, partition.log_start = opening.high_watermark, opening.log_start
        self._fetcher.add(partition)
        if self._options.on_assign is not None:
            self._options.on_assign([TopicPartition(source.topic, source.partition)])

    def _revoked(self, key: Key) -> None:
        partition = self._fetcher.partitions.get(key)
        if partition is None:  # the start position was still being looked up
            if self._membership is not None:
                self._membership.released(key, self._membership.generation(key) or 0)
            return
        partition.revoked = True
        partition.drop()
        self._reader.leave(partition)
        if partition not in self._reader.hands:
            self._tasks.spawn(self._let_go(partition))

    def finished(self, partition: Partition) -> None:
        """The application is done with what it had of a revoked partition."""
        self._tasks.spawn(self._let_go(partition))

    async def _let_go(self, partition: Partition) -> None:
        """Commit what the application finished, then release, in this order: the next owner begins at the commit."""
        try:
            if self._options.auto_commit and partition.processed != partition.committed and not partition.gone:
                await self.commit({partition: partition.processed}, "", self._client.timeout)
        except FerrylineError as error:
            log.warning("%s/%d was given up: %s", partition.source.topic, partition.source.partition, error)
        if not partition.gone and self._membership is not None:
            self._forget(partition)
            self._membership.released(partition.key, partition.generation)

    def _dropped(self, key: Key) -> None:
        partition = self._fetcher.partitions.get(key)
        if partition is not None:
            log.info("%s/%d belongs to another member now", partition.source.topic, partition.source.partition)
            self._forget(partition)

    def _forget(self, partition: Partition) -> None:
        self._fetcher.remove(partition.key)
        self._reader.forget(partition)
        if self._options.on_revoke is not None:
            self._options.on_revoke([TopicPartition(partition.source.topic, partition.source.partition)])

    # -- commits -----------------------------------------------------------------------------------

    async def commit(self, wanted: dict[Partition, int], metadata: str, timeout: float) -> None:
        """Commit an offset for each partition, where that changes something. Raises the first error."""
        offsets = {
            partition.key: (offset, partition.rewound or offset < partition.committed)
            for partition, offset in wanted.items()
            if offset != partition.committed or partition.rewound
        }
        if not offsets or self._options.group is None:
            return
        if self._membership is not None:
            outcomes = await self._membership.commit(offsets, metadata, timeout=timeout)
        else:
            outcomes = await commit_alone(self._client, self._options.group, offsets, metadata, timeout)
        failed: FerrylineError | None = None
        for partition in wanted:
            outcome = outcomes.get(partition.key)
            if isinstance(outcome, FerrylineError):
                failed = failed or located(outcome, partition)
            elif outcome is not None:
                partition.committed = outcome.offset
                partition.rewound = False
        if failed is not None:
            raise failed

    async def commit_processed(self, timeout: float) -> None:
        """Commit what the application has come back from.

        A position that comes from the start policy counts too, unless the policy is "start": else a group that begins
        at the end would begin at a later end after a restart, and what came in between would be lost to it.
        """
        await self.commit(
            {
                partition: partition.processed
                for partition in self._fetcher.partitions.values()
                if (not partition.policy or self._options.start != "start")
                and (partition.processed > partition.committed or partition.rewound)
            },
            "",
            timeout,
        )

    async def _commit_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._options.auto_commit_interval)
            try:
                await self.commit_processed(self._client.timeout)
            except StaleMember as error:
                log.info("auto-commit: %s", error)
            except FerrylineError as error:
                log.warning("auto-commit: %s", error)
