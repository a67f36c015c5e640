"""The authorization code flow: a browser logs the person in, and comes back to a port of this machine."""

from __future__ import annotations

import asyncio
import html
import secrets
import time
from collections.abc import Callable

from aiohttp import web

from ferryline.login.flow import SECRET_BYTES, Attempt, Client, Login, attempt, authorization_url, code_of, login_of
from ferryline.login.issuer import Issuer
from ferryline.protocol.errors import BadCredentials, DeadlineExceeded, FerrylineError

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Ferryline</title>
<style>body{{font:18px/1.5 system-ui,sans-serif;margin:15vh auto;max-width:34em;text-align:center}}</style>
<h1>{title}</h1><p>{text}</p></html>"""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address holds the code
}


class _Landing:
    """Where the browser comes back to: a free port of 127.0.0.1. The first answer to this attempt counts."""

    def __init__(self) -> None:
        self.redirect_uri = ""
        self._check: Callable[[dict[str, str]], str] | None = None
        self._code: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._done: asyncio.Future[FerrylineError | None] = asyncio.get_running_loop().create_future()
        app = web.Application()
        app.router.add_get("/callback", self._callback)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)

    async def open(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.redirect_uri = f"http://127.0.0.1:{self._runner.addresses[0][1]}/callback"

    async def code(self, check: Callable[[dict[str, str]], str]) -> str:
        self._check = check
        return await self._code

    def finish(self, error: FerrylineError | None) -> None:
        """Lets the browser's last page say how it ended."""
        if not self._done.done():
            self._done.set_result(error)

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _callback(self, request: web.Request) -> web.Response:
        if self._check is None or self._code.done():
            return _page(409, "Nothing to do", "This login has been answered before.")
        try:
            code = self._check(dict(request.query))
        except BadCredentials as error:
            if error.details.get("reason") == "state":  # any page may send a browser here: ours is still to come
                return _page(400, "Not logged in", error.message)
            self._code.set_exception(error)
            return _page(403, "Not logged in", error.message)
        self._code.set_result(code)
        failed = await asyncio.shield(self._done)
        if failed is not None:
            return _page(403, "Not logged in", failed.message)
        return _page(200, "Logged in", "You can close this window and go back to the terminal.")


def _page(status: int, title: str, text: str) -> web.Response:
    body = _PAGE.format(title=html.escape(title), text=html.escape(text))
    return web.Response(status=status, text=body, content_type="text/html", headers=_HEADERS)


async def log_in(client: Client, issuer: Issuer, show: Callable[[str], None], *, timeout: float) -> Login:
    """Log in with a browser. ``show`` gets the address to go to. Raises BadCredentials, ConnectionFailed, or
    DeadlineExceeded when nobody came back within ``timeout`` seconds."""
    at = await issuer.discover()
    landing = _Landing()
    await landing.open()
    failed: FerrylineError | None = None
    try:
        tried: Attempt = attempt(secrets.token_bytes(3 * SECRET_BYTES), landing.redirect_uri)
        show(authorization_url(client, at, tried))
        async with asyncio.timeout(timeout):
            code = await landing.code(lambda query: code_of(query, client, tried))
        answer = await issuer.tokens(
            at.token,
            client,
            grant_type="authorization_code",
            code=code,
            redirect_uri=tried.redirect_uri,
            code_verifier=tried.verifier,
        )
        return login_of(answer, client, time.time(), nonce=tried.nonce)
    except TimeoutError:
        failed = DeadlineExceeded(f"nobody logged in within {timeout:g} s")
        raise failed from None
    except FerrylineError as error:
        failed = error
        raise
    finally:
        landing.finish(failed)
        await landing.close()
