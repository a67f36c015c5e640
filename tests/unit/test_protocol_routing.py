"""Where records go through exchanges: tables, a naive router to compare with, hostile patterns, bounds."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.protocol.errors import FerrylineError, InvalidArgument, InvalidName, UnknownExchange
from ferryline.protocol.exchanges import (
    DIRECT,
    EXCHANGE_TYPES,
    FANOUT,
    HEADERS,
    MATCH_ANY,
    TOPIC,
    BindingMeta,
    ExchangeMeta,
    binding_to,
)
from ferryline.protocol.routing import ANSWERS_MAX, MASKS_MAX, RoutingTable, TopicPatterns

# -- patterns ---------------------------------------------------------------------------------------

MATCHES: list[tuple[str, str, bool]] = [
    ("quick.orange.rabbit", "*.orange.*", True),
    ("quick.orange.rabbit", "*.*.rabbit", True),
    ("quick.orange.male.rabbit", "*.*.rabbit", False),
    ("lazy.orange.male.rabbit", "lazy.#", True),
    ("lazy", "lazy.#", True),
    ("lazy", "lazy.*", False),
    ("a", "a", True),
    ("a", "A", False),
    ("a.b", "a", False),
    ("", "", True),
    ("", "#", True),
    ("", "*", False),
    ("", "*.#", False),
    ("", "#.#", True),
    ("a.b.c", "#", True),
    ("a.b.c", "#.c", True),
    ("c", "#.c", True),
    ("a.b", "#.c", False),
    ("a.b.c", "a.#.c", True),
    ("a.c", "a.#.c", True),
    ("a.c.c", "a.#.c", True),
    ("a.c.d", "a.#.c", False),
    ("a.b", "#.*.#", True),
    ("a", "*.#.*", False),
    ("a.", "a.*", True),  # an empty word is a word
    ("a.", "a", False),
    (".", "*.*", True),
    ("a.b", "a*", False),  # inside a word, * is a letter
    ("a*", "a*", True),
    ("größe.ß", "*.ß", True),
]


@pytest.mark.parametrize(("key", "pattern", "matches"), MATCHES)
def test_a_pattern_matches_as_in_amqp(key: str, pattern: str, matches: bool) -> None:
    assert (TopicPatterns([pattern]).matching(key) == [0]) is matches
    assert naive(pattern.split(".") if pattern else [], key.split(".") if key else []) is matches


def naive(pattern: list[str], words: list[str]) -> bool:
    """The rule as one would say it; may take exponential time."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return naive(pattern[1:], words) or (bool(words) and naive(pattern, words[1:]))
    return bool(words) and pattern[0] in ("*", words[0]) and naive(pattern[1:], words[1:])


word = st.sampled_from(["a", "b", "", "ab"])
keys = st.lists(word, max_size=6)
patterns = st.lists(st.sampled_from(["a", "b", "", "*", "#"]), max_size=6)


@settings(max_examples=500, deadline=None)
@given(st.lists(patterns, max_size=8), keys)
def test_all_patterns_at_once_say_what_each_would_say_alone(many: list[list[str]], words: list[str]) -> None:
    key, texts = ".".join(words), [".".join(pattern) for pattern in many]
    said = words if key else []
    expected = [n for n, text in enumerate(texts) if naive(text.split(".") if text else [], said)]
    assert TopicPatterns(texts).matching(key) == expected


def test_hostile_patterns_cost_time_in_proportion_and_no_more() -> None:
    hard = ".".join(["#", "a"] * 63)  # a matcher that tries again would need 2^63 steps
    many = [f"{hard[:-4]}.{number:02x}" for number in range(1_000)] + ["#." * 127 + "b"]
    made = time.process_time()
    found = TopicPatterns(many)
    asked = time.process_time()
    assert found.matching(".".join(["a"] * 127 + ["b"])) == [1_000]
    assert found.matching(".".join(["a"] * 128)) == []
    assert asked - made < 20.0
    assert time.process_time() - asked < 10.0


