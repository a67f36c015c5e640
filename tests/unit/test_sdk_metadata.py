"""What a client knows of the cluster when coordinators are slow and brokers are a little behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

import ferryline as fl
from ferryline import connections
from ferryline.protocol.errors import UnknownTopic
from ferryline.protocol.frames import Frame, decode_header
from ferryline.protocol.metadata import MetadataRequest
from ferryline_service.server_session import ServerSession
from tests.polling import SOON_S, poll
from unit.sdk_fake_cluster import FakeCluster, Node


class Behind(Node):
    """A broker that has not heard of the last changes until ``learned`` is set."""

    def __init__(self, cluster: FakeCluster, broker_id: int) -> None:
        super().__init__(cluster, broker_id)
        self.learned = asyncio.Event()
        self.asked = 0
        self.old = cluster.answer

    async def metadata(self, session: ServerSession, frame: Frame) -> None:
        wait_ms = decode_header(frame.header, MetadataRequest).wait_ms
        if not self.learned.is_set() and wait_ms:
            try:
                await asyncio.wait_for(self.learned.wait(), wait_ms / 1000)
            except TimeoutError:
                pass
        self.asked += not wait_ms
        answer = self.cluster.answer() if self.learned.is_set() else self.old()
        session.answer(frame.kind, frame.correlation, answer)


@pytest.fixture
async def behind(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[FakeCluster, Behind]]:
    """A cluster of one such broker, and a client that does not wait for its coordinator for long."""
    monkeypatch.setattr(connections, "ASK_COORDINATOR_S", 0.05)
    cluster = FakeCluster(0)
    broker = cluster.brokers[1] = Behind(cluster, 1)
    async with cluster:
        cluster.create("old")
        yield cluster, broker


async def fall_silent(cluster: FakeCluster, broker: Behind, client: fl.Client) -> None:
    await client.learn_topic("old")
    old = cluster.answer()
    broker.old = lambda: old
    cluster.coordinator.silent = True
    cluster.create("new")


async def test_what_a_broker_does_not_know_may_have_been_made_a_moment_ago(behind: tuple[FakeCluster, Behind]) -> None:
    cluster, broker = behind
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        await fall_silent(cluster, broker, client)
        learning = asyncio.create_task(client.learn_topic("new"))
        await poll(lambda: broker.asked > 0, what="the broker is asked instead of the coordinator")
        broker.learned.set()
        assert (await asyncio.wait_for(learning, SOON_S)).name == "new"


async def test_what_nobody_has_heard_of_is_an_error_after_a_moment(
    behind: tuple[FakeCluster, Behind], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "OLDER_S", 0.05)
    cluster, broker = behind
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        await fall_silent(cluster, broker, client)
        with pytest.raises(UnknownTopic):
            await asyncio.wait_for(client.learn_topic("new"), SOON_S)
