"""The program as a whole: help, global options, exit statuses, start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ferryline.cli import failures
from ferryline.cli.app import COMMANDS, build, hoist
from ferryline.cli.output import to_yaml
from ferryline.protocol import errors

CLOSED_PORT = "https://127.0.0.1:1"  # port 1 needs root and nobody listens there


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run the program with a home of its own."""

    def go(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
        clean |= {"HOME": str(tmp_path), "FERRYLINE_HOME": str(tmp_path / "data"), "COLUMNS": "120", **env}
        clean.pop("XDG_CONFIG_HOME", None)
        return subprocess.run(
            [sys.executable, "-m", "ferryline.cli", *args],
            input=stdin,
            capture_output=True,
            text=True,
            env=clean,
            timeout=60,
            check=False,
        )

    return go


@pytest.mark.parametrize("noun", ["", *COMMANDS])
def test_help_of_every_command_explains_it(run, noun: str) -> None:  # type: ignore[no-untyped-def]
    done = run(*([noun] if noun else []), "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: ferryline" in done.stdout
    if noun:
        assert len(done.stdout) > 300


def test_help_lists_every_command_with_its_line(run) -> None:  # type: ignore[no-untyped-def]
    listed = run("--help").stdout
    for name, (_, _, line) in COMMANDS.items():
        assert name in listed
        assert line.rstrip(".").split(":")[0][:30] in listed


def test_help_is_quick_because_it_imports_no_network_client() -> None:
    program = "import sys; sys.argv = ['ferryline', '--help']\nfrom ferryline.cli import main\ntry:\n    main()\n"
    program += (
        "except SystemExit: pass\nprint([m for m in ('aiohttp', 'uvloop', 'aiokafka', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_module_of_the_table_exists() -> None:
    assert build("*").registered_commands


@pytest.mark.parametrize(
    ("line", "hoisted", "noun"),
    [
        ("topic list --url U -o json", "--url U -o json topic list", "topic"),
        ("produce t --key --url=U", "--url=U produce t --key", "produce"),
        ("produce t -- --url U", "produce t -- --url U", "produce"),
        ("--verbose", "--verbose", ""),
        ("consume t --timeout 3 --verbose --count 1", "--timeout 3 --verbose consume t --count 1", "consume"),
        ("topic list --url", "--url topic list", "topic"),
    ],
)
def test_global_options_may_stand_anywhere(line: str, hoisted: str, noun: str) -> None:
    assert hoist(line.split()) == (hoisted.split(), noun)


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (("nonsense",), 2, "nonsense"),
        (("topic", "nonsense"), 2, "nonsense"),
        (("cluster", "health", "--output", "xml"), 2, "xml"),
        (("cluster", "health", "--url", "ftp://x"), 2, "ftp://x"),
        (("cluster", "health", "--context", "nowhere"), 2, "nowhere"),
        (("produce", "t", "-f", "%k", "--key-field", "a"), 2, "cannot be combined"),
        (("bench", "everything"), 2, "everything"),
        (("certs", "show", "--ca", "/no/such/file"), 3, "/no/such/file"),
        (("context", "use", "nowhere"), 3, "nowhere"),
        (("doctor", "--url", CLOSED_PORT), 5, "no server can be used"),
        (("cluster", "health", "--url", CLOSED_PORT, "--timeout", "0.5"), 5, "CONNECTION_FAILED"),
    ],
)
def test_failures_end_with_their_status_and_say_why(run, args: tuple[str, ...], status: int, says: str) -> None:  # type: ignore[no-untyped-def]
    done = run(*args)
    assert done.returncode == status, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_come_from_file_then_environment_then_flags(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run("context", "add", "one", "--url", "https://one:1", "--ca", str(tmp_path / "ca.crt")).returncode == 0
    assert run("context", "add", "two", "--url", "https://two:2", "--token", "secret").returncode == 0

    def shown(*args: str, **env: str) -> dict[str, dict[str, str]]:
        done = run("--print-config", "-o", "json", *args, **env)
        assert done.returncode == 0, done.stderr
        found: dict[str, dict[str, str]] = json.loads(done.stdout)
        return found

    assert shown()["url"] == {"value": ["https://two:2"], "from": "context two"}
    assert shown()["token"] == {"value": "(set)", "from": "context two"}
    assert shown("--context", "one")["ca"]["value"] == str(tmp_path / "ca.crt")
    elsewhere = shown(FERRYLINE_URL="https://three:3")
    assert elsewhere["url"] == {"value": ["https://three:3"], "from": "FERRYLINE_URL"}
    assert elsewhere["token"]["value"] == "(none)", "a token of one cluster must not go to another"
    assert shown("--url", "https://4:4", FERRYLINE_URL="https://3:3")["url"]["value"] == ["https://4:4"]
    assert run("context", "use", "one").returncode == 0
    assert "one" in run("context", "show").stdout
    assert run("context", "remove", "one").returncode == 0
    listed = json.loads(run("context", "list", "-o", "json").stdout)
    assert [entry["name"] for entry in listed] == ["two"]


def test_a_config_file_that_is_no_toml_is_named_and_can_be_mended(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / ".config" / "ferryline" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text("current = [broken")
    done = run("cluster", "health")
    assert done.returncode == 2
    assert str(path) in done.stderr


def test_the_file_with_the_token_is_for_its_owner_only(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run("context", "add", "x", "--url", "https://x", "--token", 'quo"te\\and\nnewline')
    path = tmp_path / ".config" / "ferryline" / "config.toml"
    assert path.stat().st_mode & 0o077 == 0
    assert run("--print-config").returncode == 0


def test_exit_statuses_follow_the_error_tree() -> None:
    expected = {
        errors.UnknownTopic: 3,
        errors.OffsetOutOfRange: 3,
        errors.Forbidden: 4,
        errors.InvalidName: 2,
        errors.NotEnoughReplicas: 5,
        errors.ConnectionFailed: 5,
        errors.OutcomeUnknown: 5,
        errors.TopicExists: 1,
        errors.InternalError: 1,
    }
    assert {kind: failures.exit_status(kind()) for kind in expected} == expected


def test_yaml_is_what_a_yaml_reader_would_expect() -> None:
    value = {"name": "a: b", "list": [1, {"x": None}], "empty": [], "odd key": True}
    assert to_yaml(value) == 'name: "a: b"\nlist:\n  - 1\n  -\n    x: null\nempty: []\n"odd key": true\n'