def test_what_a_table_remembers_is_bounded() -> None:
    found = TopicPatterns([f"w{number}" for number in range(3 * MASKS_MAX)])
    for number in range(3 * MASKS_MAX):
        assert found.matching(f"w{number}") == [number]
        assert len(found._masks) <= MASKS_MAX
    table = RoutingTable(exchanges(ExchangeMeta("x", FANOUT, bindings=(binding_to(topic="t"),))))
    for number in range(ANSWERS_MAX + 10):
        table.route("x", str(number))
    assert table._route.cache_info().currsize == ANSWERS_MAX


# -- exchanges --------------------------------------------------------------------------------------


def exchanges(*made: ExchangeMeta) -> dict[str, ExchangeMeta]:
    return {exchange.name: exchange for exchange in made}


def test_direct_and_fanout_exchanges() -> None:
    table = RoutingTable(
        exchanges(
            ExchangeMeta(
                "d",
                DIRECT,
                bindings=(
                    binding_to(topic="errors", routing_key="error"),
                    binding_to(topic="all", routing_key="error"),
                    binding_to(topic="all", routing_key="info"),
                ),
            ),
            ExchangeMeta("f", FANOUT, bindings=(binding_to(topic="b"), binding_to(topic="a"))),
        )
    )
    assert table.route("d", "error") == ("all", "errors")
    assert table.route("d", "info") == ("all",)
    assert table.route("d", "infos") == ()
    assert table.route("d", "") == ()
    assert table.route("f", "anything") == ("a", "b")
    with pytest.raises(UnknownExchange, match="nowhere"):
        table.route("nowhere", "")


HEADER_CASES: list[tuple[dict[str, bytes | None], list[str]]] = [
    ({"format": b"pdf", "kind": b"report"}, ["any", "both", "kind-given"]),
    ({"format": b"pdf"}, ["any"]),
    ({"kind": b"report"}, ["any", "kind-given"]),
    ({"kind": b"letter"}, ["kind-given"]),
    ({"kind": None}, ["kind-given"]),
    ({"format": b"zip", "other": b"pdf"}, []),
    ({"format": b""}, []),
    ({"Format": b"pdf"}, []),
    ({}, []),
]


@pytest.mark.parametrize(("headers", "expected"), HEADER_CASES, ids=[str(case[0]) for case in HEADER_CASES])
def test_a_headers_exchange_wants_all_or_any(headers: dict[str, bytes | None], expected: list[str]) -> None:
    wanted = {"format": "pdf", "kind": "report"}
    table = RoutingTable(
        exchanges(
            ExchangeMeta(
                "h",
                HEADERS,
                bindings=(
                    binding_to(topic="both", headers=wanted),
                    binding_to(topic="any", headers=wanted, match=MATCH_ANY),
                    binding_to(topic="kind-given", headers={"kind": None}),
                ),
            )
        )
    )
    assert list(table.route("h", "ignored", headers.items())) == expected


def test_of_several_headers_with_one_name_the_last_counts() -> None:
    table = RoutingTable(exchanges(ExchangeMeta("h", HEADERS, bindings=(binding_to(topic="t", headers={"a": "1"}),))))
    assert table.route("h", "", [("a", b"2"), ("a", b"1")]) == ("t",)
    assert table.route("h", "", [("a", b"1"), ("a", b"2")]) == ()


def test_headers_that_nobody_asks_for_do_not_fill_the_memory_of_a_table() -> None:
    table = RoutingTable(exchanges(ExchangeMeta("h", HEADERS, bindings=(binding_to(topic="t", headers={"a": "1"}),))))
    for number in range(100):
        assert table.route("h", "", [("trace", b"%d" % number), ("a", b"x%d" % number)]) == ()
    assert table._route.cache_info().currsize == 1


def test_a_topic_gets_a_record_once_however_many_ways_lead_to_it() -> None:
    table = RoutingTable(
        exchanges(
            ExchangeMeta("top", FANOUT, bindings=(binding_to(exchange="left"), binding_to(exchange="right"))),
            ExchangeMeta(
                "left",
                TOPIC,
                bindings=(binding_to(topic="t", routing_key="#"), binding_to(topic="t", routing_key="a.*")),
            ),
            ExchangeMeta("right", DIRECT, bindings=(binding_to(topic="t", routing_key="a.b"), binding_to(topic="u"))),
        )
    )
    assert table.route("top", "a.b") == ("t",)
    assert table.route("top", "") == ("t", "u")


