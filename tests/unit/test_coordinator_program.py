"""The coordinator's program: flags, settings, signals, exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ferryline_coordinator.app import Coordinator
from ferryline_coordinator.config import CoordinatorConfig
from tests.polling import SOON_S


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Coordinator]:
    coordinator = Coordinator(CoordinatorConfig(data_dir=tmp_path / "c", port=0, join_tokens=1))
    await coordinator.start()
    yield coordinator
    await coordinator.stop()


async def program(*arguments: str, env: dict[str, str] | None = None) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ferryline_coordinator",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )


@pytest.mark.process
async def test_the_program_says_when_it_is_ready_and_stops_cleanly_with_polls_parked(tmp_path: Path) -> None:
    process = await program("--data-dir", str(tmp_path / "d"), "--port", "0")
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        assert line.startswith("READY ")
        ready = json.loads(line.removeprefix("READY "))
        assert (ready["service"], ready["pid"]) == ("coordinator", process.pid)
        trust = ssl.create_default_context(cafile=str(tmp_path / "d" / "tls" / "ca.crt"))
        async with aiohttp.ClientSession() as http:
            async with http.get(f"{ready['url']}/v1/metadata", ssl=trust) as response:
                revision = (await response.json())["revision"]
            parked = asyncio.create_task(
                _get(http, f"{ready['url']}/v1/metadata?since={revision}&wait_ms=60000", trust)
            )
            await asyncio.sleep(0.2)
            await _get(http, f"{ready['url']}/v1/metadata", trust)  # asked later, so that the other one is parked
            process.send_signal(signal.SIGTERM)
            assert (await asyncio.wait_for(parked, SOON_S))["revision"] == revision
            assert await asyncio.wait_for(process.wait(), SOON_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _get(http: aiohttp.ClientSession, url: str, trust: ssl.SSLContext) -> Any:
    async with http.get(url, ssl=trust) as response:
        return await response.json()


@pytest.mark.process
async def test_wrong_settings_are_told_by_name_and_precedence_is_flags_environment_file(tmp_path: Path) -> None:
    wrong = await program("--data-dir", str(tmp_path), "--port", "99999")
    _, stderr = await wrong.communicate()
    assert wrong.returncode == 2
    assert b"port: Input should be less than or equal to 65535" in stderr
    contradiction = await program("--data-dir", str(tmp_path), "--fence-ms", "600")
    _, stderr = await contradiction.communicate()
    assert contradiction.returncode == 2
    assert b"fence_ms" in stderr
    file = tmp_path / "c.toml"
    file.write_text('data_dir = "/from-file"\nmoves_max = 1\nprobe_ms = 101\nhosts = ["a", "b"]\n')
    shown = await program(
        "--config",
        str(file),
        "--moves-max",
        "3",
        "--print-config",
        env={"FERRYLINE_COORDINATOR_MOVES_MAX": "2", "FERRYLINE_COORDINATOR_PROBE_MS": "102"},
    )
    stdout, _ = await shown.communicate()
    assert shown.returncode == 0
    lines = stdout.decode().splitlines()
    assert {"moves_max = 3", "probe_ms = 102", 'data_dir = "/from-file"', 'hosts = ["a", "b"]'} <= set(lines)
    file.write_text("no_such_setting = 1\n")
    unknown = await program("--config", str(file), "--data-dir", str(tmp_path))
    _, stderr = await unknown.communicate()
    assert unknown.returncode == 2
    assert b"no_such_setting" in stderr


@pytest.mark.process
async def test_a_second_program_on_the_same_directory_is_refused(running: Coordinator) -> None:
    process = await program("--data-dir", str(running.config.data_dir), "--port", "0")
    _, stderr = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert b"in use by another coordinator" in stderr
    assert running.driver.serving


@pytest.mark.process
async def test_certificates_are_shown(running: Coordinator) -> None:
    process = await program("certs", "show", "--json", "--data-dir", str(running.config.data_dir))
    stdout, _ = await process.communicate()
    shown = json.loads(stdout)
    assert [Path(c["file"]).name for c in shown] == ["ca.crt", "coordinator.crt"]
    assert running.driver.state.cluster is not None
    assert f"coordinator.{running.driver.state.cluster.cluster_id}" in shown[1]["names"]


@pytest.mark.process
async def test_a_key_that_the_program_made_opens_what_the_access_file_says_and_sighup_reads_it_again(
    tmp_path: Path, eventually: Any
) -> None:
    made, _ = await (await program("key")).communicate()
    key, line = made.decode().splitlines()
    access = tmp_path / "access.toml"
    text = f'[[principals]]\nname = "p"\n{line}\ncomment = "%s"\n'
    access.write_text(text % "one")
    process = await program("--data-dir", str(tmp_path / "d"), "--port", "0", "--access", str(access))
    try:
        assert process.stdout is not None
        ready = json.loads((await asyncio.wait_for(process.stdout.readline(), 60)).decode().removeprefix("READY "))
        trust = ssl.create_default_context(cafile=str(tmp_path / "d" / "tls" / "ca.crt"))

        async def revision() -> int:
            headers = {"Authorization": f"Bearer {key}"}
            async with http.get(f"{ready['url']}/v1/whoami", ssl=trust, headers=headers) as response:
                return int((await response.json())["revision"])

        async def changed() -> bool:
            return await revision() > before

        async with aiohttp.ClientSession() as http:
            before = await revision()
            stamp = access.stat()
            access.write_text(text % "two")  # as large and as old as before: nobody sees that it is another one
            os.utime(access, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            process.send_signal(signal.SIGHUP)
            await eventually(changed, within_s=20)
        assert process.returncode is None
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.process
async def test_a_wrong_access_file_is_told_at_the_start(tmp_path: Path) -> None:
    access = tmp_path / "access.toml"
    access.write_text('[[principals]]\nname = "a b"\n')
    process = await program("--data-dir", str(tmp_path / "d"), "--port", "0", "--access", str(access))
    _, stderr = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 2
    assert b"access.toml: principals.0.name: 'a b' does not match" in stderr
