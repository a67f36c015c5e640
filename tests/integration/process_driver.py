"""The default driver of `Cluster`: child processes, by the runner that `ferryline up` and `ferryline demo` use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferryline.cli.driver import ProcessCluster

if TYPE_CHECKING:
    from tests.integration.cluster import Cluster

    def _fits(cluster: ProcessCluster) -> Cluster:
        """mypy says so if the driver stops being what the tests expect."""
        return cluster


__all__ = ["ProcessCluster"]
