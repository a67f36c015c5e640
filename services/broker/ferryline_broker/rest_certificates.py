"""REST of a broker for its certificate: what it shows and whom it trusts, and a new one on request.

``GET  /v1/certificates``         {node, authorities}
``POST /v1/certificates/renew``   ask the coordinator for a new one, and for the CAs to trust; in use when answered
"""

from __future__ import annotations

from aiohttp import web

from ferryline.protocol.errors import CoordinatorUnavailable
from ferryline_broker.join import TlsFolder
from ferryline_broker.renewal import Renewal
from ferryline_service.certificates import of_file


class CertificateApi:
    """Handlers of the routes above."""

    def __init__(self, folder: TlsFolder, renewal: Renewal) -> None:
        self._folder = folder
        self._renewal = renewal

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/certificates", self.show), web.post("/v1/certificates/renew", self.renew)]

    async def show(self, _: web.Request) -> web.Response:
        return self._shown()

    async def renew(self, _: web.Request) -> web.Response:
        if not await self._renewal.renew():
            raise CoordinatorUnavailable("no coordinator gave a new certificate; the log says why")
        return self._shown()

    def _shown(self) -> web.Response:
        return web.json_response({"node": of_file(self._folder.cert)[0], "authorities": of_file(self._folder.ca)})
