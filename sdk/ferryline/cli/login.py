"""`ferryline login`: get a token from the issuer that the cluster believes, and keep it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.connection import run
from ferryline.cli.failures import FAILED, NOT_FOUND, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import warn
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.cli.settings import Settings
    from ferryline.login.flow import Client, Login

_ASK_S = 10.0


def app(
    ctx: typer.Context,
    issuer: Annotated[str, typer.Option(help="Which one, by name or URL, if the cluster has several.")] = "",
    client_id: Annotated[str, typer.Option(help="Of a program that the issuer knows, if not the cluster's.")] = "",
    audience: Annotated[str, typer.Option(help="Whom the token is for, if not as the cluster says.")] = "",
    scope: Annotated[list[str] | None, typer.Option(help="To ask for; may be repeated.")] = None,
    client_secret: Annotated[str, typer.Option(help="If the issuer wants one of programs like this.")] = "",
    device: Annotated[bool, typer.Option("--device", help="Type a code on another machine instead.")] = False,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address to go to.")] = False,
    issuer_ca: Annotated[str, typer.Option(help="CA certificate of the issuer.", metavar="FILE")] = "",
    wait: Annotated[float, typer.Option(help="Seconds that logging in may take.", min=1)] = 300.0,
) -> None:
    """Log in with a browser, and keep the token for this cluster: in a file that only you can read.

    The cluster says with which issuer; commands and programs on this machine use the token from then on, unless they
    are given another one (--token, FERRYLINE_TOKEN). It is renewed without asking where the issuer allows that.

    Examples:

      ferryline login                                   opens a browser

      ferryline login --device                          on a machine without one

      ferryline login --url https://mq1:8443 --issuer google
    """
    from ferryline.login.credentials import Credentials, stored

    settings = of(ctx).settings
    given = {
        "client_id": client_id,
        "audience": audience,
        "client_secret": client_secret,
        "scopes": tuple(scope or ()),
    }
    client = choose(run(offered(settings)), issuer, {name: value for name, value in given.items() if value})
    login = run(_log_in(client, issuer_ca, device=device, browser=not no_browser, wait=wait))
    credentials = Credentials()
    run(credentials.keep(addresses(settings), stored(client, login, issuer_ca)))
    if settings.token:
        warn(f"a token is set ({settings.sources.get('token', 'token')}), and goes before this login.")
    left = f"{max(0.0, login.expires_s - time.time()) / 60:.0f} min"
    of(ctx).output.done(
        f"logged in as {login.who or 'somebody'} at {settings.url[0]}; the token lasts {left}"
        + (" and is renewed" if login.refresh_token else ""),
        who=login.who,
        issuer=client.issuer,
        url=list(settings.url),
        token=login.kind,
        expires_s=login.expires_s,
        renewed=bool(login.refresh_token),
        file=str(credentials.path),
    )


def addresses(settings: Settings) -> list[str]:
    """Under which a login is kept: as given, and a loopback address by its name, too."""
    from ferryline.transport import check_url

    urls = [check_url(url) for url in settings.url]
    twins = [url.replace("//127.0.0.1:", "//localhost:") for url in urls]
    return list(dict.fromkeys([*urls, *twins]))


async def offered(settings: Settings) -> list[dict[str, Any]]:
    """The issuers with which people log in, as the first coordinator that answers says."""
    import aiohttp

    from ferryline.calls import problem_of
    from ferryline.protocol.errors import ConnectionFailed, FerrylineError, NotFound
    from ferryline.trust import ssl_context

    context = ssl_context(str(settings.ca) if settings.ca else None)
    limits = aiohttp.ClientTimeout(total=min(settings.timeout, _ASK_S))
    last: FerrylineError = ConnectionFailed("no address")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context), timeout=limits) as http:
        for url in settings.url:
            try:
                async with http.get(f"{url}/v1/login", allow_redirects=False) as answer:
                    if answer.status == 200:
                        return list((await answer.json())["issuers"])
                    last = problem_of(answer.status, await answer.read())
                    if answer.status == 404:
                        last = NotFound(f"{url} is no coordinator, or one that knows no logins")
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                last = ConnectionFailed(f"{url}: {error or type(error).__name__}")
            except (KeyError, ValueError, TypeError):
                last = ConnectionFailed(f"{url}: answers something else")
    raise last


def choose(issuers: list[dict[str, Any]], wanted: str, given: dict[str, Any]) -> Client:
    """One of the cluster's issuers, by name or URL, with what was given instead of what the cluster says.

    Raises Failed or UsageError, naming those there are.
    """
    from ferryline.login.flow import SCOPES, Client

    found = [one for one in issuers if wanted in ("", one["name"], one["issuer"])]
    if not found and wanted.startswith("http") and "client_id" in given:  # the cluster may believe it all the same
        return Client(wanted, **{"audience": given["client_id"], **given})
    names = ", ".join(f"{one['name']} ({one['issuer']})" for one in issuers)
    if not found:
        text = f"no issuer {wanted!r}; there are: {names}" if names else "nobody can log in at this cluster"
        raise Failed(
            text, NOT_FOUND, code="NOT_FOUND", remedy="The access file of the coordinator names issuers: docs/login.md."
        )
    if len(found) > 1:
        raise UsageError(f"--issuer is needed: {names}")
    one = found[0]
    told = {
        "client_id": str(one["client_id"]),
        "audience": str(one["audience"]),
        "client_secret": str(one.get("client_secret") or ""),
        "scopes": tuple(map(str, one.get("scopes") or SCOPES)),
    }
    return Client(str(one["issuer"]), name=str(one["name"]), **{**told, **given})


async def _log_in(client: Client, issuer_ca: str, *, device: bool, browser: bool, wait: float) -> Login:
    from ferryline.login import browser as with_browser
    from ferryline.login import device as with_device
    from ferryline.login.issuer import Issuer

    async with Issuer(client.issuer, ca=issuer_ca or None) as issuer:
        if device:
            return await with_device.log_in(client, issuer, _show_code, timeout=wait)
        return await with_browser.log_in(client, issuer, _open if browser else _show, timeout=wait)


def _show(url: str) -> None:
    warn(f"Go to\n\n  {url}\n\nand log in there, on this machine.")


def _open(url: str) -> None:
    import webbrowser

    _show(url)
    try:
        if not webbrowser.open(url):
            warn("No browser was found; --device works without one.")
    except webbrowser.Error as error:
        raise Failed(f"the browser does not start: {error}", FAILED, remedy="--no-browser, or --device.") from None


def _show_code(url: str, code: str, complete: str) -> None:
    warn(f"Go to\n\n  {url}\n\non any machine, and type the code\n\n  {code}\n")
    if complete:
        warn(f"or go to\n\n  {complete}\n")
