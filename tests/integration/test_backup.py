"""A backup under load and back again, a short piece of the campaign; and the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import ferryline as fl
from ferryline.backup.files import PROGRESS, read_manifest, verify
from ferryline.backup.taking import Taking
from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.records import encode_batch
from ferryline.trust import ssl_context
from tests.integration import backup_campaign
from tests.integration.conftest import Start

pytestmark = pytest.mark.process


async def test_a_backup_under_load_with_a_kill_comes_back_equal_up_to_its_mark(tmp_path: Path) -> None:
    asked = "--before 2 --after 0.5 --rate 400 --partitions 2 --kill-after 30000 --bytes-per-s 150000 --incremental"
    found = await backup_campaign.run(backup_campaign.options_of(asked.split()), tmp_path)
    assert backup_campaign.good(found), found


class Commands:
    """The program, against one cluster."""

    def __init__(self, cluster: ProcessCluster, home: Path) -> None:
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
        self.env |= {"HOME": str(home), "NO_COLOR": "1", "FERRYLINE_URL": cluster.url, "FERRYLINE_CA": str(cluster.ca)}

    def __call__(self, *args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ferryline.cli", *args]
        done = subprocess.run(command, capture_output=True, text=True, env=self.env, timeout=90, check=False)
        assert done.returncode == status, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


async def test_the_commands_take_bring_up_to_date_check_and_refuse(start_cluster: Start, tmp_path: Path) -> None:
    cluster = await start_cluster(brokers=2)
    ferryline, folder = Commands(cluster, tmp_path), tmp_path / "backup"
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic("orders", partitions=2)
        async with client.producer() as producer:
            await producer.send_many("orders", [b"v"] * 50)
        await _an_interrupted_run_is_gone_on_with(client, folder)
        told = json.loads(ferryline("backup", "take", str(folder), "--rate", "10MB", "-o", "json").stdout)
        assert (told["topics"], told["partitions"]) == (1, 2)
        async with client.producer() as producer:
            await producer.send_many("orders", [b"w"] * 50)
        again = json.loads(ferryline("backup", "take", str(folder), "-o", "json").stdout)
        assert again["offsets"] == told["offsets"] + 50
        rows = json.loads(ferryline("backup", "show", str(folder), "--partitions", "-o", "json").stdout)
        assert sum(row["mark"] - row["from"] for row in rows) == again["offsets"]
        refused = ferryline("restore", str(folder), status=1).stderr
        assert "not empty" in refused
        await _a_partition_that_is_led_takes_nothing_in(cluster, client)
    manifest = read_manifest(folder)
    assert manifest is not None
    path = folder / sorted(manifest.files())[0]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert path.name in ferryline("backup", "verify", str(folder), status=1).stderr


async def _an_interrupted_run_is_gone_on_with(client: fl.Client, folder: Path) -> None:
    work = Taking(client, folder, told=backup_campaign.interrupt_at(2)).run
    assert await backup_campaign.interrupted(work)
    assert read_manifest(folder) is None
    partial = read_manifest(folder, PROGRESS)
    assert partial is not None
    assert partial.size > 0
    came: list[str] = []
    manifest = await Taking(client, folder, told=lambda _, doing: came.append(doing)).run()
    assert sum(verify(folder, manifest)) == manifest.size
    known = [part for part in partial.partitions if part.records.size]
    assert known
    assert not [doing for doing in came if doing == f"records of orders/{known[0].partition}"]


async def _a_partition_that_is_led_takes_nothing_in(cluster: ProcessCluster, client: fl.Client) -> None:
    part = next(iter(client.routing.cluster.partitions.values()))
    url = f"{client.routing.address(part.primary)}/v1/replicas/{part.topic_id}/{part.partition}"
    data = bytes(encode_batch([(b"k", b"v", [])], base_offset=0, epoch=1))
    context = ssl_context(str(cluster.ca))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http:

        async def ask(method: str, path: str, **options: Any) -> tuple[int, str]:
            async with http.request(method, url + path, **options) as response:
                return response.status, (await response.text())

        for path, body, status, why in (
            ("/logs/records?from=0", data, 409, "not being restored"),
            ("/logs/records?from=7", data, 400, "does not follow 7"),
            ("/logs/records?from=0", data[:-1], 400, "cut off"),
            ("/logs/nothing?from=0", data, 400, "not one of"),
            ("/logs/records?from=x", data, 400, "from"),
        ):
            found = await ask("PUT", path, data=body)
            assert (found[0], why in found[1]) == (status, True), found
        assert (await ask("POST", "/restored", data=b""))[0] == 409
        assert (await ask("GET", "/logs/records?from=999999"))[0] == 404
