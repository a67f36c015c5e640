"""The OIDC issuer from npm as a process: `scripts/install-oidc` fetches it, `issuer.js` configures it."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

HERE = Path(__file__).parent
READY_S = 60.0


def modules() -> Path | None:
    """Where `scripts/install-oidc` has put it; None if it has not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("FERRYLINE_OIDC") or cache / "ferryline" / "oidc") / "node_modules"
    return folder if (folder / "oidc-provider").is_dir() else None


class NpmIssuer:
    """``url`` is its name. ``token_seconds``: how long its tokens are good. Use it with ``async with``."""

    client_id = "ferryline-cli"
    audience = "urn:ferryline:test"  # of its access tokens, when a program asks for them
    scopes = ("openid", "offline_access", "email", "groups")

    def __init__(self, token_seconds: int = 3600) -> None:
        self.url = ""
        self._token_seconds = token_seconds
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> NpmIssuer:
        folder = modules()
        assert folder is not None, "scripts/install-oidc has not run"
        self._process = await asyncio.create_subprocess_exec(
            "node",
            str(HERE / "issuer.js"),
            str(folder),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "TOKEN_SECONDS": str(self._token_seconds)},
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(READY_S):
            line = await self._process.stdout.readline()
        self.url = str(json.loads(line.decode().removeprefix("READY "))["issuer"])
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
