"""Hostile JWTs, as a table: name -> what makes one for an issuer. All of them must be refused with BAD_CREDENTIALS.

``HOSTILE[name](issuer, attacker)``: ``attacker`` is a URL whose server must never be asked for anything.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.oidc_issuer import Issuer, b64, jwk_of

Maker = Callable[[Issuer, str], str]
HOSTILE: dict[str, Maker] = {}

_STRANGER_RSA = rsa.generate_private_key(65537, 2048)
_STRANGER_EC = ec.generate_private_key(ec.SECP256R1())
_STRANGER_ED = ed25519.Ed25519PrivateKey.generate()
_P = 2**255 - 19
# The issuer's own document offers these; a verifier must not take them.
WEAK = {
    "ed-neutral": (1).to_bytes(32, "little"),  # the neutral element: every message has a signature that anybody makes
    "ed-order-4": (0).to_bytes(32, "little"),
    "ed-order-2": (_P - 1).to_bytes(32, "little"),
    "ed-not-canonical": (_P + 1).to_bytes(32, "little"),
}


def weak_keys() -> list[dict[str, Any]]:
    """Members for the issuer's JWKS, some of them with what an attacker would need to use them."""
    short = rsa.generate_private_key(65537, 1024)
    _WEAK_RSA["rsa-short"] = short
    found = [jwk_of("RS256", short.public_key(), "rsa-short")]
    found += [{"kty": "OKP", "crv": "Ed25519", "x": b64(raw), "kid": kid} for kid, raw in WEAK.items()]
    # 512 bits: no library makes such a key any more, so its numbers are made by hand.
    found.append({"kty": "RSA", "n": b64(_n512().to_bytes(64, "big")), "e": "AQAB", "kid": "rsa-512"})
    found.append({"kty": "oct", "k": b64(b"secret" * 8), "kid": "shared-secret", "alg": "HS256"})
    found.append({**jwk_of("RS256", _STRANGER_RSA.public_key(), "for-encryption"), "use": "enc"})
    found.append({**jwk_of("RS256", _STRANGER_RSA.public_key(), "for-signing"), "key_ops": ["sign"]})
    found.append({**jwk_of("RS256", _STRANGER_RSA.public_key(), "other-algorithm"), "alg": "RS512"})
    return found


_WEAK_RSA: dict[str, Any] = {}
_P512 = 2**256 - 189  # primes
_Q512 = 2**256 - 357


def _n512() -> int:
    return _P512 * _Q512


def _hostile(maker: Maker) -> Maker:
    HOSTILE[maker.__name__] = maker
    return maker


def _family(prefix: str, variants: dict[str, Any], make: Callable[[Issuer, Any], str]) -> None:
    for name, variant in variants.items():
        HOSTILE[f"{prefix}_{name}"] = lambda issuer, _, variant=variant: make(issuer, variant)


# -- the algorithm ----------------------------------------------------------------------------------


def _unsigned(issuer: Issuer, algorithm: Any) -> str:
    return f"{b64({'alg': algorithm, 'typ': 'JWT', 'kid': 'rsa-1'})}.{b64(issuer.claims())}."


_family(
    "unsigned",
    {"none": "none", "None": "None", "NONE": "NONE", "nOnE": "nOnE", "empty": "", "null": None, "space": "none "},
    _unsigned,
)


def _none_with_signature(issuer: Issuer, algorithm: Any) -> str:
    return f"{b64({'alg': algorithm, 'kid': 'rsa-1'})}.{b64(issuer.claims())}.{issuer.good().split('.')[2]}"


_family(
    "old_signature_under",
    {"none": "none", "number": 256, "list": ["RS256"], "lower_case": "rs256", "rs512": "RS512", "ps256": "PS256"},
    _none_with_signature,
)


@_hostile
def no_algorithm_at_all(issuer: Issuer, _: str) -> str:
    return issuer.sign(issuer.claims(), header={"alg": None})


def _hs256(issuer: Issuer, secret: bytes, kid: str = "rsa-1", algorithm: str = "HS256") -> str:
    signed = f"{b64({'alg': algorithm, 'typ': 'JWT', 'kid': kid})}.{b64(issuer.claims())}"
    return f"{signed}.{b64(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


