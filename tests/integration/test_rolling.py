"""Rolling restart and upgrade on real processes: nothing fails, and an older broker is refused once it is over."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.rolling import outputs, ready_line, restart_all
from ferryline.cli.settings import Settings
from ferryline.protocol.messages import FEATURE_LEVEL
from tests.integration.conftest import Start
from tests.polling import poll

pytestmark = pytest.mark.process
OLDER = Path(__file__).with_name("older_broker")
WITHIN_S = 60.0


@pytest.fixture
def up(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What `ferryline up` printed; it ends after the test."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
    command = [sys.executable, "-m", "ferryline.cli", "up", "--data-dir", str(tmp_path / "data"), "--port", "0"]
    with (tmp_path / "stderr").open("a") as errors:
        process = subprocess.Popen(
            [*command, "-o", "json"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env | {"HOME": str(tmp_path)},
        )
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            break
    yield json.loads(text)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()


async def test_a_rolling_restart_under_load_is_seen_by_nobody(up: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings(url=(up["url"],), ca=Path(up["ca"]))
    sent, got, stop = 0, set[int](), asyncio.Event()
    async with fl.connect(up["url"], ca=up["ca"]) as client:
        await client.admin.create_topic("orders", partitions=6)

        async def produce() -> None:
            nonlocal sent
            async with client.producer() as producer:
                while not stop.is_set():
                    await producer.send("orders", str(sent).encode(), key=f"k{sent % 30}")
                    sent += 1
                    await asyncio.sleep(0.005)

        async def consume() -> None:
            async with client.consumer("orders", group="g") as consumer:
                async for message in consumer:
                    got.add(int(message.value))

        works = [asyncio.create_task(produce()), asyncio.create_task(consume())]
        await poll(lambda: len(got) > 50, within_s=WITHIN_S)
        rows = await restart_all(settings, tmp_path / "data", True, WITHIN_S)
        stop.set()
        await works[0]  # raises what a send has raised
        await poll(lambda: len(got) == sent, within_s=WITHIN_S, what="everything sent is consumed")
        assert not works[1].done()
        works[1].cancel()
    assert [row["service"] for row in rows] == ["broker-1", "broker-2", "broker-3", "coordinator"]
    assert all(row["pid"] != row["pid_before"] for row in rows)
    now = {path.parent.name: ready_line(path)["pid"] for path in outputs(tmp_path / "data", "*")}
    assert now == {row["service"]: row["pid"] for row in rows}


async def test_a_broker_of_an_older_release_is_named_and_refused(start_cluster: Start) -> None:
    cluster = await start_cluster(brokers=1)
    older = cluster.local.services[cluster.local.add_broker()]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OLDER), *filter(None, [os.environ.get("PYTHONPATH")])])}
    older.spawn(env, signal.SIGKILL)
    await poll(lambda: not older.running, within_s=WITHIN_S)
    assert older.process is not None
    assert older.process.returncode == 1
    assert f"the cluster runs at {FEATURE_LEVEL}" in older.log_tail()
    assert "of an older release at 1 at most: upgrade it" in older.log_tail()
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        assert client.routing.cluster.feature_level == FEATURE_LEVEL
