"""API keys: ``fl_<id>_<secret>``. Pure: whoever makes one brings the random bytes.

The id finds the key, the secret proves it. Only the SHA-256 of the secret is stored: it has 256 random bits, so that
neither salt nor a slow hash would make it harder to guess.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re

from ferryline.protocol.errors import BadCredentials

KEY_PREFIX = "fl_"
ID_BYTES, SECRET_BYTES = 8, 32
_KEY = re.compile(r"\Afl_([0-9a-f]{16})_([A-Za-z0-9_-]{43})\Z")


def make_key(random: bytes) -> tuple[str, str, bytes]:
    """(key to show once, its id, digest to store) of ID_BYTES + SECRET_BYTES random bytes."""
    assert len(random) == ID_BYTES + SECRET_BYTES
    key_id = random[:ID_BYTES].hex()
    secret = base64.urlsafe_b64encode(random[ID_BYTES:]).rstrip(b"=").decode()
    return f"{KEY_PREFIX}{key_id}_{secret}", key_id, digest(secret)


def split_key(key: str) -> tuple[str, str]:
    """(id, secret) of a key. Raises BadCredentials, without repeating it."""
    match = _KEY.match(key)
    if match is None:
        raise BadCredentials("the API key is damaged: expected fl_<id>_<secret>")
    return match.group(1), match.group(2)


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def proves(secret: str, stored: bytes) -> bool:
    """Whether this is the secret whose digest is stored. Compares in constant time."""
    return hmac.compare_digest(digest(secret), stored)
