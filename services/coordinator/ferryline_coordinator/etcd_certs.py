"""Certificates for an etcd that serves only a Ferryline cluster: a CA of its own, one for its members, one for clients.

For trying things out and for tests; who runs etcd for more than that has its certificates already.

    <dir>/ca.crt  etcd.crt etcd.key  client.crt client.key      the CA's key is not kept
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ferryline_coordinator.certificates import alternative, key_pem, unsigned
from ferryline_service.files import write_durably

_DAYS = 3650


def make_etcd_certificates(directory: Path, hosts: Sequence[str]) -> bool:
    """Make them for members at ``hosts``, unless they are there; returns whether they were made."""
    last = directory / "client.crt"
    if last.exists():
        return False
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = ec.generate_private_key(ec.SECP256R1())
    issuer = _name("etcd CA")
    ca = unsigned(issuer, issuer, authority.public_key(), _DAYS)
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    write_durably(directory / "ca.crt", _pem(ca.sign(authority, hashes.SHA256())))
    for role in ("etcd", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        builder = unsigned(_name(role), issuer, key.public_key(), _DAYS)
        # Members call one another, and the JSON gateway of a member calls the member itself: both roles for both.
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(purposes, critical=False)
        if role == "etcd":
            alternatives = x509.SubjectAlternativeName([alternative(host) for host in dict.fromkeys(hosts)])
            builder = builder.add_extension(alternatives, critical=False)
        write_durably(directory / f"{role}.key", key_pem(key), mode=0o600)
        write_durably(directory / f"{role}.crt", _pem(builder.sign(authority, hashes.SHA256())))
    return True


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
