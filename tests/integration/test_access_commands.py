"""`ferryline principal`, `token` and `audit`, and `client.admin` behind them, against a real cluster with access on."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import ferryline as fl
from ferryline import sync
from ferryline.cli.app import run
from ferryline.cli.processes import LocalCluster
from ferryline.cli.up_auth import LocalAuth
from tests.polling import poll_blocking

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
KEY = re.compile(r"\Afl_[0-9a-f]{16}_[\w-]{43}\n\Z")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    root = tmp_path_factory.mktemp("access")
    made = LocalCluster(root, brokers=2, coordinator_args=LocalAuth(root).prepare())
    made.start()
    yield made
    made.kill_all()


@pytest.fixture(scope="module")
def admin(cluster: LocalCluster) -> str:
    return LocalAuth(cluster.root).key("")


@pytest.fixture(scope="module")
def ferryline(cluster: LocalCluster, admin: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a command line as `admin`, or with another token; the exit status must be the expected one.

    In this process, because starting Python takes longer than most commands; what reads stdin gets one of its own.
    """
    home = tmp_path_factory.mktemp("home")

    def go(*args: str, status: int = 0, token: str = admin, stdin: str | None = None, **more: str) -> Done:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
        clean |= {"HOME": str(home), "FERRYLINE_HOME": str(home / "data"), "COLUMNS": "200", "NO_COLOR": "1"}
        clean |= {"FERRYLINE_URL": cluster.url, "FERRYLINE_CA": str(cluster.ca), "FERRYLINE_TOKEN": token, **more}
        done = _here(args, clean) if stdin is None else _apart(args, clean, stdin)
        assert done.returncode == status, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return go


def _here(args: tuple[str, ...], env: dict[str, str]) -> Done:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with mock.patch.dict(os.environ, env, clear=True), redirect_stdout(out), redirect_stderr(err):
        try:
            run(args)
        except SystemExit as ended:
            code = ended.code
    shown, told = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return Done(args, code if isinstance(code, int) else 1, shown, told)