@_hostile
def hs256_with_the_public_key_as_pem(issuer: Issuer, _: str) -> str:
    public = issuer.keyring.rsa.public_key()
    return _hs256(issuer, public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@_hostile
def hs256_with_the_public_key_as_der(issuer: Issuer, _: str) -> str:
    public = issuer.keyring.rsa.public_key()
    return _hs256(issuer, public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


@_hostile
def hs256_with_the_modulus(issuer: Issuer, _: str) -> str:
    return _hs256(issuer, issuer.keyring.jwk("rsa-1")["n"].encode())


@_hostile
def hs256_with_an_empty_secret(issuer: Issuer, _: str) -> str:
    return _hs256(issuer, b"")


@_hostile
def hs256_with_a_secret_of_the_key_set(issuer: Issuer, _: str) -> str:
    return _hs256(issuer, b"secret" * 8, kid="shared-secret")


@_hostile
def hmac_that_says_rs256(issuer: Issuer, _: str) -> str:
    public = issuer.keyring.rsa.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return _hs256(issuer, pem, algorithm="RS256")


@_hostile
def rsa_key_named_for_es256(issuer: Issuer, _: str) -> str:
    return issuer.sign(issuer.claims(), kid="rsa-1", algorithm="ES256", key=issuer.keyring.ec)


@_hostile
def ec_key_named_for_rs256(issuer: Issuer, _: str) -> str:
    return issuer.sign(issuer.claims(), kid="ec-1", algorithm="RS256", key=issuer.keyring.rsa)


@_hostile
def pss_padding_that_says_rs256(issuer: Issuer, _: str) -> str:
    signed = f"{b64({'alg': 'RS256', 'kid': 'rsa-1'})}.{b64(issuer.claims())}".encode()
    pss = padding.PSS(padding.MGF1(SHA256()), 32)
    return f"{signed.decode()}.{b64(issuer.keyring.rsa.sign(signed, pss, SHA256()))}"


# -- keys and signatures ----------------------------------------------------------------------------


_family(
    "key_of_a_stranger",
    {"rsa": ("rsa-1", _STRANGER_RSA), "ec": ("ec-1", _STRANGER_EC), "ed": ("ed-1", _STRANGER_ED)},
    lambda issuer, it: issuer.sign(issuer.claims(), kid=it[0], key=it[1]),
)
_family(
    "kid",
    {
        "unknown": "nobody",
        "path": "../../../../dev/null",
        "absolute_path": "/etc/hostname",
        "sql": "x' UNION SELECT 'secret' --",
        "url": "http://169.254.169.254/latest/meta-data",
        "command": "key|cat /etc/passwd",
        "nul": "rsa-1\0",
        "huge": "k" * 4000,
        "number": 1,
        "list": ["rsa-1"],
        "object": {"kid": "rsa-1"},
        "none": None,
        "empty": "",
        "pipe_to_encryption": "for-encryption",
        "only_for_signing": "for-signing",
        "other_algorithm": "other-algorithm",
    },
    lambda issuer, kid: issuer.sign(issuer.claims(), key=_STRANGER_RSA, header={"kid": kid}),
)


@_hostile
def key_too_short(issuer: Issuer, _: str) -> str:
    return issuer.sign(issuer.claims(), kid="rsa-short", key=_WEAK_RSA["rsa-short"])


@_hostile
def key_of_512_bits(issuer: Issuer, _: str) -> str:
    signed = f"{b64({'alg': 'RS256', 'kid': 'rsa-512'})}.{b64(issuer.claims())}"
    prefix = bytes.fromhex("3031300d060960864801650304020105000420")
    digest = prefix + hashlib.sha256(signed.encode()).digest()
    block = b"\0\1" + b"\xff" * (64 - 3 - len(digest)) + b"\0" + digest
    private = pow(65537, -1, (_P512 - 1) * (_Q512 - 1))
    return f"{signed}.{b64(pow(int.from_bytes(block, 'big'), private, _n512()).to_bytes(64, 'big'))}"


_family(
    "weak_ed25519_key",
    {name: name for name in WEAK},
    # R is the neutral element and S is 0: verifies under a key of order 1 for any message.
    lambda issuer, kid: (
        f"{b64({'alg': 'EdDSA', 'kid': kid})}.{b64(issuer.claims())}.{b64((1).to_bytes(32, 'little') + bytes(32))}"
    ),
)
_family(
    "signature",
    {"zeros": bytes(256), "empty_but_there": b"\0", "ones": b"\xff" * 256, "short": b"x" * 64, "long": b"x" * 3000},
    lambda issuer, raw: f"{issuer.good().rsplit('.', 1)[0]}.{b64(raw)}",
)
_family(
    "ecdsa",
    {
        "r_and_s_zero": bytes(64),
        "r_zero": bytes(32) + b"\1" * 32,
        "n": bytes.fromhex("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551") * 2,
        "too_short": b"\1" * 63,
        "empty_der": bytes.fromhex("3006020100020100"),
    },
    lambda issuer, raw: f"{b64({'alg': 'ES256', 'kid': 'ec-1'})}.{b64(issuer.claims())}.{b64(raw)}",
)


@_hostile
def signature_of_another_token(issuer: Issuer, _: str) -> str:
    return f"{issuer.good(sub='admin').rsplit('.', 1)[0]}.{issuer.good().rsplit('.', 1)[1]}"


@_hostile
def payload_of_another_token(issuer: Issuer, _: str) -> str:
    head, _body, signature = issuer.good().split(".")
    return f"{head}.{b64(issuer.claims(sub='admin'))}.{signature}"


@_hostile
def one_bit_of_the_signature_flipped(issuer: Issuer, _: str) -> str:
    head, body, signature = issuer.good().split(".")
    return f"{head}.{body}.{'B' if signature[0] != 'B' else 'C'}{signature[1:]}"


@_hostile
def no_signature(issuer: Issuer, _: str) -> str:
    return issuer.good().rsplit(".", 1)[0] + "."


# -- keys from elsewhere ----------------------------------------------------------------------------


def _elsewhere(member: str, value: Callable[[str], Any]) -> None:
    def make(issuer: Issuer, attacker: str) -> str:
        return issuer.sign(issuer.claims(), kid="evil", key=_STRANGER_RSA, header={member: value(attacker)})

    HOSTILE[f"header_{member}"] = make


_elsewhere("jku", lambda attacker: f"{attacker}/keys")
_elsewhere("x5u", lambda attacker: f"{attacker}/cert.pem")
_elsewhere("jwk", lambda _: jwk_of("RS256", _STRANGER_RSA.public_key(), "evil"))
_elsewhere("x5c", lambda _: [b64(b"certificate")])


@_hostile
def jku_beside_a_known_kid(issuer: Issuer, attacker: str) -> str:
    return issuer.sign(issuer.claims(), kid="rsa-1", key=_STRANGER_RSA, header={"jku": f"{attacker}/keys"})


@_hostile
def embedded_key_beside_a_good_signature(issuer: Issuer, _: str) -> str:
    return issuer.sign(issuer.claims(), header={"jwk": jwk_of("RS256", _STRANGER_RSA.public_key(), "evil")})


@_hostile
def issuer_is_the_attacker(issuer: Issuer, attacker: str) -> str:
    return issuer.sign(issuer.claims(iss=attacker), key=_STRANGER_RSA)


# -- the form ---------------------------------------------------------------------------------------

_family(
    "header",
    {
        "crit": {"crit": ["exp"], "exp": 1},
        "crit_empty": {"crit": []},
        "b64_false": {"b64": False, "crit": ["b64"]},
        "compressed": {"zip": "DEF"},
        "logout_token": {"typ": "logout+jwt"},
        "proof_of_possession": {"typ": "dpop+jwt"},
        "type_is_a_list": {"typ": ["JWT"]},
    },
    lambda issuer, members: issuer.sign(issuer.claims(), header=members),
)
_family(
    "header_text",
    {
        "algorithm_twice": '{"alg":"none","alg":"RS256","kid":"rsa-1"}',
        "not_json": '{"alg":"RS256"',
        "a_list": '["RS256"]',
        "text": '"RS256"',
        "deep": '{"alg":"RS256","kid":"rsa-1","x":' + "[" * 500 + "]" * 500 + "}",
        "utf_16": '\ufeff{"alg":"RS256"}',
    },
    lambda issuer, text: issuer.sign(issuer.claims(), header=text),
)


def _bent(issuer: Issuer, change: Callable[[list[str]], str]) -> str:
    return change(issuer.good().split("."))


_family(
    "form",
    {
        "two_parts": lambda p: f"{p[0]}.{p[1]}",
        "four_parts": lambda p: ".".join([*p, p[2]]),
        "five_parts": lambda p: ".".join([*p, p[1], p[2]]),
        "padded": lambda p: ".".join(part + "=" * (-len(part) % 4) for part in p),
        "other_alphabet": lambda p: ".".join([p[0], p[1], p[2].replace("-", "+").replace("_", "/") + "+"]),
        "trailing_bytes": lambda p: ".".join(p) + "AAAA",
        "trailing_dot": lambda p: ".".join(p) + ".",
        "line_break": lambda p: ".".join([p[0], p[1], p[2][:8] + "\n" + p[2][8:]]),
        "spaces": lambda p: " . ".join(p),
        "not_ascii": lambda p: ".".join([p[0], p[1], p[2] + "é"]),
        "loose_last_bits": lambda p: ".".join([p[0], p[1], p[2][:-1] + _next_letter(p[2][-1])]),
        "empty_header": lambda p: f".{p[1]}.{p[2]}",
        "only_dots": lambda _: "..",
        "huge": lambda p: ".".join([p[0], p[1] + "A" * 200_000, p[2]]),
    },
    _bent,
)


def _next_letter(letter: str) -> str:
    """A letter that decodes to the same bytes: the last one of 256 bytes carries four bits that nobody reads."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return alphabet[alphabet.index(letter) ^ 1]


# -- claims, with a good signature ------------------------------------------------------------------


def _claims(prefix: str, variants: dict[str, dict[str, Any]]) -> None:
    _family(prefix, variants, lambda issuer, changes: issuer.sign(issuer.claims(**changes)))


_now = int(time.time())
_claims(
    "exp",
    {
        "missing": {"exp": None},
        "past": {"exp": _now - 10},
        "negative": {"exp": -1},
        "zero": {"exp": 0},
        "text": {"exp": str(_now + 600)},
        "truth": {"exp": True},
        "list": {"exp": [_now + 600]},
        "after_the_end_of_time": {"exp": 10**30},
        "float_beyond_everything": {"exp": 1e300},
    },
)
_claims("nbf", {"future": {"nbf": _now + 3600}, "text": {"nbf": "0"}, "list": {"nbf": [0]}})
_claims("iat", {"future": {"iat": _now + 3600}, "text": {"iat": "now"}, "truth": {"iat": True}})
_claims(
    "aud",
    {
        "missing": {"aud": None},
        "other": {"aud": "another"},
        "longer": {"aud": "ferryline-evil"},
        "other_case": {"aud": "Ferryline"},
        "empty": {"aud": ""},
        "empty_list": {"aud": []},
        "list_in_list": {"aud": [["ferryline"]]},
        "with_a_number": {"aud": ["ferryline", 1]},
        "object": {"aud": {"ferryline": True}},
        "number": {"aud": 5},
        "too_many": {"aud": ["x"] * 60 + ["ferryline"]},
        "letters": {"aud": list("ferryline")},
        "commas": {"aud": "other,ferryline"},
    },
)
_claims("iss", {"missing": {"iss": None}, "empty": {"iss": ""}, "number": {"iss": 1}})
_family(
    "iss",
    {
        "with_slash": lambda url: url + "/",
        "upper_case": str.upper,
        "list": lambda url: [url],
        "with_port_zero": lambda url: url.replace("127.0.0.1:", "127.0.0.1:0"),
        "user_info": lambda url: url.replace("http://", "http://x@"),
        "cyrillic": lambda url: url.replace("p", "\u0440", 1),
        "fullwidth": lambda url: url.replace("1", "\uff11", 1),
        "zero_width": lambda url: url + "\u200b",
        "nul": lambda url: url + "\0",
    },
    lambda issuer, change: issuer.sign(issuer.claims(iss=change(issuer.url))),
)
_claims(
    "sub",
    {
        "missing": {"sub": None},
        "empty": {"sub": ""},
        "number": {"sub": 7},
        "list": {"sub": ["ann"]},
        "line_break": {"sub": "ann\nadmin"},
        "slash": {"sub": "../admin"},
        "letters_that_look_alike": {"sub": "\u0430nn"},
        "too_long": {"sub": "a" * 300},
    },
)
_claims("logout", {"event": {"events": {"http://schemas.openid.net/event/backchannel-logout": {}}}})


def _text(issuer: Issuer, change: Callable[[str], str]) -> str:
    return issuer.sign(change(json.dumps(issuer.claims())))


_family(
    "payload",
    {
        "exp_nan": lambda text: text.replace('"exp": ', '"exp": NaN, "x": '),
        "exp_infinity": lambda text: text.replace('"exp": ', '"exp": Infinity, "x": '),
        "sub_twice": lambda text: text.replace("{", '{"sub": "admin", ', 1),
        "iss_twice": lambda text: text.replace("{", '{"iss": "https://other.example", ', 1),
        "exp_twice": lambda text: text.replace("{", '{"exp": 99999999999, ', 1),
        "sub_twice_by_escape": lambda text: text.replace("{", '{"s\\u0075b": "admin", ', 1),
        "trailing": lambda text: text + "{}",
        "a_list": lambda text: f"[{text}]",
        "text": lambda _: '"claims"',
        "empty": lambda _: "{}",
        "deep": lambda text: text.replace("{", '{"x": ' + "[" * 1500 + "]" * 1500 + ", ", 1),
        "deep_objects": lambda text: text.replace("{", '{"x": ' + '{"y":' * 20 + "1" + "}" * 20 + ", ", 1),
        "half_a_character": lambda text: text.replace('"ann"', '"ann\\ud800"'),
        "number_of_thousands_of_digits": lambda text: text.replace('"exp": ', '"exp": ' + "9" * 5000),
        "comment": lambda text: text + "// good",
        "single_quotes": lambda text: text.replace('"', "'"),
    },
    _text,
)
