"""The README's start, typed as it stands there: TLS, a token, a record sent and read. Only the port is another one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
UP = "ferryline up --auth"


def blocks() -> tuple[list[str], list[str], str]:
    """Lines for the first terminal, lines for the second one, and hello.py: of the section Start."""
    text = (ROOT / "README.md").read_text()
    section = text.split("\n## Start\n")[1].split("\n## ")[0]
    typed = [
        [line.strip() for line in block.splitlines()]
        for block in re.findall(r"(?:^    \S.*\n)+", section, re.MULTILINE)
    ]
    (program,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    first, second = [block for block in typed if not block[0].startswith(("import", "async"))]
    return first, second, program


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who has typed `. .venv/bin/activate` and nothing else."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
    clean |= {"HOME": str(tmp_path), "NO_COLOR": "1", "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}"}
    clean.pop("XDG_CONFIG_HOME", None)
    return clean


@pytest.fixture
def running(home: dict[str, str], tmp_path: Path, eventually_blocking: Any) -> Iterator[None]:
    """The first terminal."""
    assert blocks()[0] == ["make venv && . .venv/bin/activate", UP]
    shown = tmp_path / "first"
    with shown.open("w") as out:
        command = [*UP.split(), "--port", "0"]
        process = subprocess.Popen(command, env=home, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        eventually_blocking(
            lambda: "In another terminal" in shown.read_text() or process.poll() is not None,
            within_s=120,
            what="the cluster is up",
        )
        assert process.poll() is None, shown.read_text()
        yield
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_the_start_of_the_readme_leads_to_a_record_sent_and_read_with_a_token(
    running: None, home: dict[str, str], tmp_path: Path
) -> None:
    activate, *typed = blocks()[1]
    assert activate == ". .venv/bin/activate"
    (tmp_path / "hello.py").write_text(blocks()[2])
    script = "\n".join(["set -e", *typed, "ferryline whoami -o json", "python hello.py"])
    command = ["bash", "-c", script]
    done = subprocess.run(command, env=home, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[1] == '{"id": 0}', "what was typed was sent, and read"
    assert '  "principal": "shop",' in lines, "with a token that may do this and nothing else"
    assert lines[-2:] == ["b'customer-7' {'id': 0}", "b'customer-7' {'id': 1}"]
