"""The replication cores, rule by rule, on a perfect network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from core_pair import KEY, Pair, batch, part

from ferryline.protocol.messages import LOG_CONFLICT, RECORDS, STATE
from ferryline_broker.core import events as ev
from ferryline_broker.core.partition import ReplicaConfig


def started(**changes: object) -> Pair:
    pair = Pair()
    pair.meta(part(1, 1, 1, (1, 2), **changes))
    return pair


def test_an_epoch_starts_with_a_control_record_that_reaches_the_secondary() -> None:
    pair = started()
    assert pair.cores[1].role == "primary"
    assert pair.cores[2].role == "secondary"
    assert pair.cores[1].high_watermark == [1, 1]
    assert pair.cores[1].ready
    assert [raw for _, raw in pair.disks[2].logs[RECORDS]] == [raw for _, raw in pair.disks[1].logs[RECORDS]]


def test_an_answer_waits_for_the_flush_of_both_replicas() -> None:
    pair = started()
    pair.hold_flush = {2}
    pair.produce(1, 7)
    assert pair.answers() == {}
    assert len(pair.disks[2].logs[RECORDS]) == 2, "the secondary has the bytes, only not flushed"
    pair.tell(2, ev.Flushed(RECORDS, 2))
    assert pair.answers()[7] == ev.AnswerProduce(7, 1, 1)


def test_the_primary_own_flush_counts_too() -> None:
    pair = started()
    pair.hold_flush = {1}
    pair.produce(1, 7)
    assert pair.answers() == {}
    pair.tell(1, ev.Flushed(RECORDS, 2))
    assert isinstance(pair.answers()[7], ev.AnswerProduce)


def test_unflushed_topics_answer_from_the_page_cache_of_both_but_alone_from_the_disk() -> None:
    pair = started(flush="replicated")
    pair.hold_flush = {1, 2}
    pair.produce(1, 7)
    assert isinstance(pair.answers()[7], ev.AnswerProduce)
    pair.cut = pair.fenced = {2}
    pair.meta(part(1, 1, 2, (1,), flush="replicated"), 1)
    pair.produce(1, 8)
    assert 8 not in pair.answers(), "alone, only the own disk holds the record"
    pair.tell(1, ev.Flushed(RECORDS, pair.disks[1].end(RECORDS)))
    assert 8 in pair.answers()


def test_a_lost_secondary_is_proposed_out_and_the_union_counts_until_answered() -> None:
    pair = started()
    pair.cut = {2}
    pair.produce(1, 7)
    pair.tick(pair.config.lag_max_ms + 1)
    proposal = pair.proposals()[-1]
    assert [m.broker_id for m in proposal.new_isr] == [1]
    assert pair.cores[1].maximal_isr == {1, 2}
    assert 7 not in pair.answers()
    pair.answer_alter(1, proposal, True, part(1, 1, 2, (1,)))
    assert pair.cores[1].maximal_isr == {1}
    assert isinstance(pair.answers()[7], ev.AnswerProduce)


def test_an_unanswered_proposal_never_makes_the_set_smaller() -> None:
    pair = started()
    pair.cut = {2}
    pair.produce(1, 7)
    pair.tick(pair.config.lag_max_ms + 1)
    first = pair.proposals()[-1]
    pair.tick(pair.config.alter_retry_ms + 1)
    second = pair.proposals()[-1]
    assert second.request_id > first.request_id
    assert pair.cores[1].maximal_isr == {1, 2}
    pair.answer_alter(1, first, False, part(1, 1, 1, (1, 2)))  # a refusal of an older proposal says nothing
    assert pair.cores[1].primary is not None
    assert pair.cores[1].primary.sync.proposal is not None
    pair.answer_alter(1, second, False, part(1, 1, 1, (1, 2)))
    assert pair.cores[1].primary.sync.proposal is None
    assert pair.cores[1].maximal_isr == {1, 2}


def test_a_joiner_is_proposed_when_caught_up_and_blocks_the_watermark_at_once() -> None:
    pair = Pair()
    pair.meta(part(1, 1, 1, (1,)), 1)
    pair.produce(1, 1)
    assert isinstance(pair.answers()[1], ev.AnswerProduce)
    pair.meta(part(1, 1, 1, (1,)), 2)
    proposal = pair.proposals()[-1]
    assert sorted(m.broker_id for m in proposal.new_isr) == [1, 2]
    assert {m.broker_id: m.broker_epoch for m in proposal.new_isr} == pair.live
    pair.cut = {2}
    pair.produce(1, 2)
    assert 2 not in pair.answers()


def test_a_deposed_primary_answers_unknown_and_cuts_its_tail_by_epoch() -> None:
    pair = started()
    pair.produce(1, 1)
    pair.cut = {1}
    pair.produce(1, 2, batch(3))
    pair.meta(part(2, 2, 2, (2,)), 2)
    pair.produce(2, 3)
    pair.cut = set()
    pair.meta(part(2, 2, 2, (2,)), 1)
    refused = pair.answers()[2]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == "COMMIT_UNKNOWN"
    assert [raw for _, raw in pair.disks[1].logs[RECORDS]] == [raw for _, raw in pair.disks[2].logs[RECORDS]]
    assert pair.effects(ev.Truncate, 1) == [ev.Truncate(RECORDS, 2)]


def test_a_cut_falls_on_a_batch_boundary_when_the_named_epoch_is_unknown_here() -> None:
    """Broker 1 wrote [1, 3) of epoch 1 alone; broker 2 has epochs 1 [0, 1) and 2 [1, 2) instead."""
    pair = started()
    pair.cut = {1}
    pair.produce(1, 1, batch(2))
    pair.produce(1, 2, batch(2))
    pair.meta(part(2, 2, 2, (2,)), 2)
    pair.meta(part(1, 3, 3, (1, 2)), 1)  # a tail of epoch 3 that never commits
    pair.cut = set()
    pair.meta(part(2, 4, 4, (2,)), 2)
    pair.meta(part(2, 4, 4, (2,)), 1)
    boundaries = {0, 1, 3, 5, 6}
    assert {cut.offset for cut in pair.effects(ev.Truncate, 1) if cut.log == RECORDS} <= boundaries
    assert [raw for _, raw in pair.disks[1].logs[RECORDS]] == [raw for _, raw in pair.disks[2].logs[RECORDS]]


def test_committed_records_are_never_cut_the_replica_stops_loudly() -> None:
    pair = started()
    pair.produce(1, 1)
    pair.tick(pair.config.watermark_tell_ms)
    assert pair.cores[2].high_watermark[RECORDS] == 2
    pair.disks[1].logs = [[], []]
    pair.restart(1)
    pair.meta(part(1, 2, 2, (1, 2)), 1)
    pair.meta(part(1, 2, 2, (1, 2)), 2)
    assert pair.cores[2].role == "stopped"
    assert pair.effects(ev.SendReport, 2)[-1].report.log_state == LOG_CONFLICT
    assert pair.disks[2].end(RECORDS) == 2


def test_after_a_declared_loss_committed_records_may_be_cut() -> None:
    pair = started()
    pair.produce(1, 1)
    pair.tick(pair.config.watermark_tell_ms)
    pair.disks[1].logs = [[], []]
    pair.restart(1)
    recovered = part(1, 2, 2, (1,), recovery_epoch=2)
    pair.meta(recovered, 1)
    pair.meta(recovered, 2)
    assert pair.cores[2].role == "secondary"
    assert [raw for _, raw in pair.disks[2].logs[RECORDS]] == [raw for _, raw in pair.disks[1].logs[RECORDS]]


def test_a_restarted_primary_does_not_resume_its_epoch() -> None:
    pair = started()
    pair.restart(1)
    pair.meta(part(1, 1, 5, (1, 2)), 1)
    assert pair.cores[1].role == "idle"
    pair.meta(part(1, 2, 6, (1, 2)), 1)
    assert pair.cores[1].role == "primary"


def test_a_duplicate_of_an_uncommitted_batch_waits_for_the_same_commit() -> None:
    pair = started()
    pair.cut = pair.fenced = {2}
    pair.produce(1, 1, batch(2, (77, 0, 0)))
    pair.produce(1, 2, batch(2, (77, 0, 0)))
    assert pair.answers() == {}
    pair.meta(part(1, 1, 2, (1,)), 1)
    answers = pair.answers()
    assert answers[1] == ev.AnswerProduce(1, 1, 1)
    assert answers[2] == ev.AnswerProduce(2, 1, 1)
    assert pair.disks[1].end(RECORDS) == 3


@pytest.mark.parametrize(
    ("producer", "code"),
    [((77, 0, 4), "OUT_OF_ORDER_SEQUENCE"), ((78, 0, 3), "UNKNOWN_PRODUCER"), ((77, 1, 2), "OUT_OF_ORDER_SEQUENCE")],
)
def test_a_wrong_sequence_is_refused_before_it_is_appended(producer: tuple[int, int, int], code: str) -> None:
    pair = started()
    pair.produce(1, 1, batch(2, (77, 0, 0)))
    end = pair.disks[1].end(RECORDS)
    pair.produce(1, 2, batch(1, producer))
    refused = pair.answers()[2]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == code
    assert pair.disks[1].end(RECORDS) == end


def test_an_older_producer_epoch_is_fenced() -> None:
    pair = started()
    pair.produce(1, 1, batch(1, (77, 3, 0)))
    pair.produce(1, 2, batch(1, (77, 2, 0)))
    refused = pair.answers()[2]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == "PRODUCER_FENCED"


def test_a_promoted_secondary_refuses_the_same_duplicate() -> None:
    pair = started()
    pair.produce(1, 1, batch(2, (77, 0, 0)))
    pair.cut = {1}
    pair.meta(part(2, 2, 2, (2,)), 2)
    pair.produce(2, 2, batch(2, (77, 0, 0)))
    assert pair.answers()[2] == ev.AnswerProduce(2, 1, 1)


def test_below_min_isr_writes_are_refused_and_reads_go_on() -> None:
    pair = Pair()
    pair.meta(part(1, 1, 1, (1, 2), min_isr=2))
    pair.produce(1, 1)
    pair.cut = {2}
    pair.meta(part(1, 1, 2, (1,), min_isr=2, elr=(2,)), 1)
    pair.produce(1, 2)
    refused = pair.answers()[2]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == "NOT_ENOUGH_REPLICAS"
    assert pair.cores[1].check_read(1).below == 2


def test_a_stalled_partition_refuses_before_appending() -> None:
    pair = Pair(config=ReplicaConfig(lag_max_ms=10**9))
    pair.meta(part(1, 1, 1, (1, 2)))
    pair.cut = {2}
    pair.produce(1, 1, timeout_ms=10**9)
    pair.tick(pair.config.commit_stall_ms + 1)
    pair.produce(1, 2)
    refused = pair.answers()[2]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == "NOT_ENOUGH_REPLICAS"


def test_a_produce_that_is_not_committed_in_time_ends_as_unknown() -> None:
    pair = started()
    pair.cut = {2}
    pair.produce(1, 1, timeout_ms=500)
    pair.tick(501)
    refused = pair.answers()[1]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == "COMMIT_UNKNOWN"


def test_a_hand_over_commits_everything_before_it_resigns() -> None:
    pair = started()
    pair.hold_flush = {2}
    pair.produce(1, 1)
    pair.tell(1, ev.HandOverAsked(stopping=True))
    pair.produce(1, 2)
    assert pair.effects(ev.SendResign) == []
    refused = pair.answers()[2]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == "NOT_PRIMARY"
    pair.tell(2, ev.Flushed(RECORDS, 2))
    assert pair.effects(ev.SendResign)[0].entry.epoch == 1
    assert 1 in pair.answers()


def test_a_hand_over_that_cannot_commit_is_called_off_unless_stopping() -> None:
    pair = started()
    pair.cut = {2}
    pair.produce(1, 1)
    pair.tell(1, ev.HandOverAsked(stopping=False))
    pair.tick(pair.config.handover_ms + 1)
    assert pair.effects(ev.SendResign) == []
    pair.tell(1, ev.HandOverAsked(stopping=True))
    pair.tick(pair.config.handover_ms + 1)
    assert len(pair.effects(ev.SendResign)) == 1


def test_a_fetch_of_a_later_epoch_ends_this_primaryship() -> None:
    pair = started()
    pair.meta(part(1, 2, 2, (1, 2)), 2)
    assert pair.cores[2].epoch == 2
    assert pair.cores[1].role == "idle"
    assert pair.effects(ev.RefreshMetadata, 1)


def test_committed_offsets_survive_promotion_and_old_generations_are_refused() -> None:
    pair = started()
    for token in range(5):
        pair.produce(1, token)
    pair.tell(1, ev.Claimed(10, "billing", "m1", 1))
    pair.tell(1, ev.CommitAsked(11, "billing", "m1", 1, 4, "note"))
    pair.tell(1, ev.Claimed(12, "billing", "m2", 2))
    pair.tell(1, ev.CommitAsked(13, "billing", "m1", 1, 5))
    answers = pair.answers()
    assert isinstance(answers[12], ev.AnswerGroup)
    assert answers[12].state.offset == 4
    assert isinstance(answers[13], ev.Refuse)
    assert answers[13].code == "STALE_MEMBER"
    pair.cut = {1}
    pair.meta(part(2, 2, 2, (2,)), 2)
    pair.tell(2, ev.CommittedAsked(14, "billing"))
    found = pair.answers()[14]
    assert isinstance(found, ev.AnswerGroup)
    assert (found.state.offset, found.state.generation, found.state.metadata) == (4, 2, "note")


def test_commits_never_go_back_unless_reset_and_never_beyond_the_watermark() -> None:
    pair = started()
    for token in range(5):
        pair.produce(1, token)
    pair.tell(1, ev.CommitAsked(10, "g", "m", 0, 3))
    pair.tell(1, ev.CommitAsked(11, "g", "m", 0, 2))
    pair.tell(1, ev.CommitAsked(12, "g", "m", 0, 2, "", True))
    pair.tell(1, ev.CommitAsked(13, "g", "m", 0, 99))
    answers = pair.answers()
    assert isinstance(answers[11], ev.AnswerGroup)
    assert answers[11].state.offset == 3
    assert isinstance(answers[12], ev.AnswerGroup)
    assert answers[12].state.offset == 2
    assert isinstance(answers[13], ev.Refuse)
    assert answers[13].code == "OFFSET_OUT_OF_RANGE"


def test_a_commit_that_names_a_lost_record_is_void_after_promotion() -> None:
    pair = started(flush="replicated")
    pair.produce(1, 1)
    pair.tell(1, ev.CommitAsked(2, "g", "m", 0, 1))
    pair.produce(1, 3)
    pair.tell(1, ev.CommitAsked(4, "g", "m", 0, 3))
    pair.disks[2].logs[RECORDS].pop()  # power loss: the record log lost its tail, the state log did not
    pair.restart(2, (2, 2))
    pair.cut = {1}
    pair.meta(part(2, 2, 2, (2,), flush="replicated"), 2)
    pair.produce(2, 5)
    pair.tell(2, ev.CommittedAsked(6, "g"))
    found = pair.answers()[6]
    assert isinstance(found, ev.AnswerGroup)
    assert found.state.offset == 1


def test_the_state_log_is_bounded_by_snapshots_that_committed() -> None:
    pair = Pair(config=ReplicaConfig(snapshot_bytes=2_000))
    pair.meta(part(1, 1, 1, (1, 2)))
    pair.produce(1, 1)
    for token in range(100, 200):
        pair.tell(1, ev.CommitAsked(token, f"g{token % 3}", "m", 0, 1, "", True))
    assert pair.effects(ev.AdvanceStart, 1)
    assert pair.cores[1].log_start[STATE] > 0
    pair.tick(pair.config.watermark_tell_ms)
    pair.tick(pair.config.fetch_wait_ms)
    assert pair.cores[2].log_start[STATE] == pair.cores[1].log_start[STATE]


def test_a_replica_far_behind_begins_again_at_the_log_start() -> None:
    pair = Pair()
    pair.meta(part(1, 1, 1, (1,)), 1)
    for token in range(5):
        pair.produce(1, token)
    pair.tell(1, ev.LogStartAdvanced(RECORDS, 4))
    pair.disks[1].logs[RECORDS] = [b for b in pair.disks[1].logs[RECORDS] if b[0].base_offset >= 4]
    pair.meta(part(1, 1, 1, (1,)), 2)
    assert pair.effects(ev.ResetLog, 2) == [ev.ResetLog(RECORDS, 4, 1)]
    assert pair.cores[2].log_end[RECORDS] == 6
    assert sorted(m.broker_id for m in pair.proposals()[-1].new_isr) == [1, 2]


def test_a_replica_whose_epochs_are_no_longer_retained_begins_again() -> None:
    """The primary's log begins, in a later epoch, exactly where the uncommitted tail of this replica ends."""
    pair = started()
    pair.cut = pair.fenced = {1}
    pair.produce(1, 1)
    pair.meta(part(2, 2, 2, (2,)), 2)
    for token in range(2, 6):
        pair.produce(2, token)
    pair.tell(2, ev.LogStartAdvanced(RECORDS, 2))
    pair.disks[2].logs[RECORDS] = [b for b in pair.disks[2].logs[RECORDS] if b[0].base_offset >= 2]
    pair.cut = pair.fenced = set()
    pair.meta(part(2, 2, 2, (2,)), 1)
    assert pair.cores[1].role == "secondary"
    assert ev.ResetLog(RECORDS, 2, 2) in pair.effects(ev.ResetLog, 1)
    assert pair.disks[1].end(RECORDS) == pair.disks[2].end(RECORDS)


