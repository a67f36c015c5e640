"""A short piece of the campaign on lanes, and that it would notice."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tests.integration import lanes_campaign


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    settings: dict[str, Any] = {
        "records": 9_000,
        "keys": 300,
        "receivers": 24,
        "processes": 3,
        "partitions": 6,
        "prefetch": 32,
        "rate": 900.0,
        "lease": 3.0,
        "nacks": 0.05,
        "kill_every": 4.0,
        "worker_kill_every": 5.0,
        "seed": 1,
        "sabotage": "",
        "dir": str(folder),
    }
    return argparse.Namespace(**settings | changes)


async def test_lanes_hold_while_brokers_and_receivers_are_killed(tmp_path: Path) -> None:
    found = await lanes_campaign.run(options(tmp_path))
    assert found["broker_kills"] >= 1
    assert found["receiver_kills"] >= 1
    assert found["drained"], found
    assert {name: found[name] for name in ("order", "again", "apart", "lost")} == dict.fromkeys(
        ("order", "again", "apart", "lost"), 0
    ), found["examples"]


async def test_a_broker_that_forgets_lanes_is_noticed(tmp_path: Path) -> None:
    quiet = {"kill_every": 1e6, "worker_kill_every": 1e6, "records": 3_000}
    found = await lanes_campaign.run(options(tmp_path, sabotage="no-lanes", **quiet))
    assert found["order"] > 0
    assert found["apart"] > 0