def _apart(args: tuple[str, ...], env: dict[str, str], stdin: str) -> Done:
    command = [sys.executable, "-m", "ferryline.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=90, check=False, input=stdin)


def as_json(done: Done) -> Any:
    return json.loads(done.stdout)


def test_a_principal_may_do_what_it_was_granted_and_nothing_else(ferryline: Run) -> None:
    ferryline("topic", "create", "granted", "-p", "1")
    ferryline("topic", "create", "private", "-p", "1")
    done = ferryline("principal", "create", "shop", "--write", "topic:granted", "--key")
    assert KEY.match(done.stdout), "a key alone on stdout: it can be piped"
    assert "shown this once" in done.stderr
    key = done.stdout.strip()
    ferryline("produce", "granted", token=key, stdin="hello\n")  # at once: brokers know the key already
    assert "FORBIDDEN" in ferryline("produce", "private", token=key, stdin="x\n", status=4).stderr
    assert "FORBIDDEN" in ferryline("consume", "granted", "--from", "start", "--count", "1", token=key, status=4).stderr
    assert "FORBIDDEN" in ferryline("principal", "list", token=key, status=4).stderr
    assert "FORBIDDEN" in ferryline("audit", token=key, status=4).stderr
    ferryline("principal", "grant", "shop", "--read", "topic:gran*")
    assert ferryline("consume", "granted", "--from", "start", "--count", "1", token=key).stdout == "hello\n"


def test_principals_are_listed_shown_changed_and_deleted(ferryline: Run) -> None:
    made = as_json(
        ferryline("principal", "create", "invoicing", "--read", "topic:o.*,group:b", "--manage", "exchange:x",
                  "--quota", "records=1000,bytes=1MB", "--comment", "the invoices", "-o", "json")
    )  # fmt: skip
    assert made["grants"] == ["read topic:o.*", "read group:b", "manage exchange:x"]
    assert (made["quota"], made["keys"], made["comment"]) == ("records=1000/s, bytes=976.6 KiB/s", 0, "the invoices")
    assert "invoicing" in ferryline("principal", "list").stdout
    assert "PRINCIPAL_EXISTS" in ferryline("principal", "create", "invoicing", status=1).stderr

    assert (
        "would be left with" in ferryline("principal", "revoke", "invoicing", "--read", "group:b", "--dry-run").stdout
    )
    assert len(as_json(ferryline("principal", "show", "invoicing", "-o", "json"))["grants"]) == 3
    assert "group" not in ferryline("principal", "revoke", "invoicing", "--read", "group:b").stdout
    assert "was not granted" in ferryline("principal", "revoke", "invoicing", "--read", "topic:o", status=2).stderr
    assert "records=5/s" in ferryline("principal", "alter", "invoicing", "--quota", "records=5,bytes=0").stdout
    shown = as_json(ferryline("principal", "show", "invoicing", "-o", "json"))
    assert (shown["quota"], shown["comment"], shown["key_list"]) == ("records=5/s", "the invoices", [])

    assert "dry run" in ferryline("principal", "delete", "invoicing", "--dry-run").stdout
    ferryline("principal", "show", "invoicing")
    ferryline("principal", "delete", "invoicing", "--yes")
    assert "UNKNOWN_PRINCIPAL" in ferryline("principal", "show", "invoicing", status=3).stderr
    ferryline("principal", "grant", "invoicing", status=2)
    ferryline("principal", "alter", "invoicing", status=2)


def test_keys_are_made_listed_rotated_and_revoked(ferryline: Run, cluster: LocalCluster, tmp_path: Path) -> None:
    ferryline("principal", "create", "robot", "--read", "cluster")
    first = ferryline("token", "create", "robot", "--expires", "90d").stdout.strip()
    listed = as_json(ferryline("token", "list", "robot", "-o", "json"))
    assert [row["id"] for row in listed] == [first.split("_")[1]]
    assert listed[0]["expires"] != "never"
    secret = first.split("_", 2)[2]
    assert secret not in ferryline("token", "list", "robot", "-o", "json").stdout

    rotated = ferryline("token", "rotate", "robot")
    second = rotated.stdout.strip()
    assert f"token revoke robot {first.split('_')[1]}" in rotated.stderr
    for key in (first, second):
        assert as_json(ferryline("whoami", "-o", "json", token=key))["principal"] == "robot"

    assert "dry run" in ferryline("token", "revoke", "robot", first, "--dry-run").stdout
    ferryline("whoami", token=first)
    ferryline("token", "revoke", "robot", first, "--yes")  # the key itself names it, too
    assert "BAD_CREDENTIALS" in ferryline("whoami", token=first, status=4).stderr
    assert second.split("_")[1] in ferryline("token", "revoke", "robot", "00", "--yes", status=3).stderr
    assert "at least a second" in ferryline("token", "create", "robot", "--expires", "10ms", status=2).stderr

    config = tmp_path / "config.toml"
    env = {"FERRYLINE_CONFIG": str(config), "FERRYLINE_CONTEXT": "here"}
    ferryline("token", "create", "robot", "--save", status=2)
    config.write_text(f'[contexts.here]\nurl = "{cluster.url}"\ntoken = "{second}"\n')
    third = ferryline("token", "rotate", "robot", "--save", "--revoke-old", **env).stdout.strip()
    assert third in config.read_text()
    assert [row["id"] for row in as_json(ferryline("token", "list", "robot", "-o", "json"))] == [third.split("_")[1]]
    assert "BAD_CREDENTIALS" in ferryline("whoami", token=second, status=4).stderr


def test_a_disabled_principal_is_refused_everywhere_and_its_sessions_end(
    cluster: LocalCluster, admin: str, ferryline: Run
) -> None:
    ferryline("topic", "create", "doors", "-p", "1")
    key = ferryline("principal", "create", "guest", "--write", "topic:doors", "--key").stdout.strip()
    with (
        sync.connect(cluster.url, ca=cluster.ca, token=key) as guest,
        guest.producer(linger=0, delivery_timeout=2.0) as producer,
    ):
        producer.send("doors", b"1")
        ferryline("principal", "disable", "guest")

        def is_refused() -> bool:
            try:
                producer.send("doors", b"2")
            except fl.errors.FerrylineError:
                return True
            return False

        poll_blocking(is_refused, within_s=30, what="the session that was open is ended")
    assert "BAD_CREDENTIALS" in ferryline("topic", "list", token=key, status=4).stderr
    ferryline("principal", "enable", "guest")
    ferryline("topic", "list", token=key)


def test_the_audit_log_tells_of_every_service(ferryline: Run, cluster: LocalCluster, admin: str) -> None:
    ferryline("topic", "create", "watched", "-p", "2")
    with sync.connect(cluster.url, ca=cluster.ca, token=admin) as client:
        with client.producer() as producer:
            producer.send("watched", b"1")
        with client.receiver("watched", group="media") as receiver:
            next(iter(receiver)).ack()
    key = ferryline("principal", "create", "thief", "--read", "topic:nothing", "--key").stdout.strip()
    ferryline("produce", "watched", token=key, stdin="x\n", status=4)
    ferryline("queue", "pause", "watched", "media")
    rows = [json.loads(line) for line in ferryline("audit", "-o", "ndjson", "--count", "500").stdout.splitlines()]
    found = [(row["principal"], row["action"], row["resource"], row["name"], row["outcome"]) for row in rows]
    assert ("operator", "bootstrap_admin", "principal", "admin", "done") in found
    assert ("admin", "create_topic", "topic", "watched", "done") in found
    assert ("admin", "queue_pause", "group", "media/watched", "done") in found
    assert ("thief", "produce", "topic", "watched", "refused") in found
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    assert {row["service"] for row in rows} >= {"coordinator", "broker-1", "broker-2"}
    only = [json.loads(line) for line in ferryline("audit", "-o", "ndjson", "--outcome", "refused").stdout.splitlines()]
    assert only
    assert {row["outcome"] for row in only} == {"refused"}
    mine = ferryline("audit", "-o", "json", "--principal", "thief", "--coordinator")
    assert {row["principal"] for row in as_json(mine)} <= {"thief"}
    assert "UNKNOWN_BROKER" in ferryline("audit", "--broker", "99", status=3).stderr
    assert "expected" not in ferryline("audit", "--outcome", "maybe", status=2).stdout
    ferryline("audit", "--broker", "1", "--coordinator", status=2)
    ferryline("audit", "--follow", "-o", "json", status=2)


def test_followed_the_audit_log_shows_what_happens_from_now_on(
    cluster: LocalCluster, admin: str, ferryline: Run, eventually_blocking: Any, tmp_path: Path
) -> None:
    shown = tmp_path / "shown"
    env = {**os.environ, "FERRYLINE_URL": cluster.url, "FERRYLINE_CA": str(cluster.ca), "FERRYLINE_TOKEN": admin}
    command = [sys.executable, "-m", "ferryline.cli", "audit", "--follow", "--coordinator", "-o", "ndjson"]
    with shown.open("w") as out:
        follower = subprocess.Popen(command, stdout=out, env=env)
    try:
        eventually_blocking(lambda: "bootstrap_admin" in shown.read_text(), within_s=30, what="what there was")
        ferryline("exchange", "create", "followed", "--type", "fanout")
        eventually_blocking(lambda: '"followed"' in shown.read_text(), within_s=30, what="what came then")
        actions = [json.loads(line)["seq"] for line in shown.read_text().splitlines()]
        assert actions == sorted(set(actions)), "each once"
    finally:
        follower.kill()
        follower.wait()


def test_the_commands_of_docs_security_do_what_stands_there(ferryline: Run) -> None:
    lines = [
        line.strip() for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("    ferry")
    ]
    typed = [shlex.split(line, comments=True)[1:] for line in lines]
    assert len(typed) == 6
    ferryline("principal", "create", "billing")
    old = ferryline("token", "create", "billing").stdout.split("_")[1]
    for args in typed:
        if "--follow" in args:
            continue  # for ever; another test follows
        known = [old if arg == "3f9a1c0de4b7a210" else arg for arg in args]
        ferryline(*known, *(["--yes"] if "revoke" in args else []))
    assert old not in ferryline("token", "list", "billing").stdout


def test_without_await_it_is_the_same(cluster: LocalCluster, admin: str) -> None:
    with sync.connect(cluster.url, ca=cluster.ca, token=admin) as client:
        made = client.admin.create_principal("plain", [fl.Grant("topic", "p*", ("read",))], quota=fl.Quota(records=5))
        assert (made.grants, made.quota.records, made.version) == ((fl.Grant("topic", "p*", ("read",)),), 5, 1)
        with pytest.raises(fl.errors.VersionConflict):
            client.admin.alter_principal("plain", disabled=True, version=7)
        key = client.admin.create_key("plain", expires=3600)
        with sync.connect(cluster.url, ca=cluster.ca, token=key.key) as other:
            me = other.admin.whoami()
            assert (me.principal, me.by, me.key, me.expires_ms) == ("plain", "key", key.id, key.expires_ms)
            with pytest.raises(fl.errors.Forbidden):
                other.admin.list_principals()
        client.admin.delete_key("plain", key.id)
        with pytest.raises(fl.errors.NotFound):
            client.admin.delete_key("plain", key.id)
        with pytest.raises(fl.errors.InvalidArgument):
            client.admin.alter_principal("plain")
        client.admin.delete_principal("plain")
        assert "plain" not in [one.name for one in client.admin.list_principals()]
        page = client.admin.audit("0", limit=1)
        assert (len(page.records), page.more) == (1, True)
