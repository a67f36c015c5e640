"""The access file: what operators decide in advance. TOML in, the file's part of a policy out, or an error that names
the field and its limit.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from ferryline.protocol.access import (
    ALGORITHMS,
    ISSUERS_MAX,
    KEYS_MAX,
    PRINCIPALS_MAX,
    RULES_MAX,
    AccessPolicy,
    ClaimRule,
    IssuerMeta,
    KeyMeta,
    PrincipalMeta,
    check_principal,
)
from ferryline.protocol.errors import InvalidRequest
from ferryline.protocol.frames import encode_value
from ferryline_coordinator.core.principals import check_comment, check_grants, check_quota
from ferryline_coordinator.models import Body
from ferryline_coordinator.models_access import GrantIn, QuotaIn

FILE_BYTES_MAX = 1024 * 1024
POLICY_BYTES_MAX = 512 * 1024  # encoded: with as much as records may hold, it must still fit into one frame
TEXT_MAX = 500
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class AccessFileError(ValueError):
    """The file cannot be read, or says what makes no sense."""


class KeyIn(Body):
    """An API key that was made before, by ``ferryline-coordinator key``."""

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the secret, in hex")
    expires_ms: int = Field(0, ge=0, le=2**53)


class PrincipalIn(Body):
    name: str
    grants: list[GrantIn] = []
    quota: QuotaIn = QuotaIn()
    keys: list[KeyIn] = Field([], max_length=KEYS_MAX)
    disabled: bool = False
    comment: str = ""


class IssuerIn(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,60}$", description="begins the names of its principals")
    issuer: str = Field(max_length=TEXT_MAX, description="exactly as `iss` in its tokens")
    audience: str = Field(min_length=1, max_length=TEXT_MAX, description="that must be among `aud`")
    algorithms: list[str] = Field(list(ALGORITHMS), min_length=1)
    jwks_url: str = Field("", max_length=TEXT_MAX)
    name_claim: str = Field("sub", min_length=1, max_length=TEXT_MAX)
    ca: str = Field("", max_length=TEXT_MAX)
    leeway_ms: int = Field(30_000, ge=0, le=300_000)
    client_id: str = Field("", max_length=TEXT_MAX)
    scopes: list[str] = Field([], max_length=20)
    client_secret: str = Field("", max_length=TEXT_MAX, description="told to everybody who logs in: no secret")


class RuleIn(Body):
    issuer: str
    claim: str = Field(min_length=1, max_length=TEXT_MAX)
    value: str = Field(min_length=1, max_length=TEXT_MAX)
    grants: list[GrantIn] = []
    quota: QuotaIn = QuotaIn()


class AccessFile(Body):
    """All of it. ``open_metrics``: /metrics without a token."""

    principals: list[PrincipalIn] = Field([], max_length=PRINCIPALS_MAX)
    issuers: list[IssuerIn] = Field([], max_length=ISSUERS_MAX)
    rules: list[RuleIn] = Field([], max_length=RULES_MAX)
    redis_url: str = Field("", max_length=TEXT_MAX)
    open_metrics: bool = False


def read_access(path: Path) -> AccessPolicy:
    """The file's part of the policy. Raises AccessFileError."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise AccessFileError(f"{path}: {error.strerror}") from None
    if len(raw) > FILE_BYTES_MAX:
        raise AccessFileError(f"{path}: over the limit of {FILE_BYTES_MAX} bytes")
    try:
        return parse_access(raw)
    except AccessFileError as error:
        raise AccessFileError(f"{path}: {error}") from None


def parse_access(raw: bytes) -> AccessPolicy:
    """Raises AccessFileError, naming the first field that is wrong."""
    try:
        found = AccessFile.model_validate(tomllib.loads(raw.decode()))
        policy = _policy(found)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise AccessFileError(f"not TOML: {str(error)[:200]}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise AccessFileError(f"{field}: {first['msg']}") from None
    except InvalidRequest as error:
        raise AccessFileError(error.message) from None
    size = len(encode_value(policy))
    if size > POLICY_BYTES_MAX:
        raise AccessFileError(f"all of it takes {size} bytes, of {POLICY_BYTES_MAX}; make principals over REST instead")
    return policy


# -- inside -----------------------------------------------------------------------------------------


def _policy(file: AccessFile) -> AccessPolicy:
    issuers = tuple(_issuer(issuer, f"issuers.{number}") for number, issuer in enumerate(file.issuers))
    principals = tuple(
        _principal(principal, f"principals.{number}") for number, principal in enumerate(file.principals)
    )
    names = {issuer.name for issuer in issuers}
    rules = tuple(_rule(rule, names, f"rules.{number}") for number, rule in enumerate(file.rules))
    _distinct((issuer.name for issuer in issuers), "issuers", "name")
    _distinct((issuer.issuer for issuer in issuers), "issuers", "issuer")
    _distinct((principal.name for principal in principals), "principals", "name")
    _distinct((key.id for principal in principals for key in principal.keys), "principals", "keys.id")
    if file.redis_url and urlsplit(file.redis_url).scheme not in ("redis", "rediss", "unix"):
        raise AccessFileError("redis_url: expected redis://, rediss:// or unix://")
    return AccessPolicy(0, True, principals, issuers, rules, file.redis_url, file.open_metrics)


def _issuer(issuer: IssuerIn, field: str) -> IssuerMeta:
    for algorithm in issuer.algorithms:
        if algorithm not in ALGORITHMS:
            raise AccessFileError(f"{field}.algorithms: {algorithm[:40]!r} is none of {', '.join(ALGORITHMS)}")
    for name in ("issuer", "jwks_url"):
        url = getattr(issuer, name)
        if url or name == "issuer":
            _check_url(url, f"{field}.{name}")
    given: dict[str, Any] = issuer.model_dump()
    given.update(algorithms=tuple(issuer.algorithms), scopes=tuple(issuer.scopes))
    return IssuerMeta(**given)


def _check_url(url: str, field: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise AccessFileError(f"{field}: {url[:200]!r} is no https URL")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise AccessFileError(f"{field}: {url[:200]!r} would fetch keys in clear; use https")


def _principal(principal: PrincipalIn, field: str) -> PrincipalMeta:
    keys = tuple(KeyMeta(key.id, bytes.fromhex(key.sha256), 0, key.expires_ms) for key in principal.keys)
    return PrincipalMeta(
        check_principal(principal.name, f"{field}.name"),
        check_grants((grant.meta() for grant in principal.grants), f"{field}.grants"),
        check_quota(principal.quota.meta(), f"{field}.quota"),
        keys,
        principal.disabled,
        0,
        check_comment(principal.comment),
    )


def _rule(rule: RuleIn, issuers: set[str], field: str) -> ClaimRule:
    if rule.issuer not in issuers:
        raise AccessFileError(f"{field}.issuer: {rule.issuer[:60]!r} is none of the issuers of this file")
    grants = check_grants((grant.meta() for grant in rule.grants), f"{field}.grants")
    return ClaimRule(rule.issuer, rule.claim, rule.value, grants, check_quota(rule.quota.meta(), f"{field}.quota"))


def _distinct(names: Iterable[str], where: str, field: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise AccessFileError(f"{where}: two have the {field} {name!r}")
        seen.add(name)
