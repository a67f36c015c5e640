"""The REST surface of certificates: what this coordinator shows and whom it trusts, and how that is changed.

``GET  /v1/certificates``          {node, authorities, phase, ca}
``POST /v1/certificates/renew``    a new certificate for this coordinator, in use when answered
``POST /v1/certificates/rotate``   {step}: one step of changing the CA (`rotation`)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aiohttp import web
from pydantic import Field

from ferryline_coordinator.authority import Authority
from ferryline_coordinator.models import Body
from ferryline_coordinator.rotation import trusted
from ferryline_service.certificates import described, of_file
from ferryline_service.errors import read_json
from ferryline_service.logs import get_logger

_log = get_logger()


class Rotate(Body):
    step: str = Field(max_length=40, description="trust, issue or finish")


class CertificateRest:
    """``renew`` makes a new certificate for this coordinator and takes it into use; returns its file, None without
    TLS."""

    def __init__(self, authority: Callable[[], Authority], renew: Callable[[bool], Path | None]) -> None:
        self._authority = authority
        self._renew = renew

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/certificates", self.show),
            web.post("/v1/certificates/renew", self.renew),
            web.post("/v1/certificates/rotate", self.rotate),
        ]

    async def show(self, _: web.Request) -> web.Response:
        return self._shown()

    async def renew(self, _: web.Request) -> web.Response:
        self._renew(True)
        _log.info("certificate renewed on request")
        return self._shown()

    async def rotate(self, request: web.Request) -> web.Response:
        step = Rotate.model_validate(await read_json(request)).step
        await self._authority().change_ca(step)
        self._renew(False)  # of the new CA, if that signs now; and the new ca.crt is in use
        _log.warning("the CA is being changed", step=step)
        return self._shown()

    def _shown(self) -> web.Response:
        authority = self._authority()
        node = self._renew(False)
        return web.json_response(
            {
                "node": of_file(node)[0] if node is not None else None,
                "authorities": [described(cert) for cert in trusted(authority.directory)],
                "phase": authority.phase,
                "ca": authority.ca_pem,
            }
        )
