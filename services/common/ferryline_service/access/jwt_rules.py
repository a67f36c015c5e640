"""What a JWT must be before anybody believes it. Pure: no I/O, no clock; signatures are somebody else's.

Parsing is stricter than the standards ask, because two readers of one token must never see two things in it: base64url
in its only canonical form, JSON without duplicate members, and nothing in a header that would have us look for keys
elsewhere. Every refusal is BadCredentials; its detail ``reason`` is for logs and for clients that may renew a token.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NoReturn

import msgspec

from ferryline.protocol.access import ALGORITHMS, IssuerMeta, check_principal
from ferryline.protocol.errors import BadCredentials, InvalidArgument

TOKEN_BYTES_MAX = 8192
DEPTH_MAX = 8  # of nested objects and lists; real tokens have 2 or 3
KID_MAX = 256
AUDIENCES_MAX = 50
LATEST_S = 253_402_300_799  # the end of the year 9999: what is later is no date
# RFC 8725, 3.11: a token made for another use (logout, introspection) says so here, and is none for us.
_TYPES = ("jwt", "at+jwt", "application/at+jwt")
# A key inside the token proves nothing; an extension that must be understood is one that we do not understand.
_REFUSED_MEMBERS = ("jwk", "crit", "b64", "zip", "enc")
_LOGOUT = "http://schemas.openid.net/event/backchannel-logout"


class Verified(msgspec.Struct, array_like=True, frozen=True):
    """A token that was believed.

    ``issuer``: its short name in the policy; ``name``: of the principal, with the issuer in front, so that no token can
    name a principal that was made here (``google:ann@example.org``); ``claims``: what rules can look at, nested ones by
    path (``realm_access.roles``); ``expires_ms``: wall clock time from which the token is refused.
    """

    issuer: str
    name: str
    claims: dict[str, Any]
    expires_ms: int


class Parsed(msgspec.Struct, frozen=True):
    """A token taken apart, not believed yet. ``kid`` "": the token names no key."""

    algorithm: str
    kid: str
    issuer: str
    claims: dict[str, Any]


def refuse(reason: str, text: str) -> NoReturn:
    """Raises BadCredentials."""
    raise BadCredentials(f"token: {text}", reason=reason)


def parse(token: str) -> Parsed:
    """Take a token apart. Raises BadCredentials for whatever is not exactly three canonical parts of sane JSON."""
    if len(token) > TOKEN_BYTES_MAX:
        refuse("malformed", f"longer than {TOKEN_BYTES_MAX} bytes")
    if not token.isascii():
        refuse("malformed", "is not ASCII")
    parts = token.split(".")
    if len(parts) != 3 or not all(parts):
        refuse("malformed", "is not three parts with dots between them")
    header = _object(_decoded(parts[0]), "header")
    claims = _object(_decoded(parts[1]), "payload")
    _decoded(parts[2])
    return Parsed(_algorithm(header), _kid(header), _issuer(claims), claims)


def _decoded(part: str) -> bytes:
    """base64url without padding, in the only form that encodes these bytes."""
    try:
        raw = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        refuse("malformed", "is not base64url")
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != part.encode():
        refuse("malformed", "is not canonical base64url")
    return raw


def _object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(raw.decode(), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        refuse("malformed", f"its {what} is not JSON, or has a member twice")
    if not isinstance(found, dict):
        refuse("malformed", f"its {what} is not an object")
    if not _sane(found, DEPTH_MAX):
        refuse("malformed", f"its {what} is nested deeper than {DEPTH_MAX}, or holds half a character")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _sane(value: Any, depth: int) -> bool:
    """Not too deep, and every text can be encoded (JSON can write half of a surrogate pair)."""
    if isinstance(value, str):
        return value.isascii() or _encodable(value)
    if isinstance(value, dict):
        return depth > 0 and all(_sane(key, depth) and _sane(item, depth - 1) for key, item in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_sane(item, depth - 1) for item in value)
    return True


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _algorithm(header: dict[str, Any]) -> str:
    for member in _REFUSED_MEMBERS:
        if member in header:
            refuse("malformed", f"its header has {member!r}")
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        refuse("malformed", "its type is none of JWT and at+jwt")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        refuse("algorithm", f"its algorithm is none of {', '.join(ALGORITHMS)}")
    return algorithm


def _kid(header: dict[str, Any]) -> str:
    kid = header.get("kid", "")
    if not isinstance(kid, str) or len(kid) > KID_MAX:
        refuse("malformed", f"its kid is not a text of at most {KID_MAX} characters")
    return kid


def _issuer(claims: dict[str, Any]) -> str:
    issuer = claims.get("iss")
    if not isinstance(issuer, str) or not issuer:
        refuse("issuer", "names no issuer")
    return issuer


def believe(parsed: Parsed, issuer: IssuerMeta, now_ms: int) -> Verified:
    """What a token says, once its signature was found to be the issuer's. Raises BadCredentials."""
    claims = parsed.claims
    if parsed.issuer != issuer.issuer:
        refuse("issuer", "is of another issuer")
    if parsed.algorithm not in issuer.algorithms:
        refuse("algorithm", f"{parsed.algorithm} is not among the algorithms of this issuer")
    if not _meant_for(claims.get("aud"), issuer.audience):
        refuse("audience", "is meant for another audience")
    expires_ms = _times(claims, issuer.leeway_ms, now_ms)
    events = claims.get("events")
    if isinstance(events, dict) and _LOGOUT in events:
        refuse("malformed", "is a logout token")
    if claims.get("email_verified") is not True:  # anybody may claim an address that nobody has checked
        claims = {name: value for name, value in claims.items() if name != "email"}
    return Verified(issuer.name, _name(claims, issuer), _plain(claims), expires_ms)


