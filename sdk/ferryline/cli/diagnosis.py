"""What `ferryline doctor` looks at, one question per function. Each returns findings and never raises.

From the outside in: a name that does not resolve makes every later question pointless, so each server is asked only as
far as it answers.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from ferryline.cli import tlsinfo
from ferryline.cli.settings import Settings

OK, WARN, FAIL = "ok", "warning", "problem"
EXPIRES_SOON_DAYS = 14
CLOCK_SKEW_MAX_S = 30.0
DISK_FREE_MIN_BYTES = 2 * 1024**3
TIMEOUT_S = 5.0
_UP = "Is the service running? On this machine: ferryline up."


@dataclass(frozen=True)
class Finding:
    """One answer. ``what`` names the thing, ``detail`` the fact, ``remedy`` what to do about it."""

    level: str
    what: str
    detail: str
    remedy: str = ""

    def row(self) -> dict[str, str]:
        return {"level": self.level, "what": self.what, "detail": self.detail, "remedy": self.remedy}


def check_settings(settings: Settings) -> list[Finding]:
    """Where the settings come from, and whether the CA can be read."""
    source = settings.sources.get("url", "default")
    found = [Finding(OK, "settings", f"{', '.join(settings.url)} ({source}); context {settings.context or 'none'}")]
    if not ssl.HAS_TLSv1_3:
        found.append(Finding(FAIL, "python", f"{ssl.OPENSSL_VERSION} has no TLS 1.3", "Use a newer Python or OpenSSL."))
    found.append(check_codec())
    if settings.ca is None:
        if any(url.startswith("https://") for url in settings.url):
            remedy = "A Ferryline cluster has a private CA: --ca or FERRYLINE_CA names its ca.crt."
            found.append(Finding(WARN, "CA", "none given, the system's trust store is used", remedy))
        return found
    try:
        authorities = tlsinfo.read_file(settings.ca)
    except (OSError, ValueError) as error:
        remedy = "--ca or FERRYLINE_CA must name the cluster's ca.crt (PEM)."
        return [*found, Finding(FAIL, "CA", f"{settings.ca}: {error}", remedy)]
    found += [finding for cert in authorities for finding in _validity(f"CA {settings.ca}", cert)]
    return found


def check_codec() -> Finding:
    """Which codec of record batches this installation uses; the one in Python only costs speed."""
    from ferryline.protocol import _codec

    if _codec.COMPILED:
        return Finding(OK, "codec", f"compiled, CRC32C by {_codec.CRC_KIND}")
    remedy = "Install again where a C compiler and Python's headers are: several times fewer CPU seconds per record."
    return Finding(OK, "codec", f"in Python ({_codec.WHY})", remedy)


def _validity(what: str, cert: tlsinfo.Certificate) -> list[Finding]:
    now = tlsinfo.now()
    left = cert.days_left(now)
    until = f"{cert.not_after:%Y-%m-%d %H:%M} UTC"
    if now < cert.not_before:
        remedy = "The clock of this machine, or of the one that made it, is wrong."
        return [Finding(FAIL, what, f"not valid before {cert.not_before:%Y-%m-%d %H:%M} UTC", remedy)]
    if left < 0:
        return [
            Finding(
                FAIL,
                what,
                f"expired at {until}",
                "Renew it: ferryline certs rotate, or rotate-ca; see docs/operations.md.",
            )
        ]
    if left < EXPIRES_SOON_DAYS:
        return [
            Finding(
                WARN,
                what,
                f"expires in {left:.1f} days, at {until}",
                "ferryline certs rotate, or rotate-ca; docs/operations.md.",
            )
        ]
    return [Finding(OK, what, f"{cert.subject}, valid for {left:.0f} days")]


def check_server(url: str, ca: Path | None) -> tuple[list[Finding], bool]:
    """Name, port, TLS, HTTP of one server; and whether it answered."""
    host, port = tlsinfo.address(url)
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        return [Finding(FAIL, url, f"{host} does not resolve: {error}", "Check the name, and the DNS.")], False
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except OSError as error:
        return [_unreachable(url, host, port, error)], False
    found = [Finding(OK, url, f"listens on {', '.join(sorted(str(a) for a in addresses))} port {port}")]
    if url.startswith("https://"):
        problems = _check_tls(url, host, port, ca)
        found += problems
        if any(finding.level == FAIL for finding in problems):
            return found, False
    answers = _check_http(url, host, port, ca)
    return found + answers, not any(finding.level == FAIL for finding in answers)


def _unreachable(url: str, host: str, port: int, error: OSError) -> Finding:
    if isinstance(error, ConnectionRefusedError):
        return Finding(FAIL, url, f"refused: nothing listens on port {port}", _UP)
    if isinstance(error, TimeoutError):
        remedy = "A firewall that drops packets, a wrong address, or a machine that is down."
        return Finding(FAIL, url, f"no answer within {TIMEOUT_S:g} s", remedy)
    return Finding(FAIL, url, f"cannot be reached: {error.strerror or error}", "Check the address and the network.")


def _check_tls(url: str, host: str, port: int, ca: Path | None) -> list[Finding]:
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as error:
        return [Finding(FAIL, url, f"the CA cannot be used: {error}", "--ca must name a PEM certificate.")]
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        with (
            socket.create_connection((host, port), timeout=TIMEOUT_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as secured,
        ):
            version = secured.version()
    except ssl.SSLCertVerificationError as error:
        return [_wrong_certificate(url, host, ca, error)]
    except (ssl.SSLError, ConnectionError) as error:
        text = getattr(error, "reason", None) or str(error)
        if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER" in text:
            return [Finding(FAIL, url, "the server speaks no TLS there", "Wrong port, or http:// instead of https://?")]
        if "PROTOCOL" in text or "VERSION" in text:
            return [Finding(FAIL, url, f"no common TLS version: {text}", "Both sides must speak TLS 1.3.")]
        return [
            Finding(FAIL, url, f"the TLS handshake failed: {text}", "Is it a Ferryline service that listens there?")
        ]
    except OSError as error:
        return [
            Finding(FAIL, url, f"the TLS handshake had no end: {error}", "The process may be stopped or overloaded.")
        ]
    try:
        return [*_validity(f"certificate of {url}", tlsinfo.of_server(url)), Finding(OK, url, f"{version}, CA matches")]
    except OSError as error:
        return [Finding(WARN, url, f"its certificate could not be read: {error}")]


def _wrong_certificate(url: str, host: str, ca: Path | None, error: ssl.SSLCertVerificationError) -> Finding:
    """Say which of the many reasons it was."""
    try:
        shown = tlsinfo.of_server(url)
    except OSError:
        return Finding(FAIL, url, f"its certificate is not trusted: {error.verify_message}")
    validity = [finding for finding in _validity(f"certificate of {url}", shown) if finding.level == FAIL]
    if validity:
        return validity[0]
    if "Hostname mismatch" in error.verify_message or "IP address mismatch" in error.verify_message:
        names = ", ".join(shown.names) or "no name"
        return Finding(
            FAIL, url, f"its certificate is for {names}, not for {host}", "Use one of these names in the URL."
        )
    if "expired" in error.verify_message:
        return Finding(FAIL, url, "a certificate of its chain has expired", "ferryline certs show; renew the CA.")
    known = f"{ca}" if ca else "the system's trust store"
    remedy = "Another cluster listens there, or the CA is that of another one: --ca must name this cluster's ca.crt."
    return Finding(FAIL, url, f"its certificate is signed by {shown.issuer!r}, which {known} does not hold", remedy)


def get(url: str, path: str, ca: Path | None, token: str = "") -> tuple[int, dict[str, str], bytes]:
    """One GET: status, headers (lower case), at most 16 MiB of body. Raises OSError, http.client.HTTPException."""
    host, port = tlsinfo.address(url)
    connection: http.client.HTTPConnection
    if url.startswith("https://"):
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read(16 * 1024 * 1024)
    finally:
        connection.close()


def _check_http(url: str, host: str, port: int, ca: Path | None) -> list[Finding]:
    try:
        status, headers, _ = get(url, "/healthz", ca)
    except (OSError, http.client.HTTPException) as error:
        remedy = "The process may be stopped (SIGSTOP), overloaded, or not a Ferryline service."
        return [Finding(FAIL, url, f"does not answer HTTP: {type(error).__name__} {error}", remedy)]
    if status == 404:
        return [Finding(FAIL, url, "answers HTTP, but is no Ferryline service", "Another program uses this port.")]
    found = _check_clock(url, headers)
    if status != 200:
        return [*found, Finding(FAIL, url, f"/healthz says {status}: alive, not well", "Look into the service's log.")]
    try:
        status, _, body = get(url, "/readyz", ca)
    except (OSError, http.client.HTTPException) as error:
        return [*found, Finding(FAIL, url, f"/readyz does not answer: {error}")]
    if status == 200:
        return [*found, Finding(OK, url, "healthy and serving")]
    return [*found, Finding(WARN, url, f"alive, not serving yet: {_reason(body)}", "Wait, or look into its log.")]


def _reason(body: bytes) -> str:
    try:
        content: Any = json.loads(body)
    except ValueError:
        return body[:200].decode(errors="replace")
    if isinstance(content, dict):
        return str(content.get("detail") or content.get("reason") or content)[:300]
    return str(content)[:300]


def _check_clock(url: str, headers: dict[str, str]) -> list[Finding]:
    try:
        theirs: datetime = parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError, TypeError):
        return []
    skew = (tlsinfo.now() - theirs).total_seconds()
    if abs(skew) <= CLOCK_SKEW_MAX_S:
        return []
    remedy = "Set the clocks (NTP): timestamps, retention and certificates depend on them."
    return [Finding(WARN, url, f"its clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead'}", remedy)]


def check_port_owner(url: str) -> list[Finding]:
    """Who holds the local port of a server that did not answer as one."""
    host, port = tlsinfo.address(url)
    if host not in ("localhost", "127.0.0.1", "::1"):
        return []
    import psutil

    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return []
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            return [_owner(port, connection.pid)]
    return []


def _owner(port: int, pid: int | None) -> Finding:
    import psutil

    if pid is None:
        return Finding(WARN, f"port {port}", "held by a process of another user")
    try:
        process = psutil.Process(pid)
        line, status = " ".join(process.cmdline())[:120], process.status()
    except psutil.Error:
        return Finding(WARN, f"port {port}", f"held by process {pid}")
    if status == psutil.STATUS_STOPPED:
        return Finding(FAIL, f"port {port}", f"process {pid} is stopped: {line}", f"kill -CONT {pid}")
    return Finding(WARN, f"port {port}", f"held by process {pid}: {line}", "End it, or use another port.")


def check_disk(folder: Path) -> list[Finding]:
    """Room where the local cluster keeps its data."""
    if not folder.exists():
        return []
    usage = shutil.disk_usage(folder)
    share = usage.free / usage.total
    detail = f"{usage.free / 2**30:.1f} GiB free ({share:.0%}) at {folder}"
    if usage.free < DISK_FREE_MIN_BYTES or share < 0.05:
        remedy = "Brokers refuse records when the disk is nearly full: free space, or shorten retention."
        return [Finding(WARN, "disk", detail, remedy)]
    return [Finding(OK, "disk", detail)]


def check_versions(levels: Sequence[int], own: int) -> list[Finding]:
    """Feature levels of the cluster against what this client speaks."""
    if any(level > own for level in levels):
        remedy = "Upgrade this client: pip install -U ferryline."
        return [
            Finding(WARN, "version", f"the cluster is at feature level {max(levels)}, this client at {own}", remedy)
        ]
    return []