def test_an_idle_secondary_is_never_taken_for_a_lagging_one() -> None:
    pair = Pair(config=ReplicaConfig(lag_max_ms=300, fetch_wait_ms=5_000))
    pair.meta(part(1, 1, 1, (1, 2)))
    for _ in range(100):
        pair.tick(100)
    assert pair.proposals() == []


def test_a_secondary_that_fetches_but_never_flushes_is_proposed_out() -> None:
    pair = Pair(config=ReplicaConfig(lag_max_ms=3_000, fetch_wait_ms=500, flush_first_bytes=0))
    pair.meta(part(1, 1, 1, (1, 2)))
    pair.hold_flush = {2}
    pair.produce(1, 7)
    for _ in range(20):
        pair.tick(400)
    asked = pair.effects(ev.SendFetch, 2)[-1].fetch.positions[RECORDS]
    assert (asked.fetch_offset, asked.flushed) == (2, 1), "it has the record, behind the one that began the epoch"
    assert [m.broker_id for m in pair.proposals()[0].new_isr] == [1]


def test_a_secondary_whose_flushes_are_always_one_round_behind_stays() -> None:
    pair = Pair(config=ReplicaConfig(lag_max_ms=3_000, fetch_wait_ms=500, flush_first_bytes=0))
    pair.meta(part(1, 1, 1, (1, 2)))
    for token in range(40):
        pair.hold_flush = {2}
        pair.produce(1, token)
        pair.tick(400)
        pair.tell(2, ev.Flushed(RECORDS, pair.disks[2].end(RECORDS) - 1))
    assert pair.proposals() == []


