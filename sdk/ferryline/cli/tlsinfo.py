"""Certificates as facts: read from files and off the wire, without trusting anything."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Certificate:
    """One certificate, as far as people ask about it."""

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    fingerprint: str
    is_ca: bool
    der: bytes

    def days_left(self, now: datetime) -> float:
        return (self.not_after - now).total_seconds() / 86_400


def _parse(cert: x509.Certificate) -> Certificate:
    names: list[str] = []
    try:
        extension = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [str(entry.value) for entry in extension]
    except x509.ExtensionNotFound:
        pass
    try:
        is_ca = bool(cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except x509.ExtensionNotFound:
        is_ca = False
    return Certificate(
        _common_name(cert.subject),
        _common_name(cert.issuer),
        tuple(names),
        cert.not_valid_before_utc,
        cert.not_valid_after_utc,
        cert.fingerprint(SHA256()).hex(),
        is_ca,
        cert.public_bytes(Encoding.DER),
    )


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def read_file(path: Path) -> list[Certificate]:
    """Certificates of a PEM file. Raises OSError, ValueError."""
    return [_parse(cert) for cert in x509.load_pem_x509_certificates(path.read_bytes())]


def address(url: str) -> tuple[str, int]:
    """Host and port of a URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def of_server(url: str, timeout_s: float = TIMEOUT_S) -> Certificate:
    """The certificate that a server shows, whatever it is worth. Raises OSError (ssl.SSLError is one)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    host, port = address(url)
    with (
        socket.create_connection((host, port), timeout=timeout_s) as raw,
        context.wrap_socket(raw, server_hostname=host) as secured,
    ):
        der = secured.getpeercert(binary_form=True)
    if not der:
        raise ssl.SSLError("the server showed no certificate")
    return _parse(x509.load_der_x509_certificate(der))


def signed_by(cert: Certificate, authority: Certificate) -> bool:
    """Whether ``authority`` signed ``cert``."""
    try:
        x509.load_der_x509_certificate(cert.der).verify_directly_issued_by(
            x509.load_der_x509_certificate(authority.der)
        )
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def now() -> datetime:
    return datetime.now(UTC)
