"""The cluster's private certificate authority, and the one-time tokens by which brokers get in.

    <data>/tls/ca.crt ca.key             made on first start; while the CA is changed ca.crt holds two (`rotation`)
    <data>/tls/coordinator.crt .key      renewed at start when it ends soon or names other hosts
    <data>/tls/join.key                  signs join tokens
    <data>/tls/issued/<serial>           certificates of brokers (`revocation`)
    <data>/tls/used-tokens/<id>          storage id that used the token: the same storage may ask again
    <data>/join-tokens/<id>              unused tokens, one file each; a broker claims one by renaming it

A token is ``fl1.<id>.<MAC of id>``: whoever finds the file has it, whoever does not cannot make one up.

Several coordinators share one authority through a `Vault`: then ca.key, join.key and the used tokens are there, sealed,
and not on any coordinator's disk.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Container, Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ferryline.protocol.errors import Forbidden, InvalidArgument
from ferryline_coordinator.certificates import alternative, key_pem, unsigned
from ferryline_coordinator.revocation import Issued, revocation_list
from ferryline_coordinator.rotation import Bundle, due, pem_of, phase, signing, take_step
from ferryline_coordinator.store.vault import Vault
from ferryline_service.files import write_durably
from ferryline_service.tls import node_names

_CA_DAYS, _NODE_DAYS, _RENEW_DAYS = 3650, 825, 60
_NAMES_MAX = 32
_CA = "ca"  # in the vault
_HOST = re.compile(r"\A(?=.{1,253}\Z)[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\Z")
_TOKEN = re.compile(r"\Afl1\.([0-9a-f]{32})\.([0-9a-f]{64})\Z")
_STORAGE = re.compile(r"\A[A-Za-z0-9-]{1,64}\Z")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def _name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Ferryline"), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


class Authority:
    """Opens, or makes, the authority under a data directory; `shared` takes its secrets from a vault instead."""

    def __init__(
        self, data: Path, token_directory: Path | None = None, secrets_of_all: tuple[bytes, bytes] | None = None
    ) -> None:
        """``secrets_of_all``: CA (key and certificate, PEM) and key of the join tokens, as `shared` found them."""
        self.directory = data / "tls"
        self.tokens = token_directory if token_directory is not None else data / "join-tokens"
        self.ca_path = self.directory / "ca.crt"
        self.ca_pem: str  # all that nodes trust
        self._used = self.directory / "used-tokens"
        for directory in (self.directory, self.tokens, self._used):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._issued = Issued(self.directory / "issued")
        self.crl_url = ""  # where certificates say that revoked ones are listed
        self._vault: Vault | None = None
        self._phase = ""  # of a CA that is shared
        self._looking = asyncio.Lock()  # or what was read of the vault first might be taken over last
        if secrets_of_all is None:
            self._key, self.ca = self._open_ca()
            self._token_key = self._open_token_key()
        else:
            self.ca_pem = ""
            pem, self._token_key = secrets_of_all
            self._take(pem)

    @classmethod
    async def shared(cls, data: Path, vault: Vault, token_directory: Path | None = None) -> Authority:
        """The authority that all coordinators of a cluster share; the first one makes it. Raises StoreUnusable."""
        known = await vault.read(_CA)
        if known is None:
            key, certificate = _new_ca()
            known = await vault.create(_CA, key_pem(key) + certificate.public_bytes(serialization.Encoding.PEM))
        token_key = await vault.create("join.key", secrets.token_bytes(32))
        authority = cls(data, token_directory, (known, token_key))
        authority._vault = vault
        return authority

    def rotate(self, step: str) -> None:
        """One step of changing a CA that is here alone (`rotation.STEPS`). Raises Conflict out of turn."""
        take_step(self.directory, step, _new_ca)
        self._key, self.ca = self._open_ca()

    async def change_ca(self, step: str) -> None:
        """`rotate`, also of a CA that is shared: the other coordinators see the step at their next `refresh`."""
        if self._vault is None:
            self.rotate(step)
            return
        async with self._looking:
            while True:
                known = await self._vault.read(_CA)
                assert known is not None, "the CA is never deleted"
                bundle = Bundle.read(known)
                if not due(step, bundle.phase):
                    break
                changed = bundle.after(step, _new_ca).pem()
                if await self._vault.replace(_CA, known, changed):
                    known = changed
                    break
            self._take(known)

    async def refresh(self) -> bool:
        """Take over what another coordinator has made of the CA; whether there was anything."""
        if self._vault is None:
            return False
        async with self._looking:
            known = await self._vault.read(_CA)
            return known is not None and self._take(known)

    def _take(self, pem: bytes) -> bool:
        """The CA as the vault has it; whether that is news."""
        bundle = Bundle.read(pem)
        ca_pem = pem_of(bundle.certs).decode()
        news = ca_pem != self.ca_pem
        if news:
            write_durably(self.ca_path, ca_pem.encode(), mode=0o644)  # first: what fails is news at the next look, too
        self.ca_pem, self._key, self.ca, self._phase = ca_pem, bundle.keys[0], bundle.certs[0], bundle.phase
        return news

    @property
    def phase(self) -> str:
        """How far a change of the CA has come."""
        return self._phase if self._vault is not None else phase(self.directory)

    # -- certificates -------------------------------------------------------------------------------

    def _open_ca(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        key_path = self.directory / "ca.key"
        if self.ca_path.exists():  # written last: both are there
            self.ca_pem = self.ca_path.read_text()
            return signing(self.directory)
        key, certificate = _new_ca()
        write_durably(key_path, key_pem(key), mode=0o600)
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        write_durably(self.ca_path, self.ca_pem.encode(), mode=0o644)
        return key, certificate

    def coordinator_files(self, cluster_id: str, hosts: Iterable[str], *, anew: bool = False) -> tuple[Path, Path]:
        """Certificate and key of the coordinator, naming ``hosts``; made anew when needed, or when told to."""
        cert_path, key_path = self.directory / "coordinator.crt", self.directory / "coordinator.key"
        names = _checked_names([*LOCAL_NAMES, *hosts], cluster_id)
        wanted = {*names, *node_names(cluster_id, None)}
        if cert_path.exists() and key_path.exists() and not anew:
            known = x509.load_pem_x509_certificate(cert_path.read_bytes())
            signed = known.issuer == self.ca.subject and _names_of(known) == wanted
            if (
                signed
                and _key_of(key_path) == known.public_key()
                and known.not_valid_after_utc - _now() > datetime.timedelta(days=_RENEW_DAYS)
            ):
                return cert_path, key_path
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), node_names(cluster_id, None), names)
        write_durably(key_path, key_pem(key), mode=0o600)
        write_durably(cert_path, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        return cert_path, key_path

    def sign_broker(self, csr_pem: str, broker_id: int, cluster_id: str) -> str:
        """A certificate for a broker's key. Its role is ours to say; of the request only host names are taken.

        Raises InvalidArgument.
        """
        request = checked_request(csr_pem)
        try:
            asked = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = [str(name) for kind in (x509.DNSName, x509.IPAddress) for name in asked.get_values_for_type(kind)]
        except x509.ExtensionNotFound:
            names = []
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        hosts = _checked_names([*LOCAL_NAMES, *names], cluster_id)
        certificate = self._sign(key, node_names(cluster_id, broker_id), hosts)
        self._issued.note(certificate, broker_id)
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def _sign(self, key: ec.EllipticCurvePublicKey, role: list[str], hosts: list[str]) -> x509.Certificate:
        builder = _builder(_name(role[0]), self.ca.subject, key, _NODE_DAYS)
        alternatives = x509.SubjectAlternativeName([alternative(name) for name in (*role, *hosts)])
        builder = builder.add_extension(alternatives, critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(sign_certificates=False), critical=True)
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(purposes, critical=False)
        if self.crl_url:
            place = x509.DistributionPoint([x509.UniformResourceIdentifier(self.crl_url)], None, None, None)
            builder = builder.add_extension(x509.CRLDistributionPoints([place]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def revocation_list(self, brokers: Container[int]) -> bytes:
        """What is revoked, DER: certificates that were issued here to others than ``brokers``."""
        now = _now()
        return revocation_list(self._key, self.ca, self._issued.revoked(brokers, now), now)

    # -- join tokens --------------------------------------------------------------------------------

    def _open_token_key(self) -> bytes:
        path = self.directory / "join.key"
        if not path.exists():
            write_durably(path, secrets.token_bytes(32), mode=0o600)
        return path.read_bytes()

    def new_token(self) -> str:
        """A token that nobody has used, not stored anywhere."""
        number = secrets.token_hex(16)
        return f"fl1.{number}.{self._mac(number)}"

    def refill(self, wanted: int) -> int:
        """Keep ``wanted`` unused tokens in the directory; returns how many were added. Claimed ones have a dot."""
        unused = sum("." not in path.name for path in self.tokens.iterdir())
        for _ in range(wanted - unused):
            token = self.new_token()
            write_durably(self.tokens / token.split(".")[1], token.encode(), mode=0o600)
        return max(0, wanted - unused)

    async def use_token(self, token: str, storage_id: str) -> None:
        """Use up a token for a storage; the same storage may repeat it (its answer was lost). Raises Forbidden."""
        match = _TOKEN.match(token.strip())
        if not match or not hmac.compare_digest(match.group(2), self._mac(match.group(1))):
            raise Forbidden("token: not a join token of this cluster")
        if not _STORAGE.match(storage_id):
            raise InvalidArgument("storage_id: expected 1 to 64 letters, digits and dashes", field="storage_id")
        number = match.group(1)
        if self._vault is not None:
            user = (await self._vault.create(f"used/{number}", storage_id.encode())).decode()
        else:
            user = self._user_by_file(number, storage_id)
        if user != storage_id:
            raise Forbidden("token: used already; join tokens are good for one broker")
        (self.tokens / number).unlink(missing_ok=True)

    def _user_by_file(self, number: str, storage_id: str) -> str:
        """The storage that used a token first."""
        used = self._used / number
        mine = self._used / f"{number}.{secrets.token_hex(4)}"
        write_durably(mine, storage_id.encode(), mode=0o600)
        try:
            os.link(mine, used)  # exclusive, and whole: whoever comes second sees who was first
        except FileExistsError:
            return used.read_text()
        finally:
            mine.unlink()
        return storage_id

    def _mac(self, number: str) -> str:
        return hmac.new(self._token_key, number.encode(), hashlib.sha256).hexdigest()


def _key_of(path: Path) -> object:
    """The public half of a private key; whoever ended between writing it and its certificate left two of them."""
    return serialization.load_pem_private_key(path.read_bytes(), None).public_key()


def _new_ca() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"Ferryline CA {secrets.token_hex(4)}")
    builder = _builder(name, name, key.public_key(), _CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=True), critical=True)
    return key, builder.sign(key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key)
    return unsigned(subject, issuer, key, days).add_extension(identifier, critical=False)


def checked_request(csr_pem: str) -> x509.CertificateSigningRequest:
    """Raises InvalidArgument unless it is a request, signed by the EC P-256 key that it asks a certificate for."""
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        valid = request.is_signature_valid
    except Exception as error:  # the parser raises what it likes on hostile input
        raise InvalidArgument(f"csr: not a certificate request: {type(error).__name__}", field="csr") from None
    key = request.public_key()
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidArgument("csr: expected a request signed by its EC P-256 key", field="csr")
    return request


def _checked_names(names: Iterable[str], cluster_id: str) -> list[str]:
    """Host names and addresses, each once. A name that would give a role is refused."""
    found: dict[str, None] = {}
    for name in names:
        if not name:
            continue
        try:
            found[str(ipaddress.ip_address(name))] = None
            continue
        except ValueError:
            pass
        if not _HOST.match(name) or name.lower().endswith(f".{cluster_id}".lower()):
            raise InvalidArgument(f"name: {name[:100]!r} may not stand in a certificate", field="name")
        found[name] = None
    if len(found) > _NAMES_MAX:
        raise InvalidArgument(f"names: {len(found)} are more than {_NAMES_MAX}", field="names")
    return list(found)


def _names_of(certificate: x509.Certificate) -> set[str]:
    value = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name) for kind in (x509.DNSName, x509.IPAddress) for name in value.get_values_for_type(kind)}


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def describe(data: Path) -> list[dict[str, str]]:
    """What is in ``<data>/tls``, for people: subject, names, validity, fingerprint."""
    shown = []
    for path in sorted((data / "tls").glob("*.crt")):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        try:
            names = ", ".join(sorted(_names_of(certificate)))
        except x509.ExtensionNotFound:
            names = ""
        shown.append(
            {
                "file": str(path),
                "subject": certificate.subject.rfc4514_string(),
                "names": names,
                "valid_until": certificate.not_valid_after_utc.isoformat(),
                "sha256": certificate.fingerprint(hashes.SHA256()).hex(":"),
            }
        )
    return shown
