"""Members of groups on real sockets: who reads what, what is committed when, and heartbeats that go on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import ferryline as fl
from ferryline import heartbeats
from ferryline.core.membership import ClaimAnswered
from ferryline.membership import Membership
from ferryline.message import Message
from ferryline.protocol.errors import (
    InvalidArgument,
    StaleMember,
    UnknownMember,
)
from ferryline.protocol.messages import GroupAssignment, GroupPartition
from tests.polling import SOON_S, poll
from unit.sdk_fake_cluster import FakeCluster


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(2) as cluster:
        cluster.create("orders", 4)
        yield cluster


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[fl.Client]:
    async with fl.connect(cluster.coordinator.url, timeout=15) as client:
        yield client


async def fill(client: fl.Client, count: int, *, topic: str = "orders", partition: int | None = None) -> None:
    async with client.producer(linger=0, batch_bytes=2048) as producer:
        for number in range(count):
            key = None if partition is not None else f"k{number}"
            producer.send_nowait(topic, b"%d" % number, key, partition=partition)
        await producer.flush()


async def read(consumer: fl.Consumer[Any], count: int) -> list[Message[Any]]:
    found: list[Message[Any]] = []
    async with asyncio.timeout(SOON_S):
        while len(found) < count:
            found += await consumer.pull(max_records=count - len(found), max_wait=0.2)
    return found


# -- groups ------------------------------------------------------------------------------------------


async def test_members_share_the_partitions_and_each_record_goes_to_one(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 400)
    async with (
        client.consumer("orders", group="g") as one,
        client.consumer("orders", group="g") as two,
    ):
        await poll(lambda: len(one.assignment) == len(two.assignment) == 2)
        assert not set(one.assignment) & set(two.assignment)
        seen: list[tuple[int, int]] = []
        async with asyncio.timeout(SOON_S):
            while len(set(seen)) < 400:
                for consumer in (one, two):
                    seen += [(m.partition, m.offset) for m in await consumer.pull(max_wait=0.05)]


async def test_a_member_that_leaves_hands_over_what_it_committed(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 200)
    seen: list[tuple[int, int]] = []
    async with client.consumer("orders", group="g") as one:
        while len(seen) < 100:
            seen += [(m.partition, m.offset) for m in await one.pull(max_records=10)]
        await one.commit()
        two = client.consumer("orders", group="g")
        await two.start()
    async with two:
        async with asyncio.timeout(SOON_S):
            while len(seen) < 200:
                seen += [(m.partition, m.offset) for m in await two.pull(max_wait=0.1)]
    assert len(seen) == len(set(seen)) == 200


async def test_auto_commit_never_commits_what_was_just_handed_out(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 10, partition=0)
    log = cluster.logs[cluster.topics["orders"].id, 0]
    async with client.consumer("orders", group="g", auto_commit_interval=0.02) as consumer:
        taken = 0
        async for _ in consumer:
            taken += 1
            if taken == 3:
                await poll(lambda: log.committed.get("g") == (2, ""))
                await asyncio.sleep(0.1)
                assert log.committed["g"] == (2, ""), "the third record is still being processed"
                break
        batch = await consumer.pull(max_records=4)
        assert [message.offset for message in batch] == [3, 4, 5, 6]
        await poll(lambda: log.committed["g"] == (3, ""))
        await consumer.pull(max_records=1)
        await poll(lambda: log.committed["g"] == (7, ""))
    assert log.committed["g"] == (7, "")


async def test_a_revoked_partition_is_released_only_after_its_records_are_finished_and_committed(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 40)
    revoked: list[fl.TopicPartition] = []
    async with client.consumer("orders", group="g", on_revoke=revoked.extend) as one:
        await poll(lambda: len(one.assignment) == 4)
        batch = await read(one, 40)
        ends = {p: 1 + max(m.offset for m in batch if m.partition == p) for p in range(4)}
        async with client.consumer("orders", group="g") as two:
            await asyncio.sleep(0.3)
            assert two.assignment == [], "records of these partitions are still being processed"
            assert revoked == []
            pulling = asyncio.create_task(one.pull(max_wait=3))
            await poll(lambda: len(two.assignment) == 2)
            for _, partition in revoked:
                log = cluster.logs[cluster.topics["orders"].id, partition]
                assert log.committed["g"][0] == ends[partition]
            assert await two.pull(max_wait=0.2) == []
            pulling.cancel()


async def test_a_partition_released_while_its_revocation_is_carried_out_is_declared_free(client: fl.Client) -> None:
    # 1. the member holds partition 0, whose start position is still being looked up: nothing is to be finished
    # 2. one answer takes partition 0 away and gives it 1: it releases 0 at once, while it carries out the rest
    # 3. what is declared last must not own partition 0, or the coordinator waits for its release for ever
    def released_at_once(key: tuple[str, int]) -> None:
        membership.released(key, membership.generation(key) or 0)

    membership = Membership(
        client,
        "g",
        ("orders",),
        instance_id="",
        session_ms=10_000,
        max_processing_s=60,
        progress=lambda: None,
        opened=lambda _: None,
        revoked=released_at_once,
        dropped=lambda _: None,
        failed=lambda _: None,
    )
    beat = membership._beat
    first, second = GroupPartition("t", 0, 1, b"token"), GroupPartition("t", 1, 1, b"token")
    beat.on_answer(GroupAssignment(membership.member, [first], sequence=1), beat.declared)
    membership._feed(ClaimAnswered(("t", 0), 1, 0, 0, 0, 0))
    beat.on_answer(GroupAssignment(membership.member, [second], [first], sequence=2), beat.declared)
    assert [(item.topic_id, item.partition) for item in beat.declared.owned] == [("t", 1)]
    await membership.leave()


async def test_a_fenced_member_is_told_when_it_commits_and_reads_no_further(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 10, partition=0)
    async with client.consumer("orders", group="g", auto_commit=False) as consumer:
        await read(consumer, 10)
        cluster.logs[cluster.topics["orders"].id, 0].generations["g"] = 99
        with pytest.raises(StaleMember, match="orders/0"):
            await consumer.commit()


async def test_a_commit_may_go_back_only_after_a_seek(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 10, partition=0)
    log = cluster.logs[cluster.topics["orders"].id, 0]
    async with client.consumer("orders", group="g", auto_commit=False) as consumer:
        await poll(lambda: len(consumer.assignment) == 4)
        messages = await read(consumer, 10)
        await consumer.commit()
        assert log.committed["g"] == (10, "")
        await consumer.commit(messages[4], metadata="note")
        assert log.committed["g"] == (5, "note"), "an explicit offset is meant"
        await consumer.seek(("orders", 0), 2)
        await read(consumer, 1)
        await consumer.commit()
        assert log.committed["g"] == (3, "")
        assert await consumer.committed(("orders", 0)) == 3
        assert await consumer.committed(("orders", 1)) == 0, "nothing was read, and that is a position, too"
    async with client.consumer("orders", group="other", partitions=[1]) as other:
        assert await other.committed(("orders", 1)) is None


async def test_members_keep_their_partitions_while_the_coordinator_is_away(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.consumer("orders", group="g") as consumer:
        await poll(lambda: len(consumer.assignment) == 4)
        await cluster.coordinator.stop()
        await fill(client, 40)
        assert len(await read(consumer, 40)) == 40
        await consumer.commit()
        await asyncio.sleep(0.3)
        assert len(consumer.assignment) == 4
        beats = len(cluster.beats)
        await cluster.coordinator.start()
        await poll(lambda: len(cluster.beats) > beats)
        assert len(consumer.assignment) == 4


async def test_heartbeats_go_on_while_the_application_blocks_the_loop_and_the_log_says_where(
    cluster: FakeCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake cluster shares the loop, so what is watched here are the attempts of the thread to reach it."""
    monkeypatch.setattr(heartbeats, "STUCK_AFTER_S", 0.5)
    caplog.set_level(logging.WARNING, logger="ferryline")
    async with fl.connect(cluster.coordinator.url) as client, client.consumer("orders", group="g") as consumer:
        await poll(lambda: len(consumer.assignment) == 4)
        assert client.heartbeats is not None
        member = client.heartbeats._members[0]
        before = member.sequence
        time.sleep(2.5)  # noqa: ASYNC251  (that is the point)
        assert member.sequence > before
        await poll(lambda: [r for r in caplog.records if "has not come round" in r.message])
        told = next(record.message for record in caplog.records if "has not come round" in record.message)
        assert "test_sdk_group.py" in told


