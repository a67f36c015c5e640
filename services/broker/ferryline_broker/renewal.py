"""Keep the broker's certificate good: renewed before it ends, and when the broker is reached under other names.

``POST /v1/renew`` {csr (PEM)} over a connection that shows the present certificate. Open sessions go on; new ones get
the new certificate.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec
from cryptography import x509

from ferryline.protocol.errors import FerrylineError, InternalError
from ferryline_broker.background import Background
from ferryline_broker.join import Joined, TlsFolder, certificate_names, signing_request
from ferryline_service.logs import get_logger
from ferryline_service.tls import TlsFiles

_RENEW_BEFORE = datetime.timedelta(days=60)
_CHECK_S = 12 * 3600.0
_RETRY_S = 60.0
_TIMEOUT_S = 10.0
_log = get_logger()


class Renewal(Background):
    """``urls``: of this broker, as advertised, ``extra``: other names of it. ``coordinators`` are asked one by one."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        folder: TlsFolder,
        files: TlsFiles,
        urls: Sequence[str],
        extra: Sequence[str],
        coordinators: Sequence[str],
    ) -> None:
        self._http = http
        self._folder = folder
        self._files = files
        self._names = certificate_names(urls, extra)
        self._coordinators = list(coordinators)

    async def _run(self) -> None:
        while True:
            done = not self.due() or await self.renew()
            await asyncio.sleep(_CHECK_S if done else _RETRY_S)

    def due(self) -> str:
        """Why a new certificate is needed; "" if it is not."""
        cert = x509.load_pem_x509_certificate(self._folder.cert.read_bytes())
        if cert.not_valid_after_utc - datetime.datetime.now(datetime.UTC) < _RENEW_BEFORE:
            return f"it ends on {cert.not_valid_after_utc:%Y-%m-%d}"
        missing = set(self._names) - _names_of(cert)
        return f"it lacks {', '.join(sorted(missing))}" if missing else ""

    async def renew(self) -> bool:
        """A new certificate now, and the CAs that are to be trusted now. False if no coordinator gave one."""
        csr = signing_request(self._folder.private_key(), self._names)
        for url in self._coordinators:
            try:
                self._folder.store(await self._ask(url, csr))
                self._files.reload()
            except (FerrylineError, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                _log.warning("certificate not renewed", coordinator=url, error=str(error)[:300])
                continue
            _log.info("certificate renewed")
            return True
        return False

    async def _ask(self, url: str, csr: str) -> Joined:
        async with self._http.post(
            f"{url.rstrip('/')}/v1/renew",
            json={"csr": csr},
            ssl=self._files.client,
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        ) as response:
            answer: Any = await response.json(content_type=None)
            if response.status >= 400:
                raise InternalError(f"HTTP {response.status}: {str(answer)[:200]}")
            return msgspec.convert(answer, Joined)


def _names_of(cert: x509.Certificate) -> set[str]:
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
