"""For each anomaly a history that has it and must be flagged, and one that comes close and must not be."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pytest

from ferryline.proof.checker import check
from ferryline.proof.findings import COUNTED, ERRORS, Verdict
from ferryline.proof.history import (
    VERSION,
    HistoryError,
    HistoryWriter,
    Op,
    ValueBlocks,
    count_of,
    expand,
    pack,
    read_history,
    together,
)

Story = list[Op]


def header(**fields: Any) -> Op:
    return Op("header", version=VERSION, **fields)


def send(values: list[int], offsets: list[int], t0: int = 1, t1: int = 2, proc: str = "p", **fields: Any) -> Op:
    return Op("send", proc, topic="t", partition=0, values=pack(values), offsets=pack(offsets), t0=t0, t1=t1, **fields)


def refused(values: list[int], kind: str = "fail") -> Op:
    return Op("send", "p", kind, topic="t", partition=0, values=pack(values), t0=1, t1=2)


def poll(values: list[int], offsets: list[int], proc: str = "c", t0: int = 50, t1: int = 60, **fields: Any) -> Op:
    return Op("poll", proc, topic="t", partition=0, values=pack(values), offsets=pack(offsets), t0=t0, t1=t1, **fields)


def copy(broker: int, values: list[int], offsets: list[int]) -> Op:
    return Op("replica_read", topic="t", partition=0, broker=broker, values=pack(values), offsets=pack(offsets))


def on(f: str, **fields: Any) -> Op:
    return Op(f, topic="t", partition=0, **fields)


def claim(proc: str, number: int, offset: int | None, t0: int, t1: int = 0, **fields: Any) -> Op:
    return on("claim", proc=proc, group="g", generation=number, offset=offset, t0=t0, t1=t1 or t0 + 1, **fields)


def commit(proc: str, number: int, offset: int, t0: int, t1: int = 0, **fields: Any) -> Op:
    return on("commit", proc=proc, group="g", generation=number, offset=offset, t0=t0, t1=t1 or t0 + 1, **fields)


def view(proc: str, generation: int, owned: list[int], t1: int) -> Op:
    return Op("view", proc, group="g", generation=generation, owned=[("t", part) for part in owned], t0=t1, t1=t1)


def judged(story: Iterable[Op], **fields: Any) -> Verdict:
    ops = [header(**fields), *story]
    return check(lambda: ops)


TEN = list(range(10))
SENT = send(TEN, TEN)
READ = poll(TEN, TEN)
CALM = Op("calm", group="g", owned=[("t", 0), ("t", 1)], t0=10, t1=20)
GROUP_READ = poll(TEN, TEN, group="g")

# finding, bad story, good story, header fields
CASES: list[tuple[str, Story, Story, dict[str, Any]]] = [
    (
        "lost",
        [SENT, poll([0, 1, 3], [0, 1, 3]), poll([4], [4])],
        [SENT, poll([0, 1], [0, 1]), poll(TEN[2:], TEN[2:])],
        {},
    ),
    ("lost", [SENT, poll(TEN[5:], TEN[5:])], [SENT, poll(TEN[5:], TEN[5:]), on("expired", offset=5)], {}),
    ("unseen", [SENT, poll(TEN[:9], TEN[:9])], [SENT, poll(TEN[:9], TEN[:9], "d"), READ], {}),
    ("unseen", [SENT], [refused(TEN, "info")], {}),
    (
        "lost on replica, prefix",
        [SENT, READ, copy(1, TEN, TEN), copy(2, TEN[1:], TEN[1:])],
        [SENT, READ, copy(1, TEN, TEN), copy(2, TEN[1:], TEN[1:]), on("expired", offset=1)],
        {},
    ),
    (
        "lost on replica, middle",
        [SENT, READ, copy(2, [0, 1, 9], [0, 1, 9])],
        [SENT, READ, copy(2, [0, 1, 9], [0, 1, 9]), copy(2, TEN[2:9], TEN[2:9])],
        {},
    ),
    (
        "lost on replica, postfix",
        [SENT, READ, copy(2, TEN[:9], TEN[:9])],
        [send(TEN[:9], TEN[:9]), refused([9], "info"), READ, copy(1, TEN, TEN), copy(2, TEN[:9], TEN[:9])],
        {},
    ),
    ("lost on replica, postfix", [SENT, READ, copy(2, [], [])], [SENT, READ], {}),
    ("duplicate", [SENT, poll([*TEN, 3], [*TEN, 10])], [SENT, READ, poll(TEN, TEN, "d")], {}),
    ("duplicate", [SENT, READ, copy(1, [*TEN, 3], [*TEN, 10])], [SENT, READ, copy(1, TEN, TEN)], {}),
    (
        "nonmonotonic send",
        [send([1, 2], [5, 6]), send([3], [4]), poll([3, 1, 2], [4, 5, 6])],
        [send([1, 2], [5, 6]), send([3], [4], proc="q"), poll([3, 1, 2], [4, 5, 6])],
        {},
    ),
    (
        "nonmonotonic send",
        [send([3], [6]), send([1, 2], [5, 7]), poll([1, 3, 2], [5, 6, 7])],
        [send([3], [7]), send([1, 2], [5, 6]), poll([1, 2, 3], [5, 6, 7])],
        {},
    ),
    (
        "external poll skip",
        [SENT, READ, poll(TEN[:3], TEN[:3], "d"), poll(TEN[5:], TEN[5:], "d")],
        [SENT, READ, poll(TEN[:3], TEN[:3], "d"), on("assign", proc="d", offset=5), poll(TEN[5:], TEN[5:], "d")],
        {},
    ),
    (
        "external poll skip",
        [send([0, 1, 2, 3], [0, 1, 2, 3]), poll([0, 1], [0, 1]), poll([3], [3]), poll([0, 1, 2, 3], [0, 1, 2, 3], "d")],
        [send([0, 1, 3], [0, 1, 3]), poll([0, 1], [0, 1]), poll([3], [3])],  # offset 2: nothing that anybody knows
        {},
    ),
    (
        "external poll skip",
        [SENT, READ, on("assign", proc="d", offset=0), poll(TEN[1:], TEN[1:], "d")],
        [SENT, READ, on("assign", proc="d", offset=0), poll(TEN[1:], TEN[1:], "d"), on("expired", offset=1)],
        {},
    ),
    (
        "internal poll skip",
        [SENT, READ, poll([0, 1, 3], [0, 1, 3], "d")],
        [send([0, 1, 3], [0, 1, 3]), poll([0, 1, 3], [0, 1, 3], "d")],
        {},
    ),
    (
        "external nonmonotonic poll",
        [SENT, READ, poll([8], [8])],
        [SENT, READ, on("release", proc="c", group="g"), poll([8], [8])],
        {},
    ),
    (
        "internal nonmonotonic poll",
        [SENT, READ, poll([4, 3], [4, 3], "d")],
        [SENT, READ, poll([3, 4], [3, 4], "d")],
        {},
    ),
    (
        "phantom",
        [SENT, READ, poll([77], [10])],
        [SENT, READ, poll([77], [10]), Op("attempt", "p", values=[(70, 10)])],
        {},
    ),
    ("phantom", [SENT, READ, copy(1, [*TEN, 10], [*TEN, 10])], [SENT, READ, copy(1, TEN, TEN)], {}),
    (
        "aborted read",
        [SENT, refused([20]), poll([*TEN, 20], [*TEN, 10])],
        [SENT, refused([20], "info"), poll([*TEN, 20], [*TEN, 10])],
        {},
    ),
    (
        "inconsistent offset",
        [SENT, READ, send([20], [9], proc="q")],
        [
            SENT,
            READ,
            Op("send", "q", topic="u", values=[20], offsets=[9], partition=0),
            Op("poll", "c", topic="u", values=[20], offsets=[9], partition=0),
        ],
        {},
    ),
    (
        "inconsistent offset",
        [SENT, READ, refused([20], "info"), poll([20], [3], "d")],
        [SENT, READ, refused([20], "info"), poll([20], [10], "d")],
        {},
    ),
    (
        "real time",
        [send([1], [8], 1, 2), send([2], [7], 3, 4, "q"), poll([2, 1], [7, 8])],
        [send([1], [8], 1, 3), send([2], [7], 3, 4, "q"), poll([2, 1], [7, 8])],
        {},
    ),
    (
        "stale read",
        [SENT, READ, poll([], [], "d", t0=3, t1=4, hw=9)],
        [SENT, READ, poll([], [], "d", t0=2, t1=4, hw=9), poll([], [], "d", t0=3, t1=4, hw=10)],
        {"linearizable": True},
    ),
    ("offset sanity", [send([1], [-1]), poll([1], [0])], [send([1], [0]), poll([1], [0])], {}),
    ("offset sanity", [send([1], []), poll([1], [0])], [refused([1], "info"), poll([1], [0])], {}),
    ("offset sanity", [send([1], [2**60])], [send([1], [2**40]), poll([1], [2**40])], {}),
    (
        "K1 two committers",
        [claim("a", 1, 0, 1), commit("a", 1, 2, 3), commit("b", 1, 3, 5)],
        [claim("a", 1, 0, 1), commit("a", 1, 2, 3), commit("b", 1, 3, 5, type="fail")],
        {"drained": False},
    ),
    (
        "K1 two committers",
        [claim("a", 4, 0, 1), claim("b", 4, 0, 3)],
        [claim("a", 4, 0, 1), claim("b", 5, 0, 3)],
        {"drained": False},
    ),
    (
        "K1 zombie commit",
        [claim("a", 1, 0, 1), claim("b", 2, 0, 3, 4), commit("a", 1, 2, 5)],
        [claim("a", 1, 0, 1), claim("b", 2, 0, 3, 6), commit("a", 1, 2, 5)],
        {"drained": False},
    ),
    (
        "K1 zombie commit",
        [claim("a", 1, 0, 1), claim("b", 2, 0, 3), commit("a", 1, 2, 9)],
        [claim("a", 1, 0, 1), claim("b", 2, 0, 3), commit("a", 1, 2, 9, type="fail"), commit("b", 2, 2, 12)],
        {"drained": False},
    ),
    (
        "K2 commit went back",
        [commit("a", 1, 7, 1), commit("a", 1, 6, 3)],
        [commit("a", 1, 7, 1), on("reset", group="g", offset=2, t0=3, t1=4), commit("a", 1, 6, 5)],
        {"drained": False},
    ),
    (
        "K2 commit went back",
        [commit("a", 1, 7, 1), on("committed", group="g", offset=6, t0=3, t1=4)],
        [commit("a", 1, 7, 1, 3), on("committed", group="g", offset=6, t0=3, t1=4)],
        {"drained": False},
    ),
    (
        "K3 stale start",
        [claim("a", 1, 0, 1), commit("a", 1, 7, 3), claim("b", 2, 6, 5)],
        [claim("a", 1, 0, 1), commit("a", 1, 7, 3, 5), claim("b", 2, 6, 5)],
        {"drained": False},
    ),
    (
        "K3 stale start",
        [SENT, claim("a", 1, 0, 1), commit("a", 1, 7, 3), claim("b", 2, None, 5), poll([6], [6], "b", group="g")],
        [SENT, claim("a", 1, 0, 1), commit("a", 1, 7, 3), claim("b", 2, None, 5), poll([7], [7], "b", group="g")],
        {"drained": False},
    ),
    (
        "K5 no convergence",
        [view("a", 3, [0], 11), view("b", 3, [], 12), CALM],
        [view("a", 3, [0], 11), view("b", 3, [], 12), view("b", 3, [1], 13), CALM],
        {"drained": False},
    ),
    (
        "K5 no convergence",
        [view("a", 3, [0, 1], 11), view("b", 3, [1], 12), CALM],
        [view("a", 3, [0, 1], 11), view("a", 4, [0], 12), view("b", 4, [1], 12), CALM],
        {"drained": False},
    ),
    (
        "K5 no convergence",
        [view("a", 3, [0], 11), view("b", 4, [1], 12), CALM],
        [view("a", 3, [0], 11), view("c", 2, [1], 3), view("c", -1, [], 9), view("b", 3, [1], 12), CALM],
        {"drained": False},
    ),
    (
        "K6 not processed",
        [SENT, READ, claim("a", 1, 2, 5), poll(TEN[2:9], TEN[2:9], "a", group="g")],
        [SENT, READ, claim("a", 1, 2, 5), poll(TEN[2:], TEN[2:], "a", group="g")],
        {},
    ),
    (
        "K7 commit beyond watermark",
        [SENT, GROUP_READ, send([20], [10], 200, 201), poll([20], [10], group="g"), commit("c", 1, 11, 100)],
        [SENT, GROUP_READ, send([20], [10], 200, 201), poll([20], [10], group="g"), commit("c", 1, 11, 203)],
        {},
    ),
    (
        "K7 commit beyond watermark",
        [SENT, GROUP_READ, on("watermark", offset=11, t0=1, t1=2), commit("c", 1, 12, 100)],
        [SENT, GROUP_READ, on("watermark", offset=12, t0=1, t1=2), commit("c", 1, 12, 100)],
        {},
    ),
]


@pytest.mark.parametrize(("finding", "bad", "good", "fields"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_each_anomaly_is_flagged_and_its_near_miss_is_not(
    finding: str, bad: Story, good: Story, fields: dict[str, Any]
) -> None:
    verdict = judged(bad, **fields)
    assert verdict.errors.get(finding), verdict.explain()
    assert any(finding in line and ERRORS[finding] in line for line in verdict.explain())
    assert verdict.examples[finding]
    near = judged(good, **fields)
    assert near.good, near.explain()


def test_every_error_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(ERRORS)


COUNTS: list[tuple[str, Story, int, dict[str, Any]]] = [
    ("duplicates", [SENT, poll([*TEN, 3, 3], [*TEN, 10, 11])], 2, {"idempotent": False}),
    ("recovered", [refused([1, 2], "info"), poll([1, 2], [1, 2]), poll([1, 2], [1, 2], "d")], 2, {}),
    ("expired", [SENT, on("expired", offset=4), poll(TEN[6:], TEN[6:]), poll(TEN[4:6], TEN[4:6], "d")], 4, {}),
    ("redelivered", [SENT, GROUP_READ, claim("d", 2, 4, 5), poll(TEN[4:], TEN[4:], "d", group="g")], 6, {}),
    ("zombie refused", [claim("a", 1, 0, 1), claim("b", 2, 0, 3), commit("a", 1, 2, 9, type="fail")], 1, {}),
    ("zombie unknown", [claim("a", 1, 0, 1), claim("b", 2, 0, 3), commit("a", 1, 2, 9, type="info")], 1, {}),
]


@pytest.mark.parametrize(("name", "story", "count", "fields"), COUNTS, ids=[case[0] for case in COUNTS])
def test_what_is_no_error_is_counted(name: str, story: Story, count: int, fields: dict[str, Any]) -> None:
    verdict = judged(story, **fields)
    assert verdict.good, verdict.explain()
    assert verdict.counted[name] == count
    assert set(verdict.counted) == set(COUNTED)


def test_an_explanation_names_the_record_the_sender_the_copy_and_the_fault() -> None:
    story = [
        send(TEN, [100 + n for n in TEN], 8_000_000, 9_000_000),
        poll([9], [109]),
        on("fault", t0=7_500_000, t1=7_600_000, note="kill broker-2"),
        copy(3, [4], [104]),
    ]
    lines = "\n".join(judged(story).explain())
    assert "t/0 offset 104: value 4, acknowledged to p at 9.000 s" in lines
    assert "it is on broker 3" in lines
    assert "kill broker-2 1.5 s before" in lines


def test_a_stretch_over_pages_is_judged_like_single_records() -> None:
    many = list(range(65_000, 200_000))
    offsets = [n + 40_000 for n in many]
    assert judged([send(many, offsets), poll(many, offsets), copy(1, many, offsets)]).good
    holed = [n for n in many if n != 131_072]
    verdict = judged([send(many, offsets), poll(holed, [n + 40_000 for n in holed])])
    assert verdict.errors == {"lost": 1, "internal poll skip": 1}


def test_two_outcomes_of_one_value_are_refused() -> None:
    with pytest.raises(HistoryError, match="value 3 has two outcomes"):
        judged([SENT, refused([3])])


def test_histories_of_several_processes_go_together_unless_their_headers_differ() -> None:
    assert judged([SENT, header(), READ]).good
    with pytest.raises(HistoryError, match="headers"):
        judged([SENT, header(idempotent=False), READ])


# -- the format --------------------------------------------------------------------------------------


def test_what_is_written_is_read_back() -> None:
    ops = [SENT, READ, claim("a", 1, None, 5), view("a", 3, [0, 1], 7), on("fault", note="kill", t0=3, t1=4)]
    file = io.BytesIO()
    writer = HistoryWriter(file, idempotent=False)
    for op in ops:
        writer.write(op)
    lines = file.getvalue().splitlines(keepends=True)
    assert list(read_history(lines)) == [header(idempotent=False), *ops]
    assert list(read_history([*lines, b'{"f":"po'])) == [header(idempotent=False), *ops]  # its writer was killed


@pytest.mark.parametrize(
    "line",
    [
        b'{"f":"dance"}\n',
        b'{"f":"send","type":"maybe"}\n',
        b'{"f":"send","t0":5,"t1":4}\n',
        b'{"f":"header","version":99}\n',
        b'{"f":"send","values":[-1]}\n',
        b'{"f":"send","values":[[4,0]]}\n',
        b'{"f":"send","values":"12"}\n',
        b"[]\n",
        b"\xff\n",
    ],
)
def test_a_line_that_is_no_operation_is_named(line: bytes) -> None:
    good = b'{"f":"header","version":1}\n'
    with pytest.raises(HistoryError, match="mine:2"):
        list(read_history([good, line], "mine"))


@pytest.mark.parametrize("lines", [[], [b'{"f":"poll"}\n']])
def test_a_history_begins_with_its_header(lines: list[bytes]) -> None:
    with pytest.raises(HistoryError):
        list(read_history(lines))


def test_lists_are_packed_into_stretches() -> None:
    numbers = [5, 6, 9, 10, 11, 12, 3, 2, 1]
    assert pack(numbers) == [5, 6, (9, 4), 3, 2, 1]
    assert expand(pack(numbers)) == numbers
    assert count_of(pack(numbers)) == len(numbers)
    stretches = list(together(pack([1, 2, 3, 4, 9]), pack([7, 8, 20, 21, 22])))
    assert stretches == [(1, 7, 2), (3, 20, 2), (9, 22, 1)]
    with pytest.raises(HistoryError):
        list(together([1, 2], [1]))
    with pytest.raises(HistoryError):
        list(together([1], [1, 2]))


def test_values_come_in_blocks_of_their_own_partition() -> None:
    blocks = ValueBlocks(first=100, size=2)
    taken = [blocks.take("p", "t", part) for part in (0, 1, 0, 0, 1)]
    assert taken == [(100, (100, 2)), (102, (102, 2)), (101, None), (104, (104, 2)), (103, None)]
