"""Principals in the coordinator's core: commands and refusals, the policy that is made of them, and who is told."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from ferryline.protocol.access import (
    CLUSTER,
    GRANTS_MAX,
    KEYS_MAX,
    MANAGE,
    READ,
    TOPIC,
    AccessPolicy,
    Grant,
    KeyMeta,
    PrincipalMeta,
    Quota,
)
from ferryline.protocol.errors import (
    Conflict,
    FerrylineError,
    InvalidArgument,
    NotFound,
    PrincipalExists,
    Throttled,
    UnknownPrincipal,
    UnsupportedVersion,
    VersionConflict,
)
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import Register, RegisterOk
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.records import decode_record, encode_record, record_key
from unit.coordinator_bench import Bench

ROOT = PrincipalMeta("root", (Grant(CLUSTER, "*", (MANAGE,)),))
FILE = AccessPolicy(enabled=True, principals=(ROOT,))
ORDERS = Grant(TOPIC, "orders*", (READ,))


def key(number: int, created_ms: int = 1, expires_ms: int = 0) -> KeyMeta:
    return KeyMeta(f"{number:016x}", bytes([number]) * 32, created_ms, expires_ms)


def bench_with(file: AccessPolicy = FILE, **settings: Any) -> Bench:
    bench = Bench(2, CoreConfig(access=file, **settings))
    bench.send(ev.AccessFileRead(file))
    return bench


@pytest.fixture
def bench() -> Bench:
    """A cluster with access on and one principal, billing."""
    bench = bench_with()
    bench.ask(ev.PrincipalCreated, "billing", (ORDERS,))
    return bench


def told(bench: Bench) -> AccessPolicy:
    """The latest policy, which the coordinator itself and each broker were told alike."""
    ours = [effect.policy for effect in bench.effects if isinstance(effect, ev.AccessChanged)]
    tells = [effect for effect in bench.effects if isinstance(effect, ev.Tell) and effect.kind == Kind.ACCESS]
    assert {tell.broker_id for tell in tells if tell.message == ours[-1]} == {1, 2}
    return ours[-1]


# -- the policy -------------------------------------------------------------------------------------


def test_the_policy_joins_the_file_and_the_records(bench: Bench) -> None:
    policy = told(bench)
    assert policy.enabled
    assert [principal.name for principal in policy.principals] == ["root", "billing"]
    assert policy.principals[1] == PrincipalMeta("billing", (ORDERS,), version=1)


def test_each_change_raises_the_revision_and_is_told_once_it_is_durable(bench: Bench) -> None:
    before = told(bench).revision
    steps = [
        (ev.KeyAdded, "billing", key(1)),
        (ev.PrincipalAltered, "billing", None, Quota(records=5), True, "note"),
        (ev.KeyRemoved, "billing", key(1).id),
        (ev.PrincipalDeleted, "billing"),
    ]
    for step, (kind, *fields) in enumerate(steps, 1):
        bench.ask(kind, *fields)
        assert told(bench).revision == before + step == bench.state.cluster.access_revision
    assert [principal.name for principal in told(bench).principals] == ["root"]


def test_the_revision_rises_over_restarts_and_so_does_a_changed_file(bench: Bench) -> None:
    before = told(bench)
    bench.restart()
    bench.send(ev.AccessFileRead(FILE))
    again = [effect.policy for effect in bench.effects if isinstance(effect, ev.AccessChanged)][-1]
    assert again == replace(before, revision=before.revision + 1)
    other = replace(FILE, open_metrics=True)
    bench.send(ev.AccessFileRead(other))
    latest = [effect.policy for effect in bench.effects if isinstance(effect, ev.AccessChanged)][-1]
    assert (latest.open_metrics, latest.revision) == (True, again.revision + 1)


def test_a_broker_that_registers_gets_the_policy_or_none_while_access_is_off(bench: Bench) -> None:
    bench.ask(ev.KeyAdded, "billing", key(1))
    assert registered(bench).access == told(bench)
    assert registered(Bench(2)).access is None


def test_a_broker_that_would_ask_nobody_is_not_registered_while_access_is_on(bench: Bench) -> None:
    older = Register(1, "s-1", 9, "clean", "https://x", "https://x", 0, feature_level=1)
    for benched in (bench, Bench(2)):
        benched.state.cluster = replace(benched.state.cluster, feature_level=1)
        if benched is bench:
            with pytest.raises(UnsupportedVersion, match="access is on"):
                benched.ask(ev.RegisterReceived, benched.brokers[1].session, older)
        else:
            benched.ask(ev.RegisterReceived, benched.brokers[1].session, older)


def registered(bench: Bench) -> Any:
    bench.start(1)
    answers = [effect.message for effect in bench.effects if isinstance(effect, ev.Reply)]
    return [answer for answer in answers if isinstance(answer, RegisterOk)][-1]


def test_what_the_file_declares_goes_before_a_record_of_the_same_name(bench: Bench) -> None:
    declared = PrincipalMeta("billing", (Grant(TOPIC, "x", (READ,)),))
    bench.send(ev.AccessFileRead(replace(FILE, principals=(ROOT, declared))))
    assert told(bench).principals == (ROOT, declared)
    for kind, *fields in [
        (ev.PrincipalAltered, "billing", (), None),
        (ev.PrincipalDeleted, "billing"),
        (ev.KeyAdded, "billing", key(1)),
        (ev.KeyRemoved, "billing", key(1).id),
    ]:
        with pytest.raises(Conflict, match="declared in the access file"):
            bench.ask(kind, *fields)
    bench.send(ev.AccessFileRead(FILE))
    assert told(bench).principals[1].grants == (ORDERS,)  # the record was only covered


def test_records_of_principals_outlive_a_restart_and_read_as_they_were_written(bench: Bench) -> None:
    bench.ask(ev.KeyAdded, "billing", key(7, 5, 9))
    before = dict(bench.state.principals)
    bench.restart()
    assert bench.state.principals == before
    principal = before["billing"]
    assert decode_record(record_key(principal), encode_record(principal)) == principal
    assert record_key(principal) == "principal/billing"


def test_principals_are_no_metadata(bench: Bench) -> None:
    before = bench.state.revision
    bench.ask(ev.PrincipalCreated, "other")
    assert bench.state.revision == before


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "refusal", "told_of"),
    [
        (ev.PrincipalCreated, ("billing",), PrincipalExists, "exists"),
        (ev.PrincipalCreated, ("root",), PrincipalExists, "access file"),
        (ev.PrincipalCreated, ("a b",), InvalidArgument, "name:"),
        (ev.PrincipalCreated, ("",), InvalidArgument, "name:"),
        (ev.PrincipalCreated, ("p", (Grant("queue", "*", (READ,)),)), InvalidArgument, r"grants\.0\.resource"),
        (ev.PrincipalCreated, ("p", (ORDERS, Grant(TOPIC, "a*b", (READ,)))), InvalidArgument, r"grants\.1\.pattern"),
        (ev.PrincipalCreated, ("p", (ORDERS,) * (GRANTS_MAX + 1)), InvalidArgument, f"limit of {GRANTS_MAX}"),
        (ev.PrincipalCreated, ("p", (), Quota(bytes=-1)), InvalidArgument, r"quota\.bytes"),
        (ev.PrincipalCreated, ("p", (), Quota(records=2**60)), InvalidArgument, r"quota\.records"),
        (ev.PrincipalCreated, ("p", (), Quota(), False, "x" * 501), InvalidArgument, "comment"),
        (ev.PrincipalCreated, ("p", (), Quota(), False, "a\nb"), InvalidArgument, "comment"),
        (ev.PrincipalAltered, ("nobody",), UnknownPrincipal, "does not exist"),
        (ev.PrincipalAltered, ("billing", None, None, True, None, 7), VersionConflict, "has 1, not 7"),
        (ev.PrincipalAltered, ("billing", (Grant(TOPIC, "", (READ,)),)), InvalidArgument, "pattern"),
        (ev.PrincipalDeleted, ("nobody",), UnknownPrincipal, "does not exist"),
        (ev.PrincipalDeleted, ("billing", 2), VersionConflict, "has 1, not 2"),
        (ev.KeyAdded, ("nobody", key(1)), UnknownPrincipal, "does not exist"),
        (ev.KeyAdded, ("billing", key(1, 10, 10)), InvalidArgument, "expires_ms"),
        (ev.KeyRemoved, ("billing", "0" * 16), NotFound, "no key"),
    ],
)
def test_a_refused_command_changes_nothing(
    bench: Bench, kind: Any, fields: tuple[Any, ...], refusal: type[FerrylineError], told_of: str
) -> None:
    before, rows = told(bench), dict(bench.rows)
    with pytest.raises(refusal, match=told_of):
        bench.ask(kind, *fields)
    assert (told(bench), bench.rows) == (before, rows)


def test_a_principal_has_no_more_keys_than_it_may(bench: Bench) -> None:
    for number in range(KEYS_MAX):
        bench.ask(ev.KeyAdded, "billing", key(number))
    with pytest.raises(Throttled, match=str(KEYS_MAX)):
        bench.ask(ev.KeyAdded, "billing", key(99))


def test_an_id_of_a_key_is_given_once(bench: Bench) -> None:
    bench.ask(ev.PrincipalCreated, "other")
    bench.ask(ev.KeyAdded, "billing", key(1))
    with pytest.raises(Conflict, match="already"):
        bench.ask(ev.KeyAdded, "other", key(1))


def test_a_policy_too_large_for_a_frame_is_refused_and_forgotten() -> None:
    bench = bench_with(access_bytes_max=400)
    bench.ask(ev.PrincipalCreated, "a")
    with pytest.raises(Throttled, match="of 400"):
        bench.ask(ev.PrincipalCreated, "b", (ORDERS,) * 30)
    bench.ask(ev.PrincipalCreated, "c")
    assert [principal.name for principal in told(bench).principals] == ["root", "a", "c"]


def test_nobody_prepares_principals_while_everybody_may_do_everything() -> None:
    bench = Bench(1)
    with pytest.raises(Conflict, match="access is off"):
        bench.ask(ev.PrincipalCreated, "mallory", (Grant(CLUSTER, "*", (MANAGE,)),))


def test_principals_of_a_backup_count_at_once(bench: Bench) -> None:
    brought = PrincipalMeta("from.backup", (ORDERS,), keys=(key(3),), version=4)
    bench.ask(ev.RestoreBegun, {record_key(brought): encode_record(brought)}, {})
    assert told(bench).principals[-1] == brought
    assert told(bench).revision == bench.state.cluster.access_revision
