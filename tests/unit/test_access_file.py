"""The access file: what it may say, what is said about mistakes, and how changes of it arrive."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferryline.protocol.access import CLUSTER, MANAGE, READ, TOPIC, WRITE, AccessPolicy, Grant, Quota
from ferryline_coordinator.access_file import FILE_BYTES_MAX, AccessFileError, parse_access, read_access
from ferryline_coordinator.access_watch import AccessWatch

ROOT = Path(__file__).resolve().parents[2]
ISSUER = '[[issuers]]\nname = "i"\nissuer = "https://i.test"\naudience = "a"\n'
PRINCIPAL = '[[principals]]\nname = "p"\n'


def test_the_example_is_a_good_file() -> None:
    policy = read_access(ROOT / "docs/access.example.toml")
    assert policy.enabled
    assert [principal.name for principal in policy.principals] == ["operator", "prometheus", "google:ann@example.org"]
    assert Grant(CLUSTER, "*", (MANAGE,)) in policy.principals[0].grants
    google = policy.issuers[0]
    assert (google.issuer, google.name_claim, google.algorithms) == ("https://accounts.google.com", "email", ("RS256",))
    rule = policy.rules[0]
    assert (rule.claim, rule.value, rule.quota) == ("hd", "example.org", Quota(requests=100, bytes=10_000_000))
    assert policy.principals[2].grants[0] == Grant(TOPIC, "orders.*", (READ, WRITE))


def test_an_empty_file_grants_nothing_to_nobody() -> None:
    assert parse_access(b"") == AccessPolicy(enabled=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("principals = 3", "principals: "),
        ("nonsense = 1", "nonsense: "),
        ("[[principals]]\n", "principals.0.name: "),
        ("a = ", "not TOML"),
        ('[[principals]]\nname = "a b"', "principals.0.name: "),
        (PRINCIPAL + 'grants = [{ resource = "queue", actions = ["read"] }]', "principals.0.grants.0.resource"),
        (PRINCIPAL + 'grants = [{ resource = "topic", pattern = "*x", actions = ["read"] }]', "grants.0.pattern"),
        (PRINCIPAL + 'grants = [{ resource = "topic", actions = ["delete"] }]', "grants.0.actions"),
        (PRINCIPAL + 'grants = [{ resource = "topic", actions = [] }]', "grants.0.actions"),
        (PRINCIPAL + 'grants = [{ resource = "cluster", pattern = "x", actions = ["read"] }]', "one cluster"),
        (PRINCIPAL + "quota = { records = -1 }", "principals.0.quota.records"),
        (PRINCIPAL + "quota = { record = 1 }", "principals.0.quota.record"),
        (PRINCIPAL + 'keys = [{ id = "X", sha256 = "00" }]', "principals.0.keys.0.id"),
        (PRINCIPAL + 'keys = [{ id = "0123456789abcdef", sha256 = "00" }]', "principals.0.keys.0.sha256"),
        (PRINCIPAL + PRINCIPAL, "principals: two have the name 'p'"),
        (PRINCIPAL + 'comment = "a\\nb"', "comment"),
        (ISSUER.replace("https", "http"), "issuers.0.issuer: 'http://i.test' would fetch keys in clear"),
        (ISSUER.replace("https://i.test", "i.test"), "issuers.0.issuer: 'i.test' is no https URL"),
        (ISSUER + 'algorithms = ["HS256"]', "issuers.0.algorithms: 'HS256' is none of"),
        (ISSUER + "algorithms = []", "issuers.0.algorithms"),
        (ISSUER.replace('"a"', '""'), "issuers.0.audience"),
        (ISSUER.replace('name = "i"', 'name = "i:j"'), "issuers.0.name"),
        (ISSUER + "leeway_ms = 300001", "issuers.0.leeway_ms"),
        (ISSUER + ISSUER, "two have the name 'i'"),
        (ISSUER + ISSUER.replace('"i"', '"j"'), "two have the issuer 'https://i.test'"),
        (ISSUER + '[[rules]]\nissuer = "j"\nclaim = "c"\nvalue = "v"', "rules.0.issuer: 'j' is none of"),
        (ISSUER + '[[rules]]\nissuer = "i"\nclaim = "c"\nvalue = ""', "rules.0.value"),
        ('redis_url = "http://x"', "redis_url"),
        (ISSUER * 21, "issuers: "),
        ("x" * FILE_BYTES_MAX, "not TOML"),
    ],
)
def test_a_mistake_is_told_with_its_place(text: str, told: str) -> None:
    with pytest.raises(AccessFileError) as refused:
        parse_access(text.encode())
    assert told in str(refused.value)


def test_what_would_not_fit_into_a_frame_is_refused() -> None:
    many = "".join(f'[[principals]]\nname = "p{number}"\ncomment = "{"x" * 500}"\n' for number in range(1_100))
    with pytest.raises(AccessFileError, match="of 524288"):
        parse_access(many.encode())


def test_a_file_that_is_not_there_or_is_no_text_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(AccessFileError, match=r"missing\.toml: No such file"):
        read_access(tmp_path / "missing.toml")
    (tmp_path / "raw.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(AccessFileError, match=r"raw\.toml: not TOML"):
        read_access(tmp_path / "raw.toml")


def test_a_changed_file_is_taken_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    path, taken = tmp_path / "access.toml", list[AccessPolicy]()
    path.write_text(PRINCIPAL)
    watch = AccessWatch(path)
    watch.take = taken.append
    watch.look()
    assert taken == []
    path.write_text(PRINCIPAL + "disabled = true\n")
    watch.look()
    assert [policy.principals[0].disabled for policy in taken] == [True]
    path.write_text("nonsense")
    watch.look()
    path.unlink()
    watch.look()
    assert len(taken) == 1
    assert watch.policy is taken[0]
    path.write_text(PRINCIPAL + "disabled = true\n\n")  # says the same
    watch.look()
    watch.reload()
    assert len(taken) == 1
    path.write_text(PRINCIPAL)
    watch.look()
    assert [policy.principals[0].disabled for policy in taken] == [True, False]


def test_a_bad_file_at_the_start_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "access.toml").write_text("nonsense")
    with pytest.raises(AccessFileError):
        AccessWatch(tmp_path / "access.toml")
