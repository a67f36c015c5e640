"""Certificates for an etcd that serves only a Ferryline cluster: a CA of its own, one for its members, one for clients.

For trying things out and for tests; who runs etcd for more than that has its certificates already.

    <dir>/ca.crt  etcd.crt etcd.key  client.crt client.key      the CA's key is not kept
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

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
    ca = _builder(issuer, issuer, authority.public_key())
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    write_durably(directory / "ca.crt", _pem(ca.sign(authority, hashes.SHA256())))
    for role in ("etcd", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(role), issuer, key.public_key())
        # Members call one another, and the JSON gateway of a member calls the member itself: both roles for both.
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(purposes, critical=False)
        if role == "etcd":
            alternatives = x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys(hosts)])
            builder = builder.add_extension(alternatives, critical=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_durably(directory / f"{role}.key", private, mode=0o600)
        write_durably(directory / f"{role}.crt", _pem(builder.sign(authority, hashes.SHA256())))
    return True


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=_DAYS))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
