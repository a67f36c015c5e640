"""Certificates and join tokens, without a socket."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ferryline.protocol.errors import Forbidden, InvalidArgument
from ferryline_broker.join import signing_request
from ferryline_coordinator.authority import Authority, checked_request
from ferryline_service.tls import TlsFiles, node_identity

CLUSTER = "11111111-2222-3333-4444-555555555555"


def names_of(pem: str) -> list[str]:
    cert = x509.load_pem_x509_certificate(pem.encode())
    return cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


def identity_of(pem: str) -> str | None:
    return node_identity({"subjectAltName": [("DNS", name) for name in names_of(pem)]}, CLUSTER)


def request_for(*names: str) -> str:
    return signing_request(ec.generate_private_key(ec.SECP256R1()), names)


def test_the_ca_is_made_once_and_its_key_is_nobody_elses(tmp_path: Path) -> None:
    assert Authority(tmp_path).ca_pem == Authority(tmp_path).ca_pem
    for name in ("ca.key", "join.key"):
        assert (tmp_path / "tls" / name).stat().st_mode & 0o077 == 0


def test_a_broker_gets_its_role_and_its_hosts(tmp_path: Path) -> None:
    pem = Authority(tmp_path).sign_broker(request_for("host.example", "host_1", "127.0.0.1"), 7, CLUSTER)
    assert identity_of(pem) == "broker-7"
    assert {"host.example", "host_1", "localhost"} <= set(names_of(pem))


@pytest.mark.parametrize("name", [f"broker-1.{CLUSTER}", f"coordinator.{CLUSTER}", f"x.y.{CLUSTER}"])
def test_nobody_can_ask_for_a_role(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        Authority(tmp_path).sign_broker(request_for(name), 7, CLUSTER)
    assert identity_of(Authority(tmp_path).sign_broker(request_for("broker-1.other"), 7, CLUSTER)) == "broker-7"


def test_the_coordinators_certificate_names_its_role_and_is_kept_until_its_hosts_change(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.coordinator_files(CLUSTER, ["coordinator.example"])
    first = cert.read_text()
    assert identity_of(first) == "coordinator"
    assert TlsFiles(cert, key, authority.ca_path).server.minimum_version is ssl.TLSVersion.TLSv1_3
    Authority(tmp_path).coordinator_files(CLUSTER, ["coordinator.example"])
    assert cert.read_text() == first
    authority.coordinator_files(CLUSTER, ["elsewhere.example"])
    assert "elsewhere.example" in names_of(cert.read_text())


def test_renewed_files_are_taken_over_and_broken_ones_are_not(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.coordinator_files(CLUSTER, ["one.example"])
    files = TlsFiles(cert, key, authority.ca_path)
    assert not files.reload()
    authority.coordinator_files(CLUSTER, ["two.example"])
    assert files.reload()
    cert.write_text("broken")
    with pytest.raises(ssl.SSLError):
        files.reload()


async def test_a_token_works_once_and_again_only_for_the_same_storage(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    token = authority.new_token()
    await authority.use_token(token, "storage-1")
    again = Authority(tmp_path)
    await again.use_token(token, "storage-1")
    with pytest.raises(Forbidden, match="used already"):
        await again.use_token(token, "storage-2")
    for guess in ("guess", "", token[:-1] + ("0" if token[-1] != "0" else "1"), Authority(tmp_path / "x").new_token()):
        with pytest.raises(Forbidden):
            await again.use_token(guess, "storage-1")


async def test_the_folder_is_filled_up_and_its_tokens_are_valid(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    assert authority.refill(4) == 4
    files = sorted((tmp_path / "join-tokens").iterdir())
    assert len(files) == 4
    files[0].rename(files[0].with_name(files[0].name + ".storage"))
    assert authority.refill(4) == 1
    assert len([f for f in (tmp_path / "join-tokens").iterdir() if "." not in f.name]) == 4
    await Authority(tmp_path).use_token(files[1].read_text(), "storage")


@pytest.mark.parametrize("csr", ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAA==\n", "x" * 100_000])
def test_nonsense_is_refused_by_name(csr: str) -> None:
    with pytest.raises(InvalidArgument, match="csr"):
        checked_request(csr)


def test_too_many_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="names"):
        Authority(tmp_path).sign_broker(request_for(*(f"h{n}.example" for n in range(101))), 1, CLUSTER)
