"""Principals of a policy: what tokens of issuers are granted, and who stays in when the policy changes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from ferryline.protocol.access import (
    CLUSTER,
    MANAGE,
    READ,
    TOPIC,
    WRITE,
    AccessPolicy,
    ClaimRule,
    Grant,
    IssuerMeta,
    KeyMeta,
    PrincipalMeta,
    Quota,
)
from ferryline.protocol.errors import BadCredentials
from ferryline_service.access.caller import NOBODY, UNCHECKED, Caller
from ferryline_service.access.jwt_rules import Verified
from ferryline_service.access.keys import ID_BYTES, SECRET_BYTES, digest, make_key, proves, split_key
from ferryline_service.access.principals import Principals

KEY, KEY_ID, KEY_DIGEST = make_key(bytes(range(ID_BYTES + SECRET_BYTES)))
ISSUER = IssuerMeta("sso", "https://sso.test", "ferryline")


def rule(claim: str, value: str, *grants: Grant, quota: Quota | None = None, issuer: str = "sso") -> ClaimRule:
    return ClaimRule(issuer, claim, value, grants, quota or Quota())


def topic(pattern: str, *actions: str) -> Grant:
    return Grant(TOPIC, pattern, actions)


def verified(name: str = "sso:ann", issuer: str = "sso", **claims: Any) -> Verified:
    return Verified(issuer, name, claims, 1_000)


def policy(*rules: ClaimRule, principals: tuple[PrincipalMeta, ...] = ()) -> AccessPolicy:
    return AccessPolicy(1, True, principals, (ISSUER,), rules)


def keyed(**changed: Any) -> PrincipalMeta:
    return replace(PrincipalMeta("p", (topic("a", READ),), keys=(KeyMeta(KEY_ID, KEY_DIGEST),)), **changed)


# -- tokens of issuers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "value", "fits"),
    [
        ("eng", "eng", True),
        (["ops", "eng"], "eng", True),
        ([], "eng", False),
        (["engineering"], "eng", False),
        ("eng,ops", "eng", False),
        (True, "true", True),
        (False, "true", False),
        (1, "1", True),
        (True, "1", False),
        (None, "None", False),
        ({"eng": 1}, "eng", False),
        ([["eng"]], "eng", False),
    ],
)
def test_a_rule_fits_a_claim_that_is_its_value_or_holds_it(claim: Any, value: str, fits: bool) -> None:
    principals = Principals(policy(rule("groups", value, topic("*", WRITE))))
    assert principals.by_token(verified(groups=claim)).may(WRITE, TOPIC, "x") is fits


def test_grants_of_all_rules_and_of_the_principal_are_added_up() -> None:
    ann = PrincipalMeta("sso:ann", (topic("own", WRITE),))
    rules = (rule("g", "a", topic("a", READ)), rule("g", "b", topic("b", READ)), rule("g", "c", topic("c", READ)))
    caller = Principals(policy(*rules, principals=(ann,))).by_token(verified(g=["a", "b"]))
    assert [caller.may(READ, TOPIC, name) for name in ("a", "b", "c")] == [True, True, False]
    assert caller.may(WRITE, TOPIC, "own")
    assert (caller.name, caller.expires_ms) == ("sso:ann", 1_000)


def test_a_rule_of_another_issuer_grants_nothing() -> None:
    caller = Principals(policy(rule("g", "a", topic("*", READ), issuer="other"))).by_token(verified(g="a"))
    assert not caller.may(READ, TOPIC, "x")
    assert caller.grants == ()


def test_the_quota_is_the_principals_or_that_of_the_first_rule_that_sets_one() -> None:
    rules = (rule("g", "a"), rule("g", "a", quota=Quota(records=1)), rule("g", "a", quota=Quota(records=2)))
    assert Principals(policy(*rules)).by_token(verified(g="a")).quota == Quota(records=1)
    ann = PrincipalMeta("sso:ann", quota=Quota(bytes=9))
    assert Principals(policy(*rules, principals=(ann,))).by_token(verified(g="a")).quota == Quota(bytes=9)
    assert Principals(policy(*rules)).by_token(verified()).quota == Quota()


def test_a_disabled_principal_of_an_issuer_is_refused() -> None:
    ann = PrincipalMeta("sso:ann", disabled=True)
    with pytest.raises(BadCredentials, match="disabled"):
        Principals(policy(principals=(ann,))).by_token(verified())


# -- keys -------------------------------------------------------------------------------------------


@given(st.binary(min_size=ID_BYTES + SECRET_BYTES, max_size=ID_BYTES + SECRET_BYTES))
def test_a_key_proves_itself_and_nothing_else_does(random: bytes) -> None:
    key, key_id, stored = make_key(random)
    assert split_key(key)[0] == key_id
    secret = split_key(key)[1]
    assert proves(secret, stored)
    other = ("A" if secret[0] != "A" else "B") + secret[1:]
    assert not proves(other, stored)
    assert secret not in repr(stored)


@given(st.text(max_size=80) | st.from_regex(r"fl_[0-9a-f]{14,18}_[A-Za-z0-9_-]{40,46}", fullmatch=True))
def test_what_is_no_key_is_refused_without_being_repeated(text: str) -> None:
    told = ""
    try:
        key_id, secret = split_key(text)
    except BadCredentials as error:
        told = error.message
    else:
        assert text == f"fl_{key_id}_{secret}"
    assert len(text) < 12 or text not in told


def test_a_key_is_good_until_it_expires() -> None:
    principals = Principals(policy(principals=(keyed(keys=(KeyMeta(KEY_ID, KEY_DIGEST, 1, 500),)),)))
    assert principals.by_key(KEY, 499).expires_ms == 500
    with pytest.raises(BadCredentials, match="expired"):
        principals.by_key(KEY, 500)


# -- a policy after another one ---------------------------------------------------------------------


def test_a_caller_with_a_key_gets_what_the_next_policy_grants() -> None:
    former = Principals(policy(principals=(keyed(),)))
    caller = former.by_key(KEY, 0)
    again = Principals(policy(principals=(keyed(grants=(topic("b", READ),)),))).again(caller, former)
    assert again is not None
    assert (again.may(READ, TOPIC, "a"), again.may(READ, TOPIC, "b")) == (False, True)


@pytest.mark.parametrize(
    "changed",
    [
        (),
        (keyed(disabled=True),),
        (keyed(keys=()),),
        (keyed(name="q"),),
        (keyed(keys=(KeyMeta(KEY_ID, digest("another")),)),),
    ],
)
def test_a_caller_is_out_when_its_key_is_not_what_it_was(changed: tuple[PrincipalMeta, ...]) -> None:
    former = Principals(policy(principals=(keyed(),)))
    caller = former.by_key(KEY, 0)
    assert Principals(policy(principals=changed)).again(caller, former) is None


def test_a_caller_with_a_token_is_out_when_its_issuer_is_not_what_it_was() -> None:
    before = policy(rule("g", "a", topic("a", READ)))
    former = Principals(before)
    caller = former.by_token(verified(g="a"))
    same = Principals(replace(before, rules=(rule("g", "a", topic("b", READ)),))).again(caller, former)
    assert same is not None
    assert (same.may(READ, TOPIC, "a"), same.may(READ, TOPIC, "b")) == (False, True)
    for issuers in ((), (replace(ISSUER, audience="other"),), (replace(ISSUER, algorithms=("ES256",)),)):
        assert Principals(replace(before, issuers=issuers)).again(caller, former) is None
    disabled = replace(before, principals=(PrincipalMeta("sso:ann", disabled=True),))
    assert Principals(disabled).again(caller, former) is None


def test_who_came_in_unasked_is_out_when_everybody_is_asked() -> None:
    former = Principals(AccessPolicy())
    assert Principals(policy()).again(UNCHECKED, former) is None
    assert Principals(policy()).again(NOBODY, former) is None


# -- decisions --------------------------------------------------------------------------------------

NAMES = st.text("ab.*", max_size=4)
GRANTS = st.builds(
    Grant,
    st.sampled_from([TOPIC, CLUSTER]),
    st.text("ab.", max_size=3) | st.text("ab.", max_size=3).map(lambda text: text + "*"),
    st.lists(st.sampled_from([READ, WRITE, MANAGE]), max_size=2).map(tuple),
)


@given(st.lists(GRANTS, max_size=4), st.sampled_from([READ, WRITE, MANAGE]), st.sampled_from([TOPIC, CLUSTER]), NAMES)
def test_what_no_grant_allows_is_denied_and_asking_again_changes_nothing(
    grants: list[Grant], action: str, resource: str, name: str
) -> None:
    caller = Caller("p", grants)
    allowed = any(
        grant.resource == resource
        and (action in grant.actions or MANAGE in grant.actions)
        and (name.startswith(grant.pattern[:-1]) if grant.pattern.endswith("*") else name == grant.pattern)
        for grant in grants
    )
    assert [caller.may(action, resource, name) for _ in range(3)] == [allowed] * 3


def test_remembered_answers_are_bounded() -> None:
    caller = Caller("p", (topic("a*", READ),))
    for number in range(25_000):
        assert caller.may(READ, TOPIC, f"a{number}")
    assert len(caller._answers) <= 10_000
