"""A secondary that comes back to much in many partitions: it all arrives, in bounded memory, while traffic goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from unit.broker_world import BrokerWorld

PARTITIONS = 24
LIMIT = 1024 * 1024


async def test_catching_up_on_many_partitions_keeps_memory_bounded_and_lets_traffic_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferryline_broker.peers._BACKLOG_BYTES", LIMIT // 4)
    monkeypatch.setattr("ferryline_broker.peers._BACKLOG_BYTES_MAX", LIMIT)
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)] * PARTITIONS, flush="replicated")
        await second.crash()
        world.coordinator.fence(second.id)
        client = await world.client(first.url)

        async def fill(partition: int) -> None:
            for _ in range(2):
                assert (await client.produce(topic, partition, [b"x" * 250_000])).error is None

        await asyncio.gather(*[fill(partition) for partition in range(PARTITIONS)])
        peers, most = first.broker.peers, 0
        room = peers.room

        def watching(session: int) -> int:
            nonlocal most
            found = room(session)
            to = peers._sessions.get(session)
            if to is not None:
                most = max(most, to.unsent_bytes + to.state.outbox.held_bytes)
            return found

        peers.room = watching  # type: ignore[method-assign]
        back = await world.broker()

        def in_sync() -> bool:
            return all(back.id in part.isr for part in world.coordinator.partitions.values())

        produced = 0
        while not in_sync():
            assert (await client.produce(topic, produced % PARTITIONS, [b"live"])).error is None
            produced += 1
            assert produced < 20_000
        assert LIMIT // 4 < most < 2 * LIMIT, "the backlog was there, and was bounded"
        for partition in range(PARTITIONS):
            key = (topic.id, partition)
            ends = [running.broker.partitions.replicas[key].logs[0].log_end for running in (first, back)]
            assert ends[0] == ends[1]
