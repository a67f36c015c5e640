"""How `ferryline verify` compares copies: real logs, each walked as its broker would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from msgspec.structs import replace as replaced

from ferryline.cli.verify_receipts import ReceiptAuditor
from ferryline.cli.verify_replicas import DAMAGED, DIFFERS, UNCHECKED, Auditor, Checked
from ferryline.proof.receipts import START, Receipt, link
from ferryline.protocol.errors import ConnectionFailed
from ferryline.protocol.metadata import PartitionMeta
from ferryline.protocol.records import read_header
from ferryline_broker.audit import _shown
from ferryline_broker.digests import Walk
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.storage import MemoryStorage
from unit.log_builders import SMALL, append, batch

PART = PartitionMeta("ab" * 16, 0, replicas=(1, 2, 3), primary=1, isr=(1, 2, 3), epoch=1, version=1)


class Copy:
    """The copy of one broker: two logs on a disk of its own."""

    def __init__(self, segment_bytes: int = 2000) -> None:
        self.disk = MemoryStorage()
        config = replace(SMALL, segment_bytes=segment_bytes)
        self.logs = {name: PartitionLog.open(self.disk, name, config) for name in ("records", "state")}
        self.watermark = -1  # of the records; -1: the log end
        self.down = False
        self.stopped = ""

    def end(self, name: str) -> int:
        return self.watermark if name == "records" and self.watermark >= 0 else self.logs[name].log_end

    def status(self) -> dict[str, Any]:
        logs = {
            name: {"log_start": log.log_start, "log_end": log.log_end, "high_watermark": self.end(name)}
            for name, log in self.logs.items()
        }
        state = "damaged" if self.stopped else "ok"
        return {"stopped": self.stopped, "log_state": state, "repairing": False, "logs": logs}

    def flip(self, number: int, at: int) -> None:
        self.disk.flip(f"{self.logs['records'].segments[number].stem}.log", at)


class Brokers:
    """Answers as brokers do, from the copies."""

    def __init__(self, copies: dict[int, Copy]) -> None:
        self.copies = copies
        self.before_answer: Any = None

    async def ask(self, broker: int, method: str, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
        copy = self.copies[broker]
        if copy.down:
            raise ConnectionFailed("nobody listens")
        if not path.endswith("/digests"):
            return copy.status()
        name = query["log"]
        if self.before_answer is not None:
            self.before_answer()
        below = min(query.get("below", 2**40), copy.end(name))
        log = copy.logs[name]
        start = log.log_start if query.get("from") is None else query["from"]
        asked_for = query.get("producer")
        producer = (Walk.ALL if asked_for is None else asked_for) if query.get("batches") else None
        walk = Walk(log, start, below, query["limit"], producer=producer)
        if start < log.log_start:
            walk.found.gone = True
        else:
            for _ in walk.steps():
                pass
        return {**copy.status(), "below": below, **_shown(walk.found)}


@pytest.fixture
def brokers() -> Brokers:
    """Three equal copies of 60 batches whose segments lie differently."""
    copies = {1: Copy(2000), 2: Copy(5000), 3: Copy(2000)}
    for copy in copies.values():
        for number in range(60):
            append(copy.logs["records"], epoch=1 + number // 20, producer=7)
        for _ in range(5):
            append(copy.logs["state"])
    return Brokers(copies)


async def checked(brokers: Brokers, *, trust: int = 0, slice_bytes: int = 3000) -> Checked:
    auditor = Auditor(brokers, progress=lambda _: None, trust=trust, slice_bytes=slice_bytes)  # type: ignore[arg-type]
    return await auditor.check("orders", PART)


def kinds(found: Checked) -> set[tuple[str, int, str]]:
    return {(finding.kind, finding.broker, finding.log) for finding in found.findings}


@pytest.mark.parametrize("slice_bytes", [1, 700, 3000, 2**30])
async def test_equal_copies_agree_whatever_one_answer_holds(brokers: Brokers, slice_bytes: int) -> None:
    found = await checked(brokers, slice_bytes=slice_bytes)
    assert found.findings == []
    assert found.spans == {"records": (0, 180), "state": (0, 15)}
    assert found.bytes == 3 * sum(sum(s.size for s in log.segments) for log in brokers.copies[1].logs.values())
    assert found.row()["state"] == "agree"


async def test_damage_is_named_and_the_others_go_on(brokers: Brokers) -> None:
    brokers.copies[2].flip(1, 40)
    found = await checked(brokers)
    (finding,) = found.findings
    assert (finding.kind, finding.broker, finding.position) == (DAMAGED, 2, 0)
    assert finding.offset == brokers.copies[2].logs["records"].segments[1].base
    assert found.bytes > 2 * sum(s.size for s in brokers.copies[1].logs["records"].segments)
    assert "broker 2 damaged: records log" in finding.sentence()


def forge(copy: Copy, offset: int) -> None:
    """Another batch in the place of one, with checksums that fit."""
    log = copy.logs["records"]
    segment = next(s for s in reversed(log.segments) if s.base <= offset)
    data = batch(offset, epoch=1 + offset // 60, value=b"VALUE", producer=7)
    position = segment.locate(offset).position
    segment.file.pwrite(data, position)


async def test_of_three_copies_the_odd_one_is_wrong(brokers: Brokers) -> None:
    forge(brokers.copies[3], 90)
    found = await checked(brokers)
    assert kinds(found) == {(DIFFERS, 3, "records")}
    assert found.findings[0].offset == 90


async def test_of_two_copies_nobody_can_tell_unless_one_is_trusted(brokers: Brokers) -> None:
    brokers.copies[3].down = True
    forge(brokers.copies[2], 90)
    assert kinds(await checked(brokers)) >= {(DIFFERS, 1, "records"), (DIFFERS, 2, "records")}
    assert kinds(await checked(brokers, trust=1)) == {(DIFFERS, 2, "records"), (UNCHECKED, 3, "records")}


async def test_copies_are_compared_as_far_as_each_is_known_to_have_it(brokers: Brokers) -> None:
    brokers.copies[3].watermark = 60
    forge(brokers.copies[3], 120)  # above what it is known to have: none of our business yet
    found = await checked(brokers)
    assert found.findings == []
    assert found.spans["records"] == (0, 60)
    forge(brokers.copies[1], 120)
    assert (DIFFERS, 1, "records") in kinds(await checked(brokers)), "the other two have that in common"


async def test_retention_on_one_copy_is_no_difference(brokers: Brokers) -> None:
    log = brokers.copies[1].logs["records"]
    log.advance_start(log.segments[2].next_offset)
    found = await checked(brokers)
    assert found.findings == []
    assert found.spans["records"] == (log.log_start, 180)
    brokers.copies[2].flip(0, 40)  # only it and copy 3 still have that
    assert kinds(await checked(brokers)) == {(DAMAGED, 2, "records")}


async def test_retention_that_overtakes_the_walk_is_no_difference(brokers: Brokers) -> None:
    asked = 0

    def retention() -> None:
        nonlocal asked
        asked += 1
        if asked == 5:
            for copy in brokers.copies.values():
                copy.logs["records"].advance_start(90)

    brokers.before_answer = retention
    found = await checked(brokers, slice_bytes=1)
    assert asked > 5
    assert found.findings == []


async def test_who_cannot_be_asked_is_said_and_who_stopped_for_damage_is_damaged(brokers: Brokers) -> None:
    brokers.copies[2].down = True
    brokers.copies[3].stopped = "damaged at start"
    found = await checked(brokers)
    assert kinds(found) == {(UNCHECKED, 2, "records"), (DAMAGED, 3, "records")}
    assert found.copies == [1]


# -- receipts ----------------------------------------------------------------------------------------


class Cluster:
    partitions = {PART.key: PART}


def receipts(copy: Copy) -> list[Receipt]:
    chain, made = START, []
    for segment in copy.logs["records"].segments:
        for header, _ in segment.walk(0, segment.size):
            chain = link(chain, header.base_offset, header.crc)
            made.append(
                Receipt("orders", PART.topic_id, 0, header.base_offset, 3, header.epoch, 7, header.crc, chain.hex(), 0)
            )
    return made


async def test_receipts_are_compared_with_every_copy(brokers: Brokers) -> None:
    kept = receipts(brokers.copies[1])
    auditor = ReceiptAuditor(brokers, Cluster())  # type: ignore[arg-type]
    account = await auditor.check(kept)
    assert (account.held, account.missing, account.copies) == (180, 0, 3)
    forge(brokers.copies[2], 90)
    account = await auditor.check(kept[-1:])
    assert (account.held, account.missing) == (2, 1)
    assert "broker 2" in account.told[0]
    account = await auditor.check(kept)
    assert account.missing == 1, "the receipts around it narrow it down"


async def test_receipts_of_several_producers_are_compared_in_one_walk(brokers: Brokers) -> None:
    kept = receipts(brokers.copies[1])
    stranger = [replaced(receipt, producer_id=8) for receipt in kept[:2]]
    asked: list[int] = []
    brokers.before_answer = lambda: asked.append(1)
    account = await ReceiptAuditor(brokers, Cluster()).check([*kept, *stranger])  # type: ignore[arg-type]
    assert len(asked) == 3, "once for each copy"
    assert (account.held, account.missing) == (180, 6)


async def test_receipts_of_a_topic_that_is_gone_are_missing(brokers: Brokers) -> None:
    kept = [receipts(brokers.copies[1])[0]]
    other = [Receipt("old", "cd" * 16, *list(vars_of(kept[0]))[2:])]
    account = await ReceiptAuditor(brokers, Cluster()).check(other)  # type: ignore[arg-type]
    assert not account.good
    assert "does not exist any more" in account.told[0]


def vars_of(receipt: Receipt) -> list[Any]:
    return [getattr(receipt, name) for name in receipt.__struct_fields__]


def test_a_forged_batch_passes_its_own_checks() -> None:
    """Otherwise the tests above would show less than they say."""
    copy = Copy()
    for _ in range(10):
        append(copy.logs["records"], producer=7)
    forge(copy, 6)
    data = copy.logs["records"].read(6, 1, 30)
    assert b"VALUE" in data
    assert read_header(data).base_offset == 6
