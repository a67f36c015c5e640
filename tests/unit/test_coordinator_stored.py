"""Stored bytes in the coordinator's core: who owns a topic, who holds too much, and who is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ferryline.protocol.access import AccessPolicy, ClaimRule, IssuerMeta, PrincipalMeta, Quota, StoredBytes
from ferryline.protocol.dead_letters import EnsureTopic
from ferryline.protocol.errors import StaleBrokerEpoch
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import Done
from ferryline.protocol.metadata import TopicConfig, TopicMeta
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.records import decode_record, encode_record, topic_key
from ferryline_coordinator.core.stored import Stored
from unit.coordinator_bench import Bench

FILE = AccessPolicy(
    enabled=True,
    principals=(PrincipalMeta("billing", quota=Quota(stored_bytes=1_000)), PrincipalMeta("free")),
    issuers=(IssuerMeta("corp", "https://corp.example", "ferryline"),),
    rules=(
        ClaimRule("corp", "team", "small", quota=Quota(stored_bytes=500)),
        ClaimRule("corp", "team", "large", quota=Quota(stored_bytes=2_000)),
        ClaimRule("corp", "team", "fast", quota=Quota(records=10)),
    ),
)


@pytest.fixture
def bench() -> Bench:
    bench = Bench(2, CoreConfig(access=FILE))
    bench.send(ev.AccessFileRead(FILE))
    bench.play(2_000)
    return bench


def tell(bench: Bench, broker_id: int, *owners: tuple[str, int]) -> Any:
    broker = bench.brokers[broker_id]
    return bench.ask(ev.StoredTold, broker.session, StoredBytes(broker_id, broker.epoch, list(owners)))


def over(bench: Bench) -> tuple[tuple[str, int], ...]:
    """As the coordinator and every broker were told last."""
    ours = [effect.policy for effect in bench.effects if isinstance(effect, ev.AccessChanged)]
    tells = [effect for effect in bench.effects if isinstance(effect, ev.Tell) and effect.kind == Kind.ACCESS]
    assert {told.broker_id for told in tells if told.message == ours[-1]} == {1, 2}
    return ours[-1].over


def test_whoever_holds_more_than_the_quota_is_told_to_everybody_and_so_is_that_there_is_room_again(
    bench: Bench,
) -> None:
    assert tell(bench, 1, ("billing", 600), ("free", 10**15)) == Done()
    assert over(bench) == ()
    tell(bench, 2, ("billing", 400))
    assert over(bench) == ()  # as much as allowed
    tell(bench, 2, ("billing", 401))
    assert over(bench) == (("billing", 1_000),)
    tell(bench, 1, ("billing", 100))
    assert over(bench) == ()
    tell(bench, 2, ("billing", 5_000))
    tell(bench, 2)  # the topic is gone
    assert over(bench) == ()


def test_what_changes_nothing_is_told_to_nobody_and_written_nowhere(bench: Bench) -> None:
    tell(bench, 1, ("billing", 2_000))
    before, rows = len(bench.effects), dict(bench.rows)
    tell(bench, 1, ("billing", 3_000))
    tell(bench, 2, ("billing", 1), ("free", 10**15))
    assert not [effect for effect in bench.effects[before:] if not isinstance(effect, ev.Reply)]
    assert bench.rows == rows


def test_a_broker_that_does_not_serve_counts_no_more(bench: Bench) -> None:
    tell(bench, 1, ("billing", 2_000))
    assert over(bench) == (("billing", 1_000),)
    bench.kill(1)
    bench.play(10_000)
    tell(bench, 2, ("billing", 300))
    assert over(bench) == ()


def test_another_quota_counts_from_its_policy_on(bench: Bench) -> None:
    bench.ask(ev.PrincipalCreated, "made", (), Quota(stored_bytes=100))
    tell(bench, 1, ("made", 150))
    assert over(bench) == (("made", 100),)
    bench.ask(ev.PrincipalAltered, "made", None, Quota(stored_bytes=200))
    assert over(bench) == ()
    bench.ask(ev.PrincipalAltered, "made", None, Quota(stored_bytes=10))
    assert over(bench) == (("made", 10),)
    bench.ask(ev.PrincipalDeleted, "made")
    assert over(bench) == ()


@pytest.mark.parametrize(("size", "told"), [(500, ()), (501, (("corp:ann", 500),)), (2_001, (("corp:ann", 2_000),))])
def test_of_principals_of_an_issuer_the_largest_limit_that_is_exceeded_is_told(
    bench: Bench, size: int, told: tuple[tuple[str, int], ...]
) -> None:
    tell(bench, 1, ("corp:ann", size), ("other:ann", 10**15), ("corp", 10**15))
    assert over(bench) == told


def test_the_quota_of_a_principal_goes_before_those_of_rules() -> None:
    stored = Stored()
    stored.take(1, [("corp:ann", 1_500)])
    own = PrincipalMeta("corp:ann", quota=Quota(stored_bytes=10_000))
    assert stored.over(AccessPolicy(principals=(own,), rules=FILE.rules), [1]) == ()
    assert stored.over(AccessPolicy(rules=FILE.rules), [1]) == (("corp:ann", 500),)


def test_a_broker_of_an_earlier_life_tells_nothing(bench: Bench) -> None:
    broker = bench.brokers[1]
    with pytest.raises(StaleBrokerEpoch):
        bench.ask(ev.StoredTold, broker.session, StoredBytes(1, broker.epoch - 1, [("billing", 10**9)]))
    assert over(bench) == ()


def test_while_access_is_off_nobody_is_over() -> None:
    bench = Bench(2)
    assert tell(bench, 1, ("billing", 10**15)) == Done()
    assert not [effect for effect in bench.effects if isinstance(effect, ev.AccessChanged)]


def test_a_new_term_hears_from_the_brokers_again(bench: Bench) -> None:
    tell(bench, 1, ("billing", 2_000))
    bench.restart()
    for number in (1, 2):
        bench.start(number)
    bench.send(ev.AccessFileRead(FILE))
    assert over(bench) == ()
    bench.play(10_000)
    tell(bench, 1, ("billing", 2_000))
    assert over(bench) == (("billing", 1_000),)


# -- owners -----------------------------------------------------------------------------------------


def test_a_topic_belongs_to_whoever_created_it_whatever_becomes_of_it(bench: Bench) -> None:
    made = bench.ask(ev.TopicCreated, "orders", "t1", {"partitions": 2, "replication": 2}, "billing")
    assert made.owner == "billing"
    bench.ask(ev.TopicAltered, "orders", {"retention_ms": 5_000})
    grown = bench.ask(ev.PartitionsAdded, "orders", 3, True)
    assert grown.owner == "billing"
    bench.restart()
    assert bench.state.topics["t1"].owner == "billing"


def test_a_topic_that_a_broker_needs_belongs_to_whom_the_broker_says(bench: Bench) -> None:
    broker = bench.brokers[1]
    ensure = EnsureTopic(1, broker.epoch, "orders.dlq", TopicConfig(1, 2), "billing")
    answer = bench.ask(ev.TopicEnsured, broker.session, ensure, "t2")
    assert answer.topic.owner == "billing"


def test_a_topic_from_before_there_were_owners_belongs_to_nobody() -> None:
    old = msgspec.msgpack.encode(["t1", "orders", msgspec.to_builtins(TopicConfig()), 4])
    assert decode_record(topic_key("t1"), old) == TopicMeta("t1", "orders", TopicConfig(), 4, "")
    new = TopicMeta("t1", "orders", TopicConfig(), 4, "billing")
    assert decode_record(topic_key("t1"), encode_record(new)) == new
