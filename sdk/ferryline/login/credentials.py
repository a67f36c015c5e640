"""Tokens of people who logged in, in one file that only they can read; refreshed by one process at a time.

``~/.config/ferryline/credentials.json`` (FERRYLINE_CREDENTIALS names another), by address of the cluster: a token is
never sent to an address that it was not made for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from ferryline.login.flow import SCOPES, Client, Login, login_of
from ferryline.login.issuer import Issuer
from ferryline.protocol.errors import BadCredentials, ConnectionFailed, FerrylineError
from ferryline.tokens import renew_at

LOCK_S = 30.0  # a refresh of another process takes less
_POLL_S = 0.05
_REMEDY = "log in again: ferryline login"


class Stored(msgspec.Struct, frozen=True):
    """One login. ``expires_s``: seconds since the epoch."""

    issuer: str
    client_id: str
    audience: str
    token: str
    expires_s: float
    kind: str = "id"
    refresh_token: str = ""
    who: str = ""
    scopes: tuple[str, ...] = SCOPES
    client_secret: str = ""
    issuer_ca: str = ""

    @property
    def client(self) -> Client:
        return Client(self.issuer, self.client_id, self.audience, self.scopes, self.client_secret)


def stored(client: Client, login: Login, issuer_ca: str = "") -> Stored:
    """What is kept of a login, with all that renewing it takes."""
    return Stored(
        client.issuer,
        client.client_id,
        client.audience,
        login.token,
        login.expires_s,
        login.kind,
        login.refresh_token,
        login.who,
        client.scopes,
        client.client_secret,
        issuer_ca,
    )


def credentials_path() -> Path:
    """The file in force, whether or not it exists."""
    if named := os.environ.get("FERRYLINE_CREDENTIALS"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "ferryline" / "credentials.json"


class Credentials:
    """The file. Reading needs no lock, since it is replaced whole; whoever changes it holds the lock."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or credentials_path()

    def read(self) -> dict[str, Stored]:
        """All logins by address of the cluster. Raises BadCredentials for a file that cannot be read."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=dict[str, Stored])
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return {}  # of somebody else: a service that nobody logs in at may run with any HOME
        except (OSError, msgspec.MsgspecError) as error:
            raise BadCredentials(f"{self.path}: {error}") from None

    def find(self, urls: Iterable[str]) -> tuple[str, Stored] | None:
        """The login for the first of these addresses that has one."""
        found = self.read()
        return next(((url, found[url]) for url in urls if url in found), None)

    async def keep(self, urls: Iterable[str], login: Stored) -> None:
        """Keep a login for a cluster, in place of an earlier one."""
        async with self.locked():
            self._write({**self.read(), **dict.fromkeys(urls, login)})

    async def forget(self, urls: Iterable[str]) -> list[Stored]:
        """Returns what was forgotten."""
        gone = set(urls)
        async with self.locked():
            found = self.read()
            if gone & found.keys():
                self._write({url: login for url, login in found.items() if url not in gone})
        return [login for url, login in found.items() if url in gone]

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the lock that all processes of this user share. Raises BadCredentials if another one does not let go."""
        import fcntl  # not on every system where clients run; logins are kept on those that have it

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = time.monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise BadCredentials(f"{self.path}: locked by another process for {LOCK_S:g} s") from None
                await asyncio.sleep(_POLL_S)
            yield
        finally:
            os.close(lock)  # lets go of it

    def _write(self, found: dict[str, Stored]) -> None:
        text = json.dumps({url: msgspec.to_builtins(login) for url, login in found.items()}, indent=2)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # a refresh token that was used and not kept would log its owner out
        temporary.replace(self.path)

    # -- the token to use --------------------------------------------------------------------------

    async def token(self, url: str, refused: str = "") -> str:
        """The token for a cluster, refreshed if it is due or was refused. Raises BadCredentials: log in again."""
        login = self._login(url)
        if self._good(login, refused):
            return login.token
        async with self.locked():
            login = self._login(url)  # another process may have refreshed it while we waited
            if self._good(login, refused):
                return login.token
            renewed = await self._refreshed(login)
            found = self.read()
            # Every address of this cluster has the same login: the old refresh token may be worth nothing from now on.
            same = {name for name, other in found.items() if other.refresh_token == login.refresh_token}
            self._write({**found, **dict.fromkeys(same | {url}, renewed)})
            return renewed.token

    def _login(self, url: str) -> Stored:
        login = self.read().get(url)
        if login is None:
            raise BadCredentials(f"not logged in at {url}; {_REMEDY}", reason="login")
        return login

    def _good(self, login: Stored, refused: str) -> bool:
        if login.token == refused:
            return False
        now_s = time.time()
        return now_s < (renew_at(login.token, now_s) if login.refresh_token else login.expires_s)

    async def _refreshed(self, login: Stored) -> Stored:
        if not login.refresh_token:
            raise BadCredentials(f"the login has ended; {_REMEDY}", reason="login")
        client = login.client
        try:
            async with Issuer(login.issuer, ca=login.issuer_ca or None) as issuer:
                at = await issuer.discover()
                answer: Any = await issuer.tokens(
                    at.token,
                    client,
                    grant_type="refresh_token",
                    refresh_token=login.refresh_token,
                    scope=" ".join(login.scopes),
                )
            return stored(
                client, login_of(answer, client, time.time(), refresh_token=login.refresh_token), login.issuer_ca
            )
        except BadCredentials as error:
            raise BadCredentials(f"the login has ended ({error.message}); {_REMEDY}", reason="login") from None
        except ConnectionFailed:
            if time.time() < login.expires_s:
                return login  # good for a moment: the next request tries again
            raise


class LoginToken:
    """The function that a client asks for its token: that of whoever logged in at ``url`` on this machine."""

    any_loop = True

    def __init__(self, credentials: Credentials, url: str) -> None:
        self._credentials, self._url = credentials, url
        self._last = ""

    async def __call__(self) -> str:
        """Asked again for a token that is still good: it was refused, and another one is needed."""
        refused = self._last if self._last and self._still_good() else ""
        self._last = await self._credentials.token(self._url, refused)
        return self._last

    def _still_good(self) -> bool:
        try:
            login = self._credentials.find([self._url])
        except FerrylineError:
            return False
        now_s = time.time()
        return login is not None and login[1].token == self._last and now_s < renew_at(self._last, now_s)


def login_token(urls: Iterable[str]) -> LoginToken | None:
    """For a client of these addresses, if somebody logged in at one of them. Raises BadCredentials."""
    try:
        credentials = Credentials()
    except RuntimeError:  # this user has no home
        return None
    found = credentials.find(urls)
    return LoginToken(credentials, found[0]) if found is not None else None
