"""Registration, fencing, election and in-sync sets: rules C2 to C6 and C10, as stories of small clusters."""

from __future__ import annotations

from typing import Any

import pytest

from ferryline.protocol.errors import Fenced, StaleBrokerEpoch, StaleCoordinator
from ferryline.protocol.messages import Heartbeat, IsrMember, Report, Resign, ResignEntry
from ferryline_coordinator.core import events as ev
from unit.coordinator_bench import Bench, Halted


def cluster(brokers: int = 3, **settings: Any) -> Bench:
    bench = Bench(brokers)
    bench.create("t", **{"partitions": 1, "replication": 2, **settings})
    return bench


def other(bench: Bench) -> tuple[int, int]:
    """Primary and secondary of t/0."""
    part = bench.part()
    return part.primary, next(b for b in part.replicas if b != part.primary)


# -- fencing ----------------------------------------------------------------------------------------


def test_a_killed_primary_is_replaced_by_its_secondary_without_waiting_for_a_timeout() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    before = bench.now
    bench.kill(primary)
    assert bench.now == before
    part = bench.part()
    assert (part.primary, part.isr, part.elr, part.epoch) == (secondary, (secondary,), (), 2)
    assert bench.noted("fenced")[0] == {"broker": primary, "reason": "gone"}


def test_a_silent_primary_is_replaced_after_fence_ms_and_not_before() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.brokers[primary].silent = True
    bench.play(2_900)
    assert bench.part().primary == primary
    bench.play(700)
    assert bench.part().primary == secondary


def test_a_session_that_ends_while_its_broker_answers_fences_nobody() -> None:
    bench = cluster()
    primary, _ = other(bench)
    bench.send(ev.SessionClosed(bench.brokers[primary].session, primary))
    assert bench.part().primary == primary
    bench.register(primary)
    bench.play(5_000)
    assert bench.part().primary == primary
    assert bench.part().epoch == 1


def test_the_end_of_an_earlier_session_means_nothing() -> None:
    bench = cluster()
    primary, _ = other(bench)
    first = bench.brokers[primary].session
    bench.register(primary)
    bench.brokers[primary].up = False  # a probe would say it is dead
    assert not any(isinstance(e, ev.Probe) for e in bench.send(ev.SessionClosed(first, primary)))
    assert bench.part().primary == primary


@pytest.mark.parametrize("min_isr", [1, 2])
def test_replicas_that_die_together_are_fenced_as_one_set_and_both_stay_candidates(min_isr: int) -> None:
    bench = cluster(min_isr=min_isr)
    primary, secondary = other(bench)
    bench.brokers[secondary].up = False  # dead, but nobody has noticed
    bench.kill(primary)
    part = bench.part()
    assert (part.primary, part.isr, set(part.elr)) == (0, (), {primary, secondary})
    bench.start(secondary)
    part = bench.part()
    assert (part.primary, part.isr) == (secondary, (secondary,))
    assert part.elr == ((primary,) if min_isr == 2 else ())


def test_a_neighbour_that_answers_late_is_waited_for_and_a_heartbeat_counts_as_an_answer() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.brokers[secondary].silent = True  # its probe stays unanswered for now
    bench.kill(primary)
    assert bench.part().primary == primary, "the round waits for the neighbour"
    bench.brokers[secondary].silent = False
    bench.heartbeat(secondary)
    assert bench.part().primary == secondary


def test_a_neighbour_that_never_answers_is_fenced_with_it() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.brokers[secondary].silent = True
    bench.kill(primary)
    bench.play(900)
    part = bench.part()
    assert (part.primary, set(part.elr)) == (0, {primary, secondary})


def test_a_replica_that_fell_out_while_another_went_on_alone_is_no_candidate() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.kill(secondary)
    assert bench.part().isr == (primary,)
    bench.kill(primary)
    assert bench.part().elr == (primary,)
    bench.start(secondary)
    assert bench.part().primary == 0
    bench.start(primary)
    assert bench.part().primary == primary


def test_nobody_is_fenced_before_one_full_fence_time_after_a_coordinator_start() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.now += 60_000
    bench.restart()
    for broker in bench.brokers.values():
        broker.silent = True
    bench.play(2_900)
    assert bench.part().primary == primary
    bench.brokers[secondary].silent = False
    bench.play(1_500)
    assert bench.part().primary == secondary


