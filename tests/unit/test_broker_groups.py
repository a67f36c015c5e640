"""CLAIM, COMMIT and COMMITTED at the broker: the token decides who may claim, the generation who may commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ferryline.protocol.errors import InvalidName
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import (
    Claim,
    ClaimEntry,
    Commit,
    CommitEntry,
    Committed,
    CommittedAnswer,
    CommittedResult,
)
from ferryline.protocol.metadata import TopicMeta
from ferryline_service.claims import claim_token
from unit.broker_world import CLAIM_KEY, BrokerWorld, RawClient, eventually


async def claim(
    client: RawClient, topic: TopicMeta, member: str, generation: int, *, token: bytes | None = None, partition: int = 0
) -> CommittedResult:
    made = claim_token(CLAIM_KEY, "billing", topic.id, partition, member, generation)
    entry = ClaimEntry(topic.id, partition, generation, made if token is None else token)
    answer = await client.call(Kind.CLAIM, Claim("billing", member, [entry]), CommittedAnswer)
    result: CommittedResult = answer.results[0]
    return result


async def commit(
    client: RawClient, topic: TopicMeta, member: str, generation: int, offset: int, **fields: Any
) -> CommittedResult:
    entry = CommitEntry(topic.id, 0, generation, offset, **fields)
    answer = await client.call(Kind.COMMIT, Commit("billing", member, [entry]), CommittedAnswer)
    result: CommittedResult = answer.results[0]
    return result


def code(result: CommittedResult) -> str:
    return result.error.code if result.error is not None else ""


async def test_a_claim_fences_the_member_before_and_learns_where_it_was(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        for _ in range(5):
            await client.produce(topic, 0, [b"x"])
        assert (await claim(client, topic, "a", 1)).offset == -1
        assert code(await commit(client, topic, "a", 1, 3, metadata="half")) == ""
        taken = await claim(client, topic, "b", 2)
        assert (taken.offset, taken.generation, taken.metadata) == (3, 2, "half")
        assert code(await commit(client, topic, "a", 1, 4)) == "STALE_MEMBER"
        assert code(await commit(client, topic, "b", 2, 5)) == ""
        assert (await commit(client, topic, "b", 2, 4)).offset == 5, "commits never go back"
        assert (await commit(client, topic, "b", 2, 1, reset=True)).offset == 1


async def test_committed_offsets_follow_a_fail_over(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        result = await client.produce(topic, 0, [b"x"])
        assert code(await claim(client, topic, "a", 1)) == ""
        assert code(await commit(client, topic, "a", 1, result.base_offset + 1)) == ""
        await first.crash()
        world.coordinator.fence(first.id)
        await eventually(lambda: world.primary(topic.id) is second, "the secondary leads")
        client = await world.client(second.url)
        asked = Committed("billing", [(topic.id, 0)])
        found = (await client.call(Kind.COMMITTED, asked, CommittedAnswer)).results[0]
        assert (found.offset, found.generation) == (result.base_offset + 1, 1)
        assert code(await commit(client, topic, "b", 1, result.base_offset + 1)) == "STALE_MEMBER"


@pytest.mark.parametrize("token", [b"", b"x" * 32, b"x" * 100_000])
async def test_a_claim_without_the_coordinators_token_is_forbidden(tmp_path: Path, token: bytes) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        assert code(await claim(client, topic, "a", 1, token=token)) == "FORBIDDEN"
        other = claim_token(CLAIM_KEY, "billing", topic.id, 0, "somebody else", 1)
        assert code(await claim(client, topic, "a", 1, token=other)) == "FORBIDDEN"


async def test_bad_entries_get_their_own_errors_and_keep_their_order(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        entries = [
            CommitEntry("f" * 32, 0, 0, 0),
            CommitEntry(topic.id, 7, 0, 0),
            CommitEntry(topic.id, 0, 0, 0),
            CommitEntry(topic.id, 0, 0, -1),
            CommitEntry(topic.id, 0, 0, 10**12),
            CommitEntry(topic.id, 0, 0, 0, "x" * 5000),
        ]
        answer = await client.call(Kind.COMMIT, Commit("billing", "a", entries), CommittedAnswer)
        assert [code(result) for result in answer.results] == [
            "UNKNOWN_TOPIC",
            "UNKNOWN_PARTITION",
            "",
            "INVALID_ARGUMENT",
            "OFFSET_OUT_OF_RANGE",
            "INVALID_ARGUMENT",
        ]
        for group in ("", "a/b", "__state"):
            with pytest.raises(InvalidName):
                await client.call(Kind.COMMITTED, Committed(group, [(topic.id, 0)]), CommittedAnswer)
