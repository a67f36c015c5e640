"""The ledger of runs, and the pieces of a run that need no cluster."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ferryline.cli.chaos.campaign import broken, judge
from ferryline.cli.chaos.harm import flip
from ferryline.cli.chaos.ledger import append, commit_of, read, total
from ferryline.cli.chaos.record import FAIL, INFO, OK, Recorder, now_us, number_of, payload
from ferryline.cli.chaos.traffic import keys_for, queue_topic, topics_for
from ferryline.protocol.partitioner import partition_of

ROOT = Path(__file__).resolve().parents[2]
PLACE = ("chaos-two", 0)


def entry(**changed: Any) -> dict[str, Any]:
    return {"good": True, "seconds": 10.0, "acked": 100, "anomalies": 0, "faults": {"kill": 2}, **changed}


def test_a_ledger_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.jsonl"
    append(path, entry(commit="a"))
    append(path, entry(commit="b", faults={"kill": 1, "cut": 4}, good=False, anomalies=3))
    append(path, entry(commit="c", faults={"kill": 100}, good=False, sabotage="ack-before-flush"))
    found = total(read(path))
    assert found["faults"] == {"cut": 4, "kill": 3}, "a sabotaged run counts nowhere"
    assert (found["runs"], found["failed"], found["commits"]) == (2, 1, 2)
    assert (found["acked"], found["anomalies"], found["seconds"]) == (200, 3, 20)


def test_the_commit_of_a_source_tree_is_known_and_of_another_folder_not(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == ""
    if (ROOT / ".git").exists():
        assert len(commit_of(ROOT).rstrip("+")) >= 12


def test_a_flip_changes_bits_and_not_the_size(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    before = bytes(range(256)) * 16
    for seed in range(50):
        path.write_bytes(before)
        flip(path, random.Random(seed))
        after = path.read_bytes()
        turned = sum((one ^ other).bit_count() for one, other in zip(before, after, strict=True))
        assert 1 <= turned <= 8


def test_payloads_carry_their_number() -> None:
    assert number_of(payload(123_456, b"....")) == 123_456
    assert len(payload(0, b"." * 90)) == 100
    assert number_of(b"somebody else's") == number_of(None) == 2**31 - 1


def test_keys_belong_to_the_partition_they_are_made_for() -> None:
    for topic in [*topics_for(3, 8), queue_topic(3)]:
        for place in topic.places:
            keys = keys_for(2, place, topic.partitions, topic.keys)
            assert len(set(keys)) == topic.keys
            assert {partition_of(key, topic.partitions) for key in keys} == {place[1]}


def test_two_brokers_have_no_topic_with_three_copies() -> None:
    assert [topic.replication for topic in topics_for(2, 4)] == [2]
    assert [topic.replication for topic in topics_for(5, 4)] == [2, 3]


def recorded(path: Path, *, read_first: int, copies: tuple[int, ...] = (1, 2), moved: int = 0) -> Path:
    """Ten records, one refused and one unknown; a reader and two copies that hold some of them."""
    with Recorder(path) as recorder:
        first = recorder.attempt("producer-0", PLACE, 12)
        recorder.sent("producer-0", PLACE, OK, now_us(), range(first, first + 10), range(10))
        recorder.sent("producer-0", PLACE, FAIL, now_us(), [first + 10])
        recorder.sent("producer-0", PLACE, INFO, now_us(), [first + 11])
        recorder.begins("reader-0", PLACE, now_us(), 0)
        numbers = range(first, first + read_first)
        recorder.polled_at("reader-0", PLACE, now_us(), numbers, range(moved, read_first + moved))
        for broker in copies:
            held = 10 if broker == 1 else read_first
            recorder.replica(broker, PLACE, now_us(), [], [])
            recorder.replica(broker, PLACE, now_us(), range(first, first + held), range(held))
        assert (recorder.acked, recorder.refused, recorder.unknown) == (10, 1, 1)
    return path


def test_a_faithful_history_is_good(tmp_path: Path) -> None:
    verdict = judge(recorded(tmp_path / "h", read_first=10))
    assert verdict.good, verdict.explain()


@pytest.mark.parametrize(("changed", "finding"), [({"read_first": 9}, "lost"), ({"moved": 1}, "inconsistent offset")])
def test_what_the_recorder_writes_is_judged(tmp_path: Path, changed: dict[str, int], finding: str) -> None:
    verdict = judge(recorded(tmp_path / "h", **{"read_first": 10, **changed}))
    assert any(finding in name for name in verdict.errors), verdict.explain()


HANDSHAKE = b"""[error    ] Future exception was never retrieved
Traceback (most recent call last):
  File "uvloop/sslproto.pyx", line 527, in uvloop.loop.SSLProtocol._on_handshake_complete
ConnectionResetError
[warning  ] session with the coordinator ended
"""


CLOSED = b"""2026-11-29T01:22:54.101545Z [error    ] Fatal error on SSL protocol
Traceback (most recent call last):
  File "uvloop/sslproto.pyx", line 727, in uvloop.loop.SSLProtocol._do_read
  File "uvloop/handles/handle.pyx", line 159, in uvloop.loop.UVHandle._ensure_alive
RuntimeError: unable to perform operation on <TCPTransport closed=True reading=False 0x562a>; the handler is closed
2026-11-29T01:22:56.935067Z [info     ] role   epoch=6 partition=chaos-two/1 reason= role=primary service=broker
"""


def test_a_broken_invariant_in_a_log_is_found_and_daily_bread_is_not() -> None:
    assert broken(HANDSHAKE) == []
    assert broken(CLOSED) == []
    (found,) = broken(HANDSHAKE + b"[critical ] invariant violated, partition stopped\n")
    assert "partition stopped" in found
    (found,) = broken(HANDSHAKE + b'Traceback (most recent call last):\n  File "x.py", line 1, in f\nKeyError: 3\n')
    assert "KeyError" in found