def test_a_coordinator_that_was_itself_away_blames_nobody() -> None:
    bench = cluster()
    primary, _ = other(bench)
    bench.now += 10_000  # stopped, with heartbeats waiting in its sockets
    bench.send(ev.Tick())
    assert bench.part().primary == primary
    bench.play(5_000)
    assert bench.part().epoch == 1


def test_a_fenced_broker_that_comes_back_is_unfenced_only_with_the_present_metadata() -> None:
    bench = cluster()
    primary, _ = other(bench)
    bench.brokers[primary].silent = True
    bench.play(4_000)
    broker = bench.brokers[primary]
    fenced_at = bench.state.revision
    late = Heartbeat(primary, broker.epoch, broker.incarnation, "run", bench.coord_epoch, fenced_at - 1)
    assert bench.ask(ev.HeartbeatReceived, broker.session, late).fenced
    stale = Heartbeat(primary, broker.epoch, broker.incarnation, "run", bench.coord_epoch - 1, fenced_at)
    assert bench.ask(ev.HeartbeatReceived, broker.session, stale).fenced
    assert not bench.heartbeat(primary).fenced


# -- registration -----------------------------------------------------------------------------------


def test_registering_again_in_the_same_life_gives_the_same_epoch_and_fences_nobody() -> None:
    bench = cluster()
    primary, _ = other(bench)
    epoch, part = bench.brokers[primary].epoch, bench.part()
    again = bench.register(primary)
    assert again is not None
    assert again.broker_epoch == epoch
    assert bench.part() == part
    assert not bench.heartbeat(primary).fenced


def test_an_answer_names_the_registration_that_it_is_for() -> None:
    """A broker that found damage after it had sent one must know whether the damage was in what is answered."""
    bench = cluster()
    primary, _ = other(bench)
    bench.brokers[primary].incarnation += 1
    answers = [bench.register(primary, request=request) for request in (3, 5)]
    assert [answer.request for answer in answers if answer is not None] == [3, 5]


def test_a_new_life_is_fenced_first_and_gets_a_later_epoch() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    epochs = {b.epoch for b in bench.brokers.values()}
    bench.start(primary)
    part = bench.part()
    assert (part.primary, part.isr, part.epoch) == (secondary, (secondary,), 2)
    assert bench.brokers[primary].epoch > max(epochs)
    with pytest.raises(StaleBrokerEpoch):
        bench.ask(ev.HeartbeatReceived, bench.brokers[primary].session, Heartbeat(primary, min(epochs), 1))


def test_a_registration_waits_for_neighbours_that_do_not_answer_yet() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.brokers[secondary].silent = True
    bench.brokers[primary].incarnation += 1
    assert bench.register(primary) is None
    bench.brokers[secondary].silent = False
    bench.heartbeat(secondary)
    answer = bench.answers[max(n for n, a in bench.answers.items() if type(a).__name__ == "RegisterOk")]
    assert answer.broker_id == primary
    assert bench.part().primary == secondary


def test_two_registrations_of_one_broker_that_overtake_each_other_leave_the_later_life() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    broker = bench.brokers[primary]
    bench.brokers[secondary].silent = True
    broker.incarnation += 1
    assert bench.register(primary) is None
    broker.incarnation += 1
    assert bench.register(primary) is None
    refused = [a for a in bench.answers.values() if isinstance(a, StaleBrokerEpoch)]
    assert len(refused) == 1
    bench.play(1_000)
    assert bench.state.brokers[primary].meta.incarnation == broker.incarnation


def test_storage_that_went_back_in_time_is_refused_and_holds_no_candidate() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.kill(secondary)
    bench.kill(primary)
    assert bench.part().elr == (primary,)
    bench.start(primary)
    bench.kill(primary)
    bench.brokers[primary].incarnation = 1  # a copy of its disk from before
    with pytest.raises(Fenced, match="rolled back"):
        bench.register(primary)
    assert bench.part().elr == ()
    bench.brokers[primary].incarnation = 5  # it was restarted until its number passed the old one
    bench.start(primary)
    assert bench.part().primary == 0, "what it holds counts as empty"


def test_a_straggling_registration_of_an_earlier_life_harms_nobody() -> None:
    bench = cluster()
    primary, _ = other(bench)
    bench.start(primary)
    bench.brokers[primary].incarnation = 1
    with pytest.raises(Fenced):
        bench.register(primary)
    assert not bench.state.brokers[primary].rolled_back