def test_an_old_record_does_not_prove_a_conflict() -> None:
    """Broker 2 was cut off and removed, the log start moved past it; its own record still says that it is in sync."""
    pair = started()
    pair.cut = pair.fenced = {2}
    pair.meta(part(1, 1, 2, (1,)), 1)
    for token in range(5):
        pair.produce(1, token)
    pair.tell(1, ev.LogStartAdvanced(RECORDS, 4))
    pair.disks[1].logs[RECORDS] = [b for b in pair.disks[1].logs[RECORDS] if b[0].base_offset >= 4]
    pair.cut = pair.fenced = set()
    pair.tell(2, ev.PeerUp(1))
    assert pair.cores[2].role == "secondary"
    assert pair.effects(ev.RefreshMetadata, 2)
    pair.meta(part(1, 1, 2, (1,)), 2)
    assert pair.disks[2].end(RECORDS) == 6


def test_a_copy_that_was_deleted_and_made_again_does_not_count_with_what_the_old_one_had() -> None:
    pair = Pair((1, 2, 3))
    three = (1, 2, 3)
    pair.meta(part(1, 1, 1, (1,), replicas=three), 1, 3)
    pair.produce(1, 1)
    before = len(pair.proposals())
    stale = pair.effects(ev.SendFetch, 3)[-1].fetch
    pair.disks[3].logs, pair.cores[3] = [[], []], pair._core(3)
    pair.cut = {3}
    pair.meta(part(1, 1, 3, (1,), replicas=three), 1)  # away at version 2, back at 3; version 2 was overtaken
    pair.tell(1, ev.FetchReceived(1, 3, pair.live[3], stale))
    assert len(pair.proposals()) == before
    pair.cut = set()
    pair.meta(part(1, 1, 3, (1,), replicas=three), 3)
    assert pair.disks[3].end(RECORDS) == pair.disks[1].end(RECORDS)
    assert sorted(m.broker_id for m in pair.proposals()[-1].new_isr) == [1, 3]


