"""Certificates as JSON: what operators ask of both services."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes


def described(cert: x509.Certificate) -> dict[str, Any]:
    """Subject, issuer, validity and fingerprint."""
    return {
        "subject": cert.subject.rfc4514_string(),
        "issuer": cert.issuer.rfc4514_string(),
        "not_before": cert.not_valid_before_utc.isoformat(),
        "not_after": cert.not_valid_after_utc.isoformat(),
        "sha256": cert.fingerprint(hashes.SHA256()).hex(),
    }


def of_file(path: Path) -> list[dict[str, Any]]:
    """All certificates of a PEM file."""
    return [described(cert) for cert in x509.load_pem_x509_certificates(path.read_bytes())]
