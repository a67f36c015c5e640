"""What is asked of an issuer and what may come back: PKCE, state, nonce, and which token a cluster takes. Pure.

Random texts and the time are arguments. Everything that came back from outside is checked here before it is used.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from ferryline.protocol.errors import BadCredentials, InvalidArgument
from ferryline.tokens import claims_of
from ferryline.transport import check_url

SECRET_BYTES = 32  # of state, nonce and the verifier of PKCE
SCOPES = ("openid", "offline_access")
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_LEEWAY_S = 60
_ANSWER_MAX = 200  # characters of an issuer's error that are shown


@dataclass(frozen=True)
class Client:
    """What a cluster expects: tokens of ``issuer`` for ``audience``; and under which name programs ask for them.

    ``client_secret``: some issuers want one of programs that cannot keep any; it protects nothing.
    """

    issuer: str
    client_id: str
    audience: str
    scopes: tuple[str, ...] = SCOPES
    client_secret: str = ""
    name: str = ""


@dataclass(frozen=True)
class Endpoints:
    """Of an issuer, from its discovery document; "" for what it does not have."""

    authorization: str
    token: str
    device: str = ""
    revocation: str = ""
    pkce: bool = True


@dataclass(frozen=True)
class Login:
    """What an issuer gave: the token for the cluster, when it ends (seconds since the epoch), and how to renew it.

    ``kind``: "access" or "id", whichever is for the cluster's audience.
    """

    token: str
    kind: str
    expires_s: float
    refresh_token: str
    who: str


@dataclass(frozen=True)
class Attempt:
    """One attempt to log in with a browser. ``state`` ties the answer to it, ``nonce`` the token, ``verifier`` the
    code."""

    state: str
    nonce: str
    verifier: str
    redirect_uri: str

    @property
    def challenge(self) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).rstrip(b"=").decode()


def attempt(random: bytes, redirect_uri: str) -> Attempt:
    """Of ``3 * SECRET_BYTES`` random bytes."""
    if len(random) != 3 * SECRET_BYTES:
        raise ValueError("not enough chance for three secrets")
    secrets = [random[i * SECRET_BYTES : (i + 1) * SECRET_BYTES] for i in range(3)]
    state, nonce, verifier = (base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in secrets)
    return Attempt(state, nonce, verifier, redirect_uri)


def discovery_url(issuer: str) -> str:
    """Raises InvalidArgument unless the issuer is https, or http on the loopback."""
    try:
        check_url(issuer)
    except InvalidArgument as error:
        raise InvalidArgument(error.message.replace("url:", "issuer:"), field="issuer") from None
    return issuer.rstrip("/") + "/.well-known/openid-configuration"


def endpoints(issuer: str, document: Any) -> Endpoints:
    """From a discovery document. Raises InvalidArgument for one of another issuer, or with addresses in clear."""
    if not isinstance(document, dict) or document.get("issuer") != issuer:
        raise InvalidArgument(f"issuer: what {issuer} says about itself names another issuer", field="issuer")

    def address(name: str) -> str:
        url = document.get(name)
        if not isinstance(url, str) or not url:
            return ""
        if urlsplit(issuer).scheme == "https" and urlsplit(url).scheme != "https":
            raise InvalidArgument(f"issuer: its {name} is not https", field="issuer")
        check_url(url)
        return url

    methods = document.get("code_challenge_methods_supported")
    return Endpoints(
        address("authorization_endpoint"),
        address("token_endpoint"),
        address("device_authorization_endpoint"),
        address("revocation_endpoint"),
        not isinstance(methods, list) or "S256" in methods,
    )


def authorization_url(client: Client, at: Endpoints, tried: Attempt) -> str:
    """Where the browser goes. Raises InvalidArgument if the issuer has no such page or no PKCE."""
    if not at.authorization or not at.token:
        raise InvalidArgument("issuer: has no authorization code flow", field="issuer")
    if not at.pkce:
        raise InvalidArgument("issuer: does not know PKCE with S256", field="issuer")
    asked = {
        "response_type": "code",
        "client_id": client.client_id,
        "redirect_uri": tried.redirect_uri,
        "scope": " ".join(client.scopes),
        "state": tried.state,
        "nonce": tried.nonce,
        "code_challenge": tried.challenge,
        "code_challenge_method": "S256",
        **for_audience(client),
    }
    if "offline_access" in client.scopes:
        asked["prompt"] = "consent"  # OpenID Connect Core, 11: without it an issuer ignores offline_access
    return at.authorization + ("&" if "?" in at.authorization else "?") + urlencode(asked)


def for_audience(client: Client) -> dict[str, str]:
    """Parameters by which issuers let a program say for whom a token is to be; most know one of them or none."""
    if client.audience in ("", client.client_id):
        return {}
    asked = {"audience": client.audience}
    if client.audience.startswith(("https://", "urn:")):
        asked["resource"] = client.audience  # RFC 8707
    return asked


def code_of(query: Mapping[str, str], client: Client, tried: Attempt) -> str:
    """The code that the browser brought. Raises BadCredentials for an answer to somebody else, or a refusal."""
    if not hmac.compare_digest(query.get("state", "").encode(), tried.state.encode()):
        raise BadCredentials("the browser came back with an answer to another login", reason="state")
    if query.get("iss", client.issuer) != client.issuer:  # RFC 9207: an answer of another issuer, mixed up with ours
        raise BadCredentials("the browser came back from another issuer", reason="issuer")
    if "error" in query:
        raise BadCredentials(f"the issuer refused: {said(query)}", reason="refused")
    if not query.get("code"):
        raise BadCredentials("the browser came back without a code", reason="code")
    return query["code"]


def said(answer: Mapping[str, Any]) -> str:
    """An issuer's error, short and printable."""
    text = f"{answer.get('error', 'error')}: {answer.get('error_description', '')}".strip(": ")
    return "".join(letter for letter in text if letter.isprintable())[:_ANSWER_MAX]


