"""`ferryline logout`: forget a login, and tell the issuer so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ferryline.cli.connection import run
from ferryline.cli.invocation import of
from ferryline.cli.login import addresses
from ferryline.cli.output import warn

if TYPE_CHECKING:
    from ferryline.login.credentials import Stored


def app(
    ctx: typer.Context,
    everywhere: Annotated[bool, typer.Option("--all", help="Every login on this machine.")] = False,
) -> None:
    """Forget the token that `ferryline login` keeps for this cluster, and have the issuer end what renews it.

    The token itself is good until it ends: minutes to an hour, as the issuer decided.

    Example: ferryline logout --all
    """
    from ferryline.login.credentials import Credentials

    credentials = Credentials()
    urls = list(credentials.read()) if everywhere else addresses(of(ctx).settings)
    gone = run(credentials.forget(urls))
    for login in {login.refresh_token: login for login in gone if login.refresh_token}.values():
        run(_revoke(login))
    count = len(gone)
    of(ctx).output.done("logged out" if count else "nobody was logged in", forgotten=count, file=str(credentials.path))


async def _revoke(login: Stored) -> None:
    """Best effort: what matters is that this machine has forgotten it."""
    from ferryline.login.issuer import Issuer
    from ferryline.protocol.errors import FerrylineError

    try:
        async with Issuer(login.issuer, ca=login.issuer_ca or None) as issuer:
            at = await issuer.discover()
            if not at.revocation:
                return
            fields = {"token": login.refresh_token, "token_type_hint": "refresh_token", "client_id": login.client_id}
            if login.client_secret:
                fields["client_secret"] = login.client_secret
            status, _ = await issuer.post(at.revocation, fields)
            if status >= 400:
                warn(f"{login.issuer}: answered {status} when asked to end the login")
    except FerrylineError as error:
        warn(f"the issuer was not told: {error.message}")