def test_a_full_disk_refuses_records_and_still_takes_commits() -> None:
    pair = started()
    pair.produce(1, 1)
    pair.tell(1, ev.DiskFull(True))
    pair.produce(1, 2)
    pair.tell(1, ev.CommitAsked(3, "g", "m", 0, 1))
    answers = pair.answers()
    assert isinstance(answers[2], ev.Refuse)
    assert answers[2].code == "STORAGE_FULL"
    assert isinstance(answers[3], ev.AnswerGroup)
    pair.tell(1, ev.DiskFull(False))
    pair.produce(1, 4)
    assert isinstance(pair.answers()[4], ev.AnswerProduce)


def test_failed_storage_stops_the_partition_and_settles_whoever_waits() -> None:
    pair = started()
    pair.cut = {2}
    pair.produce(1, 1)
    pair.tell(1, ev.StorageFailed(RECORDS, "EIO"))
    refused = pair.answers()[1]
    assert isinstance(refused, ev.Refuse)
    assert refused.code == "COMMIT_UNKNOWN"
    pair.produce(1, 2)
    assert isinstance(pair.answers()[2], ev.Refuse)
    assert pair.cores[1].role == "stopped"


def test_after_a_declared_loss_a_replica_that_begins_above_it_begins_again() -> None:
    """Retention took what both had in common: there is no offset to cut at."""
    pair = started()
    for token in range(1, 4):
        pair.produce(1, token)
    pair.tick(pair.config.watermark_tell_ms)
    pair.tell(2, ev.LogStartAdvanced(RECORDS, 3))
    pair.disks[2].logs[RECORDS] = [b for b in pair.disks[2].logs[RECORDS] if b[0].base_offset >= 3]
    pair.disks[1].logs = [[], []]
    pair.restart(1)
    for broker in (1, 2):
        pair.meta(part(1, 2, 2, (1,), recovery_epoch=2), broker)
    assert ev.ResetLog(RECORDS, 0) in pair.effects(ev.ResetLog, 2)
    assert pair.disks[2].end(RECORDS) == pair.disks[1].end(RECORDS)


