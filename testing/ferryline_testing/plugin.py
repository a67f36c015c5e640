"""pytest: a cluster for each test that asks for one::

    @pytest.mark.ferryline(topics=["orders"], seed=7)
    async def test_orders_arrive(ferryline_cluster, ferryline_client): ...

Nothing is loaded before a test uses a fixture. A test that fails is reported with its seed and what happened last.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline_testing.cluster import Cluster

SHOWN = 60  # events of a test that failed
_used: pytest.StashKey[Cluster] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The seed of a run, and how large clusters are where no marker says so."""
    group = parser.getgroup("ferryline", "clusters of ferryline.testing")
    group.addoption(
        "--ferryline-seed", type=int, default=None, help="seed of every cluster, in place of what markers say"
    )
    parser.addini("ferryline_brokers", "brokers of a cluster where no marker says so", default="3")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "ferryline(**settings): of the fixture ferryline_cluster, as of ferryline.testing.Cluster"
    )


def _settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The nearest marker wins, name by name; the command line's seed wins over all."""
    settings: dict[str, Any] = {"brokers": int(request.config.getini("ferryline_brokers"))}
    for marker in reversed(list(request.node.iter_markers("ferryline"))):
        if marker.args:
            raise pytest.UsageError("pytest.mark.ferryline takes settings by name, as ferryline.testing.Cluster does")
        settings.update(marker.kwargs)
    seed = request.config.getoption("--ferryline-seed")
    if seed is not None:
        settings["seed"] = seed
    return settings


async def _cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """A running cluster; settings come from ``pytest.mark.ferryline``."""
    from ferryline_testing.cluster import Cluster

    async with Cluster(**_settings(request)) as cluster:
        request.node.stash[_used] = cluster
        yield cluster


async def _client(ferryline_cluster: Cluster) -> AsyncIterator[Client]:
    """A connected client of ``ferryline_cluster``."""
    async with ferryline_cluster.client() as client:
        yield client


def _missing() -> None:
    raise pytest.UsageError("the fixtures of ferryline need pytest-asyncio: pip install 'ferryline-testing[pytest]'")


def _fixture(name: str, function: Callable[..., Any]) -> Any:
    try:
        import pytest_asyncio
    except ModuleNotFoundError:
        return pytest.fixture(_missing, name=name)
    return pytest_asyncio.fixture(function, loop_scope="function", name=name)


ferryline_cluster = _fixture("ferryline_cluster", _cluster)
ferryline_client = _fixture("ferryline_client", _client)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the cluster did, beside what the test says."""
    report = yield
    cluster = item.stash.get(_used, None)
    if cluster is not None and report.failed:
        told = "\n".join(map(str, list(cluster.events)[-SHOWN:]))
        again = f"again with: --ferryline-seed={cluster.seed}"
        report.sections.append((f"ferryline cluster, seed {cluster.seed}", f"{told}\n{again}"))
    return report
