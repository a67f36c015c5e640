"""Plans of faults: the same seed gives the same plan, every step is undone, and the end is always a drain."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ferryline.cli.chaos.schedule import (
    ACTIVE,
    ALL_ETCD,
    ANY,
    CLIENT,
    COORDINATOR,
    DAMAGE,
    DEFAULT_FAULTS,
    DRAIN,
    ETCD_MEMBERS,
    FAULTS,
    NEED_ETCD,
    QUIET,
    SHAPES,
    Plan,
    make_plan,
)

BROKERS = ["broker-1", "broker-2", "broker-3"]
COORDINATORS = [COORDINATOR, "coordinator-2", "coordinator-3"]
ALONE = tuple(fault for fault in FAULTS if fault not in NEED_ETCD)  # what one coordinator without etcd can stand
# Faults that leave nothing behind: a broken connection is made anew, a restarted broker is up again, flipped bits are
# for the product to mend.
OVER_AT_ONCE = {"half-open", "reset", "restart", "flip"}


def plan(seed: int, *, seconds: float = 600.0, faults: tuple[str, ...] = ALONE, every_s: float = 2.0) -> Plan:
    return make_plan(seed, brokers=BROKERS, faults=faults, seconds=seconds, every_s=every_s)


def on_etcd(seed: int, *, seconds: float = 600.0) -> Plan:
    return make_plan(
        seed, brokers=BROKERS, faults=tuple(FAULTS), seconds=seconds, every_s=2.0, coordinators=len(COORDINATORS)
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_gives_the_same_plan_and_another_seed_another(seed: int) -> None:
    assert plan(seed) == plan(seed)
    assert plan(seed).phases != plan(seed + 1).phases


@pytest.mark.parametrize("make", [plan, on_etcd])
@pytest.mark.parametrize("seed", range(20))
def test_every_step_is_undone_and_the_end_is_a_drain(seed: int, make: Callable[[int], Plan]) -> None:
    made = make(seed)
    assert made.phases[-1].name == DRAIN
    assert [phase.name for phase in made.phases].count(DRAIN) == 1
    for phase in made.phases:
        for step in phase.steps:
            assert 0 <= step.at_s < phase.seconds
            assert step.for_s > 0 or step.kind in OVER_AT_ONCE, step


@pytest.mark.parametrize("seed", range(20))
def test_files_are_harmed_on_one_broker_only_and_never_beside_other_faults(seed: int) -> None:
    made = plan(seed)
    harmed = [phase for phase in made.phases if any(step.kind in DAMAGE for step in phase.steps)]
    assert len({step.target for phase in harmed for step in phase.steps}) == 1
    assert all({step.kind for step in phase.steps} <= DAMAGE for phase in harmed)


@pytest.mark.parametrize("seed", range(20))
def test_steps_name_only_nodes_that_exist(seed: int) -> None:
    known = {*BROKERS, COORDINATOR}
    for phase in plan(seed).phases:
        for step in phase.steps:
            assert step.target in known | {CLIENT, ANY}
            assert step.other in known | {CLIENT, ANY, "", "write", "sync"}
            assert step.target != step.other


@pytest.mark.parametrize("seed", range(20))
def test_with_several_coordinators_steps_name_the_active_one_and_members_of_etcd(seed: int) -> None:
    steps = [step for phase in on_etcd(seed, seconds=1_800).phases for step in phase.steps]
    nodes = {*BROKERS, *COORDINATORS, ACTIVE, *ETCD_MEMBERS}
    for step in steps:
        assert step.target in nodes | {CLIENT, ANY, ALL_ETCD}
        assert step.other in nodes | {CLIENT, ANY, "", "write", "sync"}
        assert step.target != step.other
        assert step.target != ALL_ETCD or step.kind == "etcd"
    struck = {step.target for step in steps if step.kind == "coordinator"}
    assert ACTIVE in struck
    assert {step.target for step in steps if step.kind == "etcd"} <= {*ETCD_MEMBERS, ALL_ETCD}
    assert any(ACTIVE in (step.target, step.other) for step in steps if step.kind in ("cut", "one-way"))


@pytest.mark.parametrize("make", [plan, on_etcd])
def test_a_long_plan_has_every_shape_and_about_a_quarter_of_quiet_phases(make: Callable[..., Plan]) -> None:
    made = make(1, seconds=1_800)
    names = [phase.name for phase in made.phases]
    possible = {name for name, (needs, _) in SHAPES.items() if set(needs) <= set(made.faults)}
    assert possible == set(SHAPES) or made.coordinators == 1
    assert set(names) >= {*possible, *(f"{fault} alone" for fault in made.faults), QUIET, DRAIN}
    assert 0.15 < names.count(QUIET) / len(names) < 0.4
    assert 1_800 <= made.seconds < 1_830


def test_only_the_chosen_faults_happen() -> None:
    made = plan(3, faults=("pause", "one-way"))
    assert {step.kind for phase in made.phases for step in phase.steps} == {"pause", "one-way"}


def test_a_third_of_the_cuts_of_the_default_faults_is_one_way() -> None:
    steps = [
        step
        for seed in range(20)
        for phase in make_plan(seed, brokers=BROKERS, faults=DEFAULT_FAULTS, seconds=600).phases
        for step in phase.steps
    ]
    one_way = sum(step.kind == "one-way" for step in steps)
    assert one_way / sum(step.kind in ("cut", "one-way") for step in steps) > 1 / 3


def test_shapes_can_be_asked_for_first() -> None:
    made = make_plan(5, brokers=BROKERS, faults=["kill", "pause"], seconds=60, first=["kill the one that went on"])
    assert made.phases[0].name == "kill the one that went on"
    woken = {step.target for step in made.phases[0].steps if step.kind == "pause"}
    killed = {step.target for step in made.phases[0].steps if step.kind == "kill"}
    assert len(killed) == 1
    assert woken | killed == set(BROKERS)
    assert not woken & killed


def test_no_faults_is_a_plan_too() -> None:
    made = make_plan(1, brokers=BROKERS, faults=[], seconds=30)
    assert all(not phase.steps for phase in made.phases)
    assert made.phases[-1].name == DRAIN


@pytest.mark.parametrize(("faults", "brokers"), [(["flood"], BROKERS), (["kill"], ["broker-1"]), (["etcd"], BROKERS)])
def test_what_cannot_be_planned_is_refused(faults: list[str], brokers: list[str]) -> None:
    with pytest.raises(ValueError, match=r"faults|several coordinators"):
        make_plan(1, brokers=brokers, faults=faults, seconds=10)