async def test_heartbeats_end_when_one_record_is_processed_for_too_long(
    cluster: FakeCluster, client: fl.Client
) -> None:
    await fill(client, 2, partition=0)
    async with client.consumer("orders", group="g", max_processing=0.3) as consumer:
        await read(consumer, 1)
        assert client.heartbeats is not None
        member = client.heartbeats._members[0]
        await poll(member.overdue)
        sent = member.sequence
        await asyncio.sleep(0.2)
        assert member.sequence <= sent + 1
        await read(consumer, 1)
        await poll(lambda: member.sequence > sent + 2)


async def test_what_the_coordinator_refuses_for_good_reaches_the_application(
    cluster: FakeCluster, client: fl.Client
) -> None:
    cluster.on_heartbeat = lambda beat: InvalidArgument("session_ms: out of range", field="session_ms")
    async with client.consumer("orders", group="g") as consumer:
        with pytest.raises(InvalidArgument, match="session_ms"):
            await consumer.pull(max_wait=3)


async def test_a_group_without_membership_goes_on_where_it_stands(cluster: FakeCluster, client: fl.Client) -> None:
    await fill(client, 10, partition=0)
    for expected in ([0, 1, 2, 3], [4, 5, 6, 7]):
        async with client.consumer("orders", group="solo", partitions=[0]) as consumer:
            assert [message.offset for message in await read(consumer, 4)] == expected
            await consumer.commit()
    assert not cluster.beats


