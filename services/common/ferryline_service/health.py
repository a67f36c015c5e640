"""/healthz: the process is alive. /readyz: it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web


def health_routes(
    ready: Callable[[], str],
    about: Callable[[], dict[str, Any]],
    standby_for: Callable[[], str] = lambda: "",
) -> list[web.RouteDef]:
    """``ready`` returns why the service is not ready, "" when it is; ``about`` what /healthz tells about it.
    ``standby_for``: URL of the service that does the work while this one is ready to take over, "" otherwise.

    /healthz answers as long as the loop turns; the coordinator probes it.
    """

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "alive", **about()})

    async def readyz(_: web.Request) -> web.Response:
        active = standby_for()
        if active:
            return web.json_response({"status": "standby", "active": active})
        reason = ready()
        if reason:
            return web.json_response({"status": "not ready", "reason": reason}, status=503)
        return web.json_response({"status": "ready"})

    return [web.get("/healthz", healthz), web.get("/readyz", readyz)]