def test_a_broker_on_another_disk_is_no_candidate_for_what_it_held() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.kill(secondary)
    bench.kill(primary)
    bench.brokers[primary].storage = "s-new"
    bench.brokers[primary].incarnation = 0
    bench.start(primary, restart="foreign")
    part = bench.part()
    assert (part.primary, part.elr, part.last_known_elr) == (0, (), ())


@pytest.mark.parametrize(("flush", "candidate"), [("fsync", True), ("replicated", False)])
def test_after_a_power_cut_only_flushed_replicas_are_candidates(flush: str, candidate: bool) -> None:
    bench = cluster(flush=flush)
    primary, secondary = other(bench)
    bench.kill(secondary)
    bench.kill(primary)
    bench.start(primary, restart="os_crash")
    part = bench.part()
    assert (part.primary == primary) is candidate
    assert part.last_known_elr == (() if candidate else (primary,))


@pytest.mark.parametrize("log_state", ["damaged", "truncated_below_checkpoint", "conflict"])
def test_a_replica_that_reports_an_incomplete_log_is_no_candidate(log_state: str) -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.kill(secondary)
    bench.kill(primary)
    bench.start(primary, restart="process_crash", replicas=[bench.report(bench.part(), 9, state=log_state)])
    part = bench.part()
    assert (part.primary, part.elr, part.last_known_elr) == (0, (), (primary,))


def test_a_broker_that_knows_a_later_epoch_than_the_store_freezes_elections() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    report = bench.report(bench.part(), 9)
    ahead = type(report)(*[7 if name == "seen_epoch" else getattr(report, name) for name in report.__struct_fields__])
    bench.start(secondary, replicas=[ahead])
    assert bench.state.parts[("t-id", 0)].frozen
    bench.kill(primary)
    assert bench.part().primary == 0
    bench.start(primary)
    assert bench.part().primary == 0
    assert bench.noted("frozen")


def test_a_coordinator_older_than_what_brokers_saw_freezes_everything_and_starts_again_above_it() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.brokers[secondary].seen_coord_epoch = 9
    with pytest.raises(StaleCoordinator):
        bench.start(secondary)
    assert ev.Recampaign(10) in bench.effects
    assert bench.state.parts[("t-id", 0)].frozen
    bench.coord_epoch = 9
    bench.restart()
    assert bench.state.cluster.coord_epoch_floor == 10
    bench.play(1_000)
    bench.kill(primary)
    assert bench.part().primary == 0


def test_what_an_earlier_session_still_says_is_refused_and_is_no_sign_of_life() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    broker = bench.brokers[primary]
    first = broker.session
    bench.register(primary)
    beat = Heartbeat(primary, broker.epoch, broker.incarnation, "run", bench.coord_epoch, bench.state.revision)
    with pytest.raises(StaleBrokerEpoch, match="later session"):
        bench.ask(ev.HeartbeatReceived, first, beat)
    proposal = bench.part()
    latest, broker.session = broker.session, first
    assert bench.alter(proposal, [primary]).error == "STALE_BROKER_EPOCH"
    broker.session = latest
    bench.kill(primary)
    with pytest.raises(StaleBrokerEpoch, match="later session"):
        bench.ask(ev.HeartbeatReceived, latest, beat)
    assert bench.part().primary == secondary


# -- in-sync sets -----------------------------------------------------------------------------------


def test_a_primary_shrinks_and_grows_the_in_sync_set() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    shrunk = bench.alter(bench.part(), [primary])
    assert shrunk.accepted
    assert shrunk.part == bench.part()
    assert (bench.part().isr, bench.part().version) == ((primary,), 2)
    grown = bench.alter(bench.part(), [secondary, primary])
    assert grown.accepted
    assert bench.part().isr == bench.part().replicas


def test_who_leaves_below_min_isr_stays_a_candidate_until_enough_are_back() -> None:
    bench = cluster(replication=3, min_isr=2)
    part = bench.part()
    primary, first, second = part.replicas
    bench.alter(bench.part(), [primary, first])
    assert bench.part().elr == ()
    bench.alter(bench.part(), [primary])
    assert bench.part().elr == (first,)
    bench.alter(bench.part(), [primary, second])
    assert bench.part().elr == ()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("another coordinator", {"coord_epoch": 0}, "STALE_COORDINATOR"),
    ("another life of the primary", {"broker_epoch": 99}, "STALE_BROKER_EPOCH"),
    ("an earlier primaryship", {"epoch": 0}, "STALE_EPOCH"),
    ("an earlier version", {"version": 0}, "VERSION_CONFLICT"),
    ("an unknown partition", {"partition": 7}, "UNKNOWN_PARTITION"),
    ("an unknown topic", {"topic_id": "x"}, "UNKNOWN_PARTITION"),
    ("a member that is no replica", {"members": [IsrMember(1, 1), IsrMember(2, 2), IsrMember(3, 3)]}, "INVALID"),
    ("the primary left out", {"members": [IsrMember(9, 9)]}, "INVALID"),
    ("nobody", {"members": []}, "INVALID"),
]


