"""Receipts that a producer keeps, what they prove, and batches whose place in the log was changed on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

import ferryline as fl
from ferryline.proof.receipts import (
    START,
    Receipt,
    ReceiptError,
    StoredBatch,
    chains,
    judge,
    link,
    parse,
)
from ferryline.protocol.errors import CorruptBatch
from ferryline.protocol.records import split_batches, stamp
from tests.polling import SOON_S
from unit.sdk_fake_cluster import FakeCluster

# -- what receipts prove -----------------------------------------------------------------------------

STORED = [StoredBatch(offset, offset + 2, 3, 1000 + offset) for offset in range(0, 40, 4)]


def receipts_of(stored: list[StoredBatch]) -> list[Receipt]:
    chain, made = START, []
    for batch in stored:
        chain = link(chain, batch.offset, batch.crc)
        made.append(Receipt("t", "id", 0, batch.offset, 2, 3, 9, batch.crc, chain.hex(), stored[0].offset))
    return made


ALL = receipts_of(STORED)


def test_every_receipt_of_a_whole_log_is_honoured() -> None:
    found = judge(ALL, STORED, 0)
    assert (found.held, found.expired, found.missing) == (len(ALL), 0, [])


@pytest.mark.parametrize("kept", [[-1], [3, -1], [0], [2, 3, 4]])
def test_few_receipts_vouch_for_all_batches_before_them(kept: list[int]) -> None:
    some = [ALL[index] for index in kept]
    assert judge(some, STORED, 0).missing == []
    last = STORED.index(next(batch for batch in STORED if batch.offset == some[-1].offset))
    for number in range(last + 1):
        without = STORED[:number] + STORED[number + 1 :]
        assert judge(some, without, 0).missing, f"batch {number} is gone"
        changed = [*STORED]
        changed[number] = msgspec.structs.replace(changed[number], crc=7)
        assert judge(some, changed, 0).missing, f"batch {number} was changed"


def test_what_comes_after_the_newest_receipt_is_none_of_its_business() -> None:
    assert judge([ALL[4]], STORED[:5], 0).missing == []


def test_a_batch_of_a_later_epoch_than_the_receipt_is_not_the_one_that_was_acknowledged() -> None:
    later = [msgspec.structs.replace(batch, epoch=4) for batch in STORED]
    earlier = [msgspec.structs.replace(batch, epoch=2) for batch in STORED]  # a duplicate is answered in a later epoch
    assert len(judge(ALL, later, 0).missing) == len(ALL)
    assert judge(ALL, earlier, 0).missing == []


def test_what_retention_removed_is_expired_and_not_missing() -> None:
    rest = [batch for batch in STORED if batch.offset >= 16]
    found = judge(ALL, rest, 16)
    assert (found.held, found.expired, found.missing) == (6, 4, [])
    assert judge([ALL[-1]], rest, 16).missing == [], "the newest alone cannot be recomputed, and says nothing wrong"
    assert judge(ALL, rest[:2] + rest[3:], 16).missing


def test_chains_are_kept_apart_by_producer_partition_and_beginning() -> None:
    other = [msgspec.structs.replace(receipt, producer_id=8) for receipt in ALL]
    assert sorted(len(rows) for rows in chains([*ALL, *other]).values()) == [10, 10]


@pytest.mark.parametrize("field", [{"chain": "00"}, {"chain": "zz" * 16}, {"count": 0}, {"first": 99}, {"offset": "x"}])
def test_a_line_that_is_no_receipt_is_refused(field: dict[str, object]) -> None:
    line = msgspec.json.encode({**msgspec.to_builtins(ALL[0]), **field})
    with pytest.raises(ReceiptError):
        parse(line)
    assert parse(msgspec.json.encode(ALL[0])) == ALL[0]


# -- the producer ------------------------------------------------------------------------------------


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(2) as cluster:
        cluster.create("orders", 2)
        yield cluster


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        yield client


def stored_of(cluster: FakeCluster, partition: int) -> list[StoredBatch]:
    """What the brokers hold of a partition."""
    log = next(log for (_, number), log in cluster.logs.items() if number == partition)
    headers = [header for data in log.batches for _, header in split_batches(data)]
    return [StoredBatch(h.base_offset, h.next_offset, h.epoch, h.crc) for h in headers]


async def test_a_producer_writes_a_receipt_for_each_batch_before_it_tells_anybody(
    cluster: FakeCluster, client: fl.Client, tmp_path: Path
) -> None:
    path = tmp_path / "receipts.jsonl"
    async with client.producer(linger=0, receipts=path) as producer:
        for number in range(20):
            meta = await producer.send("orders", b"%d" % number, f"k{number}")
            newest = parse(path.read_bytes().splitlines()[-1])
            assert (newest.partition, newest.offset) == (meta.partition, meta.offset)
    receipts = [parse(line) for line in path.read_bytes().splitlines()]
    assert sum(receipt.count for receipt in receipts) == 20
    assert {receipt.topic for receipt in receipts} == {"orders"}
    for rows in chains(receipts).values():
        stored = stored_of(cluster, rows[0].partition)
        assert judge(rows, stored, 0).missing == []
        assert judge(rows[-1:], stored[1:], 0).missing


async def test_a_sink_that_fails_costs_lines_and_not_records(client: fl.Client) -> None:
    kept: list[Receipt] = []

    def sink(receipt: Receipt) -> None:
        if len(kept) == 2:
            kept.append(receipt)
            raise OSError("no space")
        kept.append(receipt)

    async with client.producer(linger=0, receipts=sink) as producer:
        for number in range(5):
            await producer.send("orders", b"%d" % number, partition=0)
    assert len(kept) == 5
    chain = START
    for receipt in kept:
        chain = link(chain, receipt.offset, receipt.crc)
    assert kept[-1].chain == chain.hex(), "the chain goes on behind a line that was not written"


async def test_a_batch_of_unknown_outcome_begins_a_new_chain(cluster: FakeCluster, client: fl.Client) -> None:
    kept: list[Receipt] = []
    async with client.producer(linger=0, receipts=kept.append, delivery_timeout=3, request_timeout=0.3) as producer:
        await producer.send("orders", b"1", partition=0)
        await producer.send("orders", b"2", partition=0)
        for broker in cluster.brokers.values():
            broker.silent = True
        with pytest.raises(fl.FerrylineError) as caught:
            await producer.send("orders", b"nobody knows", partition=0)
        assert not caught.value.definite
        for broker in cluster.brokers.values():
            broker.silent = False
        async with asyncio.timeout(10):
            while True:
                try:
                    await producer.send("orders", b"3", partition=0)
                    break
                except fl.FerrylineError:
                    continue
    assert kept[1].first == kept[0].first
    assert kept[-1].first == kept[-1].offset, "it vouches for nothing before the batch that may or may not be there"


# -- batches that are not where they belong ------------------------------------------------------------


@pytest.mark.parametrize("moved", [-1, 1, 100])
async def test_a_batch_that_is_not_where_it_belongs_is_never_handed_out(
    cluster: FakeCluster, client: fl.Client, moved: int
) -> None:
    async with client.producer(linger=0) as producer:
        for number in range(6):
            await producer.send("orders", b"%d" % number, partition=0)
    log = next(log for (_, number), log in cluster.logs.items() if number == 0)
    data = bytearray(log.batches[3])
    ((_, header),) = split_batches(data)
    stamp(data, header.base_offset + moved, header.epoch)  # the CRC does not cover this
    log.batches[3] = bytes(data)
    seen: list[bytes] = []
    with pytest.raises(CorruptBatch):
        await read_all(client, seen)
    assert seen == [b"%d" % number for number in range(len(seen))]


async def read_all(client: fl.Client, seen: list[bytes]) -> None:
    """Read partition 0 until something is wrong."""
    async with client.consumer("orders", partitions=[0], start="start") as consumer, asyncio.timeout(SOON_S):
        while True:
            seen += [message.value for message in await consumer.pull(max_wait=0.2)]


async def test_without_the_option_nothing_is_kept(client: fl.Client) -> None:
    async with client.producer(linger=0) as producer:
        await producer.send("orders", b"x")
        assert producer._receipts is None
