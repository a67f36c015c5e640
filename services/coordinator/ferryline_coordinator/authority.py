"""The cluster's private certificate authority and its one-time join tokens.

``<data>/tls``: ca.key, ca.crt (made on the first start), coordinator.key, coordinator.crt (made again at every start).
``<data>/join-tokens``: one file per unused token. A broker takes a file by renaming it; the coordinator fills up the
folder. What makes a token valid is not the file but ``<data>/tls/tokens.json``, where its hash stands with the storage
that used it: a second use by another storage is refused, a repeated one by the same storage gives the same answer.

The requester chooses host names; the name that gives a certificate its role is set here and nowhere else.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ferryline.protocol.errors import BadCredentials, InvalidArgument
from ferryline_service.tls import TlsFiles, node_names

CA_DAYS = 3650
NODE_DAYS = 825
CSR_BYTES_MAX = 64 * 1024
NAMES_MAX = 100
_CLOCK_SKEW = datetime.timedelta(hours=1)


class Token(msgspec.Struct):
    """``used_by``: storage id of the broker that joined with it, "" while unused."""

    used_by: str = ""


class Authority:
    """Issues certificates for one cluster. All calls are synchronous, short and rare."""

    def __init__(self, data_dir: Path, token_dir: Path | None = None) -> None:
        self.folder = data_dir / "tls"
        self.token_dir = token_dir or data_dir / "join-tokens"
        self.ca_cert, self._ca_key_file = self.folder / "ca.crt", self.folder / "ca.key"
        self._token_file = self.folder / "tokens.json"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.token_dir.mkdir(parents=True, exist_ok=True)
        if not self.ca_cert.exists():
            self._make_ca()
        key = serialization.load_pem_private_key(self._ca_key_file.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._cert = x509.load_pem_x509_certificate(self.ca_cert.read_bytes())
        self._tokens: dict[str, Token] = {}
        if self._token_file.exists():
            self._tokens = msgspec.json.decode(self._token_file.read_bytes(), type=dict[str, Token])

    @property
    def ca_pem(self) -> str:
        return self.ca_cert.read_text()

    # -- certificates -------------------------------------------------------------------------------

    def coordinator_files(self, cluster_id: str, hosts: Iterable[str]) -> TlsFiles:
        """A fresh certificate for this coordinator; ``hosts`` are names and addresses under which it is reached."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = ["localhost", "127.0.0.1", "::1", socket.gethostname(), *hosts]
        cert = self._issue(key.public_key(), "ferryline coordinator", [*names, *node_names(cluster_id, None)])
        key_file, cert_file = self.folder / "coordinator.key", self.folder / "coordinator.crt"
        write_atomically(key_file, _key_pem(key), mode=0o600)
        write_atomically(cert_file, cert, mode=0o644)
        return TlsFiles(cert_file, key_file, self.ca_cert)

    def sign_broker(self, csr_pem: str, cluster_id: str, broker_id: int) -> str:
        """A certificate for the key and host names of the request, with the role name of ``broker_id``. PEM."""
        public, asked = parse_request(csr_pem)
        names = [*asked, *node_names(cluster_id, broker_id)]
        return self._issue(public, f"ferryline broker {broker_id}", names).decode()

    def _issue(self, public: ec.EllipticCurvePublicKey, common_name: str, names: Sequence[str]) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self._cert.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(min(now + datetime.timedelta(days=NODE_DAYS), self._cert.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(_general_names(names)), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _make_ca(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Ferryline CA {secrets.token_hex(4)}")])
        cert = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_atomically(self._ca_key_file, _key_pem(key), mode=0o600)
        write_atomically(self.ca_cert, cert.public_bytes(serialization.Encoding.PEM), mode=0o644)

    # -- join tokens --------------------------------------------------------------------------------

    def refill_tokens(self, wanted: int) -> None:
        """Bring the folder up to ``wanted`` unclaimed tokens."""
        present = [path for path in self.token_dir.iterdir() if path.is_file() and "." not in path.name]
        fresh = [secrets.token_urlsafe(24) for _ in range(wanted - len(present))]
        if not fresh:
            return
        for token in fresh:
            self._tokens[_hash(token)] = Token()
        self._store_tokens()  # before a file shows up: a token that a broker finds must be known
        for token in fresh:
            hidden = self.token_dir / f".new-{secrets.token_hex(4)}"
            hidden.write_text(token + "\n")
            hidden.chmod(0o640)
            hidden.rename(self.token_dir / f"token-{secrets.token_hex(4)}")

    def redeem(self, token: str, storage_id: str) -> None:
        """Use up a token. Durable when it returns. Raises BadCredentials for one that is unknown or used elsewhere."""
        known = self._tokens.get(_hash(token.strip()))
        if known is None or known.used_by not in ("", storage_id):
            raise BadCredentials("join token: unknown, or used by another broker")
        if not known.used_by:
            known.used_by = storage_id
            self._store_tokens()

    def new_token(self) -> str:
        """A token for an operator, outside the folder."""
        token = secrets.token_urlsafe(24)
        self._tokens[_hash(token)] = Token()
        self._store_tokens()
        return token

    def _store_tokens(self) -> None:
        write_atomically(self._token_file, msgspec.json.encode(self._tokens), mode=0o600)


def parse_request(csr_pem: str) -> tuple[ec.EllipticCurvePublicKey, list[str]]:
    """Key and host names of a signing request. Names with a dot-separated role (``broker-1.x``) are dropped.

    Raises InvalidArgument, naming the field and the limit.
    """
    if len(csr_pem) > CSR_BYTES_MAX:
        raise InvalidArgument(f"csr: {len(csr_pem)} bytes, limit {CSR_BYTES_MAX}", field="csr")
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        valid = request.is_signature_valid
        public = request.public_key()
    except Exception as error:
        raise InvalidArgument(f"csr: not a PEM signing request: {str(error)[:200]}", field="csr") from None
    if not valid or not isinstance(public, ec.EllipticCurvePublicKey):
        raise InvalidArgument("csr: expected a valid signature by an elliptic curve key", field="csr")
    try:
        alternatives = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return public, []
    hosts = [str(name) for name in alternatives.get_values_for_type(x509.DNSName)]
    addresses = [str(address) for address in alternatives.get_values_for_type(x509.IPAddress)]
    if len(hosts) + len(addresses) > NAMES_MAX:
        raise InvalidArgument(f"csr: {len(hosts) + len(addresses)} names, limit {NAMES_MAX}", field="csr")
    roles = ("broker-", "coordinator.")
    return public, [host for host in hosts if not (host.startswith(roles) and "." in host)] + addresses


def write_atomically(path: Path, content: bytes, *, mode: int) -> None:
    """Replace ``path``: after a crash the old or the new content is there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _general_names(names: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in dict.fromkeys(name for name in names if name):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
