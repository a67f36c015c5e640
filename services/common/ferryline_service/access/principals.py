"""Principals of a policy: who shows an API key or a verified token, and what they are granted. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ferryline.protocol.access import AccessPolicy, ClaimRule, IssuerMeta, KeyMeta, PrincipalMeta, Quota
from ferryline.protocol.errors import BadCredentials
from ferryline_service.access.caller import Caller
from ferryline_service.access.keys import proves, split_key


class Verified(Protocol):
    """What a JWT says, once it is believed. ``name``: of the principal, with that of the issuer in front."""

    @property
    def issuer(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def claims(self) -> Mapping[str, Any]: ...

    @property
    def expires_ms(self) -> int: ...


class Principals:
    """One policy, indexed. Callers by key are made once and kept: they remember what was decided."""

    def __init__(self, policy: AccessPolicy) -> None:
        self._policy = policy
        self._by_name = {principal.name: principal for principal in policy.principals}
        self._keys = {key.id: (principal, key) for principal in policy.principals for key in principal.keys}
        self._callers: dict[str, Caller] = {}  # by key id

    def by_key(self, token: str, now_ms: int) -> Caller:
        """Whoever shows this key. Raises BadCredentials."""
        key_id, secret = split_key(token)
        found = self._keys.get(key_id)
        # An unknown id costs what a known one costs. That there is none is no secret, but need not be told for free.
        proved = proves(secret, found[1].digest if found is not None else bytes(32))
        if found is None or not proved:
            raise BadCredentials("the API key is unknown here, or was removed")
        principal, key = found
        if principal.disabled:
            raise BadCredentials(f"principal {principal.name} is disabled", principal=principal.name)
        if key.expires_ms and now_ms >= key.expires_ms:
            raise BadCredentials("the API key has expired", key=key.id, expires_ms=key.expires_ms)
        return self._of_key(principal, key)

    def by_token(self, verified: Verified) -> Caller:
        """Whoever shows a token that was verified. Raises BadCredentials."""
        name = verified.name
        principal = self._by_name.get(name)
        if principal is not None and principal.disabled:
            raise BadCredentials(f"principal {name} is disabled", principal=name)
        rules = [rule for rule in self._policy.rules if rule.issuer == verified.issuer and _matches(rule, verified)]
        grants = [grant for rule in rules for grant in rule.grants]
        quota = next((rule.quota for rule in rules if rule.quota != Quota()), Quota())
        if principal is not None:
            grants = [*principal.grants, *grants]
            quota = principal.quota if principal.quota != Quota() else quota
        return Caller(name, grants, quota, expires_ms=verified.expires_ms, verified=verified)

    def again(self, caller: Caller, former: Principals) -> Caller | None:
        """The same caller under this policy, who came in under a ``former`` one; None if what was shown then would not
        be believed now."""
        if caller.service or not caller.name:
            return None  # came in before anything was checked
        if caller.verified is not None:
            issuer = self._issuer(caller.verified.issuer)
            if issuer is None or issuer != former._issuer(caller.verified.issuer):
                return None
            try:
                return self.by_token(caller.verified)
            except BadCredentials:
                return None
        principal, key = self._keys.get(caller.key_id, (None, None))
        if principal is None or key is None or principal.disabled or principal.name != caller.name:
            return None
        _, known = former._keys.get(caller.key_id, (None, None))
        if known is None or known.digest != key.digest:
            return None
        return self._of_key(principal, key)

    def _issuer(self, name: str) -> IssuerMeta | None:
        return next((issuer for issuer in self._policy.issuers if issuer.name == name), None)

    def _of_key(self, principal: PrincipalMeta, key: KeyMeta) -> Caller:
        caller = self._callers.get(key.id)
        if caller is None:
            caller = self._callers[key.id] = Caller(
                principal.name, principal.grants, principal.quota, expires_ms=key.expires_ms, key_id=key.id
            )
        return caller


def _matches(rule: ClaimRule, verified: Verified) -> bool:
    """Whether the claim is the value, or a list that holds it. Numbers and truth compare as they are written."""
    claim = verified.claims.get(rule.claim)
    values = claim if isinstance(claim, list) else [claim]
    return any(_text(value) == rule.value for value in values)


def _text(value: object) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int) else None
