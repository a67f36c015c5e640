"""The core of a replica whose disk is full: what it gives up, what it goes on with, and what it tells of itself."""

from __future__ import annotations

from ferryline.protocol.messages import LOG_OK, RECORDS, STATE
from ferryline_broker.core import events as ev
from unit.core_pair import KEY, Pair, batch, part

WHY = "0 bytes are free"


def with_a_tail() -> Pair:
    """Replica 1 leads; three batches are committed, and the fourth never reached its disk."""
    pair = Pair()
    pair.meta(part(1, 1, 1, (1, 2)))
    for token in (1, 2, 3):
        pair.produce(1, token)
    pair.cut = {2}
    pair.hold_flush = {1}
    pair.produce(1, 4)
    return pair


def full(pair: Pair, broker: int, records_end: int | None = None) -> list[ev.Effect]:
    disk = pair.disks[broker]
    end = disk.end(RECORDS) if records_end is None else records_end
    return pair.tell(broker, ev.StorageFailed(RECORDS, WHY, (end, disk.end(STATE))))


def resigned(pair: Pair, broker: int) -> list[int]:
    return [effect.entry.epoch for effect in pair.effects(ev.SendResign, broker)]


def test_it_counts_on_nothing_that_is_not_on_the_disk_and_is_not_reported_as_damaged() -> None:
    pair = with_a_tail()
    core = pair.cores[1]
    assert core.log_end[RECORDS] == 5
    effects = full(pair, 1, records_end=4)
    assert not any(isinstance(effect, ev.SendReport) for effect in effects)
    report = core.report()
    assert (report.log_end, report.log_state) == ((4, 1), LOG_OK)
    assert core.high_watermark[RECORDS] == 4
    refused = pair.answers()[4]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == "COMMIT_UNKNOWN", "nobody may call it refused: the other copy may have it"


def test_as_long_as_it_is_the_primary_by_record_it_serves_reads_and_says_why_it_refuses_writes() -> None:
    pair = with_a_tail()
    core = pair.cores[1]
    full(pair, 1, records_end=4)
    assert core.check_read(1).below == 4
    pair.produce(1, 5)
    pair.tell(1, ev.CommitAsked(6, "g", "m", 0, 1))
    for token in (5, 6):
        refused = pair.answers()[token]
        assert isinstance(refused, ev.Refuse)
        assert (refused.code, refused.message, refused.primary) == ("STORAGE_FULL", WHY, 1)
    pair.meta(part(2, 2, 2, (1, 2)), 1)
    assert core.check_read(1).code == "NOT_PRIMARY"
    pair.produce(1, 7)
    refused = pair.answers()[7]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == "NOT_PRIMARY"


def test_it_resigns_until_it_is_heard_and_never_from_a_later_primaryship() -> None:
    pair = with_a_tail()
    full(pair, 1)
    assert resigned(pair, 1) == [1]
    pair.tick(pair.config.alter_retry_ms // 2)
    assert resigned(pair, 1) == [1]
    pair.tick(pair.config.alter_retry_ms)
    assert resigned(pair, 1) == [1, 1], "the first one may have been lost"
    deadline = pair.cores[1].next_deadline_ms()
    assert deadline is not None
    assert deadline > pair.now
    pair.meta(part(1, 3, 3, (1, 2)), 1)  # the other one's disk is full, too
    pair.tick(10 * pair.config.alter_retry_ms)
    assert resigned(pair, 1) == [1, 1]
    assert pair.cores[1].next_deadline_ms() is None
    assert pair.cores[1].check_read(1).code == "", "better than nobody"


def test_alone_in_sync_it_has_nobody_to_hand_over_to() -> None:
    pair = Pair()
    pair.meta(part(1, 1, 1, (1,)))
    pair.produce(1, 1)
    full(pair, 1)
    pair.tick(10 * pair.config.alter_retry_ms)
    assert resigned(pair, 1) == []


def test_a_secondary_stops_fetching_and_is_proposed_out_of_the_in_sync_set() -> None:
    pair = with_a_tail()
    pair.cut, pair.hold_flush = set(), set()
    full(pair, 2)
    assert pair.cores[2].next_deadline_ms() is None
    assert resigned(pair, 2) == []
    asked = len(pair.effects(ev.SendFetch, 2))
    for _ in range(4):
        pair.tick(pair.config.lag_max_ms // 2)
    assert len(pair.effects(ev.SendFetch, 2)) == asked
    assert [member.broker_id for member in pair.proposals()[-1].new_isr] == [1]


def test_it_leads_no_epoch_again_that_it_had_seen_and_joins_a_newer_one() -> None:
    """The process starts again once there is space: its log is what the disk holds."""
    pair = with_a_tail()
    pair.disks[1].logs[RECORDS].pop()
    full(pair, 1)
    pair.cut, pair.hold_flush = set(), set()
    pair.restart(1, watermark=(4, 1))
    pair.meta(part(1, 1, 1, (1, 2)), 1)
    assert pair.cores[1].role == "idle"
    pair.meta(part(2, 2, 2, (2,)))
    pair.produce(2, 8, batch(value=b"new"))
    pair.meta(part(2, 2, 2, (2,)), 1)
    assert pair.cores[1].role == "secondary"
    assert pair.disks[1].logs[RECORDS] == pair.disks[2].logs[RECORDS]
    assert {member.broker_id for member in pair.proposals()[-1].new_isr} == {1, 2}
    assert pair.proposals()[-1].topic_id == KEY[0]
