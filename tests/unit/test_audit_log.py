"""The audit log: what is in its lines, that it stays within bounds, and that a cursor survives files and failures."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ferryline_service.access import audit_log
from ferryline_service.access.audit_files import Journal, seq_of
from ferryline_service.access.audit_log import DONE, FAILED, LOST, REFUSED, AuditLog
from ferryline_service.access.caller import Caller

ALICE = Caller("alice")


class Clock:
    def __init__(self) -> None:
        self.ms = 1_767_225_600_123

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> AuditLog:
    return AuditLog(tmp_path / "audit", now_ms=clock)


def lines(folder: Path, name: str = "audit") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_bytes().splitlines()]


def refuse(log: AuditLog, name: str = "orders", who: Caller | None = ALICE) -> None:
    log.note(who, "10.0.0.7", "produce", "topic", name, REFUSED, "FORBIDDEN", "r1")


def test_a_line_says_who_did_what_to_what_from_where_and_how_it_ended(log: AuditLog, tmp_path: Path) -> None:
    log.note(ALICE, "10.0.0.7", "delete_topic", "topic", "orders", DONE, "", "r1", partitions=3)
    assert lines(tmp_path / "audit") == [
        {
            "seq": 1,
            "time": "2026-01-01T00:00:00.123Z",
            "principal": "alice",
            "remote": "10.0.0.7",
            "action": "delete_topic",
            "resource": "topic",
            "name": "orders",
            "outcome": "done",
            "code": "",
            "request_id": "r1",
            "count": 1,
            "details": {"partitions": 3},
        }
    ]
    assert (tmp_path / "audit" / "audit.jsonl").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700


def test_nothing_from_outside_breaks_a_line_or_reaches_a_terminal(log: AuditLog, tmp_path: Path) -> None:
    evil = 'a\n{"seq":9}\x1b[2J\u202e\ud800\x00"'
    log.note(Caller(evil), evil, evil, evil, evil, FAILED, evil, evil, **{evil: evil, "n": 2**80, "list": [evil]})
    raw = (tmp_path / "audit" / "audit.jsonl").read_bytes()
    assert raw.count(b"\n") == 1
    assert raw.decode("utf-8").rstrip("\n").isprintable()
    record = json.loads(raw)
    assert record["principal"] == 'a\\n{"seq":9}\\x1b[2J\\u202e\\ud800\\x00"'
    assert all(text.isprintable() for text in [*map(str, record["details"].values()), record["request_id"]])


@pytest.mark.parametrize(
    "token",
    [
        "fl_3f9a1c_" + "S3cr3t" * 7,
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl",
        "Bearer eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.",
    ],
)
def test_a_token_is_never_written_wherever_it_stands(log: AuditLog, tmp_path: Path, token: str) -> None:
    log.note(ALICE, "10.0.0.7", "a", "topic", token, DONE, "", "r", where=f"/v1/x?token={token}")
    log.note(None, token, "a", "topic", "x" * 150 + token, REFUSED, "BAD_CREDENTIALS", token)
    secret = token.removeprefix("Bearer ")[10:]
    for path in (tmp_path / "audit").iterdir():
        assert secret[:20] not in path.read_text()
        assert "(token)" in path.read_text()


def test_what_is_long_is_cut(log: AuditLog, tmp_path: Path) -> None:
    log.note(
        Caller("p" * 9_000), "r", "a", "t", "\x00" * 9_000, DONE, "", "r", **{f"k{n}": "v" * 999 for n in range(99)}
    )
    (record,) = lines(tmp_path / "audit")
    assert len(record["principal"]) == len(record["name"]) == audit_log.TEXT_MAX
    assert len(record["details"]) == audit_log.DETAILS_MAX
    assert max(len(text) for text in record["details"].values()) == audit_log.TEXT_MAX


def test_equal_refusals_within_a_second_are_two_lines_with_their_count(
    log: AuditLog, clock: Clock, tmp_path: Path
) -> None:
    for _ in range(500):
        refuse(log)
    clock.ms += 999
    refuse(log)
    assert [line["count"] for line in lines(tmp_path / "audit", "refused")] == [1]
    clock.ms += 1
    refuse(log)  # a new second: the old one is told
    assert [line["count"] for line in lines(tmp_path / "audit", "refused")] == [1, 500, 1]
    assert not (tmp_path / "audit" / "audit.jsonl").read_bytes(), "refusals are kept apart from changes"


async def test_the_rest_of_a_second_is_written_without_a_further_refusal(
    log: AuditLog, tmp_path: Path, eventually: Any
) -> None:
    refuse(log)
    refuse(log)
    await eventually(lambda: [line["count"] for line in lines(tmp_path / "audit", "refused")] == [1, 1])
    log.close()


def test_ever_new_names_fill_no_disk(log: AuditLog, clock: Clock, tmp_path: Path) -> None:
    for number in range(10_000):
        refuse(log, f"name-{number}")
    log.flush()
    found = lines(tmp_path / "audit", "refused")
    assert len(found) == audit_log.SECOND_LINES_MAX + 1
    assert (found[-1]["name"], found[-1]["count"]) == ("*", 10_000 - audit_log.SECOND_LINES_MAX)
    assert sum(line["count"] for line in found) == 10_000


def test_changes_are_not_aggregated(log: AuditLog, tmp_path: Path) -> None:
    for _ in range(50):
        log.note(ALICE, "", "purge", "group", "g", DONE)
        log.note(ALICE, "", "purge", "group", "g", FAILED, "CONFLICT")
    assert len(lines(tmp_path / "audit")) == 100


def test_files_are_bounded_and_a_cursor_outlives_their_rotation(tmp_path: Path, clock: Clock) -> None:
    log = AuditLog(tmp_path, now_ms=clock, file_bytes=2_000, files=3)
    seen: list[int] = []
    cursor = 0
    for number in range(1, 301):
        log.note(ALICE, "", "alter", "topic", f"t{number}", DONE)
        if number % 5 == 0:
            page = log.read(cursor, 100)
            seen += [record["seq"] for record in page.records]
            cursor = int(page.next)
            assert not page.more
    assert seen == list(range(1, 301)), "who reads often enough misses nothing and sees nothing twice"
    older = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("audit-"))
    assert len(older) == 2
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * 2_000
    kept = [record["seq"] for record in log.read(0, 1_000).records]
    assert kept == list(range(kept[0], 301)), "from the beginning: everything that is still there"
    for start in range(kept[0] - 1, 300):
        assert [record["seq"] for record in log.read(start, 2).records] == list(range(start + 1, min(start + 3, 301)))


def test_a_flood_of_refusals_takes_no_change_away(tmp_path: Path, clock: Clock) -> None:
    log = AuditLog(tmp_path, now_ms=clock, file_bytes=2_000, files=2)
    log.note(ALICE, "", "delete_topic", "topic", "orders", DONE)
    for number in range(500):
        clock.ms += 1_000
        refuse(log, f"n{number}")
    assert log.read(0, 1_000, outcome=DONE).records[0]["name"] == "orders"


def test_pages_are_in_order_over_both_kinds_and_filters_apply(log: AuditLog, clock: Clock) -> None:
    for number in range(30):
        clock.ms += 1_000
        log.note(ALICE if number % 3 else Caller("bob"), "", "a", "topic", f"t{number}", DONE)
        refuse(log, f"r{number}")
    page = log.read(None, 10)
    assert [record["seq"] for record in page.records] == list(range(51, 61)), (
        "without a cursor: the newest, newest last"
    )
    page = log.read(0, 7)
    assert [record["seq"] for record in page.records] == list(range(1, 8))
    assert page.more
    assert page.next == "7"
    assert [record["name"] for record in log.read(0, 3, principal="bob").records] == ["t0", "t3", "t6"]
    assert [record["name"] for record in log.read(None, 2, outcome=REFUSED).records] == ["r28", "r29"]
    assert log.read(10_000, 5).next == "60", "a cursor of a log that was thrown away leads to its end"


def test_one_question_looks_at_a_bounded_number_of_lines(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "LOOKED_AT_MAX", 10)
    for number in range(25):
        log.note(ALICE, "", "a", "topic", f"t{number}", DONE)
    log.note(Caller("bob"), "", "a", "topic", "last", DONE)
    page = log.read(0, 5, principal="bob")
    assert (page.records, page.next, page.more) == ([], "10", True)
    page = log.read(20, 5, principal="bob")
    assert [record["name"] for record in page.records] == ["last"]


def test_the_next_start_goes_on_where_the_last_one_ended(tmp_path: Path, clock: Clock) -> None:
    first = AuditLog(tmp_path, now_ms=clock)
    first.note(ALICE, "", "a", "topic", "one", DONE)
    refuse(first, "two")
    refuse(first, "two")
    first.close()
    second = AuditLog(tmp_path, now_ms=clock)
    second.note(ALICE, "", "a", "topic", "four", DONE)
    assert [(record["seq"], record["name"]) for record in second.read(0, 9).records] == [
        (1, "one"),
        (2, "two"),
        (3, "two"),
        (4, "four"),
    ]


def test_a_line_that_was_torn_by_a_crash_is_passed_over(tmp_path: Path, clock: Clock) -> None:
    first = AuditLog(tmp_path, now_ms=clock)
    for name in ("one", "two"):
        first.note(ALICE, "", "a", "topic", name, DONE)
    first.close()
    path = tmp_path / "audit.jsonl"
    os.truncate(path, path.stat().st_size - 20)
    second = AuditLog(tmp_path, now_ms=clock)
    for name in ("three", "four"):
        second.note(ALICE, "", "a", "topic", name, DONE)
    assert [record["name"] for record in second.read(0, 9).records] == ["one", "three", "four"]


def test_a_disk_that_takes_nothing_stops_nothing_and_is_told_once_there_is_room(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "audit").write_text("a file where the folder should be")
    log = AuditLog(tmp_path / "audit", now_ms=clock)
    for _ in range(7):
        log.note(ALICE, "", "a", "topic", "gone", DONE)
    refuse(log)
    assert (log.lost, log.written) == (8, 0)
    with pytest.raises(OSError, match="audit"):
        log.read(0, 1)
    (tmp_path / "audit").unlink()
    log.note(ALICE, "", "a", "topic", "kept", DONE)
    first, second = log.read(0, 9).records
    assert (first["outcome"], first["count"], second["name"]) == (LOST, 8, "kept")


def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_the_others_readable(
    log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    log.note(ALICE, "", "a", "topic", "one", DONE)
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:30]))
    log.note(ALICE, "", "a", "topic", "two", DONE)
    monkeypatch.setattr(os, "write", write)
    log.note(ALICE, "", "a", "topic", "three", DONE)
    assert [record["name"] for record in log.read(0, 9).records] == ["one", "", "three"]
    assert log.lost == 1


@pytest.mark.parametrize("how", ["removed", "moved", "with its folder"])
def test_a_file_that_somebody_took_away_is_made_again(log: AuditLog, tmp_path: Path, how: str) -> None:
    path = tmp_path / "audit" / "audit.jsonl"
    log.note(ALICE, "", "a", "topic", "one", DONE)
    if how == "removed":
        path.unlink()
        page = log.read(0, 9)
        assert (page.records, page.more) == ([], False), "nobody asks for ever for what is not there"
    elif how == "moved":
        path.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(tmp_path / "audit")
        assert log.read(0, 9).records == []
    log.note(ALICE, "", "a", "topic", "two", DONE)
    assert [(record["seq"], record["name"]) for record in log.read(0, 9).records] == [(2, "two")]
    assert log.lost == 0


def test_numbers_are_read_from_whole_lines_only(tmp_path: Path) -> None:
    assert seq_of(b'{"seq":41,"a":1}\n') == 41
    assert seq_of(b'{"seq":41,"a":1') is None
    assert seq_of(b'{"seq":x}\n') is None
    journal = Journal(tmp_path, "audit")
    assert journal.open() == 0
    assert list(journal.after(0)) == []
    journal.close()


async def test_nothing_is_written_after_the_end_and_no_timer_is_left(log: AuditLog, tmp_path: Path) -> None:
    refuse(log)
    log.close()
    log.note(ALICE, "", "a", "topic", "late", DONE)
    assert log.written == 1
    assert not [handle for handle in getattr(asyncio.get_running_loop(), "_scheduled", []) if not handle.cancelled()]