def _plain(claims: dict[str, Any]) -> dict[str, Any]:
    """Texts, numbers, truths and lists of them; members of objects by their path, unless a claim has that very name."""
    found: dict[str, Any] = {}
    inner: list[tuple[str, dict[str, Any]]] = []
    for name, value in claims.items():
        if isinstance(value, dict):
            inner.append((name, value))
        elif isinstance(value, list):
            found[name] = [item for item in value if _kept(item)]
        elif _kept(value):
            found[name] = value
    for name, value in inner:
        for member, item in _plain(value).items():
            found.setdefault(f"{name}.{member}", item)
    return found


def _kept(value: Any) -> bool:
    """A text, a truth, or a number that can be encoded for those who share the token."""
    return isinstance(value, str) or (isinstance(value, int) and -(2**63) <= value < 2**64)


def _meant_for(audience: Any, ours: str) -> bool:
    if isinstance(audience, str):
        return audience == ours
    if not isinstance(audience, list) or not 0 < len(audience) <= AUDIENCES_MAX:
        return False
    return all(isinstance(item, str) for item in audience) and ours in audience


def _times(claims: dict[str, Any], leeway_ms: int, now_ms: int) -> int:
    """Until when the token is good, the leeway included. Raises BadCredentials when that has passed or not begun."""
    if "exp" not in claims:
        refuse("claims", "has no exp")
    expires_ms = _date_ms(claims["exp"], "exp") + leeway_ms
    if now_ms >= expires_ms:
        refuse("expired", "has expired")
    for claim in ("nbf", "iat"):
        if claim in claims and _date_ms(claims[claim], claim) - leeway_ms > now_ms:
            refuse("not_yet", f"is not good yet ({claim})")
    return expires_ms


def _date_ms(value: Any, claim: str) -> int:
    """A NumericDate. Texts, booleans, and what is no time of this calendar are refused, not interpreted."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LATEST_S:
        refuse("claims", f"{claim} is not a time in seconds")
    return int(value * 1000)


def _name(claims: dict[str, Any], issuer: IssuerMeta) -> str:
    value = claims.get(issuer.name_claim)
    if not isinstance(value, str) or not value:
        why = " (an email counts if email_verified is true)" if issuer.name_claim == "email" else ""
        refuse("claims", f"has no {issuer.name_claim} that could name a principal{why}")
    try:
        return check_principal(f"{issuer.name}:{value}")
    except InvalidArgument:
        refuse("claims", f"its {issuer.name_claim} holds characters that no principal's name may have")
