"""Certificates and join tokens."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ferryline.protocol.errors import BadCredentials, InvalidArgument
from ferryline_broker.join import signing_request
from ferryline_coordinator.authority import Authority, parse_request
from ferryline_service.tls import node_identity

CLUSTER = "11111111-2222-3333-4444-555555555555"


def names_of(pem: str) -> list[str]:
    cert = x509.load_pem_x509_certificate(pem.encode())
    return cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


def identity_of(pem: str) -> str | None:
    return node_identity({"subjectAltName": [("DNS", name) for name in names_of(pem)]}, CLUSTER)


def request_for(*names: str) -> str:
    return signing_request(ec.generate_private_key(ec.SECP256R1()), names)


def test_the_ca_is_made_once_and_kept(tmp_path: Path) -> None:
    assert Authority(tmp_path).ca_pem == Authority(tmp_path).ca_pem
    assert (tmp_path / "tls" / "ca.key").stat().st_mode & 0o077 == 0


def test_a_broker_gets_its_role_and_its_hosts(tmp_path: Path) -> None:
    pem = Authority(tmp_path).sign_broker(request_for("host.example", "127.0.0.1"), CLUSTER, 7)
    assert identity_of(pem) == "broker-7"
    assert "host.example" in names_of(pem)


@pytest.mark.parametrize("name", [f"broker-1.{CLUSTER}", f"coordinator.{CLUSTER}", "broker-1.other"])
def test_nobody_can_ask_for_another_role(tmp_path: Path, name: str) -> None:
    pem = Authority(tmp_path).sign_broker(request_for(name), CLUSTER, 7)
    assert identity_of(pem) == "broker-7"
    assert name not in names_of(pem)


def test_the_coordinator_certificate_loads_and_names_its_role(tmp_path: Path) -> None:
    files = Authority(tmp_path).coordinator_files(CLUSTER, ["coordinator.example"])
    assert identity_of(files.cert.read_text()) == "coordinator"
    assert files.server.minimum_version is ssl.TLSVersion.TLSv1_3


def test_a_token_works_once_and_again_only_for_the_same_storage(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    token = authority.new_token()
    authority.redeem(token, "storage-1")
    again = Authority(tmp_path)
    again.redeem(token, "storage-1")
    with pytest.raises(BadCredentials):
        again.redeem(token, "storage-2")
    with pytest.raises(BadCredentials):
        again.redeem("guess", "storage-1")


def test_the_folder_is_filled_up_and_its_tokens_are_valid(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.refill_tokens(4)
    files = sorted((tmp_path / "join-tokens").iterdir())
    assert len(files) == 4
    files[0].rename(files[0].with_name(files[0].name + ".storage"))
    authority.refill_tokens(4)
    assert len([f for f in (tmp_path / "join-tokens").iterdir() if "." not in f.name]) == 4
    Authority(tmp_path).redeem(files[1].read_text(), "storage")


@pytest.mark.parametrize("csr", ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAA==\n", "x" * 100_000])
def test_nonsense_is_refused_by_name(csr: str) -> None:
    with pytest.raises(InvalidArgument, match="csr"):
        parse_request(csr)


def test_too_many_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="names"):
        Authority(tmp_path).sign_broker(request_for(*(f"h{n}.example" for n in range(101))), CLUSTER, 1)
