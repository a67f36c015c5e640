"""Feature levels: what a cluster may use only once all of it can.

A release announces the highest level that it can run at. The cluster stays at its own until an operator says that the
upgrade is finished: until then brokers may go back to the release before. Afterwards older ones are refused.
"""

from __future__ import annotations

from ferryline.protocol.errors import Conflict, UnsupportedVersion
from ferryline.protocol.messages import FEATURE_LEVEL
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.events import LevelRaised
from ferryline_coordinator.core.records import BrokerRecord, ClusterRecord


def check_known(cluster: ClusterRecord | None) -> None:
    """Raises UnsupportedVersion when the cluster has been raised beyond what this release knows: it would take back
    what others rely on."""
    if cluster is not None and cluster.feature_level > FEATURE_LEVEL:
        raise UnsupportedVersion(
            f"feature_level: the cluster runs at {cluster.feature_level}, this coordinator of an older release at "
            f"{FEATURE_LEVEL} at most: upgrade it",
            cluster=cluster.feature_level,
            coordinator=FEATURE_LEVEL,
        )


def possible(brokers: list[BrokerRecord]) -> int:
    """The level that the coordinator and all brokers can run at, whether these are up or not."""
    return min([FEATURE_LEVEL, *(record.feature_level for record in brokers if record.meta.broker_epoch)])


def behind(brokers: list[BrokerRecord]) -> list[int]:
    """Who keeps the cluster from running at this release's level."""
    return [record.meta.id for record in brokers if record.meta.broker_epoch and record.feature_level < FEATURE_LEVEL]


def finish(change: Change, event: LevelRaised) -> None:
    """Raise the level as far as everybody can run at, for good. Raises Conflict while somebody is behind."""
    brokers = change.brokers()
    level = possible(brokers)
    if late := behind(brokers):
        raise Conflict(
            f"brokers {', '.join(map(str, late))} run an older release: upgrade them, or forget those that are gone",
            brokers=late,
            possible=level,
        )
    if level > change.cluster.feature_level:
        change.set_cluster(feature_level=level)
        change.note("feature_level_raised", "warning", feature_level=level)
    change.reply(event.reply, max(level, change.cluster.feature_level))
