"""What a dead letter tells of itself, which ones a redrive means, and what it sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

import ferryline as fl
from ferryline.dead_letters import Choice, DeadLetter, why_not
from ferryline.message import Headers
from ferryline.protocol.metadata import RetryPolicy, TopicConfig, TopicMeta
from ferryline.queue_admin import Queue, StoredRecord

STORY: list[tuple[str, bytes | None]] = [
    ("fl-origin-topic", b"orders"),
    ("fl-origin-partition", b"3"),
    ("fl-origin-offset", b"1047"),
    ("fl-origin-timestamp", b"1700000000000"),
    ("fl-origin-id", b"id-1"),
    ("fl-group", b"billing"),
    ("fl-attempts", b"5"),
    ("fl-dead-reason", b"no stock"),
    ("fl-exception", b"Traceback ...\nOutOfStock: none left"),
    ("fl-history", json.dumps([{"attempt": 4, "reason": "timeout", "detail": "t"}, {"omitted": 3}]).encode()),
]


def letter(*headers: tuple[str, bytes | None], key: bytes | None = b"c-7") -> DeadLetter:
    return DeadLetter.of(StoredRecord("orders.dlq", 3, 17, 1, key, b"{}", Headers(list(headers))))


def test_a_letter_says_where_it_comes_from_and_why() -> None:
    told = letter(*STORY, ("trace", b"abc"))
    assert (told.origin_topic, told.origin_partition, told.origin_offset) == ("orders", 3, 1047)
    assert (told.origin_timestamp_ms, told.group, told.reason, told.attempts) == (
        1_700_000_000_000,
        "billing",
        "no stock",
        5,
    )
    assert told.exception.endswith("OutOfStock: none left")
    assert told.history[0] == {"attempt": 4, "reason": "timeout", "detail": "t"}
    assert told.why_not == ""


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("fl-origin-topic", None), ("fl-origin-offset", b"-5"), ("fl-attempts", b"many")],
        [("fl-history", b"{"), ("fl-attempts", b"9" * 30), ("fl-origin-topic", b"\xff")],
        [("fl-history", b'["text"]')],
    ],
)
def test_headers_that_make_no_sense_make_no_letter_and_no_error(headers: list[tuple[str, bytes | None]]) -> None:
    told = letter(*headers)
    assert (told.origin_topic, told.origin_offset, told.attempts, told.history) == ("", 0, 0, [])
    assert "where it came from" in told.why_not


def test_a_letter_that_lacks_bytes_is_not_sent_back() -> None:
    assert "52 bytes" in letter(*STORY, ("fl-truncated", b"52")).why_not


@pytest.mark.parametrize(
    ("origin", "retry", "sent"),
    [
        ("orders", RetryPolicy(), True),
        ("orders", RetryPolicy(dead_letters="elsewhere"), True),  # since then
        ("payments", RetryPolicy(), False),
        ("payments", RetryPolicy(dead_letters="orders.dlq"), True),
    ],
)
def test_a_letter_goes_back_only_where_letters_come_from(origin: str, retry: RetryPolicy, sent: bool) -> None:
    """Whoever may send to a topic of dead letters can write there that a letter came from any topic."""
    forged = letter(("fl-origin-topic", origin.encode()))
    why = why_not(forged, "orders.dlq", TopicMeta("t", origin, TopicConfig(retry=retry), 1))
    assert (why == "") is sent
    assert why_not(forged, "orders.dlq", None) == "", "who sends there is told that there is no such topic"
    assert why_not(letter(), "orders.dlq", None) != ""


def test_what_is_sent_back_has_the_headers_of_the_record_and_an_id_of_its_place() -> None:
    told = letter(("trace", b"abc"), *STORY, ("fl-priority", b"7"), ("fl-id", b"old"), ("empty", None))
    assert told.resent("t1") == [
        ("trace", b"abc"),
        ("fl-priority", b"7"),
        ("empty", None),
        ("fl-id", b"redrive/t1/3/17"),
    ]
    assert told.resent("t1") == told.resent("t1")
    assert told.resent("t1") != told.resent("t2"), "a topic that was made anew has other letters at the same places"


@pytest.mark.parametrize(
    ("choice", "taken"),
    [
        (Choice(), True),
        (Choice(key=b"c-7"), True),
        (Choice(key=b"c-8"), False),
        (Choice(reason="stock"), True),
        (Choice(reason="timeout"), True),  # of an earlier attempt
        (Choice(reason="Stock"), False),
        (Choice(group="billing"), True),
        (Choice(group="bill"), False),
        (Choice(b"c-7", "no stock", "billing"), True),
        (Choice(b"c-7", "no stock", "other"), False),
    ],
)
def test_a_choice_takes_what_all_of_it_says(choice: Choice, taken: bool) -> None:
    assert choice.takes(letter(*STORY)) is taken


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda client: client.queue("a/b", "g"), "topic"),
        (lambda client: client.queue("jobs", "a b"), "group"),
        (lambda client: client.dead_letters(""), "topic"),
    ],
)
async def test_a_wrong_name_is_refused_where_it_is_written(make: Any, field: str) -> None:
    client = fl.connect("https://127.0.0.1:1")
    with pytest.raises(fl.errors.InvalidName) as refused:
        make(client)
    assert refused.value.details["field"] == field
    await client.close()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda queue: queue.peek(0), "count"),
        (lambda queue: queue.peek(10_001), "count"),
        (lambda queue: queue.redrive(count=-1), "count"),
        (lambda queue: queue.explain(0, -1), "offset"),
    ],
)
async def test_a_wrong_argument_is_refused_before_anything_is_sent(call: Any, field: str) -> None:
    client = fl.connect("https://127.0.0.1:1")
    with pytest.raises(fl.errors.InvalidArgument) as refused:
        await call(Queue(client, "jobs", "media"))
    assert refused.value.details["field"] == field
    await client.close()


async def test_wrong_arguments_of_a_redrive_are_refused_before_anything_is_sent() -> None:
    client = fl.connect("https://127.0.0.1:1")
    letters = client.dead_letters("orders")
    for wrong, field in (({"count": -1}, "count"), ({"rate": -1.0}, "rate"), ({"group": "a b"}, "group")):
        with pytest.raises(fl.errors.InvalidRequest) as refused:
            await letters.redrive(**wrong)  # type: ignore[arg-type]
        assert refused.value.details["field"] == field
    await client.close()
