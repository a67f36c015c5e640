"""Where replicas and primaries live: the planner's promises, and clusters that grow, shrink and lose brokers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.protocol.errors import NotEnoughReplicas
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.placement import Assignment, Planner, is_balanced, rebalanced
from ferryline_coordinator.core.placement import placed as placed_by_counts
from unit.coordinator_bench import Bench, even


def placed(assignment: Assignment, new: dict[tuple[str, int], int], usable: list[int]) -> Assignment:
    replicas, leaders = counts(assignment, usable)
    return placed_by_counts(replicas, leaders, new, usable)


def counts(plan: Assignment, usable: list[int]) -> tuple[dict[int, int], dict[int, int]]:
    replicas = Counter(b for r in plan.values() for b in r)
    leaders = Counter(r[0] for r in plan.values() if r)
    return {b: replicas[b] for b in usable}, {b: leaders[b] for b in usable}


assignments = st.integers(1, 7).flatmap(
    lambda brokers: st.tuples(
        st.just(brokers),
        st.lists(
            st.permutations(range(1, brokers + 1)).flatmap(
                lambda p: st.integers(1, min(4, brokers)).map(lambda n: tuple(p[:n]))
            ),
            max_size=30,
        ),
        st.sets(st.integers(1, brokers)),
        st.integers(0, 3),
    )
)


@given(assignments)
@settings(max_examples=300, deadline=None)
def test_a_rebalanced_cluster_is_even_keeps_replication_and_is_left_alone_afterwards(
    case: tuple[int, list[tuple[int, ...]], set[int], int],
) -> None:
    brokers, replicas, leave, joined = case
    before = {("t", number): r for number, r in enumerate(replicas)}
    usable = [b for b in range(1, brokers + joined + 1) if b not in leave]
    plan = rebalanced(before, usable, leave)
    assert {k: len(set(r)) for k, r in plan.items()} == {k: len(r) for k, r in before.items()}
    if all(len(r) <= len(usable) for r in plan.values()):
        assert not any(b in leave for r in plan.values() for b in r)
        spread, leaders = counts(plan, usable)
        assert even(spread)
        assert even(leaders)
    assert rebalanced(plan, usable, leave) == plan


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_new_topics_are_placed_evenly_and_move_nothing(brokers: int, topics: list[tuple[int, int]]) -> None:
    usable = list(range(1, brokers + 1))
    assignment: Assignment = {}
    for number, (partitions, replication) in enumerate(topics):
        if replication > brokers:
            continue
        new = {(f"t{number}", p): replication for p in range(partitions)}
        fresh = placed(assignment, new, usable)
        assert set(fresh) == set(new)
        assert all(len(set(r)) == replication for r in fresh.values())
        assignment |= fresh
        spread, leaders = counts(assignment, usable)
        assert even(spread)
        assert max(leaders.values()) - min(leaders.values()) <= 2  # the planner settles the rest by order alone
        plan = rebalanced(assignment, usable)
        assert even(counts(plan, usable)[1])
        assignment = plan


def test_adding_one_broker_moves_only_its_share() -> None:
    before = placed({}, {("t", p): 2 for p in range(30)}, [1, 2, 3])
    plan = rebalanced(before, [1, 2, 3, 4])
    assert sum(4 in r for r in plan.values()) == 15
    moved = sum(len(set(plan[k]) - set(before[k])) for k in plan)
    assert moved == 15


def test_a_replica_of_a_broker_that_is_away_for_a_moment_stays() -> None:
    before = placed({}, {("t", p): 2 for p in range(12)}, [1, 2, 3])
    plan = rebalanced(before, [1, 2])
    assert {k: set(r) for k, r in plan.items()} == {k: set(r) for k, r in before.items()}


# -- clusters ---------------------------------------------------------------------------------------

QUICK = CoreConfig(preferred_ms=1_000, replacement_ms=5_000)


def settled(bench: Bench) -> bool:
    parts = [record.meta for record in bench.state.parts.values()]
    complete = all(set(p.isr) == set(p.replicas) and not p.adding and not p.removing for p in parts)
    return complete and all(map(even, bench.spread()))


def test_a_broker_that_joins_gets_its_share_a_bounded_number_of_moves_at_a_time() -> None:
    bench = Bench(3, QUICK, lively=True)
    bench.create("t", partitions=30)
    assert settled(bench)
    bench.start(4)
    most = 0
    for _ in range(300):
        bench.play(100)
        most = max(most, sum(bool(r.meta.adding) for r in bench.state.parts.values()))
        for record in bench.state.parts.values():
            assert record.meta.primary, "no partition is ever without primary"
            assert len(record.meta.isr) >= 2
    assert settled(bench)
    assert 0 < most <= QUICK.moves_max
    assert bench.spread()[0][4] == 15


def test_a_drained_broker_holds_nothing_and_leads_nothing_and_can_be_forgotten() -> None:
    bench = Bench(4, QUICK, lively=True)
    bench.create("t", partitions=12)
    bench.ask(ev.DrainSet, 2, True)
    bench.play(30_000)
    assert bench.state.held_by(2) == []
    assert settled(bench)
    bench.kill(2)
    bench.ask(ev.BrokerForgotten, 2)
    assert 2 not in bench.state.brokers


def test_draining_without_a_place_to_go_moves_the_primaries_and_keeps_the_copies() -> None:
    bench = Bench(2, QUICK, lively=True)
    bench.create("t", partitions=4)
    bench.ask(ev.DrainSet, 2, True)
    bench.play(10_000)
    for record in bench.state.parts.values():
        assert record.meta.primary == 1
        assert set(record.meta.isr) == {1, 2}
    bench.ask(ev.DrainSet, 2, False)
    bench.play(10_000)
    assert settled(bench)


def test_a_lost_replica_is_replaced_after_replacement_ms_and_not_before() -> None:
    bench = Bench(4, QUICK, lively=True)
    bench.create("t", partitions=12)
    lost = bench.state.held_by(4)
    assert lost
    bench.kill(4)
    bench.play(4_000)
    assert bench.state.held_by(4) == lost
    bench.play(20_000)
    assert bench.state.held_by(4) == []
    assert settled(bench)


def test_a_broker_that_returns_in_time_gets_its_primaries_back_and_no_data_moves() -> None:
    bench = Bench(3, QUICK, lively=True)
    bench.create("t", partitions=12)
    before = {k: r.meta.replicas for k, r in bench.state.parts.items()}
    bench.kill(1)
    bench.play(2_000)
    bench.start(1)
    bench.play(10_000)
    assert {k: r.meta.replicas for k, r in bench.state.parts.items()} == before
    assert settled(bench)
    assert not bench.noted("move_started")


def test_a_change_is_looked_at_soon_even_while_a_replacement_is_due_much_later() -> None:
    bench = Bench(3, CoreConfig(preferred_ms=1_000), lively=True)
    bench.create("t", partitions=6)
    bench.kill(1)
    bench.play(3_000)  # nothing to do now: the next look is for the replacement, in half a minute
    bench.start(1)
    bench.start(4)
    bench.play(8_000)
    assert settled(bench)
    assert bench.spread()[0][4] == 3


def test_a_move_whose_target_dies_goes_elsewhere_and_keeps_the_old_copy_meanwhile() -> None:
    bench = Bench(4, QUICK)  # nobody catches up: moves stay open
    bench.create("t", partitions=4, replication=2)
    bench.ask(ev.DrainSet, 1, True)
    bench.play(2_000)
    moving = [r.meta for r in bench.state.parts.values() if r.meta.adding]
    assert moving
    target = moving[0].adding[0]
    bench.kill(target)
    bench.play(2_000)
    for record in bench.state.parts.values():
        part = record.meta
        assert target not in part.adding
        assert len([b for b in part.replicas if b not in part.adding]) == 2
    assert bench.noted("move_cancelled")
    bench.lively = True
    bench.play(30_000)
    assert bench.state.held_by(1) == []


def test_a_move_that_loses_the_replica_it_was_to_keep_keeps_the_one_it_was_to_remove() -> None:
    bench = Bench(3, QUICK)
    bench.create("t", partitions=1, min_isr=2)
    first, second = bench.part().replicas
    bench.ask(ev.DrainSet, first, True)
    bench.play(2_000)
    part = bench.part()
    (third,) = part.adding
    assert part.removing == (first,)
    bench.ask(ev.DrainSet, first, False)
    bench.kill(second)
    bench.lively = True
    bench.play(30_000)
    assert set(bench.part().replicas) == {first, third}
    assert set(bench.part().isr) == {first, third}


def test_a_cancelled_move_keeps_the_copy_that_recovery_may_need() -> None:
    """The new replica led alone, and its power failed: what it flushed is nowhere else."""
    bench = Bench(3, QUICK)
    bench.create("t", partitions=1, min_isr=1, flush="replicated")
    primary, secondary = bench.part().replicas
    bench.ask(ev.DrainSet, primary, True)
    bench.play(2_000)
    (third,) = bench.part().adding
    bench.alter(bench.part(), [primary, third])
    bench.kill(primary)
    assert bench.part().isr == (third,)
    bench.kill(third)
    broker = bench.brokers[third]
    broker.incarnation += 1
    bench.register(third, restart="os_crash", replicas=[bench.report(bench.part(), 90)])
    bench.play(5_000)  # it has registered and does not serve yet
    part = bench.part()
    assert (part.primary, part.isr, part.elr) == (0, (), ())
    assert third in part.replicas, "its files would be deleted"
    broker.up = True
    bench.heartbeat(third)
    bench.register(secondary, replicas=[bench.report(bench.part(), 20)])
    bench.start(primary, replicas=[bench.report(bench.part(), 40)])
    assert bench.ask(ev.RecoveryAsked, "t", 0).primary == third


def test_a_move_survives_a_coordinator_restart() -> None:
    bench = Bench(3, QUICK)
    bench.create("t", partitions=6)
    bench.start(4)
    bench.play(2_000)
    assert any(r.meta.adding for r in bench.state.parts.values())
    bench.restart()
    bench.lively = True
    bench.play(30_000)
    assert settled(bench)


def test_the_old_copy_stays_until_the_new_one_is_in_sync_however_long_that_takes() -> None:
    bench = Bench(3, QUICK)  # nobody catches up
    bench.create("t", partitions=6)
    before = {key: record.meta.isr for key, record in bench.state.parts.items()}
    bench.start(4)
    bench.play(60_000)
    assert any(r.meta.adding for r in bench.state.parts.values())
    assert {key: tuple(sorted(record.meta.isr)) for key, record in bench.state.parts.items()} == {
        key: tuple(sorted(isr)) for key, isr in before.items()
    }


def test_the_last_complete_replica_is_never_removed() -> None:
    bench = Bench(3, QUICK)
    bench.create("t", partitions=1, replication=2)
    part = bench.part()
    primary, secondary = part.primary, part.replicas[1]
    bench.alter(part, [primary])  # the secondary fell behind
    bench.ask(ev.DrainSet, primary, True)
    bench.play(60_000)
    assert primary in bench.part().isr
    assert primary in bench.part().replicas
    bench.alter(bench.part(), [primary, secondary])
    bench.lively = True
    bench.play(30_000)
    assert primary not in bench.part().replicas
    assert len(bench.part().isr) == 2


def test_a_topic_that_needs_more_brokers_than_there_are_is_refused_with_both_numbers() -> None:
    bench = Bench(2)
    with pytest.raises(NotEnoughReplicas, match=r"3 replicas.* 2 are registered") as refused:
        bench.create("t", replication=3)
    assert refused.value.details == {"replication": 3, "brokers": 2, "serving": 2}
    assert refused.value.definite
    assert not bench.state.topics


def test_a_topic_is_created_on_a_broker_that_is_away_only_if_it_must_be() -> None:
    bench = Bench(3)
    bench.kill(3)
    bench.create("t", partitions=3, replication=3)
    for record in bench.state.parts.values():
        assert len(record.meta.replicas) == 3
        assert set(record.meta.isr) == {1, 2}
    bench.create("u", partitions=3, replication=2)
    assert not any(3 in bench.part("u", p).replicas for p in range(3))


@given(assignments, st.integers(1, 3), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_placing_many_at_once_gives_what_placing_one_by_one_gives(
    case: tuple[int, list[tuple[int, ...]], set[int], int], replication: int, partitions: int
) -> None:
    brokers, replicas, leave, joined = case
    usable = [b for b in range(1, brokers + joined + 1) if b not in leave]
    if len(usable) < replication:
        return
    before = {("a", number): r for number, r in enumerate(replicas)}
    new = {("t", number): replication for number in range(partitions)}
    spread, leaders = counts(before, usable)
    one_by_one = Planner({}, usable, counts=spread, preferred=leaders)
    for key in sorted(new):
        one_by_one.place(key, new[key])
    at_once = Planner({}, usable, counts=spread, preferred=leaders)
    at_once.place_all(new)
    assert at_once.plan == one_by_one.plan


@given(assignments)
@settings(max_examples=300, deadline=None)
def test_a_cluster_that_counts_as_balanced_would_not_be_changed(
    case: tuple[int, list[tuple[int, ...]], set[int], int],
) -> None:
    brokers, replicas, leave, joined = case
    usable = [b for b in range(1, brokers + joined + 1) if b not in leave]
    before = {("t", number): r for number, r in enumerate(replicas)}
    everybody = [*usable, *sorted(leave)]
    spread, leaders = counts(before, everybody)
    for plan in (before, rebalanced(before, usable, leave)):
        spread, leaders = counts(plan, everybody)
        if is_balanced(spread, leaders, usable, leave):
            assert rebalanced(plan, usable, leave) == plan


@given(assignments, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_planning_a_few_steps_at_a_time_ends_where_nothing_is_left_to_do(
    case: tuple[int, list[tuple[int, ...]], set[int], int], steps: int
) -> None:
    brokers, replicas, leave, joined = case
    usable = [b for b in range(1, brokers + joined + 1) if b not in leave]
    plan = {("t", number): r for number, r in enumerate(replicas)}
    for _ in range(400):
        following = rebalanced(plan, usable, leave, steps_max=steps)
        if following == plan:
            break
        plan = following
    assert rebalanced(plan, usable, leave) == plan


def test_the_indexes_of_the_state_are_what_a_count_gives() -> None:
    bench = Bench(4, lively=True)
    bench.create("a", partitions=13, replication=2)
    bench.create("b", partitions=5, replication=3)
    bench.kill(2)
    bench.play(33_000)
    bench.create("c", partitions=7, replication=2)
    bench.play(3_000)
    bench.ask(ev.TopicDeleted, "a")
    state = bench.state
    metas = [record.meta for record in state.parts.values()]
    keep = {meta.key: [b for b in meta.replicas if b not in meta.removing] for meta in metas}
    brokers = sorted(state.brokers)
    assert {b: state.assigned.get(b, 0) for b in brokers} == {b: sum(b in r for r in keep.values()) for b in brokers}
    assert {b: state.preferred.get(b, 0) for b in brokers} == {
        b: sum(r[0] == b for r in keep.values()) for b in brokers
    }
    assert {b: state.led.get(b, 0) for b in brokers} == {b: sum(m.primary == b for m in metas) for b in brokers}
    assert state.moving == {meta.key for meta in metas if meta.adding or meta.removing}
    assert state.misled == {meta.key for meta in metas if meta.primary != keep[meta.key][0]}
