"""Every block of the pages for users, run as it stands there, against a cluster of its own.

A page is run from its top to its end in an empty directory, with the tools of this environment on the PATH and
FERRYLINE_URL, FERRYLINE_CA and FERRYLINE_TOKEN of a cluster with access on; BROKER_2 is the process of a broker.
Blocks of ``sh`` go to bash, blocks of ``python`` to Python; each must end with status 0. The first line may say more:

    # send.py                      the block is that file; whatever runs it comes later
    # in a terminal of its own     goes on until the page ends

Blocks of any other language are not run. One that cannot be says why in a comment above it: ``<!-- not run: why -->``.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    page
    for page in (
        "start",
        "concepts",
        "recipes",
        "from-kafka",
        "from-rabbitmq",
        "from-celery",
        "tracing",
        "rest",
        "backup",
        "operations",
    )
    if (ROOT / f"docs/{page}.md").exists()
]
BLOCK_S = 150.0
BACKGROUND = "# in a terminal of its own"
_FENCE = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```", re.M | re.S)
_FILE = re.compile(r"\A# ([A-Za-z0-9_./-]+\.[a-z]+)\n")

pytestmark = pytest.mark.process


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line``: where it begins in its page."""

    language: str
    text: str
    line: int
    why_not: str

    @property
    def file(self) -> str:
        """The name under which it is kept, "" for one that is run."""
        found = _FILE.match(self.text)
        return found.group(1) if found else ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], text.count("\n", 0, found.start()) + 1, found["why"] or "")
        for found in _FENCE.finditer(text)
    ]


class Desk:
    """Where one page is worked through."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._folder = folder
        self._env = {**env, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "NO_COLOR": "1"}
        self._background: list[subprocess.Popen[bytes]] = []
        self._logs = 0

    def run(self, block: Block) -> str:
        """What went wrong, "" if nothing did."""
        if block.why_not or block.language not in ("sh", "python", "toml", "yaml") or not block.text.strip():
            return ""
        if block.file:
            path = self._folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            return ""
        if block.language not in ("sh", "python"):
            return ""
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        if block.language == "python":
            command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block.text]
        if block.text.startswith(BACKGROUND):
            log = (self._folder / f"terminal-{self._logs}.log").open("wb")
            self._logs += 1
            self._background.append(
                subprocess.Popen(
                    command, cwd=self._folder, env=self._env, stdout=log, stderr=log, start_new_session=True
                )
            )
            log.close()
            return ""
        try:
            done = subprocess.run(
                command, cwd=self._folder, env=self._env, capture_output=True, timeout=BLOCK_S, check=False
            )
        except subprocess.TimeoutExpired as late:
            return f"not over within {BLOCK_S:g} s: {(late.stdout or b'')[-500:]!r} {(late.stderr or b'')[-500:]!r}"
        if done.returncode == 0:
            return ""
        return f"status {done.returncode}: {done.stdout.decode()[-800:]}{done.stderr.decode()[-1500:]}"

    def close(self) -> str:
        """End what still runs; what the terminals said."""
        for process in self._background:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + 15
        for process in self._background:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(5)
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in self._folder.glob("terminal-*.log"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster as `ferryline up --auth` makes it, and the variables that lead to it."""
    home = tmp_path_factory.mktemp("home")
    env = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
    env |= {"HOME": str(home), "FERRYLINE_HOME": str(home / "ferryline"), "XDG_CONFIG_HOME": str(home / "config")}
    log = (home / "up.log").open("wb")
    command = [sys.executable, "-m", "ferryline.cli", "up", "--auth", "--port", "0", "--brokers", "3"]
    up = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield env | asyncio.run(_where(env, home, up))
    finally:
        up.send_signal(signal.SIGTERM)
        try:
            up.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(up.pid, signal.SIGKILL)
            up.wait(5)
        log.close()


async def _where(env: dict[str, str], home: Path, up: subprocess.Popen[bytes]) -> dict[str, str]:
    """Once it serves: how to reach it, as the context that it saved says."""
    import tomllib

    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert up.poll() is None, (home / "up.log").read_text()
        config = home / "config/ferryline/config.toml"
        if config.exists():
            context = tomllib.loads(config.read_text())["contexts"]["local"]
            urls = context["url"] if isinstance(context["url"], str) else ",".join(context["url"])
            found = {"FERRYLINE_URL": urls, "FERRYLINE_CA": context["ca"], "FERRYLINE_TOKEN": context["token"]}
            look = [sys.executable, "-m", "ferryline.cli", "--timeout", "3", "broker", "list", "--output", "json"]
            seen = await asyncio.to_thread(subprocess.run, look, env={**env, **found}, capture_output=True, check=False)
            if seen.returncode == 0 and seen.stdout.count(b'"running"') >= 3:
                pid = re.search(r"^broker-2 .* (\d+)\s*$", (home / "up.log").read_text(), re.M)
                assert pid, "the table of `ferryline up` has no line for broker-2"
                return found | {"BROKER_2": pid[1]}
        await asyncio.sleep(0.2)
    raise AssertionError(f"the cluster did not come up: {(home / 'up.log').read_text()[-2000:]}")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_page_runs(page: str, tmp_path: Path, environment: dict[str, str]) -> None:
    desk = Desk(tmp_path, environment)
    try:
        for block in blocks(ROOT / f"docs/{page}.md"):
            wrong = desk.run(block)
            assert not wrong, f"docs/{page}.md:{block.line}: {wrong}\n{desk.close()}"
    finally:
        desk.close()


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_overlooked(page: str) -> None:
    """An indented one, or one whose comment stands elsewhere, would never run and nobody would notice."""
    path = ROOT / f"docs/{page}.md"
    fences = re.findall(r"^\s*```", path.read_text(encoding="utf-8"), re.M)
    assert len(fences) == 2 * len(blocks(path))
    assert path.read_text(encoding="utf-8").count("<!-- not run") == sum(bool(block.why_not) for block in blocks(path))


def test_blocks_are_found_with_what_is_said_about_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n```sh\nfalse\n```\n<!-- not run: no time -->\n```python\nx\n```\n```python\n# a/b.py\n1\n```\n"
    )
    found = blocks(page)
    assert [(block.language, block.line, block.why_not, block.file) for block in found] == [
        ("sh", 2, "", ""),
        ("python", 5, "no time", ""),
        ("python", 9, "", "a/b.py"),
    ]
    desk = Desk(tmp_path, dict(os.environ))
    assert [desk.run(block)[:8] for block in found] == ["status 1", "", ""]
    assert (tmp_path / "a/b.py").read_text() == "# a/b.py\n1\n"