def test_a_stopped_replica_that_is_moved_elsewhere_is_deleted() -> None:
    """Its files would stay for ever, and nobody would look for it there any more."""
    pair = started()
    pair.tell(2, ev.StorageFailed(RECORDS, "EIO"))
    pair.meta(part(1, 1, 9, (1,), replicas=(1,)), 2)
    assert pair.effects(ev.DeleteReplica, 2)


def test_reads_above_the_watermark_are_empty_and_truncated_positions_are_named() -> None:
    pair = started()
    pair.produce(1, 1)
    core = pair.cores[1]
    assert core.check_read(2).below == 2
    assert core.check_read(3).code == "OFFSET_OUT_OF_RANGE"
    assert core.check_read(2, offset_epoch=1).code == ""
    assert core.check_read(5, offset_epoch=1).code == "LOG_TRUNCATED"
    assert core.check_read(2, offset_epoch=0).code == "LOG_TRUNCATED"
    assert core.check_read(9, offset_epoch=9).code == "NOT_PRIMARY", "the reader comes from a later primary"
    assert pair.cores[2].check_read(1).code == "NOT_PRIMARY"
    assert pair.cores[2].check_read(1, secondary=True).code == ""


def test_only_a_primary_that_can_still_commit_proves_that_an_offset_is_above_the_end() -> None:
    """The reader knows no epoch: a later primary may have told it the offset, and this one need not know of it yet."""
    pair = started()
    pair.cut = {1}
    pair.meta(part(2, 2, 2, (2,)), 2)
    pair.produce(2, 1)
    deposed = pair.cores[1]
    assert pair.cores[2].check_read(3).code == ""
    assert deposed.check_read(3).unproven
    assert not deposed.check_read(3, offset_epoch=1).unproven, "its own epoch: nobody else wrote there"
    older = deposed.check_read(3, offset_epoch=0)
    assert (older.code, older.unproven) == ("LOG_TRUNCATED", True), "a later primary may have carried that epoch on"
    pair.tell(1, ev.BarrierAsked(9))
    assert 9 not in pair.answers()
    pair.meta(part(2, 2, 2, (2,)), 1)
    assert isinstance(pair.answers()[9], ev.Refuse)
    assert pair.cores[2].check_read(99).unproven
    pair.tell(2, ev.BarrierAsked(10))
    assert pair.answers()[10] == ev.AnswerBarrier(10)


def test_cores_come_to_rest_when_nothing_happens() -> None:
    """A deadline that fired must be cleared, or the driver spins."""
    pair = started()
    pair.produce(1, 1)
    for _ in range(50):
        deadlines = [d for c in pair.cores.values() if (d := c.next_deadline_ms()) is not None]
        assert all(d > pair.now for d in deadlines), (pair.now, deadlines)
        pair.tick(min(deadlines) - pair.now)


@pytest.mark.parametrize("lost", [1, 2])
def test_cores_come_to_rest_when_a_peer_is_gone(lost: int) -> None:
    pair = started()
    pair.cut = {lost}
    pair.produce(1, 1)
    for _ in range(60):
        deadlines = [d for c in pair.cores.values() if (d := c.next_deadline_ms()) is not None]
        assert all(d > pair.now for d in deadlines), (pair.now, deadlines)
        pair.tick(max(1, min(deadlines) - pair.now))


def test_the_key_of_a_core_is_its_partition() -> None:
    assert started().cores[1].key == KEY
