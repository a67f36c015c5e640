"""Everything that a running cluster serves, asked as everybody, against the tables of docs/access.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.access_matrix import CALLERS, MATRIX, differences, documented, run, shown

pytestmark = pytest.mark.process


async def test_every_route_and_frame_is_open_to_whom_the_document_says_and_to_nobody_else(tmp_path: Path) -> None:
    routes, frames = await run(tmp_path)
    assert differences(routes, frames) == []
    assert shown(routes, frames) == MATRIX.read_text(), (
        "make it anew: python -m tests.integration.access_matrix --write"
    )
    assert len(routes) > 80
    assert all(set(outcomes) == set(CALLERS) for found in (routes, frames) for outcomes in found.values())


def test_a_difference_is_noticed_in_either_direction() -> None:
    expected_routes, expected_frames = documented()
    routes = {("coordinator", name): dict(outcomes) for name, outcomes in expected_routes.items()}
    frames = {("broker", name): dict(outcomes) for name, outcomes in expected_frames.items()}
    assert differences(routes, frames) == []
    routes["coordinator", "DELETE /v1/topics/{topic}"]["reader"] = "yes"
    routes["coordinator", "GET /v1/new"] = routes.pop(("coordinator", "GET /v1/whoami"))
    frames["broker", "PRODUCE"]["writer"] = "403"
    assert differences(routes, frames) == [
        "route GET /v1/whoami: documented, and nobody serves it",
        "coordinator: route DELETE /v1/topics/{topic}: reader gets yes, documented is 403",
        "coordinator: route GET /v1/new: served, and not documented",
        "broker: frame PRODUCE: writer gets 403, documented is yes",
    ]
