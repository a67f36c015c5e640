"""A producer over its quota, on real sockets: nothing is lost or out of order, and batches become small enough."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

import ferryline as fl
from ferryline.protocol.access import Quota
from ferryline.protocol.errors import QuotaExceeded
from ferryline.protocol.records import read_header
from ferryline_service.access.caller import Caller
from ferryline_service.access.quotas import Quotas
from unit.sdk_fake_cluster import FakeCluster, Key, Node

COUNT, KEYS = 16_000, 4


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(2) as cluster:
        cluster.create("orders", 4)
        yield cluster


class Limit:
    """Lets brokers admit what a principal's quota allows; ``sizes``: records of what was let in, in order."""

    def __init__(self, cluster: FakeCluster, **limits: int) -> None:
        self._quotas = Quotas()
        self._caller = Caller("billing", (), Quota(**limits))
        self.sizes: list[int] = []
        self.refused = 0
        cluster.on_produce = self._admit

    def _admit(self, node: Node, key: Key, data: bytearray) -> None:
        header = read_header(data)
        try:
            self._quotas.spend(self._caller, records=header.record_count, bytes=len(data))
        except QuotaExceeded:
            self.refused += 1
            raise
        self.sizes.append(header.record_count)


async def send_all(cluster: FakeCluster, **options: int) -> None:
    async with fl.connect(cluster.coordinator.url) as client, client.producer(**options) as producer:
        for number in range(COUNT):
            value = b"%d " % number + b"x" * 90
            while True:
                try:
                    producer.send_nowait("orders", value, key=f"k{number % KEYS}")
                    break
                except fl.BufferFull:
                    await asyncio.sleep(0.005)
        await producer.flush()


def check_order(cluster: FakeCluster) -> None:
    """Every record once, those of a key in order."""
    by_key: dict[int, list[int]] = {}
    for records in cluster.records("orders").values():
        for _, value in records:
            number = int((value or b"").split()[0])
            by_key.setdefault(number % KEYS, []).append(number)
    assert by_key == {rest: list(range(rest, COUNT, KEYS)) for rest in range(KEYS)}


async def test_nothing_is_lost_or_out_of_order_and_batches_become_small_enough_to_flow(cluster: FakeCluster) -> None:
    limit = Limit(cluster, records=4_000)
    await send_all(cluster, buffer_bytes=512 * 1024)
    check_order(cluster)
    assert limit.refused > 0
    assert max(limit.sizes) > 1_000  # before it knew
    assert max(limit.sizes[-10:]) <= 600  # a tenth of a second is 400


async def test_the_same_for_bytes(cluster: FakeCluster) -> None:
    limit = Limit(cluster, bytes=500_000)
    await send_all(cluster, buffer_bytes=512 * 1024)
    check_order(cluster)
    assert max(limit.sizes) > 1_000
    assert max(limit.sizes[-10:]) <= 600  # a tenth of a second are some 450 records


async def test_a_quota_of_requests_leaves_batches_as_large_as_they_are(cluster: FakeCluster) -> None:
    turn = 0

    def refuse_some(node: Node, key: Key, data: bytearray) -> None:
        nonlocal turn
        turn += 1
        if turn % 3 == 0:
            raise QuotaExceeded("", retry_after_ms=10, quota="requests", limit=1)

    cluster.on_produce = refuse_some
    await send_all(cluster)
    check_order(cluster)
    assert turn < COUNT / 500
