"""The first start of a broker: trade a one-time token for an id and a certificate.

``POST /v1/join`` {token, csr (PEM), storage_id, internal_url, external_url} -> {broker_id, cert, ca, cluster_id}

The private key never leaves the data directory. A token from a directory is claimed by renaming its file, so that
several brokers started at once (``--scale broker=5``) each take another one; a token whose use is uncertain stays
claimed: a lost token costs nothing, a token used twice would be refused anyway.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from yarl import URL

from ferryline.protocol.errors import (
    ConnectionFailed,
    ErrorInfo,
    FerrylineError,
    InternalError,
    InvalidArgument,
    Unauthorized,
    from_info,
)
from ferryline_broker.config import BrokerConfig
from ferryline_broker.finding import hinted
from ferryline_service.files import write_durably
from ferryline_service.logs import get_logger
from ferryline_service.tls import TlsFiles

_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0
_JOIN_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 2.0  # a stopped coordinator takes connections and says nothing
_log = get_logger()


class Joined(msgspec.Struct, frozen=True):
    """What the coordinator gave; ``cert`` and ``ca`` are PEM."""

    broker_id: int
    cert: str
    ca: str
    cluster_id: str


class TlsFolder:
    """``<data>/tls``: broker.key, broker.crt, ca.crt. Complete once broker.crt is there, which is written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key, self.cert, self.ca = folder / "broker.key", folder / "broker.crt", folder / "ca.crt"

    @property
    def complete(self) -> bool:
        return self.cert.exists()

    def files(self) -> TlsFiles:
        return TlsFiles(self.cert, self.key, self.ca)

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """The key of this broker, made on first use."""
        if self.key.exists():
            loaded = serialization.load_pem_private_key(self.key.read_bytes(), password=None)
            assert isinstance(loaded, ec.EllipticCurvePrivateKey)
            return loaded
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_durably(self.key, pem, mode=0o600)
        return key

    def store(self, joined: Joined) -> None:
        write_durably(self.ca, joined.ca.encode())
        write_durably(self.cert, joined.cert.encode())


def signing_request(key: ec.EllipticCurvePrivateKey, names: Sequence[str]) -> str:
    """PEM of a request for ``names`` (host names and addresses). The coordinator adds the name that gives the role."""
    hosts = sorted({name for name in names if name})
    alternatives: list[x509.GeneralName] = []
    for host in hosts:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            alternatives.append(x509.DNSName(host))
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ferryline broker")])
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def certificate_names(urls: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Names under which this broker may be reached."""
    from_urls = [host for host in (URL(url).host for url in urls) if host]
    return [*dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname(), *from_urls, *extra])]


def claim_token(config: BrokerConfig, storage_id: str) -> str:
    """The join token to use, "" when none is left. A token of the directory is renamed to ``<name>.<storage_id>``, so
    that a join that was interrupted finds its own token again."""
    if config.join_token:
        return config.join_token
    if config.join_token_file is not None:
        return config.join_token_file.read_text().strip()
    folder = config.join_token_dir
    if folder is None or not folder.is_dir():
        return ""
    suffix = f".{storage_id}"
    for mine in sorted(folder.glob(f"*{suffix}")):
        return mine.read_text().strip()
    for path in sorted(folder.iterdir()):
        if "." in path.name or not path.is_file():
            continue  # claimed, or being written
        claimed = path.with_name(path.name + suffix)
        try:
            path.rename(claimed)
        except FileNotFoundError:
            continue  # another broker was quicker
        return claimed.read_text().strip()
    return ""


async def join(
    config: BrokerConfig,
    tls: TlsFolder,
    storage_id: str,
    internal_url: str,
    external_url: str,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Joined | None:
    """Join the cluster, trying each coordinator until one answers; None when ``stopped`` became true first.

    Raises the coordinator's refusal, unless it is for the token and the directory may hold another.
    """
    csr = signing_request(tls.private_key(), certificate_names([internal_url, external_url], config.tls_names))
    delay = _RETRY_FIRST_S
    told = ""
    urls = list(config.coordinator)
    async with aiohttp.ClientSession() as http:
        while not stopped():
            for url in list(urls):
                token = claim_token(config, storage_id)
                reason = "no join token is available" if not token else ""
                if token and (config.ca_file is None or config.ca_file.exists()):
                    body = {
                        "token": token,
                        "csr": csr,
                        "storage_id": storage_id,
                        "internal_url": internal_url,
                        "external_url": external_url,
                    }
                    try:
                        joined = await _ask(http, url, body, config.ca_file)
                    except Unauthorized as refusal:
                        if config.join_token_dir is None:
                            raise
                        _discard(config.join_token_dir, storage_id)
                        reason = str(refusal)
                    except FerrylineError as error:
                        if not error.retriable:
                            raise
                        reason = str(error)
                        if (active := hinted(error)) and active not in urls:
                            urls.append(active)
                    else:
                        tls.store(joined)
                        if config.join_token_dir is not None:
                            _discard(config.join_token_dir, storage_id)
                        return joined
                elif token:
                    reason = f"waiting for {config.ca_file}"
                if reason != told:
                    _log.info("not joined yet", coordinator=url, reason=reason)
                    told = reason
            await asyncio.sleep(delay)
            delay = min(delay * 2, _RETRY_MAX_S)
    return None


def _discard(folder: Path, storage_id: str) -> None:
    for used in folder.glob(f"*.{storage_id}"):
        used.unlink(missing_ok=True)


async def _ask(http: aiohttp.ClientSession, url: str, body: dict[str, str], ca_file: Path | None) -> Joined:
    # Here the broker is a client: host name checked, so that no other node can take the token.
    context = ssl.create_default_context(cafile=str(ca_file)) if ca_file is not None else True
    try:
        async with http.post(
            f"{url.rstrip('/')}/v1/join",
            json=body,
            ssl=context,
            timeout=aiohttp.ClientTimeout(total=_JOIN_TIMEOUT_S, sock_connect=_CONNECT_TIMEOUT_S),
        ) as response:
            answer: Any = await response.json(content_type=None)
            status = response.status
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise ConnectionFailed(f"{url}: {type(error).__name__}: {str(error)[:200]}") from None
    if status >= 400:
        raise _refusal(url, status, answer)
    try:
        return msgspec.convert(answer, Joined)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{url}: the answer to join is not understood: {error}") from None


def _details(answer: dict[str, Any]) -> dict[str, Any]:
    details = answer.get("details")
    return {str(key): value for key, value in details.items() if key != "message"} if isinstance(details, dict) else {}


def _refusal(url: str, status: int, answer: Any) -> FerrylineError:
    if isinstance(answer, dict) and isinstance(answer.get("code"), str):
        return from_info(
            ErrorInfo(answer["code"], f"{url}: {str(answer.get('detail', ''))[:300]}", details=_details(answer))
        )
    return InternalError(f"{url}: join answered HTTP {status}")
