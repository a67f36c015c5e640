"""What replication promises, told as stories (`*.txt`) and acted out by the real cores and the real log."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.scenarios.script import rewritten

FILES = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_cluster_does_what_the_story_says(path: Path, request: pytest.FixtureRequest) -> None:
    told = path.read_text()
    acted = rewritten(told)
    if request.config.getoption("--rewrite", default=False):
        path.write_text(acted)
        return
    difference = "".join(difflib.unified_diff(told.splitlines(True), acted.splitlines(True), "told", "acted", n=6))
    assert not difference, f"{path.name}\n{difference}"


def test_there_is_a_story_for_every_row_that_was_promised() -> None:
    rows = {path.stem[:2] for path in FILES}
    assert {"01", "02", "03", "04", "05", "11", "13", "14", "15"} <= rows
