"""Who may do what: principals, grants, quotas, and the policy that the coordinator tells every broker.

A principal is whoever shows a token: an API key that the cluster made, or a JWT of a configured issuer. A grant allows
actions on resources of one type whose name fits a pattern; what no grant allows is denied:

    topic      read: fetch, receive, look     write: send            manage: create, change, delete
    group      read: join, commit, settle     -                      manage: pause, purge, redrive, reset, delete
    exchange   read: look                     -                      manage: create, bind, delete
    cluster    read: brokers, partitions,     -                      manage: drain, recover, repair, principals,
               metrics                                               audit log

``manage`` implies the other two; ``write`` does not imply ``read``. A receiver needs ``read`` on topic and group.
"""

from __future__ import annotations

import re

import msgspec

from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import check_name

READ, WRITE, MANAGE = "read", "write", "manage"
ACTIONS = (READ, WRITE, MANAGE)
TOPIC, GROUP, EXCHANGE, CLUSTER = "topic", "group", "exchange", "cluster"
RESOURCES = (TOPIC, GROUP, EXCHANGE, CLUSTER)

GRANTS_MAX = 200  # of one principal or rule; bounds what a decision costs
KEYS_MAX = 10  # of one principal: enough to change keys without a gap
PRINCIPALS_MAX = 10_000  # every broker keeps all of them
ISSUERS_MAX = 20
RULES_MAX = 200
ALGORITHMS = ("RS256", "ES256", "EdDSA")  # nothing symmetric: an issuer's public key must never verify as a secret
VERIFIED_MS_MAX = 300_000  # a verified token is believed for this long, at most until it expires
_PATTERN = re.compile(r"\A[A-Za-z0-9._-]{0,200}\*?\Z")
_PRINCIPAL = re.compile(r"\A[A-Za-z0-9._@:+-]{1,200}\Z")


class Grant(msgspec.Struct, array_like=True, frozen=True):
    """``pattern``: a name, a prefix with ``*`` at its end, or ``*``. The cluster has no names: ``*``."""

    resource: str
    pattern: str
    actions: tuple[str, ...]

    def allows(self, action: str, resource: str, name: str) -> bool:
        """Whether this grant alone allows it."""
        if resource != self.resource or not (action in self.actions or MANAGE in self.actions):
            return False
        if self.pattern.endswith("*"):
            return name.startswith(self.pattern[:-1])
        return name == self.pattern


class Quota(msgspec.Struct, array_like=True, frozen=True):
    """What a principal may use, 0 for no limit. Rates are per second over the whole cluster; ``connections``: sessions
    and streams open at one service; ``stored_bytes``: of the topics that the principal has created."""

    requests: int = 0
    records: int = 0
    bytes: int = 0
    connections: int = 0
    stored_bytes: int = 0


class KeyMeta(msgspec.Struct, array_like=True, frozen=True):
    """An API key without its secret. ``digest``: SHA-256 of the secret, which has 256 random bits: no salt, no slow
    hash is needed. ``expires_ms`` 0: never."""

    id: str
    digest: bytes
    created_ms: int = 0
    expires_ms: int = 0


class PrincipalMeta(msgspec.Struct, array_like=True, frozen=True):
    """A named principal. One of an issuer is named ``<issuer>:<name in the token>`` and needs no keys.

    ``version`` rises with every change.
    """

    name: str
    grants: tuple[Grant, ...] = ()
    quota: Quota = Quota()
    keys: tuple[KeyMeta, ...] = ()
    disabled: bool = False
    version: int = 0
    comment: str = ""


class IssuerMeta(msgspec.Struct, array_like=True, frozen=True):
    """An OIDC issuer whose JWTs are believed, as the operator configured it: nothing in a token names another one.

    ``name``: short, begins the names of its principals. ``jwks_url`` "": found through the issuer's discovery document.
    ``name_claim``: which claim names the principal. ``ca``: path of a CA file for its TLS, "" for the system's.
    ``client_id``, ``scopes`` and ``client_secret``: for `ferryline login`, which asks for them; "" where nobody logs in
    with this issuer. Some issuers want a secret of programs that cannot keep one; everybody is told it.
    """

    name: str
    issuer: str
    audience: str
    algorithms: tuple[str, ...] = ALGORITHMS
    jwks_url: str = ""
    name_claim: str = "sub"
    ca: str = ""
    leeway_ms: int = 30_000
    client_id: str = ""
    scopes: tuple[str, ...] = ()
    client_secret: str = ""


class ClaimRule(msgspec.Struct, array_like=True, frozen=True):
    """Grants (and, where one is set, the quota) for tokens of ``issuer`` whose ``claim`` is ``value`` or holds it."""

    issuer: str
    claim: str
    value: str
    grants: tuple[Grant, ...] = ()
    quota: Quota = Quota()


class AccessPolicy(msgspec.Struct, array_like=True, frozen=True):
    """All that a service needs to decide. Made by the coordinator of its config file and of what was stored since.

    ``enabled`` False: everybody may do everything, as without a config file. ``revision`` rises with every change.
    ``redis_url``: shares quotas and verified tokens between services; "" keeps both local. ``over``: principals whose
    topics hold more bytes than a quota that may be theirs, and the largest such: who has that or less may not write.
    """

    revision: int = 0
    enabled: bool = False
    principals: tuple[PrincipalMeta, ...] = ()
    issuers: tuple[IssuerMeta, ...] = ()
    rules: tuple[ClaimRule, ...] = ()
    redis_url: str = ""
    open_metrics: bool = False  # /metrics without a token
    over: tuple[tuple[str, int], ...] = ()


class StoredBytes(msgspec.Struct, array_like=True, frozen=True):
    """B -> C: what the topics of each owner hold in the partitions that this broker leads: (principal, bytes)."""

    broker_id: int
    broker_epoch: int
    owners: list[tuple[str, int]]


def check_principal(name: object, field: str = "principal") -> str:
    """Return ``name`` if it may name a principal. Raises InvalidArgument naming field and rule."""
    if not isinstance(name, str) or not _PRINCIPAL.match(name):
        shown = name[:64].encode("unicode_escape").decode() if isinstance(name, str) else type(name).__name__
        raise InvalidArgument(f"{field}: {shown!r} does not match [A-Za-z0-9._@:+-]{{1,200}}", field=field)
    return name


def check_grant(grant: Grant, field: str = "grants") -> Grant:
    """Return a grant that makes sense. Raises InvalidArgument naming the field and what is allowed."""
    if grant.resource not in RESOURCES:
        raise InvalidArgument(
            f"{field}.resource: {grant.resource[:40]!r} is none of {', '.join(RESOURCES)}", field=f"{field}.resource"
        )
    if not grant.actions:
        raise InvalidArgument(f"{field}.actions: at least one of {', '.join(ACTIONS)}", field=f"{field}.actions")
    for action in grant.actions:
        if action not in ACTIONS:
            raise InvalidArgument(
                f"{field}.actions: {action[:40]!r} is none of {', '.join(ACTIONS)}", field=f"{field}.actions"
            )
    if grant.resource == CLUSTER:
        if grant.pattern != "*":
            raise InvalidArgument(f"{field}.pattern: there is one cluster: '*'", field=f"{field}.pattern")
        return grant
    if not _PATTERN.match(grant.pattern) or not grant.pattern:
        shown = grant.pattern[:64].encode("unicode_escape").decode()
        raise InvalidArgument(
            f"{field}.pattern: {shown!r} is neither a name nor a prefix followed by '*'", field=f"{field}.pattern"
        )
    if not grant.pattern.endswith("*"):
        check_name(grant.pattern, f"{field}.pattern")
    return grant
