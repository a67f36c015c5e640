"""The blocks of docs/compose.md, in their order, as they stand there: only volumes and port are this test's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.compose_campaign import free_port

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/compose.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def surroundings() -> Iterator[dict[str, str]]:
    """A compose project of its own; nothing of it stays."""
    volumes = tempfile.mkdtemp(prefix="ferryline-compose-docs-")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")},
        "FERRYLINE_VOLUMES": volumes,
        "FERRYLINE_PORT": str(free_port()),
        "HOME": volumes,  # no context of this machine's user
        "COMPOSE_PROJECT_NAME": f"ferryline-docs-{os.getpid()}",
        "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}",
    }
    yield environment
    down = ["scripts/compose", "down", "--volumes", "--remove-orphans", "--timeout", "5"]
    subprocess.run(down, cwd=ROOT, env=environment, capture_output=True, check=True)
    shutil.rmtree(volumes)


def test_the_page_does_what_it_says(surroundings: dict[str, str]) -> None:
    assert len(BLOCKS) == 4
    script = "set -euxo pipefail\n" + "".join(BLOCKS)
    script = script.replace("docker_volumes", surroundings["FERRYLINE_VOLUMES"])
    script = script.replace("8443", surroundings["FERRYLINE_PORT"])
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count('{"id":0}') + done.stdout.count('{"id": 0}') == 2, done.stdout
    assert "roll: done: the coordinator and 4 brokers" in done.stdout
    assert (Path(surroundings["FERRYLINE_VOLUMES"]) / "access/admin.key").stat().st_mode & 0o777 == 0o600
