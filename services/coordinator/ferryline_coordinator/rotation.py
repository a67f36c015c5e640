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
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ferryline.protocol.errors import Conflict, InvalidArgument
from ferryline_coordinator.certificates import key_pem
from ferryline_service.files import write_durably

TRUST, ISSUE, FINISH = STEPS = ("trust", "issue", "finish")
ONE, TRUSTED, ISSUED = "one", "trusted", "issued"  # where the change stands
_CERTS, _KEY, _NEXT = "ca.crt", "ca.key", "ca-next.key"
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
    if step not in STEPS:
        raise InvalidArgument(f"step: {step[:40]!r} is none of {', '.join(STEPS)}", field="step")
    certs, now = trusted(folder), phase(folder)
    if (step, now) in ((TRUST, TRUSTED), (ISSUE, ISSUED)):
        return
    if (step, now) == (TRUST, ONE):
        key, certificate = new_ca()
        write_durably(folder / _NEXT, key_pem(key), mode=0o600)
        _write(folder, [certs[0], certificate])
    elif (step, now) == (ISSUE, TRUSTED):
        _write(folder, [certs[1], certs[0]])
        signing(folder)
    elif (step, now) == (FINISH, ISSUED):
        _write(folder, certs[:1])
    else:
        raise Conflict(f"step: {step} does not come now; the change of the CA stands at {now!r}", phase=now)


def _write(folder: Path, certs: list[x509.Certificate]) -> None:
    pem = b"".join(cert.public_bytes(serialization.Encoding.PEM) for cert in certs)
    write_durably(folder / _CERTS, pem, mode=0o644)
