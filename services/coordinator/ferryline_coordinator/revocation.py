"""Which certificates of brokers are revoked, as a signed list for whoever checks such (RFC 5280): `GET /v1/ca.crl`.

    <data>/tls/issued/<serial in hex>     broker id and last second of a certificate that this coordinator issued

A broker that was forgotten is revoked. The services do not need the list: they ask the cluster's records who is a
broker (`Gate.is_node`). Several coordinators list what each of them issued.
"""

from __future__ import annotations

import datetime
from collections.abc import Container, Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ferryline_service.files import write_durably

_GOOD_FOR = datetime.timedelta(days=7)  # of a list; it is made anew whenever somebody asks


class Issued:
    """The certificates of brokers that have not ended yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def note(self, certificate: x509.Certificate, broker_id: int) -> None:
        """Remember it, before anybody gets it."""
        until = int(certificate.not_valid_after_utc.timestamp())
        write_durably(self._folder / f"{certificate.serial_number:x}", f"{broker_id} {until}".encode(), mode=0o600)

    def revoked(self, brokers: Container[int], now: datetime.datetime) -> list[int]:
        """Serial numbers of what was issued to others than ``brokers``. Forgets what has ended."""
        found = []
        for path in sorted(self._folder.iterdir()):
            try:
                serial, (broker_id, until) = int(path.name, 16), map(int, path.read_text().split())
            except ValueError:
                continue  # a file of a write that was cut short
            if until < now.timestamp():
                path.unlink(missing_ok=True)
            elif broker_id not in brokers:
                found.append(serial)
        return found


def revocation_list(
    key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, serials: Iterable[int], now: datetime.datetime
) -> bytes:
    """The list, DER, signed by the CA."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now)
        .next_update(now + _GOOD_FOR)
        .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
        builder = builder.add_revoked_certificate(
            entry.add_extension(x509.CRLReason(x509.ReasonFlags.cessation_of_operation), critical=False).build()
        )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
