"""Every block of docs/workers.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/workers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def page() -> dict[str, Any]:
    """The module that all blocks together are."""
    scope: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), scope)
    return scope


async def test_the_test_of_the_page_passes(capsys: pytest.CaptureFixture[str]) -> None:
    await page()["test_orders_are_billed"]()
    printed = capsys.readouterr().out
    for text in ("b'ann' pays for 1", "9.5 attempt 1 of 5", "orders: ", "connected: client", "closed"):
        assert text in printed


async def test_the_submitter_of_the_page_gets_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    scope = page()
    app: fl.App = scope["app"]
    async with (
        fl.testing.Cluster(topics=["orders"]) as cluster,
        cluster.client() as client,
        app.connected(client),
        app.worker(),
    ):
        scope["app"] = Here(app)  # `async with app` there means: over this client
        await scope["submit"]()
    printed = capsys.readouterr().out
    assert "https://example.org/cat.png?width=128" in printed
    assert [line for line in printed.splitlines() if line.startswith("dog-1")] == [
        "dog-1 queued",
        "dog-1 done",
    ]


class Here:
    """An app that is connected already."""

    def __init__(self, app: fl.App) -> None:
        self._app = app

    async def __aenter__(self) -> fl.App:
        return self._app

    async def __aexit__(self, *exc: object) -> None:
        return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._app, name)


async def test_the_example_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {"__name__": "example"}
    exec(compile((ROOT / "examples/tasks.py").read_text(encoding="utf-8"), "tasks.py", "exec"), scope)
    app: fl.App = scope["app"]
    async with (
        fl.testing.Cluster(topics=["orders"]) as cluster,
        cluster.client() as client,
        app.connected(client),
        app.worker(),
    ):
        scope["app"] = Here(app)
        await scope["main"]()
        await cluster.advance(seconds=11)
    printed = capsys.readouterr().out
    for text in ("ann pays 0.0, attempt 1 of 3", "running (attempt 2 of 3)", "cat.png?width=2000", "tidying up"):
        assert text in printed
