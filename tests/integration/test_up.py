"""`ferryline up`: starts, brings back what ends, stops cleanly on Ctrl-C, and finds its data again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.process


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], dict[str, Any]]]]:
    """Start `ferryline up` and return it with what it printed."""
    started: list[subprocess.Popen[str]] = []
    env = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
    env |= {"HOME": str(tmp_path), "NO_COLOR": "1"}

    def start(*args: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        command = [
            sys.executable,
            "-m",
            "ferryline.cli",
            "up",
            "--data-dir",
            str(tmp_path / "data"),
            *args,
            "-o",
            "json",
        ]
        errors = (tmp_path / "stderr").open("a")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        errors.close()
        started.append(process)
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if line == "}\n":
                return process, json.loads(text)
        raise AssertionError(f"it ended: {process.wait()} {(tmp_path / 'stderr').read_text()}")

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def cli(found: dict[str, Any], *args: str, stdin: str = "") -> str:
    env = {**os.environ, "FERRYLINE_URL": found["url"], "FERRYLINE_CA": found["ca"]}
    return subprocess.run(
        [sys.executable, "-m", "ferryline.cli", *args],
        input=stdin,
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        check=True,
    ).stdout


@pytest.mark.timeout(180)
def test_a_cluster_comes_up_heals_stops_on_ctrl_c_and_keeps_its_data(
    up: Any, eventually_blocking: Any, tmp_path: Path
) -> None:
    process, found = up("--brokers", "2", "--port", "0")
    assert len(found["services"]) == 3
    assert Path(found["ca"]).exists()
    cli(found, "topic", "create", "kept", "-p", "2")
    cli(found, "produce", "kept", stdin="hello\n")

    broker = found["services"][1]
    os.kill(broker["pid"], signal.SIGKILL)
    eventually_blocking(
        lambda: "is back" in (tmp_path / "stderr").read_text(), within_s=30, what="the broker is started again"
    )
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not any(child.is_running() and child.status() != "zombie" for child in children)

    _, found = up("--brokers", "2", "--port", "0")
    assert cli(found, "consume", "kept", "--from", "start", "--exit") == "hello\n"


# What FalconQ's own README tells its users to type, but for the texts; the address stands for the gateway's.
FALCONQ_README = """
curl -X POST http://localhost:8080/topic/orders/publish \\
  -H "Content-Type: application/json" \\
  -d '{"message": "a refund 🔥", "priority": "high"}'
curl -X POST http://localhost:8080/topic/orders/publish \\
  -H "Content-Type: application/json" \\
  -d '{"message": "an order", "priority": "low"}'
curl "http://localhost:8080/topic/orders/consume?consumerID=worker1&batch=1"
curl "http://localhost:8080/topic/orders/peek?offset=0&batch=5"
curl http://localhost:8080/topics
curl http://localhost:8080/topics/orders/partitions
"""


def falconq_readme(url: str) -> list[Any]:
    """The answer to each command."""
    script = FALCONQ_README.replace("http://localhost:8080", url).replace("curl ", "echo; curl --fail --silent ")
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line]


@pytest.mark.timeout(180)
def test_falconq_is_served_when_it_is_asked_for_and_started_again(
    up: Any, eventually_blocking: Any, tmp_path: Path
) -> None:
    process, found = up("--brokers", "1", "--port", "0", "--falconq")
    (gateway,) = [service for service in found["services"] if service["service"] == "falconq"]

    def ask(path: str, body: str | None = None) -> Any:
        data = None if body is None else body.encode()
        with urllib.request.urlopen(gateway["url"] + path, data=data, timeout=30) as response:
            return json.loads(response.read())

    if shutil.which("curl"):
        *_, consumed, peeked, topics, partitions = falconq_readme(gateway["url"])
        assert [one["message"] for one in consumed["messages"]] == ["a refund 🔥"]
        assert [one["message"] for one in peeked["messages"]] == ["a refund 🔥", "an order"]
        assert "orders" in json.dumps(topics)
        assert len(partitions["partitions"]) == 1
    for number in range(2):
        ask("/topic/kept/publish", json.dumps({"message": number}))
    assert [one["message"] for one in ask("/topic/kept/consume?consumerID=c&batch=1")["messages"]] == [0]
    os.kill(gateway["pid"], signal.SIGKILL)
    eventually_blocking(
        lambda: "falconq is back" in (tmp_path / "stderr").read_text(), within_s=30, what="it is started again"
    )
    again = [one["message"] for one in ask("/topic/kept/consume?consumerID=c&batch=1")["messages"]]
    if again == [0]:  # it was killed before it had noted that the answer was out: repeated, not skipped
        again = [one["message"] for one in ask("/topic/kept/consume?consumerID=c&batch=1")["messages"]]
    assert again == [1]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    _, found = up("--brokers", "1", "--port", "0")
    assert "falconq" not in [service["service"] for service in found["services"]], "it is off by default"


@pytest.mark.timeout(240)
def test_with_auth_nobody_gets_in_without_a_token_and_commands_here_have_one(
    up: Any, eventually_blocking: Any, tmp_path: Path
) -> None:
    """1. The first start makes an access file, a key and a context; FalconQ's gateway has a principal of its own.
    2. A later one goes on, also when the key's file was taken away.
    3. Without --auth it says that everybody may do everything."""
    process, found = up("--brokers", "1", "--port", "0", "--auth", "--falconq")
    access, config = tmp_path / "data", tmp_path / ".config" / "ferryline" / "config.toml"
    assert [path.stat().st_mode & 0o777 for path in (access / "admin-key", access / "access.toml", config)] == [
        0o600
    ] * 3
    own = {"HOME": str(tmp_path), "NO_COLOR": "1"}

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
        command = [sys.executable, "-m", "ferryline.cli", *args]
        env = {**clean, **own, **env}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    assert run("topic", "list").returncode == 0, "the context is in use: neither address nor token was given"
    stranger = run("topic", "list", FERRYLINE_URL=found["url"], FERRYLINE_CA=found["ca"])
    assert (stranger.returncode, "BAD_CREDENTIALS" in stranger.stderr) == (4, True)
    (gateway,) = [service for service in found["services"] if service["service"] == "falconq"]
    data = json.dumps({"message": "hi"}).encode()
    with urllib.request.urlopen(gateway["url"] + "/topic/kept/publish", data=data, timeout=30) as response:
        assert response.status == 201
    arguments = psutil.Process(gateway["pid"]).cmdline()
    assert not any("fl_" in argument for argument in arguments), "everybody on the machine can read those"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0

    (access / "admin-key").unlink()
    process, _ = up("--brokers", "1", "--port", "0", "--auth", "--falconq")
    names = [one["name"] for one in json.loads(run("principal", "list", "-o", "json").stdout)]
    assert names == ["admin", "falconq"]
    assert len(json.loads(run("token", "list", "falconq", "-o", "json").stdout)) == 1, "its key is used again"
    assert not (access / "admin-key").exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0

    _, found = up("--brokers", "1", "--port", "0")
    assert "access control is OFF this time" in (tmp_path / "stderr").read_text()
    assert run("topic", "list", FERRYLINE_URL=found["url"], FERRYLINE_CA=found["ca"]).returncode == 0


def test_a_port_in_use_is_refused_before_anything_starts(up: Any, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AssertionError, match="PORT_IN_USE"):
            up("--port", str(taken.getsockname()[1]))
    assert not (tmp_path / "data" / "coordinator").exists()
