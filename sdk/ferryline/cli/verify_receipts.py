"""Compare receipts with what the copies hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ferryline.cli.verify_replicas import ANSWER_BYTES, Brokers, path_of
from ferryline.proof.receipts import Receipt, StoredBatch, chains, judge
from ferryline.protocol.errors import FerrylineError

if TYPE_CHECKING:
    from ferryline.protocol.metadata import ClusterMetadata, PartitionMeta

EXAMPLES_MAX = 20
Producers = dict[int, list[list[Receipt]]]  # producer id -> its chains


@dataclass
class Account:
    """What came of the receipts: each counts once for each copy that was asked."""

    receipts: int = 0
    records: int = 0
    held: int = 0
    expired: int = 0
    missing: int = 0
    unknown_topics: int = 0
    copies: int = 0
    told: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.missing

    def row(self) -> dict[str, Any]:
        names = ("receipts", "records", "held", "expired", "missing", "unknown_topics", "copies")
        return {name: getattr(self, name) for name in names}


class ReceiptAuditor:
    """Walks the headers of each producer's batches on every copy and recomputes the chains."""

    def __init__(self, brokers: Brokers, cluster: ClusterMetadata) -> None:
        self._brokers = brokers
        self._cluster = cluster

    async def check(self, receipts: Iterable[Receipt]) -> Account:
        """All receipts, against all copies in sync."""
        account = Account()
        partitions: dict[tuple[str, int], Producers] = {}
        for (topic_id, partition, producer, _), rows in sorted(chains(receipts).items()):
            account.receipts += len(rows)
            account.records += sum(receipt.count for receipt in rows)
            partitions.setdefault((topic_id, partition), {}).setdefault(producer, []).append(rows)
        for key, producers in partitions.items():
            part = self._cluster.partitions.get(key)
            if part is not None:
                for broker in part.isr:
                    await self._copy(account, part, broker, producers)
                continue
            gone = [rows for lists in producers.values() for rows in lists]
            account.unknown_topics += sum(map(len, gone))
            account.missing += sum(map(len, gone))
            account.told.append(f"topic {gone[0][0].topic} ({key[0]}) does not exist any more")
        return account

    async def _copy(self, account: Account, part: PartitionMeta, broker: int, producers: Producers) -> None:
        name = f"{next(iter(producers.values()))[0][0].topic}/{part.partition} on broker {broker}"
        try:
            log_start, stored = await self._stored(part, broker, sorted(producers))
        except FerrylineError as error:
            account.unchecked.append(f"{name}: {error}")
            return
        account.copies += 1
        for producer, lists in producers.items():
            for rows in lists:
                found = judge(rows, stored[producer], log_start)
                account.held += found.held
                account.expired += found.expired
                account.missing += len(found.missing)
                for one in found.missing[: EXAMPLES_MAX - len(account.told)]:
                    account.told.append(f"{name}: producer {producer}: {one.reason}")

    async def _stored(
        self, part: PartitionMeta, broker: int, producers: list[int]
    ) -> tuple[int, dict[int, list[StoredBatch]]]:
        """(log start, batches of each producer), in one walk. A copy that is damaged on the way ends there."""
        stored: dict[int, list[StoredBatch]] = {producer: [] for producer in producers}
        only = producers[0] if len(producers) == 1 else None
        at: int | None = None
        while True:
            query = {"log": "records", "from": at, "limit": ANSWER_BYTES, "batches": "true", "producer": only}
            answer = await self._brokers.ask(broker, "GET", f"{path_of(part)}/digests", **query)
            log_start: int = answer["logs"]["records"]["log_start"]
            for row in answer["batches"]:
                if row[4] in stored:
                    stored[row[4]].append(StoredBatch(row[0], row[1], row[2], row[3]))
            following: int = answer["next"]
            if answer["gone"] and at is not None and at < log_start:
                at = log_start
                continue
            if answer["wrong"] is not None or following >= answer["below"] or following == at:
                return log_start, stored
            at = following
