"""The same drill on containers: the driver of the docker SDK behind the Cluster protocol."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ferryline.cli.drill import Plan, run_drill
from tests.integration.docker_driver import DockerCluster

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]


@pytest.fixture
async def containers(tmp_path: Path) -> AsyncIterator[DockerCluster]:
    made = DockerCluster(f"ferryline-test-{os.getpid()}", tmp_path / "volumes")
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


async def test_a_container_killed_under_load_loses_nothing_and_comes_back(containers: DockerCluster) -> None:
    account = await run_drill(Plan(records=40_000, keys=8, victim_share=0.5, partitions=8, seed=1), containers)
    assert account.good, account
    assert account.verdict.acknowledged == 40_000, account
    assert account.healed_s is not None
    name = await containers.add_broker()
    assert containers.broker_id(name) > 0
    assert await containers.terminate(name) == 0
