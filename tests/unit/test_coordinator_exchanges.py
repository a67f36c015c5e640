"""Exchanges in the coordinator's core: commands and refusals, what goes with what is deleted, metadata, replay."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ferryline.protocol.errors import (
    Conflict,
    ExchangeExists,
    FerrylineError,
    InvalidArgument,
    InvalidName,
    NotFound,
    Throttled,
    UnknownExchange,
    UnknownTopic,
)
from ferryline.protocol.exchanges import DIRECT, FANOUT, HEADERS, TOPIC, BindingMeta, ExchangeMeta, binding_to
from ferryline.protocol.metadata import ClusterMetadata
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.records import decode_record, encode_record, record_key
from unit.coordinator_bench import Bench


def create(bench: Bench, name: str, kind: str = TOPIC, alternate: str = "") -> ExchangeMeta:
    exchange = bench.ask(ev.ExchangeCreated, name, kind, alternate)
    assert isinstance(exchange, ExchangeMeta)
    return exchange


def bind(bench: Bench, source: str, **where: Any) -> ExchangeMeta:
    bound = bench.ask(ev.BindingAdded, source, binding_to(**where))
    assert isinstance(bound, ExchangeMeta)
    return bound


def known(bench: Bench) -> dict[str, ExchangeMeta]:
    found: dict[str, ExchangeMeta] = bench.state.exchanges
    return found


@pytest.fixture
def bench() -> Bench:
    """Topics t and u, and one exchange of each type."""
    bench = Bench(1)
    bench.create("t", partitions=1, replication=1)
    bench.create("u", partitions=1, replication=1)
    for kind in (DIRECT, TOPIC, FANOUT, HEADERS):
        create(bench, kind, kind)
    return bench


# -- the life of an exchange ------------------------------------------------------------------------


def test_an_exchange_with_its_bindings_outlives_a_restart(bench: Bench) -> None:
    create(bench, "rest", FANOUT)
    create(bench, "x", DIRECT, "rest")
    bind(bench, "x", topic="t", routing_key="a")
    bound = bind(bench, "x", exchange="topic", routing_key="b")
    bind(bench, "headers", topic="u", headers={"b": None, "a": "1"}, match="any")
    assert (bound.alternate, bound.version) == ("rest", 3)
    assert [(b.target, b.to_exchange, b.routing_key) for b in bound.bindings] == [
        ("t", False, "a"),
        ("topic", True, "b"),
    ]
    before = dict(known(bench))
    bench.restart()
    assert known(bench) == before
    assert known(bench)["headers"].bindings[0].headers == (("a", "1"), ("b", None))


def test_a_record_of_an_exchange_reads_as_it_was_written(bench: Bench) -> None:
    exchange = bind(bench, "headers", topic="u", headers={"b": None, "a": "ß"}, match="any")
    assert decode_record(record_key(exchange), encode_record(exchange)) == exchange
    assert record_key(exchange) == "exchange/headers"


def test_fields_that_a_later_version_appends_may_be_missing() -> None:
    assert decode_record("exchange/x", msgspec.msgpack.encode(["x", "fanout"])) == ExchangeMeta("x", FANOUT)
    short = msgspec.msgpack.encode(["x", "fanout", "", [["t"]]])
    assert decode_record("exchange/x", short) == ExchangeMeta("x", FANOUT, bindings=(BindingMeta("t"),))


def test_the_same_binding_again_changes_nothing(bench: Bench) -> None:
    first = bind(bench, "topic", topic="t", routing_key="a.#")
    revision = bench.state.revision
    assert bind(bench, "topic", topic="t", routing_key="a.#") == first
    assert bench.state.revision == revision
    assert len(bind(bench, "topic", topic="t", routing_key="b.#").bindings) == 2


def test_a_binding_is_removed_by_its_id_once(bench: Bench) -> None:
    binding = binding_to(topic="t", routing_key="a")
    bind(bench, "direct", topic="t", routing_key="a")
    bind(bench, "direct", topic="t", routing_key="b")
    left = bench.ask(ev.BindingRemoved, "direct", binding.id)
    assert [b.routing_key for b in left.bindings] == ["b"]
    with pytest.raises(NotFound, match=binding.id):
        bench.ask(ev.BindingRemoved, "direct", binding.id)
    assert known(bench)["direct"] == left


# -- refusals ---------------------------------------------------------------------------------------

REFUSED: list[tuple[type[ev.Event], tuple[Any, ...], type[FerrylineError], str]] = [
    (ev.ExchangeCreated, ("a/b", TOPIC), InvalidName, "exchange"),
    (ev.ExchangeCreated, ("__x", TOPIC), InvalidName, "reserved"),
    (ev.ExchangeCreated, ("", TOPIC), InvalidName, "exchange"),
    (ev.ExchangeCreated, ("topic", DIRECT), ExchangeExists, "topic"),
    (ev.ExchangeCreated, ("new", "x-random"), InvalidArgument, "type: 'x-random' is none of direct, topic"),
    (ev.ExchangeCreated, ("new", TOPIC, "nowhere"), UnknownExchange, "nowhere"),
    (ev.ExchangeCreated, ("new", TOPIC, "new"), UnknownExchange, "new"),
    (ev.ExchangeCreated, ("new", TOPIC, "a b"), InvalidName, "alternate"),
    (ev.ExchangeDeleted, ("nowhere",), UnknownExchange, "nowhere"),
    (ev.BindingAdded, ("nowhere", binding_to(topic="t")), UnknownExchange, "nowhere"),
    (ev.BindingAdded, ("topic", binding_to(topic="nowhere")), UnknownTopic, "nowhere"),
    (ev.BindingAdded, ("topic", binding_to(exchange="t")), UnknownExchange, "exchange t does not exist"),
    (ev.BindingAdded, ("topic", binding_to(topic="topic")), UnknownTopic, "topic topic does not exist"),
    (ev.BindingAdded, ("fanout", binding_to(topic="t", routing_key="k")), InvalidArgument, "routing_key"),
    (ev.BindingAdded, ("headers", binding_to(topic="t", routing_key="k")), InvalidArgument, "routing_key"),
    (ev.BindingAdded, ("direct", binding_to(topic="t", headers={"a": "1"})), InvalidArgument, "headers"),
    (ev.BindingAdded, ("topic", binding_to(topic="t", headers={"a": "1"})), InvalidArgument, "headers"),
    (ev.BindingAdded, ("fanout", binding_to(topic="t", headers={"a": "1"})), InvalidArgument, "headers"),
    (ev.BindingAdded, ("fanout", binding_to(topic="t", match="any")), InvalidArgument, "match"),
    (ev.BindingAdded, ("headers", binding_to(topic="t", match="any")), InvalidArgument, "any of none"),
    (ev.BindingRemoved, ("nowhere", "00"), UnknownExchange, "nowhere"),
    (ev.BindingRemoved, ("topic", "00"), NotFound, "no binding '00'"),
]


@pytest.mark.parametrize(("event", "fields", "error", "says"), REFUSED)
def test_a_refused_command_says_why_and_changes_nothing(
    bench: Bench, event: type[ev.Event], fields: tuple[Any, ...], error: type[FerrylineError], says: str
) -> None:
    before, revision = dict(known(bench)), bench.state.revision
    with pytest.raises(error) as refused:
        bench.ask(event, *fields)
    assert says in refused.value.message
    assert (known(bench), bench.state.revision) == (before, revision)


def test_who_creates_an_exchange_that_exists_learns_what_it_is(bench: Bench) -> None:
    create(bench, "x", DIRECT, "fanout")
    with pytest.raises(ExchangeExists) as refused:
        create(bench, "x", TOPIC)
    assert refused.value.details == {"exchange": "x", "type": "direct", "alternate": "fanout"}


def test_records_cannot_be_made_to_go_round_in_a_circle(bench: Bench) -> None:
    for name in "abc":
        create(bench, name, FANOUT)
    create(bench, "d", FANOUT, "a")  # d leads to a, as its alternate
    with pytest.raises(Conflict, match="a -> a"):
        bind(bench, "a", exchange="a")
    bind(bench, "a", exchange="b")
    bind(bench, "b", exchange="c")
    with pytest.raises(Conflict, match="c -> a -> b -> c"):
        bind(bench, "c", exchange="a")
    with pytest.raises(Conflict, match="c -> d -> a -> b -> c"):
        bind(bench, "c", exchange="d")
    bind(bench, "a", exchange="c")  # two ways to c are no circle
    assert not known(bench)["c"].bindings


def test_exchanges_bindings_and_their_bytes_are_bounded() -> None:
    bench = Bench(1, CoreConfig(exchanges_max=2, bindings_max=3, exchange_bytes_max=400))
    bench.create("t", partitions=1, replication=1)
    create(bench, "a", TOPIC)
    create(bench, "b", HEADERS)
    with pytest.raises(Throttled, match="2 exchanges"):
        create(bench, "c")
    for number in range(3):
        bind(bench, "a", topic="t", routing_key=str(number))
    with pytest.raises(Throttled, match="3 bindings"):
        bind(bench, "a", topic="t", routing_key="3")
    bind(bench, "a", topic="t", routing_key="2")  # is there already: no more room needed
    with pytest.raises(Throttled, match="of 400"):
        bind(bench, "b", topic="t", headers={"a": "v" * 250, "b": "v" * 100})
    assert not known(bench)["b"].bindings


# -- what goes with what is deleted -----------------------------------------------------------------


def test_the_bindings_to_a_deleted_topic_go_with_it(bench: Bench) -> None:
    create(bench, "t", FANOUT)  # an exchange of the same name is another thing
    bind(bench, "topic", topic="t", routing_key="a")
    bind(bench, "topic", topic="u", routing_key="a")
    bind(bench, "fanout", topic="t")
    bind(bench, "fanout", exchange="t")
    revision = bench.state.revision
    bench.ask(ev.TopicDeleted, "t")
    assert bench.state.revision == revision + 1, "in one decision: nobody sees a binding to nothing"
    assert [b.target for b in known(bench)["topic"].bindings] == ["u"]
    assert [(b.target, b.to_exchange) for b in known(bench)["fanout"].bindings] == [("t", True)]
    bench.create("again", partitions=1, replication=1)
    bench.ask(ev.TopicCreated, "t", "t-again", {"partitions": 1, "replication": 1})
    assert [b.target for b in known(bench)["topic"].bindings] == ["u"], "a topic made again is another one"


def test_what_leads_to_a_deleted_exchange_goes_with_it(bench: Bench) -> None:
    create(bench, "x", DIRECT, "fanout")
    bind(bench, "topic", exchange="fanout", routing_key="a")
    bind(bench, "topic", topic="t", routing_key="a")
    bench.ask(ev.ExchangeDeleted, "fanout")
    assert "fanout" not in known(bench)
    assert known(bench)["x"].alternate == ""
    assert [b.target for b in known(bench)["topic"].bindings] == ["t"]
    bench.restart()
    assert "fanout" not in known(bench)
    create(bench, "fanout", DIRECT)
    assert not known(bench)["fanout"].bindings


# -- metadata ---------------------------------------------------------------------------------------


def test_a_copy_that_follows_by_deltas_has_the_exchanges_after_every_change(bench: Bench) -> None:
    copy = ClusterMetadata()
    copy.apply(bench.metadata())
    assert set(copy.exchanges) == {"direct", "topic", "fanout", "headers"}
    steps: list[Any] = [
        lambda: create(bench, "x", FANOUT, "topic"),
        lambda: bind(bench, "x", topic="t"),
        lambda: bind(bench, "direct", exchange="x", routing_key="k"),
        lambda: bench.ask(ev.BindingRemoved, "x", binding_to(topic="t").id),
        lambda: bind(bench, "topic", topic="u", routing_key="#"),
        lambda: bench.ask(ev.TopicDeleted, "u"),
        lambda: bench.ask(ev.ExchangeDeleted, "topic"),
        lambda: create(bench, "topic", HEADERS),
        lambda: bench.ask(ev.ExchangeDeleted, "x"),
        lambda: bench.ask(ev.ExchangeDeleted, "headers"),  # nothing led to it, so nothing else changes
    ]
    behind = ClusterMetadata()  # hears of it only at the end
    behind.apply(bench.metadata())
    for step in steps:
        step()
        delta = bench.metadata(copy)
        assert not delta.full
        assert copy.apply(delta)
        assert copy.exchanges == known(bench)
    late = bench.metadata(behind)
    assert not late.full
    assert behind.apply(late)
    assert behind.exchanges == known(bench)


def test_who_waits_for_news_is_told_of_exchanges(bench: Bench) -> None:
    copy = ClusterMetadata()
    copy.apply(bench.metadata())
    bind(bench, "topic", exchange="fanout", routing_key="#")
    copy.apply(bench.metadata(copy))
    assert bench.metadata(copy, wait_ms=30_000) is None
    reply = bench._numbers
    bench.ask(ev.ExchangeDeleted, "fanout")
    answer = bench.answers[reply]
    assert answer.deleted_exchanges == ["fanout"]
    assert [exchange.name for exchange in answer.exchanges] == ["topic"]
    copy.apply(answer)
    assert copy.exchanges == known(bench)


def test_a_copy_shows_by_its_dict_whether_exchanges_changed(bench: Bench) -> None:
    """Clients make their routes anew only then."""
    copy = ClusterMetadata()
    copy.apply(bench.metadata())
    before = copy.exchanges
    bench.create("v", partitions=1, replication=1)
    copy.apply(bench.metadata(copy))
    assert copy.exchanges is before
    bench.restart()
    bench.create("w", partitions=1, replication=1)
    full = bench.metadata(copy)
    assert full.full
    assert copy.apply(full)
    assert copy.exchanges is before
    create(bench, "x")
    copy.apply(bench.metadata(copy))
    assert copy.exchanges is not before
    assert copy.apply(bench.metadata()) is False
    again = ClusterMetadata()
    assert again.apply(copy.answer())
    assert again.exchanges == copy.exchanges