def test_the_alternate_gets_what_no_binding_takes_and_nothing_else() -> None:
    to_t, to_empty = binding_to(topic="t", routing_key="t"), binding_to(exchange="empty", routing_key="e")
    table = RoutingTable(
        exchanges(
            ExchangeMeta("x", DIRECT, "second", (to_t, to_empty)),
            ExchangeMeta("second", DIRECT, "third", (binding_to(topic="u", routing_key="u"),)),
            ExchangeMeta("third", FANOUT, bindings=(binding_to(topic="rest"),)),
            ExchangeMeta("empty", FANOUT),
        )
    )
    assert table.route("x", "t") == ("t",)
    assert table.route("x", "u") == ("u",)
    assert table.route("x", "v") == ("rest",)
    assert table.route("x", "e") == (), "a binding took it, so the alternate is not asked; as in RabbitMQ"
    assert table.route("empty", "") == ()


def test_a_later_table_takes_over_what_is_unchanged_and_sees_what_is_not() -> None:
    kept = ExchangeMeta("kept", TOPIC, bindings=(binding_to(topic="t", routing_key="a.#"),))
    changed = ExchangeMeta("changed", FANOUT, bindings=(binding_to(topic="t"),))
    first = RoutingTable(exchanges(kept, changed, ExchangeMeta("gone", FANOUT)))
    assert (first.route("kept", "a"), first.route("changed", ""), first.route("gone", "")) == (("t",), ("t",), ())
    changed = ExchangeMeta("changed", FANOUT, bindings=(binding_to(topic="u"),), version=2)
    second = RoutingTable(exchanges(kept, changed), first)
    assert second._matches["kept"] is first._matches["kept"]
    assert (second.route("kept", "a"), second.route("changed", "")) == (("t",), ("u",))
    with pytest.raises(UnknownExchange):
        second.route("gone", "")


# -- whole topologies against a naive router --------------------------------------------------------


def topology(rng: random.Random) -> dict[str, ExchangeMeta]:
    """Random exchanges; bindings and alternates lead to later ones only, so there is no cycle."""
    made = []
    count = rng.randint(1, 6)
    for number in range(count):
        kind, bindings = rng.choice(EXCHANGE_TYPES), []
        for _ in range(rng.randint(0, 5)):
            later = rng.random() < 0.4 and number + 1 < count
            where: dict[str, Any] = (
                {"exchange": f"x{rng.randrange(number + 1, count)}"} if later else {"topic": f"t{rng.randrange(4)}"}
            )
            if kind in (DIRECT, TOPIC):
                where["routing_key"] = ".".join(rng.choices(["a", "b", "*", "#"], k=rng.randint(0, 3)))
            elif kind == HEADERS:
                where["headers"] = {name: rng.choice(["1", "2", None]) for name in rng.sample("pqr", rng.randint(1, 3))}
                where["match"] = rng.choice(["all", "any"])
            bindings.append(binding_to(**where))
        alternate = f"x{rng.randrange(number + 1, count)}" if rng.random() < 0.3 and number + 1 < count else ""
        made.append(ExchangeMeta(f"x{number}", kind, alternate, tuple(bindings)))
    return exchanges(*made)


def takes(kind: str, binding: BindingMeta, key: str, headers: dict[str, bytes | None]) -> bool:
    if kind == DIRECT:
        return binding.routing_key == key
    if kind == TOPIC:
        return naive(binding.routing_key.split(".") if binding.routing_key else [], key.split(".") if key else [])
    if kind == HEADERS:
        has = [n in headers and (v is None or headers[n] == v.encode()) for n, v in binding.headers]
        return any(has) if binding.match == MATCH_ANY else all(has)
    return True


