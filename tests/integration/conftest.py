"""Clusters for the tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from ferryline.cli.driver import ProcessCluster
from tests.integration.bad_input import World

LOG_LINES = 40
# Peers die here with connections open, and the garbage collector may look between a socket's abort and its closing:
# a matter of timing. Leaks are an error in tests/unit, where nobody is killed.
LENIENT = ("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
Start = Callable[..., Awaitable[ProcessCluster]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for rule in LENIENT:
                item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture
async def start_cluster(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Start]:
    """``await start_cluster(brokers=3)``: real processes, killed after the test, their logs shown if it failed."""
    made: list[ProcessCluster] = []

    async def start(**options: object) -> ProcessCluster:
        cluster = ProcessCluster(tmp_path / f"cluster-{len(made)}", **options)  # type: ignore[arg-type]
        made.append(cluster)
        await cluster.start()
        return cluster

    yield start
    for cluster in made:
        await cluster.kill_all()
    # The other side of every connection is gone: one moment for the loop to see that, so that no socket outlives it.
    await asyncio.sleep(0.1)
    for cluster in made:
        for name in cluster.local.services:
            tail = cluster.logs(name).splitlines()[-LOG_LINES:]
            request.node.add_report_section("call", f"log of {name}", "\n".join(tail))


@pytest.fixture
async def cluster(start_cluster: Start) -> ProcessCluster:
    """A coordinator and three brokers."""
    return await start_cluster(brokers=3)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    """A coordinator and two brokers, for all hostile input of one file."""
    made = ProcessCluster(tmp_path_factory.mktemp("attacked"), brokers=2)
    made.local.start()
    yield made
    made.local.kill_all()


@pytest.fixture
async def world(attacked: ProcessCluster) -> World:
    """That cluster with its topic, as it is now."""
    return await World.make(attacked)
