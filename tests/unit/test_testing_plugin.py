"""The pytest plugin, the example and the page, as their users run them: by pytest in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INI = "[pytest]\nasyncio_mode = strict\nasyncio_default_fixture_loop_scope = function\n"
TESTS = """
import pytest
import ferryline as fl

pytestmark = [pytest.mark.asyncio, pytest.mark.ferryline(topics=["orders"], seed=5)]

@pytest.mark.ferryline(brokers=1)
async def test_the_nearest_marker_wins_name_by_name(ferryline_cluster, ferryline_client):
    assert ferryline_cluster.size == 1
    assert await ferryline_client.learn_topic("orders")

async def test_the_ini_file_says_how_many(ferryline_cluster):
    assert (ferryline_cluster.size, ferryline_cluster.seed) == (2, SEED)

async def test_that_fails(ferryline_cluster):
    ferryline_cluster.kill(1)
    assert not "it fails"

@pytest.mark.ferryline(7)
async def test_that_is_marked_badly(ferryline_cluster):
    pass
"""
HIDING = """
import builtins, sys, pytest

real = builtins.__import__

def hiding(name, *rest, **more):
    if name == "pytest_asyncio":
        raise ModuleNotFoundError(name, name=name)
    return real(name, *rest, **more)

builtins.__import__ = hiding
sys.exit(pytest.main(["-p", "no:asyncio", "-p", "no:cacheprovider"]))
"""


def run_pytest(folder: Path, *arguments: str, code: str = "") -> str:
    """What pytest printed. The settings of our own run are left out."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "-W", "error", *arguments]
    if code:
        command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text(INI + "ferryline_brokers = 2\n")
    return tmp_path


def test_clusters_come_from_markers_and_failures_tell_what_happened(folder: Path) -> None:
    (folder / "test_it.py").write_text(TESTS.replace("SEED", "5"))
    told = run_pytest(folder)
    assert "2 passed" in told, told
    assert "1 failed" in told
    assert "1 error" in told
    assert "takes settings by name" in told
    assert "ferryline cluster, seed 5" in told
    assert re.search(r"test +kill broker-1", told)
    assert "again with: --ferryline-seed=5" in told


def test_the_seed_of_the_command_line_wins(folder: Path) -> None:
    (folder / "test_it.py").write_text(TESTS.replace("SEED", "99"))
    told = run_pytest(folder, "--ferryline-seed=99", "-k", "ini_file")
    assert "1 passed" in told, told


def test_the_plugin_loads_nothing_that_is_not_used(folder: Path) -> None:
    (folder / "test_it.py").write_text(
        "import sys\n\ndef test_it():\n"
        "    found = {name.split('.')[0] for name in sys.modules} & {'ferryline', 'ferryline_broker', 'aiohttp'}\n"
        "    assert 'ferryline_testing.plugin' in sys.modules\n    assert not found\n"
    )
    told = run_pytest(folder)
    assert "1 passed" in told, told


def test_without_pytest_asyncio_the_fixtures_say_what_is_missing(folder: Path) -> None:
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text("def test_it(ferryline_cluster):\n    pass\n")
    told = run_pytest(folder, code=HIDING)
    assert "need pytest-asyncio" in told, told


def test_the_example_passes() -> None:
    told = run_pytest(ROOT / "examples/testing", "-q")
    assert re.search(r"\b5 passed", told), told


def test_every_block_of_the_page_runs(folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/testing.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    for number, block in enumerate(blocks):
        body = block
        if "asyncio.run(main())" in block:  # a program: pytest runs what it would run
            body = block.replace("asyncio.run(main())", "def test_block() -> None:\n    asyncio.run(main())")
        (folder / f"test_block_{number}.py").write_text(body)
    told = run_pytest(folder, "-q")
    assert f"{len(blocks)} passed" in told, told
