"""FalconQ without a cluster: what a call means, what survives on disk, who may call, and how records are shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ferryline.falconq.consumers import _chosen
from ferryline.falconq.files import PositionFiles
from ferryline.falconq.gateway import is_loopback
from ferryline.falconq.position import HeldLease, Position
from ferryline.falconq.shown import level_of, shown
from ferryline.protocol.errors import Conflict, StorageFailed
from ferryline.protocol.queue_messages import Delivery

TOPIC = "t" * 32
FRESH = Position(TOPIC, "jobs", "billing")


def lease(number: int, *offsets: int) -> HeldLease:
    return HeldLease(0, 1, number, b"r" * 16, list(offsets))


def answering(position: Position, number: int) -> Position:
    return position.answering([lease(number, number)], [{"message": number}])


def test_a_plain_call_goes_on_unless_the_answer_could_not_be_written() -> None:
    first = answering(FRESH, 1)
    assert not FRESH.repeats(None, written=True)
    assert not first.repeats(None, written=True)
    assert first.repeats(None, written=False)


def test_a_call_with_a_token_can_be_made_again_and_again() -> None:
    first = answering(FRESH, 1)
    second = answering(first.passed(), 2)
    for written in (True, False):
        assert not FRESH.repeats("", written)
        assert first.repeats("", written), "its answer did not arrive"
        assert not first.repeats(first.token, written)
        assert second.repeats(first.token, written), "the same call again: the answer to it was lost"
        assert second.repeats("", written), "a consumer that has forgotten all gets what is out"
        assert not second.repeats(second.token, written)


def test_an_empty_answer_leaves_the_token_good() -> None:
    first = answering(FRESH, 1)
    empty = first.passed().answering([], [])
    assert (empty.processed, empty.token, empty.messages) == (first.token, "", [])
    for ack in (None, "", first.token):
        assert not empty.repeats(ack, written=True)


def test_a_token_of_another_answer_is_refused_and_the_last_one_named() -> None:
    first = answering(FRESH, 1)
    third = answering(answering(first.passed(), 2).passed(), 3)
    for position, ack in ((FRESH, "x"), (first, "x"), (third, first.token), (third.passed(), "x" * 1_000)):
        with pytest.raises(Conflict, match="ack: ") as refused:
            position.repeats(ack, written=True)
        assert refused.value.details["last"] == (position.token or position.processed)
        assert len(str(refused.value)) < 300


def test_positions_survive_and_an_answer_that_is_out_counts_as_not_written_until_it_was(tmp_path: Path) -> None:
    files = PositionFiles(tmp_path)
    assert files.load(FRESH) == (FRESH, True)
    first = answering(FRESH, 1)
    files.save(first)
    assert files.load(FRESH) == (first, False)
    files.written(first)
    assert files.load(FRESH) == (first, True)
    second = answering(first.passed(), 2)
    files.save(second)
    files.close()
    files = PositionFiles(tmp_path)
    assert files.load(FRESH) == (second, False)
    files.save(second.passed())
    assert files.load(FRESH) == (second.passed(), True), "the older file of an answer that was out is gone"
    other = Position(TOPIC, "jobs", "billing", 3)
    assert files.load(other) == (other, True)
    files.close()


def test_one_gateway_at_a_time_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    files = PositionFiles(tmp_path)
    with pytest.raises(Conflict, match="data_dir"):
        PositionFiles(tmp_path)
    files.save(FRESH.passed())
    (found,) = (path for path in tmp_path.iterdir() if path.name != "lock")
    found.write_bytes(b"{")
    with pytest.raises(StorageFailed, match=found.name):
        files.load(FRESH)
    files.close()


def record(offset: int, timestamp: int, priority: bytes | None = None, value: bytes = b"x") -> Any:
    headers = [] if priority is None else [("fl-priority", priority)]
    return SimpleNamespace(offset=offset, timestamp=timestamp, key=None, value=value, headers=headers)


def test_high_comes_before_low_over_all_partitions_and_the_rest_goes_back() -> None:
    zero = Delivery(TOPIC, 0, 1, 7, b"a", offsets=[1, 2, 3], attempts=[1, 1, 1])
    one = Delivery(TOPIC, 1, 4, 9, b"b", offsets=[8, 5], attempts=[1, 1])
    leased = [
        ((TOPIC, 0), zero, [record(1, 100), record(2, 90), record(3, 300, b"9")]),
        ((TOPIC, 1), one, [record(8, 200, b"9"), record(5, 95)]),
    ]
    held, surplus, messages = _chosen(leased, 4)
    assert [(one["partition"], one["offset"], one["priority"]) for one in messages] == [
        (1, 8, "high"),
        (0, 3, "high"),
        (1, 5, "low"),
        (0, 1, "low"),
    ], "by time between partitions, but never against the order of the log within one"
    assert [(lease.partition, lease.number, lease.offsets) for lease in held] == [(0, 7, [1, 3]), (1, 9, [8, 5])]
    assert [(lease.partition, lease.number, lease.offsets) for lease in surplus] == [(0, 7, [2])]


@pytest.mark.parametrize(
    ("headers", "level"),
    [([], 4), ([("fl-priority", b"9")], 9), ([("fl-priority", b"x")], 4), ([("fl-priority", None)], 4),
     ([("fl-priority", b"10")], 4), ([("fl-priority", b"0")], 0), ([("other", b"9")], 4)],
)  # fmt: skip
def test_priorities_are_those_of_queues(headers: Any, level: int) -> None:
    assert level_of(headers) == level


def test_messages_come_back_as_they_were_published() -> None:
    json = [("content-type", b"application/json")]
    for value, headers, message in (
        (b"gr\xc3\xbc\xc3\x9fe", [], "grüße"),
        (b'{"a": [1]}', json, {"a": [1]}),
        (b"{", json, "{"),
        (b"\xff\x00", [], {"base64": "/wA="}),
        (None, [], None),
    ):
        made = SimpleNamespace(offset=1, timestamp=2, key=None, value=value, headers=headers)
        assert shown(0, 1, made)["message"] == message


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3:80", "localhost", "localhost:8080", "[::1]:8080", "[::1]"])
def test_this_machine_is_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "10.0.0.1:8080", "[::]", "example.org", "localhost.example.org", "", "[::1", "127.0.0.1.nip.io"]
)
def test_everything_else_is_not(host: str) -> None:
    assert not is_loopback(host)
