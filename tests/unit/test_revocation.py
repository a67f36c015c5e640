"""The list of revoked certificates: those of forgotten brokers, signed by the CA, and nothing else."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ferryline_coordinator.authority import Authority
from unit.test_coordinator_authority import CLUSTER, request_for


def issued(authority: Authority, broker_id: int) -> x509.Certificate:
    return x509.load_pem_x509_certificate(authority.sign_broker(request_for(), broker_id, CLUSTER).encode())


def serials(authority: Authority, brokers: set[int]) -> set[int]:
    found = x509.load_der_x509_crl(authority.revocation_list(brokers))
    key = authority.ca.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert found.is_signature_valid(key)
    assert found.issuer == authority.ca.subject
    now = datetime.datetime.now(datetime.UTC)
    assert found.next_update_utc is not None
    assert found.last_update_utc <= now < found.next_update_utc
    return {revoked.serial_number for revoked in found}


def test_every_certificate_of_a_forgotten_broker_is_listed_also_after_a_restart(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    first, renewed, other = issued(authority, 1), issued(authority, 1), issued(authority, 2)
    assert serials(authority, {1, 2}) == set()
    assert serials(authority, {2}) == {first.serial_number, renewed.serial_number}
    assert serials(Authority(tmp_path), set()) == {certificate.serial_number for certificate in (first, renewed, other)}


def test_what_has_ended_and_what_was_cut_short_are_not_listed(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    kept = issued(authority, 1)
    folder = tmp_path / "tls" / "issued"
    (folder / "abc").write_text("1 1000")
    (folder / "abd").write_text("")
    (folder / "note").write_text("1 99999999999")
    assert serials(authority, set()) == {kept.serial_number}
    assert not (folder / "abc").exists(), "forgotten once it has ended"


def test_certificates_say_where_the_list_is(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.crl_url = "https://coordinator.example:8443/v1/ca.crl"
    pem, _ = authority.coordinator_files(CLUSTER, [])
    for certificate in (issued(authority, 1), x509.load_pem_x509_certificate(pem.read_bytes())):
        (place,) = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
        assert place.full_name is not None
        assert [name.value for name in place.full_name] == [authority.crl_url]
    assert "ca.crl" not in Authority(tmp_path / "other").sign_broker(request_for(), 1, CLUSTER)


def test_the_folder_is_nobody_elses(tmp_path: Path) -> None:
    Authority(tmp_path)
    assert (tmp_path / "tls" / "issued").stat().st_mode & 0o077 == 0
