"""`ferryline chaos --driver docker`: the containers of a compose project, broken from outside."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ferryline.cli.chaos.campaign import Campaign, Load
from ferryline.cli.chaos.containers import DockerBed
from ferryline.cli.chaos.schedule import make_plan
from ferryline.cli.processes import ProcessFailed
from tests.integration.docker_driver import DockerCluster

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]
FAULTS = ["kill", "coordinator", "pause", "restart"]


@pytest.fixture
async def containers(tmp_path: Path) -> AsyncIterator[DockerCluster]:
    made = DockerCluster(f"ferryline-chaos-{os.getpid()}", tmp_path / "volumes")
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


async def test_containers_are_killed_and_paused_and_nothing_is_lost(containers: DockerCluster, tmp_path: Path) -> None:
    faults = FAULTS if os.geteuid() else [*FAULTS, "cut", "one-way"]  # packet filters are for root
    plan = make_plan(5, brokers=containers.brokers, faults=faults, seconds=40, every_s=3)
    bed = DockerBed(containers.project)
    assert await asyncio.to_thread(bed.find) == containers.brokers
    account = await Campaign(plan, Load(rate=500, partitions=2), bed, tmp_path / "history").run()
    assert account.good, account.as_dict()
    assert account.acked > 1_000
    assert sum(account.faults.values()) >= 3


async def test_a_project_without_a_cluster_is_refused() -> None:
    with pytest.raises(ProcessFailed, match="no container"):
        await asyncio.to_thread(DockerBed("nobody-uses-this-name").find)
