"""Retry settings of topics, and topics that brokers ask for: checked, kept over a restart, made once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ferryline.protocol.dead_letters import EnsureTopic, EnsureTopicOk, dead_letters_of
from ferryline.protocol.errors import (
    FerrylineError,
    InvalidArgument,
    InvalidName,
    InvalidRequest,
    NotEnoughReplicas,
    StaleBrokerEpoch,
    Throttled,
    UnknownBroker,
)
from ferryline.protocol.limits import check_name
from ferryline.protocol.metadata import RetryPolicy, TopicConfig, TopicMeta
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.records import decode_record, encode_record, topic_key
from unit.coordinator_bench import Bench

DAY_MS = 86_400_000

BAD_RETRY: list[tuple[Any, str]] = [
    ({"attempts": 0}, "retry.attempts: 0 is outside 1..1000"),
    ({"attempts": 1_001}, "retry.attempts: 1001"),
    ({"attempts": "5"}, "retry.attempts: expected an integer, got str"),
    ({"attempts": True}, "retry.attempts: expected an integer, got bool"),
    ({"backoff_ms": -1}, "retry.backoff_ms: -1 is outside 0..86400000"),
    ({"backoff_ms": DAY_MS + 1, "backoff_max_ms": DAY_MS + 1}, "retry.backoff_ms: 86400001"),
    ({"backoff_max_ms": DAY_MS + 1}, "retry.backoff_max_ms: 86400001"),
    ({"backoff_ms": 2_000, "backoff_max_ms": 1_999}, "retry.backoff_max_ms: 1999 is below backoff_ms, 2000"),
    ({"backoff_ms": 60_001}, "retry.backoff_max_ms: 60000 is below backoff_ms, 60001"),
    ({"on_dead": "drop"}, "retry.on_dead: expected 'skip' or 'park'"),
    ({"on_dead": None}, "retry.on_dead"),
    ({"dead_letters": "a/b"}, "retry.dead_letters: 'a/b' does not match"),
    ({"dead_letters": "__x"}, "retry.dead_letters: '__x' starts with '__'"),
    ({"dead_letters": 7}, "retry.dead_letters: expected text, got int"),
    ({"dead_letters": "t"}, "retry.dead_letters: t cannot take its own dead letters"),
    ({"tries": 7}, "retry.tries: no such setting; there are attempts"),
    ("often", "retry: expected an object, got str"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_RETRY, ids=[str(case[0]) for case in BAD_RETRY])
def test_a_wrong_retry_setting_is_refused_by_name_and_limit(wrong: Any, message: str) -> None:
    bench = Bench(3)
    with pytest.raises(InvalidRequest) as refused:
        bench.create("t", retry=wrong)
    assert message in refused.value.message
    assert refused.value.details["field"] in message
    assert not bench.state.topics
    bench.create("t")
    with pytest.raises(InvalidRequest):
        bench.ask(ev.TopicAltered, "t", {"retry": wrong})
    assert bench.state.topic("t").config == TopicConfig()


@pytest.mark.parametrize(
    "edge",
    [
        {"attempts": 1, "backoff_ms": 0, "backoff_max_ms": 0},
        {"attempts": 1_000, "backoff_ms": DAY_MS, "backoff_max_ms": DAY_MS},
        {"on_dead": "park", "dead_letters": ""},
        {"on_dead": "skip", "dead_letters": "graveyard"},
        {},
    ],
)
def test_retry_settings_at_their_limits_are_taken(edge: dict[str, Any]) -> None:
    topic = Bench(3).create("t", retry=edge)
    assert topic.config.retry == msgspec.structs.replace(RetryPolicy(), **edge)


def test_altering_retry_changes_what_is_named_and_keeps_the_rest_over_a_restart() -> None:
    bench = Bench(3)
    bench.create("t", retry={"attempts": 9, "on_dead": "park"})
    before = dict(bench.state.parts)
    topic = bench.ask(ev.TopicAltered, "t", {"retry": {"backoff_max_ms": 300_000}, "retention_ms": 60_000})
    assert topic.config.retry == RetryPolicy(9, 1_000, 300_000, "park", "")
    assert (topic.config.retention_ms, topic.version) == (60_000, 2)
    assert bench.state.parts == before  # no partition has to hear of it
    assert bench.ask(ev.TopicAltered, "t", {"retry": {"attempts": 9}}).version == 2
    bench.restart()
    assert bench.state.topic("t").config.retry == RetryPolicy(9, 1_000, 300_000, "park", "")
    assert bench.metadata().topics[0].config.retry.backoff_max_ms == 300_000


def test_a_record_from_before_there_was_retry_loads_with_the_default() -> None:
    stored = ["t-id", "t", [3, 2, 1, "fsync", 60_000, -1, 2**20, 1_000, 1024], 4]
    topic = decode_record("topic/t-id", msgspec.msgpack.encode(stored))
    assert isinstance(topic, TopicMeta)
    assert topic.config.retry == RetryPolicy()
    assert (topic.config.max_record_bytes, topic.version) == (1024, 4)
    assert decode_record(topic_key("t-id"), encode_record(topic)) == topic


# -- topics that brokers ask for --------------------------------------------------------------------


def ensure(bench: Bench, name: str, broker: int = 1, topic_id: str = "made", **wrong: Any) -> TopicMeta:
    asker = bench.brokers[broker]
    session, epoch = wrong.pop("session", asker.session), wrong.pop("epoch", asker.epoch)
    config = wrong.pop("config", TopicConfig(2, 2, retry=RetryPolicy(on_dead="park")))
    answer = bench.ask(ev.TopicEnsured, session, EnsureTopic(broker, epoch, name, config), topic_id)
    assert isinstance(answer, EnsureTopicOk)
    return answer.topic


def test_a_topic_that_a_broker_needs_is_made_once_with_what_it_asked_for() -> None:
    bench = Bench(3)
    made = ensure(bench, "t.dlq")
    assert (made.id, made.config) == ("made", TopicConfig(2, 2, retry=RetryPolicy(on_dead="park")))
    assert {key for key in bench.state.parts} == {("made", 0), ("made", 1)}
    revision = bench.state.revision
    assert ensure(bench, "t.dlq", broker=2, topic_id="again", config=TopicConfig(7)) == made
    assert bench.state.revision == revision  # nothing was changed, and nobody is told of anything
    bench.restart()
    bench.connect(3)
    assert ensure(bench, "t.dlq", broker=3, topic_id="later") == made


def test_a_topic_that_somebody_else_made_is_taken_as_it_is() -> None:
    bench = Bench(3)
    own = bench.create("graveyard", partitions=5)
    assert ensure(bench, "graveyard") == own


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"epoch": 999}, StaleBrokerEpoch),
        ({"session": 1}, StaleBrokerEpoch),
        ({"config": TopicConfig(partitions=0)}, InvalidArgument),
        ({"config": TopicConfig(retry=RetryPolicy(attempts=0))}, InvalidArgument),
        ({"config": TopicConfig(replication=4)}, NotEnoughReplicas),
        ({"name": "__dlq"}, InvalidName),
    ],
)
def test_a_broker_is_refused_what_anybody_would_be(wrong: dict[str, Any], error: type[FerrylineError]) -> None:
    bench = Bench(3)
    name = wrong.pop("name", "t.dlq")
    bench.connect(1)
    bench.connect(1)
    bench.register(1)
    with pytest.raises(error):
        ensure(bench, name, **wrong)
    assert not bench.state.topics


def test_an_unknown_broker_and_a_full_cluster_are_refused() -> None:
    bench = Bench(3, CoreConfig(topics_max=1))
    with pytest.raises(UnknownBroker):
        bench.ask(ev.TopicEnsured, 1, EnsureTopic(9, 1, "t.dlq", TopicConfig()), "made")
    first = ensure(bench, "t.dlq")
    with pytest.raises(Throttled):
        ensure(bench, "u.dlq")
    assert ensure(bench, "t.dlq") == first  # what is there needs no room


# -- names ------------------------------------------------------------------------------------------


def test_dead_letters_go_where_the_policy_says_and_nowhere_else() -> None:
    assert dead_letters_of("orders", RetryPolicy()) == "orders.dlq"
    assert dead_letters_of("orders", RetryPolicy(dead_letters="graveyard")) == "graveyard"
    assert dead_letters_of("orders.dlq", RetryPolicy()) == "orders.dlq"  # never a .dlq.dlq
    assert dead_letters_of("orders.dlq", RetryPolicy(dead_letters="graveyard")) == "graveyard"


def test_dead_letters_of_a_long_name_have_a_valid_name_of_their_own() -> None:
    names = ["x" * 196, "x" * 197, "x" * 200, "x" * 199 + "y"]
    found = [check_name(dead_letters_of(name, RetryPolicy())) for name in names]
    assert len(set(found)) == len(names)
    assert all(name.endswith(".dlq") for name in found)
    assert found[0] == names[0] + ".dlq"
