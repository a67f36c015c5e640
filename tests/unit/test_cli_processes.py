"""The runner of local processes, with small programs in the place of services."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ferryline.cli.processes import LocalCluster, ProcessFailed, Service, free_port, port_is_free

READY = 'print(\'READY {"url": "https://127.0.0.1:7", "broker_id": 3}\', flush=True)\n'
STAY = "import time\nwhile True: time.sleep(0.05)\n"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[[str], Service]]:
    """A service whose program is the given text."""
    made: list[Service] = []

    def make(program: str) -> Service:
        (tmp_path / "code").mkdir(exist_ok=True)
        (tmp_path / "code" / f"program{len(made)}.py").write_text(textwrap.dedent(program))
        one = Service(f"service-{len(made)}", f"program{len(made)}", tmp_path / f"run{len(made)}", 7, [])
        made.append(one)
        return one

    yield make
    for one in made:
        if one.process is not None:
            one.send_signal(signal.SIGKILL)
            one.process.wait()


def spawn(one: Service) -> None:
    one.spawn({**os.environ, "PYTHONPATH": str(one.folder.parent / "code")}, signal.SIGKILL)


def test_a_service_is_ready_when_it_says_so(service: Any, eventually_blocking: Any) -> None:
    one = service(READY + STAY)
    spawn(one)
    eventually_blocking(one.read_ready, what="READY")
    assert (one.url, one.ready["broker_id"], one.running) == ("https://127.0.0.1:7", 3, True)


def test_the_ready_line_of_an_earlier_life_does_not_count(service: Any, eventually_blocking: Any) -> None:
    one = service("import os, time\nif not os.path.exists('again'): open('again', 'w'); " + READY + STAY)
    spawn(one)
    eventually_blocking(one.read_ready, what="READY")
    one.send_signal(signal.SIGKILL)
    assert one.process is not None
    one.process.wait()
    spawn(one)
    assert not one.read_ready()
    assert not one.read_ready()


def test_a_service_that_ends_at_once_is_told_with_its_last_words(service: Any, eventually_blocking: Any) -> None:
    one = service("raise SystemExit('the disk is on fire')")
    spawn(one)

    def failed() -> str:
        try:
            one.read_ready()
        except ProcessFailed as error:
            return str(error)
        return ""

    text = eventually_blocking(failed, what="failure")
    assert "status 1" in text
    assert "the disk is on fire" in text


def test_signals_never_reach_a_process_that_has_ended(service: Any) -> None:
    one = service("")
    spawn(one)
    assert one.process is not None
    one.process.wait()
    one.send_signal(signal.SIGKILL)  # would raise ProcessLookupError, or worse: hit whoever has the pid now
    assert not one.running


def test_children_die_with_whoever_started_them(tmp_path: Path, eventually_blocking: Any) -> None:
    (tmp_path / "stay.py").write_text(READY + STAY)
    program = f"""
        import os, signal
        from pathlib import Path
        from ferryline.cli.processes import Service
        one = Service("stay", "stay", Path({str(tmp_path / "run")!r}), 7, [])
        one.spawn({{**os.environ, "PYTHONPATH": {str(tmp_path)!r}}}, signal.SIGKILL)
        while not one.read_ready(): pass
        print(one.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    eventually_blocking(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", what="end")


def test_ports_are_picked_once_and_outside_the_ephemeral_range(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, brokers=5)
    ports = [one.port for one in cluster.services.values()]
    assert len(set(ports)) == 6
    assert all(20_000 <= port < 32_000 for port in ports)
    assert all(port_is_free(port) for port in ports)
    assert free_port(set(ports)) not in ports


def test_a_cluster_gives_every_broker_its_own_folder_and_the_same_coordinator(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, brokers=2, port=8443, broker_port=9443)
    assert cluster.brokers == ["broker-1", "broker-2"]
    assert [cluster.services[name].port for name in cluster.brokers] == [9443, 9444]
    for name in cluster.brokers:
        args = cluster.services[name].args
        assert args[args.index("--coordinator") + 1] == "https://127.0.0.1:8443"
        assert args[args.index("--data-root") + 1] == str(tmp_path / name / "data")
        assert args[args.index("--ca-file") + 1] == str(cluster.ca)
    assert cluster.add_broker() == "broker-3"


def test_settings_of_the_client_do_not_leak_into_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRYLINE_TOKEN", "secret")
    monkeypatch.setenv("FERRYLINE_BROKER_LOG_LEVEL", "debug")
    env = LocalCluster(tmp_path, env={"FERRYLINE_SABOTAGE": "x"})._env
    assert "FERRYLINE_TOKEN" not in env
    assert (env["FERRYLINE_BROKER_LOG_LEVEL"], env["FERRYLINE_SABOTAGE"]) == ("debug", "x")
