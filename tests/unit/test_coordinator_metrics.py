"""What the coordinator tells Prometheus: its state while it is active, and what its core noted."""

from __future__ import annotations

from ferryline_coordinator.core import events as ev
from ferryline_coordinator.metrics import GROUPS_MAX, OTHERS, CoordinatorMetrics
from unit.coordinator_bench import Bench


def samples(metrics: CoordinatorMetrics) -> dict[tuple[str, str], float]:
    """(name, value of the one label) -> value."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if len(sample.labels) < 2
    }


def made(bench: Bench) -> CoordinatorMetrics:
    metrics = CoordinatorMetrics(lambda: bench.core)
    metrics.active = lambda: True
    return metrics


def test_in_sync_sets_that_shrink_and_grow_are_counted_apart() -> None:
    metrics = made(Bench())
    for before, after in (([1, 2, 3], [1]), ([1], [1, 2]), ([1, 2], [1, 2, 3]), ([1, 2], [1, 3])):
        metrics.noted(ev.Note("isr_changed", {"before": before, "after": after}))
    found = samples(metrics)
    assert [found[f"ferryline_isr_{what}_total", ""] for what in ("shrinks", "expands", "changes")] == [1, 2, 4]


def test_each_broker_is_shown_as_running_or_not_and_a_standby_says_nothing_of_them() -> None:
    bench = Bench(brokers=2)
    metrics = made(bench)
    assert samples(metrics)["ferryline_broker_running", "2"] == 1
    bench.brokers[2].up = False
    bench.play(20_000)
    found = samples(metrics)
    assert (found["ferryline_broker_running", "1"], found["ferryline_broker_running", "2"]) == (1, 0)
    assert found["ferryline_brokers_registered", ""] - found["ferryline_brokers_running", ""] == 1
    metrics.active = lambda: False
    assert not any(name == "ferryline_broker_running" for name, _ in samples(metrics))


def test_members_of_groups_are_shown_by_group_and_beyond_a_limit_together() -> None:
    bench = Bench()
    bench.create("orders")
    for number in range(GROUPS_MAX + 3):
        bench.member(f"g{number:05}", "m", ["orders"])
    bench.member("g00000", "n", ["orders"])
    metrics = made(bench)
    shown = {label: value for (name, label), value in samples(metrics).items() if name == "ferryline_group_members"}
    assert len(shown) == GROUPS_MAX + 1
    assert (shown["g00000"], shown["g00001"], shown[OTHERS]) == (2, 1, 3)


def test_commits_of_the_store_are_timed() -> None:
    metrics = made(Bench())
    metrics.commit_seconds.observe(0.003)
    assert samples(metrics)["ferryline_store_commit_seconds_count", ""] == 1
