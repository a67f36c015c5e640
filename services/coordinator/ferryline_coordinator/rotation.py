"""Change the CA under way: first everybody trusts both, then the new one signs, then the old one is forgotten.

    ca.crt        what everybody trusts; the first one signs
    ca.key        its key
    ca-next.key   key of the one that will sign next

Writing ca.crt is each step: whatever a crash leaves of the rest is put right by `signing`.

| step     | ca.crt before | after     | to be done before the next step                                        |
|----------|---------------|-----------|------------------------------------------------------------------------|
| `trust`  | old           | old, new  | every broker and every client has the new ca.crt                        |
| `issue`  | old, new      | new, old  | coordinator and brokers have certificates of the new one                |
| `finish` | new, old      | new       |                                                                         |

Coordinators that share a CA have all of it in one value of their vault (`Bundle`): a step replaces that value, whoever
takes it, and the others find it there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ferryline.protocol.errors import Conflict, InvalidArgument
from ferryline_coordinator.certificates import key_pem
from ferryline_service.files import write_durably

TRUST, ISSUE, FINISH = STEPS = ("trust", "issue", "finish")
ONE, TRUSTED, ISSUED = "one", "trusted", "issued"  # where the change stands
_CERTS, _KEY, _NEXT = "ca.crt", "ca.key", "ca-next.key"
_KEYS = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----\n", re.DOTALL)
Pair = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]


def signing(folder: Path) -> Pair:
    """The CA that signs now."""
    first = trusted(folder)[0]
    for name in (_KEY, _NEXT):
        path = folder / name
        if path.exists():
            key = serialization.load_pem_private_key(path.read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            if key.public_key() == first.public_key():
                if name == _NEXT:
                    write_durably(folder / _KEY, key_pem(key), mode=0o600)
                    path.unlink()
                return key, first
    raise Conflict(f"{folder}: no key belongs to the first certificate of {_CERTS}")


def trusted(folder: Path) -> list[x509.Certificate]:
    """All that nodes and clients are to trust; the first one signs."""
    return x509.load_pem_x509_certificates((folder / _CERTS).read_bytes())


def phase(folder: Path) -> str:
    """How far a change has come."""
    if len(trusted(folder)) == 1:
        return ONE
    return TRUSTED if (folder / _NEXT).exists() else ISSUED


def take_step(folder: Path, step: str, new_ca: Callable[[], Pair]) -> None:
    """Durable when it returns. Taking the last step again changes nothing. Raises Conflict for one out of turn."""
    if not due(step, phase(folder)):
        return
    certs = trusted(folder)
    if step == TRUST:
        key, certificate = new_ca()
        write_durably(folder / _NEXT, key_pem(key), mode=0o600)
        certs.append(certificate)
    else:
        certs = [certs[1], certs[0]] if step == ISSUE else certs[:1]
    write_durably(folder / _CERTS, pem_of(certs), mode=0o644)
    signing(folder)


def due(step: str, now: str) -> bool:
    """Whether the step is to be taken at this phase; False: it was the last one. Raises InvalidArgument, Conflict."""
    if step not in STEPS:
        raise InvalidArgument(f"step: {step[:40]!r} is none of {', '.join(STEPS)}", field="step")
    if (step, now) in ((TRUST, TRUSTED), (ISSUE, ISSUED)):
        return False
    if (step, now) not in ((TRUST, ONE), (ISSUE, TRUSTED), (FINISH, ISSUED)):
        raise Conflict(f"step: {step} does not come now; the change of the CA stands at {now!r}", phase=now)
    return True


def pem_of(certs: list[x509.Certificate]) -> bytes:
    return b"".join(cert.public_bytes(serialization.Encoding.PEM) for cert in certs)


class Bundle(NamedTuple):
    """``certs``: what everybody trusts; the first one signs. ``keys``: that of the first one; then that of the one that
    will sign next, if there is one."""

    keys: list[ec.EllipticCurvePrivateKey]
    certs: list[x509.Certificate]

    @classmethod
    def read(cls, pem: bytes) -> Bundle:
        keys = [serialization.load_pem_private_key(found, None) for found in _KEYS.findall(pem)]
        certs = x509.load_pem_x509_certificates(pem)
        assert [key.public_key() for key in keys] == [cert.public_key() for cert in certs[: len(keys)]]
        return cls([key for key in keys if isinstance(key, ec.EllipticCurvePrivateKey)], certs)

    def pem(self) -> bytes:
        return b"".join(map(key_pem, self.keys)) + pem_of(self.certs)

    @property
    def phase(self) -> str:
        if len(self.certs) == 1:
            return ONE
        return TRUSTED if len(self.keys) == 2 else ISSUED

    def after(self, step: str, new_ca: Callable[[], Pair]) -> Bundle:
        """What is there when the step, which is due, was taken."""
        if step == TRUST:
            key, certificate = new_ca()
            return Bundle([*self.keys, key], [*self.certs, certificate])
        if step == ISSUE:
            return Bundle(self.keys[1:], [self.certs[1], self.certs[0]])
        return Bundle(self.keys, self.certs[:1])
