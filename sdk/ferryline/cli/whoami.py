"""`ferryline whoami`: for whom the cluster takes this client, and what that one may do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from ferryline.cli.connection import connected, run
from ferryline.cli.invocation import of

if TYPE_CHECKING:
    from ferryline.access_admin import Whoami
    from ferryline.cli.settings import Settings


def app(ctx: typer.Context) -> None:
    """Who am I here, and what may I do? Asks the cluster, with the token that every command would use.

    Example: ferryline whoami --output json
    """
    me = run(_ask(of(ctx).settings))
    shown: dict[str, Any] = {"principal": me.principal, "by": me.by}
    if not me.access:
        shown["grants"] = "everything: access control is off"
    else:
        shown["grants"] = [f"{one.resource} {one.pattern}: {'+'.join(one.actions)}" for one in me.grants]
    if me.key:
        shown["key"] = me.key
    if me.expires_ms:
        shown["token_ends"] = _time(me.expires_ms)
    of(ctx).output.one(shown)


async def _ask(settings: Settings) -> Whoami:
    async with connected(settings) as client:
        return await client.admin.whoami(timeout=settings.timeout)


def _time(ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(ms / 1000, tz=UTC).isoformat(timespec="seconds")
