"""The public keys of an issuer: which of them may verify what, and fetching them without anybody waiting for long.

Keys come from the configured address, or from the one that the issuer's own discovery document names; never from a
token. One task fetches, so there is never more than one request on the way to an issuer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import ssl
import warnings
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ferryline.protocol.access import IssuerMeta
from ferryline.protocol.errors import Unavailable
from ferryline_service.logs import get_logger

REFRESH_S = 600.0  # keys that an issuer withdrew are believed for this long at most, while it answers
ASK_AGAIN_S = 10.0  # an unknown kid asks the issuer at most this often, whoever sends how many of them
RETRY_S = 2.0  # while no key at all is known
FETCH_S = 5.0  # for discovery and keys together
DOCUMENT_BYTES_MAX = 256 * 1024
KEYS_MAX = 64
RSA_BITS = (2048, 8192)  # below: can be broken; above: costs us too much
_KINDS = (("RSA", None, "RS256"), ("EC", "P-256", "ES256"), ("OKP", "Ed25519", "EdDSA"))
_P25519 = 2**255 - 19
_D25519 = -121665 * pow(121666, -1, _P25519)
_log = get_logger()


class UnusableKeys(Exception):
    """An issuer's documents are not what they must be."""


class Key:
    """One public key and the only algorithm that it verifies."""

    __slots__ = ("algorithm", "kid", "public", "thumbprint")

    def __init__(self, kid: str, algorithm: str, public: jwt.PyJWK) -> None:
        self.kid = kid
        self.algorithm = algorithm
        self.public = public
        self.thumbprint = _thumbprint(algorithm, public)

    def verifies(self, token: str) -> bool:
        """Whether the signature of a token was made with this key, by its algorithm."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about lengths, which `read_key` has checked
            try:
                jwt.api_jws.decode_complete(token, self.public, algorithms=[self.algorithm])
            except jwt.PyJWTError:
                return False
        return True


def _thumbprint(algorithm: str, public: jwt.PyJWK) -> str:
    encoded = public.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(algorithm.encode() + b"\0" + encoded).hexdigest()[:32]


def read_key(given: Any) -> Key | None:
    """A key of a JWKS that may verify tokens; None for all others: secrets, private, weak, or for another use."""
    if not isinstance(given, dict) or "d" in given or "k" in given or given.get("use", "sig") != "sig":
        return None
    uses = given.get("key_ops", ["verify"])
    kid = given.get("kid", "")
    if not isinstance(uses, list) or "verify" not in uses or not isinstance(kid, str):
        return None
    algorithm = next(
        (name for kind, curve, name in _KINDS if given.get("kty") == kind and given.get("crv") == curve), None
    )
    if algorithm is None or given.get("alg", algorithm) not in (algorithm, "Ed25519" if algorithm == "EdDSA" else ""):
        return None
    try:
        public = jwt.PyJWK({**given, "alg": algorithm}, algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return Key(kid, algorithm, public) if _strong(public.key) else None


def _strong(key: Any) -> bool:
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        return RSA_BITS[0] <= key.key_size <= RSA_BITS[1] and numbers.e % 2 == 1 and 3 <= numbers.e < 2**32
    if isinstance(key, ed25519.Ed25519PublicKey):
        return not small_order(key.public_bytes_raw())
    return isinstance(key, ec.EllipticCurvePublicKey)


def small_order(encoded: bytes) -> bool:
    """Whether an Ed25519 key is one of the few points for which anybody can make signatures, or no canonical point.

    Doubled three times, a point of small order becomes the neutral element (0, 1).
    """
    y = int.from_bytes(encoded, "little") & (2**255 - 1)
    if y >= _P25519:
        return True
    try:
        for _ in range(3):
            y2 = y * y % _P25519
            x2 = (y2 - 1) * pow(_D25519 * y2 + 1, -1, _P25519) % _P25519
            y = (y2 + x2) * pow(1 - _D25519 * x2 * y2, -1, _P25519) % _P25519
    except ValueError:  # not on the curve
        return True
    return y == 1


def read_keys(document: Any) -> dict[tuple[str, str], Key]:
    """The usable keys of a JWKS by (kid, algorithm). Raises UnusableKeys when it is none.

    Two keys under one name: neither is used, because which one was meant cannot be told.
    """
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list) or len(listed) > KEYS_MAX:
        raise UnusableKeys(f"not a JWKS of at most {KEYS_MAX} keys")
    found: dict[tuple[str, str], Key] = {}
    twice: set[tuple[str, str]] = set()
    for given in listed:
        key = read_key(given)
        if key is None:
            continue
        named = (key.kid, key.algorithm)
        if named in found and found[named].thumbprint != key.thumbprint:
            twice.add(named)
        found[named] = key
    return {named: key for named, key in found.items() if named not in twice}


def checked_url(url: str, what: str) -> str:
    """Return ``url`` if it is https, or http on the loopback. Raises UnusableKeys."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname and parts.username is None:
        return url
    if parts.scheme == "http" and parts.hostname and is_loopback(parts.hostname):
        return url
    raise UnusableKeys(f"{what}: {url[:200]!r} is not an https URL")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class IssuerKeys:
    """The keys of one issuer, kept fresh by a task of its own. An issuer that is down keeps the keys that it had."""

    def __init__(self, issuer: IssuerMeta, http: Callable[[], aiohttp.ClientSession]) -> None:
        self.issuer = issuer
        self.fetches = 0
        self.keys: dict[tuple[str, str], Key] | None = None  # None: never heard of the issuer
        self.thumbprints: frozenset[str] = frozenset()
        self._http = http
        self._ssl: ssl.SSLContext | None = None
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()
        self._fetching = False
        self._fetched: asyncio.Future[None] = self._loop.create_future()
        self._tried_at = float("-inf")
        self._task = self._loop.create_task(self._keep_fresh())

    async def find(self, kid: str, algorithm: str) -> Key | None:
        """The key that a token names; None if the issuer has none of that name.

        A name that is not known waits for one fetch, if the last one is not too recent. Raises Unavailable while the
        issuer has never answered.
        """
        key = self._known(kid, algorithm)
        if key is not None:
            return key
        pause = ASK_AGAIN_S if self.keys is not None else RETRY_S
        if self._loop.time() - self._tried_at >= pause:
            self._asked.set()
        if self._asked.is_set() or self._fetching:
            await asyncio.shield(self._fetched)
        if self.keys is None:
            raise Unavailable(f"the keys of issuer {self.issuer.name} cannot be had at the moment")
        return self._known(kid, algorithm)

    def _known(self, kid: str, algorithm: str) -> Key | None:
        if self.keys is None:
            return None
        if kid:
            return self.keys.get((kid, algorithm))
        fitting = [key for key in self.keys.values() if key.algorithm == algorithm]
        return fitting[0] if len(fitting) == 1 else None  # a token without kid must not choose among several

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._fetched.done():
            self._fetched.set_result(None)  # who waits is told Unavailable

    # -- fetching ----------------------------------------------------------------------------------

    async def _keep_fresh(self) -> None:
        while True:
            self._asked.clear()
            self._fetching = True
            self._tried_at = self._loop.time()
            try:
                async with asyncio.timeout(FETCH_S):
                    await self._fetch()
            except (UnusableKeys, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                text = f"{type(error).__name__}: {str(error)[:200]}"
                _log.warning("keys of an issuer not fetched", issuer=self.issuer.name, error=text)
            except Exception:  # not foreseen: the keys we have stay good, and the next try is not lost
                _log.exception("keys of an issuer not fetched", issuer=self.issuer.name)
            self._fetching = False
            fetched, self._fetched = self._fetched, self._loop.create_future()
            fetched.set_result(None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await self._asked.wait()

    async def _fetch(self) -> None:
        issuer = self.issuer
        url = issuer.jwks_url
        if not url:
            discovery = issuer.issuer.rstrip("/") + "/.well-known/openid-configuration"
            about = await self._get(checked_url(discovery, "issuer"))
            if not isinstance(about, dict) or about.get("issuer") != issuer.issuer:
                raise UnusableKeys("its discovery document is that of another issuer")
            named = about.get("jwks_uri")
            if not isinstance(named, str):
                raise UnusableKeys("its discovery document names no jwks_uri")
            url = named
            if issuer.issuer.startswith("https:") and not url.startswith("https:"):
                raise UnusableKeys("its discovery document leads from https to http")
        keys = read_keys(await self._get(checked_url(url, "jwks_uri")))
        if not keys:
            raise UnusableKeys("none of its keys can be used")  # an accident there must not lock everybody out here
        self.keys = {named: key for named, key in keys.items() if key.algorithm in issuer.algorithms}
        self.thumbprints = frozenset(key.thumbprint for key in self.keys.values())
        self.fetches += 1

    async def _get(self, url: str) -> Any:
        async with self._http().get(url, ssl=await self._tls(), allow_redirects=False) as response:
            if response.status != 200:
                raise UnusableKeys(f"{url[:200]}: answered {response.status}")
            raw = bytearray()
            async for chunk in response.content.iter_chunked(16 * 1024):
                raw += chunk
                if len(raw) > DOCUMENT_BYTES_MAX:
                    raise UnusableKeys(f"{url[:200]}: more than {DOCUMENT_BYTES_MAX} bytes")
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise UnusableKeys(f"{url[:200]}: not JSON") from None

    async def _tls(self) -> ssl.SSLContext:
        if self._ssl is None:
            self._ssl = await self._loop.run_in_executor(None, _context, self.issuer.ca)  # reads files
        return self._ssl


def _context(ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # issuers on the internet, not ours to upgrade
    return context