def login_of(answer: Any, client: Client, now_s: float, *, nonce: str = "", refresh_token: str = "") -> Login:
    """What a token endpoint answered. The cluster gets the access token if it is a JWT for the cluster's audience,
    else the ID token. Raises BadCredentials when neither fits.

    ``nonce``: what an ID token must carry, "" after a device flow or a refresh. ``refresh_token``: the one that stays
    in use if there is no new one.
    """
    if not isinstance(answer, dict):
        raise BadCredentials("the issuer's answer holds no tokens", reason="answer")
    id_claims = claims_of(_text(answer, "id_token"))
    if id_claims:
        _check_id_token(id_claims, client, now_s, nonce)
    elif nonce and "openid" in client.scopes:
        raise BadCredentials("the issuer gave no ID token", reason="answer")
    for kind in ("access", "id"):
        token = _text(answer, f"{kind}_token")
        claims = claims_of(token)
        if claims.get("iss") == client.issuer and client.audience in _audiences(claims):
            who = str(claims.get("email") or id_claims.get("email") or claims.get("sub") or "")
            renewed = _text(answer, "refresh_token") or refresh_token
            return Login(token, kind, float(claims.get("exp") or 0), renewed, who)
    found = sorted({*_audiences(claims_of(_text(answer, "access_token"))), *_audiences(id_claims)})
    others = ", ".join(found) or "nobody that can be read"
    raise BadCredentials(f"no token of the issuer is for {client.audience!r}, only for {others}", reason="audience")


def _check_id_token(claims: Mapping[str, Any], client: Client, now_s: float, nonce: str) -> None:
    """It came straight from the issuer over TLS, which stands for its signature (OpenID Connect Core, 3.1.3.7)."""
    expires = claims.get("exp")
    if claims.get("iss") != client.issuer or client.client_id not in _audiences(claims):
        raise BadCredentials("the ID token is of another issuer, or for another program", reason="id_token")
    if not isinstance(expires, (int, float)) or expires + _LEEWAY_S < now_s:
        raise BadCredentials("the ID token has expired; is the clock right?", reason="id_token")
    if nonce and claims.get("nonce") != nonce:
        raise BadCredentials("the ID token belongs to another login", reason="nonce")


def _audiences(claims: Mapping[str, Any]) -> list[str]:
    audience = claims.get("aud")
    listed = audience if isinstance(audience, list) else [audience]
    return [item for item in listed if isinstance(item, str)]


def _text(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name)
    return value if isinstance(value, str) else ""