def reached(known: dict[str, ExchangeMeta], name: str, key: str, headers: dict[str, bytes | None]) -> set[str]:
    exchange, topics, any_taken = known[name], set(), False
    for binding in exchange.bindings:
        if takes(exchange.type, binding, key, headers):
            any_taken = True
            topics |= reached(known, binding.target, key, headers) if binding.to_exchange else {binding.target}
    if not any_taken and exchange.alternate:
        topics |= reached(known, exchange.alternate, key, headers)
    return topics


@pytest.mark.parametrize("seed", range(60))
def test_a_table_says_what_a_naive_router_says(seed: int) -> None:
    rng = random.Random(seed)
    known = topology(rng)
    table = RoutingTable(known)
    for _ in range(60):
        key = ".".join(rng.choices(["a", "b", "c"], k=rng.randint(0, 3)))
        headers = {name: rng.choice([b"1", b"2", b"3", None]) for name in rng.sample("pqrs", rng.randint(0, 4))}
        for name in known:
            expected = sorted(reached(known, name, key, headers))
            assert list(table.route(name, key, headers.items())) == expected, (name, key, headers, known)


# -- bindings ---------------------------------------------------------------------------------------

BAD_BINDINGS: list[tuple[dict[str, Any], type[FerrylineError], str]] = [
    ({}, InvalidArgument, "topic, exchange"),
    ({"topic": "t", "exchange": "x"}, InvalidArgument, "topic, exchange"),
    ({"topic": "a/b"}, InvalidName, "topic"),
    ({"exchange": "__x"}, InvalidName, "exchange"),
    ({"topic": "t", "routing_key": "k" * 256}, InvalidArgument, "routing_key: 256 bytes are over the limit of 255"),
    ({"topic": "t", "routing_key": "ß" * 128}, InvalidArgument, "routing_key: 256 bytes"),
    ({"topic": "t", "routing_key": 7}, InvalidArgument, "routing_key: expected text, got int"),
    ({"topic": "t", "routing_key": "\ud800"}, InvalidArgument, "routing_key"),
    ({"topic": "t", "match": "some"}, InvalidArgument, "match: 'some'"),
    ({"topic": "t", "headers": {"": "x"}}, InvalidArgument, "headers"),
    ({"topic": "t", "headers": {"a": 1}}, InvalidArgument, "headers"),
    ({"topic": "t", "headers": {1: "a"}}, InvalidArgument, "headers"),
    ({"topic": "t", "headers": {"n" * 256: "a"}}, InvalidArgument, "255 bytes"),
    ({"topic": "t", "headers": {"a": "v" * 256}}, InvalidArgument, "255 bytes"),
    ({"topic": "t", "headers": {"a": "\ud800"}}, InvalidArgument, "headers"),
    (
        {"topic": "t", "headers": {str(n): "" for n in range(21)}},
        InvalidArgument,
        "headers: 21 are over the limit of 20",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "says"), BAD_BINDINGS)
def test_a_wrong_binding_is_refused_by_field_and_limit(
    wrong: dict[str, Any], error: type[FerrylineError], says: str
) -> None:
    with pytest.raises(error) as refused:
        binding_to(**wrong)
    assert says in refused.value.message


def test_the_id_of_a_binding_is_the_same_everywhere_and_names_all_of_it() -> None:
    binding = binding_to(topic="t", headers={"b": None, "a": "1"}, match=MATCH_ANY)
    assert binding == binding_to(topic="t", headers={"a": "1", "b": None}, match=MATCH_ANY)
    assert binding_to(topic="orders", routing_key="eu.#").id == "6f93514792b9cdc5", "ids are in scripts and on the wire"
    others = [
        binding_to(exchange="t", headers={"b": None, "a": "1"}, match=MATCH_ANY),
        binding_to(topic="u", headers={"b": None, "a": "1"}, match=MATCH_ANY),
        binding_to(topic="t", headers={"b": "", "a": "1"}, match=MATCH_ANY),
        binding_to(topic="t", headers={"b": None, "a": "1"}),
        binding_to(topic="t", routing_key="k", headers={"b": None, "a": "1"}, match=MATCH_ANY),
    ]
    assert len({binding.id, *(other.id for other in others)}) == 6
