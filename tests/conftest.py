"""What all tests share: which tests run, polling with a deadline, free ports, and checks that nothing leaks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

from ferryline.cli import service
from tests.integration.oidc import chromium, oidc
from tests.polling import POLL_SECONDS, poll, poll_blocking

NEEDS = {
    "docker": "needs a docker daemon: `make test-all`, or --docker",
    "root": "needs root: `make test-all`, or --root",
    "slow": "takes long: `make test-all`, or --slow",
}
PROGRAMS = {  # tests run where these are found
    "etcd": "needs etcd (Debian: etcd-server): `make test-all` installs it",
    "prometheus": "needs prometheus and promtool (Debian: prometheus): `make test-all` installs them",
    "redis": "needs redis-server (Debian: redis-server): `make test-all` installs it",
    "oidc": "needs node, chromium and what scripts/install-oidc fetches: `make test-all` installs them",
}
# Properties are judged by what they find. How long an example takes is the machine's business, which may be busy.
settings.register_profile("ferryline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ferryline")
_COMMANDS = {"redis": "redis-server"}  # where it is not called like the marker


def _there(program: str) -> bool:
    if program == "oidc":
        return shutil.which("node") is not None and chromium.program() is not None and oidc.modules() is not None
    return shutil.which(_COMMANDS.get(program, program)) is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    """One switch for each marker whose tests do not run everywhere."""
    for marker, reason in NEEDS.items():
        parser.addoption(f"--{marker}", action="store_true", help=f"run tests marked {marker} ({reason})")
    for program in PROGRAMS:
        parser.addoption(f"--{program}", action="store_true", help=f"tests marked {program} must run, not be skipped")


def pytest_configure() -> None:
    """Workers of one run take ports from ranges of their own: one is free until the service that it is for listens."""
    number, count = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if 1 < count <= 6:
        share = len(service.FREE_PORTS) // count
        service.FREE_PORTS = service.FREE_PORTS[int(number.removeprefix("gw")) * share :][:share]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with its reason, what was not asked for. What was asked for must run: it fails where it cannot."""
    for item in items:
        for marker, reason in NEEDS.items():
            if item.get_closest_marker(marker) and not config.getoption(f"--{marker}"):
                item.add_marker(pytest.mark.skip(reason=reason))
        for program, reason in PROGRAMS.items():
            if item.get_closest_marker(program) and not config.getoption(f"--{program}") and not _there(program):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """What is garbage after the last test belongs to none, and is taken away in silence: pytest would end a green run
    with an error that names nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def eventually() -> Callable[..., Awaitable[Any]]:
    """``await eventually(lambda: condition, within_s=5)``: polls with a deadline, instead of a sleep that guesses."""
    return poll


@pytest.fixture
def eventually_blocking() -> Callable[..., Any]:
    """`eventually` for tests that are not coroutines."""
    return poll_blocking


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A loopback port that was free a moment ago; where a service can take port 0 itself, prefer that."""

    def pick() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    return pick


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> Iterator[None]:
    """A thread left behind keeps the interpreter from ending and disturbs the tests after it."""
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        left = [t.name for t in threading.enumerate() if t not in before and not t.daemon and t.is_alive()]
        if not left:
            return
        time.sleep(POLL_SECONDS)
    pytest.fail(f"threads left running: {left}")


@pytest.fixture(autouse=True, scope="session")
def no_process_outlives_the_session() -> Iterator[None]:
    """Whoever starts a process ends it. First fixture to start and last to finish: nothing ends after it."""
    me = psutil.Process(os.getpid())
    before = {child.pid for child in me.children(recursive=True)}
    yield
    helpers = {child.pid for child in multiprocessing.active_children()}
    tracker = "multiprocessing.resource_tracker"  # started by the standard library, ends with us
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        left = []
        for child in me.children(recursive=True):
            try:
                line = " ".join(child.cmdline())
                if child.pid not in before | helpers and tracker not in line and child.status() != "zombie":
                    left.append(f"{child.pid} {line[:120]}")
            except psutil.NoSuchProcess:
                continue
        if not left:
            return
        time.sleep(POLL_SECONDS)
    pytest.fail(f"processes left running: {left}")
