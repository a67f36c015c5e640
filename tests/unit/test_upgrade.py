"""Rolling upgrades: who is behind, when the level is raised, and who is refused afterwards."""

from __future__ import annotations

import pytest

from ferryline.protocol.errors import Conflict, UnsupportedVersion
from ferryline.protocol.messages import FEATURE_LEVEL, PROTOCOL_MAX, Register
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core import upgrade
from ferryline_coordinator.core.coordinator import CoordinatorCore
from ferryline_coordinator.core.records import CLUSTER_KEY, ClusterRecord, encode_record
from tests.unit.coordinator_bench import Bench


def grown() -> Bench:
    """A cluster that the release before has made."""
    bench = Bench(3)
    old = ClusterRecord(
        "c" * 32, b"k" * 32, feature_level=1, revision=bench.state.revision, broker_id=3, broker_epoch=3
    )
    bench.rows[CLUSTER_KEY] = encode_record(old)
    bench.restart()
    return bench


def test_a_new_cluster_runs_at_its_release() -> None:
    assert Bench(1).state.cluster.feature_level == FEATURE_LEVEL


def test_the_level_is_raised_once_the_last_broker_is_upgraded_and_everybody_hears_of_it() -> None:
    bench = grown()
    for number in bench.brokers:
        bench.start(number, feature_level=1)
    records = list(bench.state.brokers.values())
    assert (upgrade.possible(records), upgrade.behind(records)) == (1, [1, 2, 3])
    for number in (1, 2):
        bench.start(number)  # the new release; the coordinator takes the old one beside it
    with pytest.raises(Conflict, match="brokers 3 run an older release"):
        bench.ask(ev.LevelRaised)
    bench.start(3)
    before = bench.state.revision
    assert bench.ask(ev.LevelRaised) == FEATURE_LEVEL
    assert bench.state.cluster.feature_level == FEATURE_LEVEL
    assert bench.state.revision > before
    assert bench.ask(ev.LevelRaised) == FEATURE_LEVEL
    assert bench.state.revision == before + 1  # the second one changed nothing


def test_an_older_broker_is_refused_afterwards_and_told_why() -> None:
    bench = grown()
    bench.start(1, feature_level=1)
    bench.start(1)
    bench.start(2)
    bench.start(3)
    bench.ask(ev.LevelRaised)
    with pytest.raises(UnsupportedVersion, match=r"the cluster runs at 2, broker 1 of an older release at 1 at most"):
        bench.start(1, feature_level=1)
    bench.start(1)
    assert not bench.state.brokers[1].meta.fenced


def test_a_broker_without_a_common_version_of_the_protocol_is_refused() -> None:
    bench = Bench(1)
    assert Register(1, "s", 1, "clean", "", "", 0).version_max == PROTOCOL_MAX
    with pytest.raises(UnsupportedVersion, match="speaks"):
        bench.start(1, version_min=PROTOCOL_MAX + 1, version_max=PROTOCOL_MAX + 3)


def test_a_coordinator_leaves_a_cluster_of_a_later_release_alone() -> None:
    bench = Bench(1)
    later = ClusterRecord("c" * 32, b"k" * 32, feature_level=FEATURE_LEVEL + 1)
    with pytest.raises(UnsupportedVersion, match="of an older release"):
        CoordinatorCore(bench.config).load([(CLUSTER_KEY, encode_record(later))], 9, 0)


def test_nothing_is_restored_into_a_cluster_at_the_level_before() -> None:
    bench = grown()
    with pytest.raises(Conflict, match="upgrade --finish"):
        bench.ask(ev.RestoreBegun, {}, {})