@pytest.mark.parametrize(("wrong", "error"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_wrong_proposal_is_refused_with_the_present_record_and_changes_nothing(
    wrong: dict[str, Any], error: str
) -> None:
    bench = cluster()
    before = bench.part()
    primary, _ = other(bench)
    if wrong.get("members") == []:
        wrong = {"new_isr": []}
    result = bench.alter(before, [primary], **wrong)
    assert not result.accepted
    assert result.error.startswith(error)
    assert bench.part() == before
    if error != "UNKNOWN_PARTITION":
        assert result.part == before


def test_a_proposal_from_who_is_not_primary_is_refused() -> None:
    bench = cluster()
    _, secondary = other(bench)
    assert bench.alter(bench.part(), [secondary], as_broker=secondary).error == "NOT_PRIMARY"


def test_a_repeated_request_id_is_never_accepted() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    bench.alter(bench.part(), [primary])
    bench.brokers[secondary].silent = True
    bench.play(4_000)
    part = bench.part()
    members = [IsrMember(primary, bench.brokers[primary].epoch), IsrMember(secondary, bench.brokers[secondary].epoch)]
    assert bench.alter(part, [], members=members, request_id=900).error == "NOT_READY"
    bench.brokers[secondary].silent = False
    bench.heartbeat(secondary)
    assert bench.part().version == part.version, "unfencing does not touch the partition"
    # what others ask for meanwhile, the primary of an earlier epoch for example, must not make it forget
    assert bench.alter(part, [secondary], as_broker=secondary, request_id=3).error == "NOT_PRIMARY"
    copy = bench.alter(part, [], members=members, request_id=900)
    assert (copy.accepted, copy.error) == (False, "VERSION_CONFLICT")
    assert bench.alter(part, [], members=members, request_id=901).accepted


def test_a_member_is_added_only_in_its_present_life_and_only_if_it_stays() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    old = bench.brokers[secondary].epoch
    bench.start(secondary)
    me = IsrMember(primary, bench.brokers[primary].epoch)
    stale = bench.alter(bench.part(), [], members=[me, IsrMember(secondary, old)])
    assert stale.error == "STALE_BROKER_EPOCH"
    bench.brokers[secondary].want = "stop"
    bench.heartbeat(secondary)
    assert bench.alter(bench.part(), [primary, secondary]).error == "NOT_READY"


# -- leaving ----------------------------------------------------------------------------------------


def test_a_primary_that_stops_hands_over_and_may_then_leave() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    broker = bench.brokers[primary]
    broker.want = "stop"
    answer = bench.heartbeat(primary)
    assert (answer.fenced, answer.stop_allowed) == (False, False)
    part = bench.part()
    bench.ask(ev.ResignReceived, broker.session, Resign(primary, broker.epoch, [ResignEntry("t-id", 0, part.epoch)]))
    assert (bench.part().primary, bench.part().epoch) == (secondary, 2)
    bench.heartbeat(primary)
    assert bench.heartbeat(primary).stop_allowed
    assert bench.part().isr == (secondary,)
    assert bench.heartbeat(primary).fenced, "a stopping broker is not unfenced"


def test_a_late_resignation_changes_nothing() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    broker = bench.brokers[primary]
    entry = Resign(primary, broker.epoch, [ResignEntry("t-id", 0, 1), ResignEntry("gone", 0, 1)])
    bench.ask(ev.ResignReceived, broker.session, entry)
    after = bench.part()
    assert after.primary == secondary
    bench.ask(ev.ResignReceived, broker.session, entry)
    assert bench.part() == after


def test_a_primary_with_nobody_to_hand_over_to_leads_on_under_a_new_epoch() -> None:
    bench = cluster(replication=1)
    part = bench.part()
    broker = bench.brokers[part.primary]
    bench.ask(ev.ResignReceived, broker.session, Resign(broker.id, broker.epoch, [ResignEntry("t-id", 0, part.epoch)]))
    assert (bench.part().primary, bench.part().epoch) == (broker.id, 2)


def test_the_only_replica_may_stop_and_leads_again_when_it_is_back() -> None:
    bench = cluster(replication=1)
    part = bench.part()
    broker = bench.brokers[part.primary]
    broker.want = "stop"
    bench.heartbeat(broker.id)
    bench.ask(ev.ResignReceived, broker.session, Resign(broker.id, broker.epoch, [ResignEntry("t-id", 0, part.epoch)]))
    bench.heartbeat(broker.id)
    assert bench.heartbeat(broker.id).stop_allowed
    assert (bench.part().primary, bench.part().elr) == (0, (broker.id,))
    bench.start(broker.id)
    assert bench.part().primary == broker.id


def test_a_damaged_primary_resigns_and_is_no_candidate() -> None:
    bench = cluster()
    primary, secondary = other(bench)
    broker = bench.brokers[primary]
    entry = ResignEntry("t-id", 0, bench.part().epoch, "damaged")
    bench.ask(ev.ResignReceived, broker.session, Resign(primary, broker.epoch, [entry]))
    part = bench.part()
    assert (part.primary, part.isr, part.last_known_elr) == (secondary, (secondary,), (primary,))


# -- interruption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(6))
def test_a_failover_that_is_interrupted_after_any_commit_is_finished_by_the_next_coordinator(step: int) -> None:
    """Kill the primary, let it return and rejoin; the coordinator dies after commit number ``step`` of that story."""
    bench = Bench(3, lively=True)
    bench.create("t", partitions=3)
    primary, _ = other(bench)
    commits = iter(range(step + 1))
    bench.halt = lambda _: next(commits) == step
    story = [
        lambda: bench.kill(primary),
        lambda: bench.play(1_000),
        lambda: bench.start(primary),
        lambda: bench.play(8_000),
        lambda: bench.play(8_000),
    ]
    for chapter in story:
        try:
            chapter()
        except Halted:
            bench.restart()
    assert bench.halt is None, "the story has fewer commits than that"
    for number in range(3):
        part = bench.part("t", number)
        assert part.primary == part.replicas[0]
        assert set(part.isr) == set(part.replicas)


def test_a_complete_replica_that_is_up_leads_as_soon_as_the_one_before_it_is_excluded() -> None:
    """The primary resigned to leave, nobody else in sync could lead; then its log turns out to be damaged."""
    bench = cluster(replication=2, min_isr=2)
    primary, secondary = other(bench)
    bench.alter(bench.part(), [primary])
    assert bench.part().elr == (secondary,)
    broker = bench.brokers[primary]
    broker.want = "stop"
    bench.heartbeat(primary)
    bench.ask(ev.ResignReceived, broker.session, Resign(primary, broker.epoch, [ResignEntry("t-id", 0, 1)]))
    assert bench.part().primary == 0
    damaged = bench.report(bench.part(), 9, state="damaged")
    bench.ask(ev.ReportReceived, broker.session, Report(primary, broker.epoch, [damaged]))
    assert (bench.part().primary, bench.part().isr) == (secondary, (secondary,))


def test_no_proposal_made_before_damage_was_reported_takes_the_replica_in() -> None:
    """It is under way, knows the present record, and vouches for what the replica had before its disk rotted."""
    bench = cluster()
    primary, secondary = other(bench)
    bench.alter(bench.part(), [primary])
    before = bench.part()
    damaged = bench.report(before, 9, state="damaged")
    broker = bench.brokers[secondary]
    bench.ask(ev.ReportReceived, broker.session, Report(secondary, broker.epoch, [damaged]))
    bench.alter(before, [primary, secondary])
    assert bench.part().isr == (primary,)


def test_a_last_heartbeat_does_not_hide_that_a_broker_died_with_the_others() -> None:
    """It arrives while a round is on, and then the session of its sender ends."""
    bench = Bench(3)
    bench.create("t", partitions=1, replication=2)
    primary, secondary = bench.part().replicas
    (third,) = set(bench.brokers) - {primary, secondary}
    bench.brokers[third].silent = True
    bench.send(ev.SessionClosed(bench.brokers[third].session, third))  # its probe is under way for a while
    bench.heartbeat(secondary)
    for broker_id in (primary, secondary):
        bench.brokers[broker_id].up = False
    for broker_id in (secondary, primary):
        bench.send(ev.SessionClosed(bench.brokers[broker_id].session, broker_id))
    bench.play(2_000)
    assert (bench.part().primary, set(bench.part().elr)) == (0, {primary, secondary})
    bench.start(primary)
    assert bench.part().primary == primary
