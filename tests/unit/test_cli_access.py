"""Grants and quotas as people write them, and what `up --auth` keeps on this machine."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path

import pytest

from ferryline.access_admin import with_grants, without_grants
from ferryline.cli import up_auth
from ferryline.cli.failures import Failed
from ferryline.cli.grants import parse_grants, parse_quota, show_grant, show_quota
from ferryline.cli.settings import UsageError
from ferryline.cli.up_auth import LocalAuth, known_token, save_context
from ferryline.protocol.access import Grant, Quota
from ferryline_coordinator.access_file import parse_access


def test_options_become_one_grant_for_each_thing() -> None:
    found = parse_grants(["topic:orders.*", "group:billing,group:audit"], ["topic:orders.*"], ["cluster"])
    assert found == (
        Grant("topic", "orders.*", ("read", "write")),
        Grant("group", "billing", ("read",)),
        Grant("group", "audit", ("read",)),
        Grant("cluster", "*", ("manage",)),
    )
    assert [show_grant(grant) for grant in found[::3]] == ["read+write topic:orders.*", "manage cluster"]


@pytest.mark.parametrize(
    "text", ["orders", "topic", "topic:", ":x", "queue:x", "topic:a b", "topic:*x", "cluster:x", ""]
)
def test_what_is_no_grant_is_refused_with_what_would_be_one(text: str) -> None:
    with pytest.raises(UsageError, match=r"topic:NAME|pattern|one cluster"):
        parse_grants([text], None, None)


def test_granting_adds_and_revoking_takes_away_exactly_what_is_named() -> None:
    present = (Grant("topic", "a*", ("read",)), Grant("topic", "b", ("read", "write")))
    more = with_grants(present, [Grant("topic", "a*", ("write",)), Grant("group", "g", ("read",))])
    assert more == (
        Grant("topic", "a*", ("read", "write")),
        Grant("topic", "b", ("read", "write")),
        Grant("group", "g", ("read",)),
    )
    assert without_grants(more, [Grant("topic", "b", ("read", "write")), Grant("topic", "a*", ("read",))]) == (
        Grant("topic", "a*", ("write",)),
        Grant("group", "g", ("read",)),
    )
    assert without_grants(present, [Grant("topic", "ab", ("read",))]) == present, "a name within a prefix is not it"


def test_a_quota_is_read_shown_and_changed_in_part() -> None:
    quota = parse_quota("records=1000, bytes=1MB,stored_bytes=10GiB")
    assert quota == Quota(records=1000, bytes=1_000_000, stored_bytes=10 * 2**30)
    assert show_quota(quota) == "records=1000/s, bytes=976.6 KiB/s, stored_bytes=10 GiB"
    assert parse_quota("records=0,connections=5,bytes=unlimited", quota) == Quota(
        connections=5, stored_bytes=10 * 2**30
    )
    assert show_quota(Quota()) == ""
    for wrong in ("records", "speed=1", "records=-1", "records=1k", "bytes=lots", "", "records=1,"):
        with pytest.raises(UsageError):
            parse_quota(wrong)


def test_the_access_file_of_a_local_cluster_is_valid_as_written_and_with_its_examples_in_force(tmp_path: Path) -> None:
    access = LocalAuth(tmp_path)
    assert access.prepare() == ["--access", str(access.access_file), "--bootstrap-admin", str(access.key_file)]
    assert stat.S_IMODE(access.access_file.stat().st_mode) == 0o600
    text = access.access_file.read_text()
    assert parse_access(text.encode()).enabled
    lines = [line.removeprefix("# ") if _is_toml(line) else "" for line in text.splitlines()]
    found = parse_access("\n".join(lines[_first_top(lines) :] + lines[: _first_top(lines)]).encode())
    assert (len(found.principals), len(found.issuers), len(found.rules)) == (1, 1, 1)
    assert (found.open_metrics, found.redis_url) == (True, "redis://127.0.0.1:6379/0")
    access.access_file.write_text("open_metrics = true\n")
    access.prepare()
    assert access.access_file.read_text() == "open_metrics = true\n", "what somebody wrote there is left alone"


def _is_toml(line: str) -> bool:
    """A commented line that is meant to be taken over, not to be read."""
    text = line.removeprefix("# ")
    return text.startswith(("[[", "    {", "]")) or (" = " in text and text.split(" = ")[0].replace("_", "").isalpha())


def _first_top(lines: list[str]) -> int:
    """Where the settings of the file itself begin, which TOML wants before any table."""
    return next(number for number, line in enumerate(lines) if line.startswith("open_metrics"))


def test_the_key_is_kept_in_a_context_that_is_used_and_that_nobody_else_can_read(tmp_path: Path) -> None:
    file, ca = tmp_path / "config.toml", tmp_path / "ca.crt"
    saved = save_context("local", file, "https://a:1,https://b:2", ca, "fl_x_y")
    assert (saved.name, saved.current) == ("local", True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = tomllib.loads(file.read_text())
    assert content["contexts"]["local"] == {"url": ["https://a:1", "https://b:2"], "ca": str(ca), "token": "fl_x_y"}
    assert known_token("local", file, ca) == "fl_x_y"
    assert known_token("local", file, tmp_path / "other.crt") == "", "not the token of another cluster"
    assert known_token("other", file, ca) == ""


def test_another_clusters_context_is_neither_overwritten_nor_left(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('current = "staging"\n[contexts.staging]\nurl = "https://s:1"\nca = "/s.crt"\ntoken = "t"\n')
    with pytest.raises(Failed, match="another cluster's"):
        save_context("staging", file, "https://a:1", tmp_path / "ca.crt", "fl_x_y")
    saved = save_context("local", file, "https://a:1", tmp_path / "ca.crt", "fl_x_y")
    assert not saved.current
    assert tomllib.loads(file.read_text())["contexts"]["staging"]["token"] == "t"


def test_a_key_that_is_nowhere_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up_auth, "KEY_WAIT_S", 0.0)
    access = LocalAuth(tmp_path)
    with pytest.raises(Failed) as failed:
        access.key("")
    assert "ferryline-coordinator key" in failed.value.remedy
    assert access.key("fl_known_key") == "fl_known_key"
    access.key_file.write_text("fl_a_b\n")
    assert access.key("fl_known_key") == "fl_a_b"