async def test_a_static_member_goes_without_a_word_and_its_next_life_goes_on(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.consumer("orders", group="g", instance_id="worker-1") as consumer:
        await poll(lambda: len(consumer.assignment) == 4)
    assert cluster.beats[-1].instance_id == "worker-1"
    assert not any(beat.leave for beat in cluster.beats)


async def test_a_static_member_whose_instance_was_taken_over_ends_with_an_error(
    cluster: FakeCluster, client: fl.Client
) -> None:
    async with client.consumer("orders", group="g", instance_id="worker-1") as consumer:
        await poll(lambda: len(consumer.assignment) == 4)
        cluster.on_heartbeat = lambda beat: UnknownMember("another process has this instance_id")
        with pytest.raises(UnknownMember):
            await consumer.pull(max_wait=3)
        assert consumer.assignment == []
        beats = len(cluster.beats)
        await asyncio.sleep(0.3)
        assert len(cluster.beats) <= beats + 1, "it would take the instance back"


async def test_a_member_whose_session_ended_joins_anew(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.consumer("orders", group="g") as consumer:
        await poll(lambda: len(consumer.assignment) == 4)
        cluster.on_heartbeat = lambda beat: UnknownMember("your session ended")
        await poll(lambda: consumer.assignment == [])
        cluster.on_heartbeat = None
        await poll(lambda: len(consumer.assignment) == 4)


async def test_leaving_takes_a_partition_out_of_the_group_at_once(cluster: FakeCluster, client: fl.Client) -> None:
    async with client.consumer("orders", group="g") as consumer:
        await poll(lambda: len(consumer.assignment) == 4)
    assert cluster.beats[-1].leave
