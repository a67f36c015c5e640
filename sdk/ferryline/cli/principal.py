"""`ferryline principal`: who there is, and what each may do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ferryline.cli.invocation import of
from ferryline.cli.output import stderr
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.access_admin import NewKey, PrincipalInfo
    from ferryline.admin import Admin

T = TypeVar("T")
_GRANTS = "topic:NAME, group:NAME, exchange:NAME or cluster. NAME may end with *. May be repeated."
app = typer.Typer(
    no_args_is_help=True,
    help="""Principals: who may use the cluster, and for what. Nothing is allowed that was not granted.

read on a topic is to consume it, on a group to be its member; write on a topic is to send; manage is to create, change
and delete, and includes the other two. A consumer needs read on its topic and on its group.

  ferryline principal create billing --read topic:orders.* --read group:billing --key\n
  ferryline principal create shop --write topic:orders.* --quota records=1000,bytes=1MB --key\n
  ferryline principal grant shop --read topic:prices\n
  ferryline principal disable shop

Needs manage on the cluster, and a coordinator with --access.""",
)

Read = Annotated[list[str] | None, typer.Option("--read", help=_GRANTS)]
Write = Annotated[list[str] | None, typer.Option("--write", help="The same, for writing.")]
Manage = Annotated[list[str] | None, typer.Option("--manage", help="The same, for everything.")]
QuotaText = Annotated[
    str | None,
    typer.Option("--quota", help="requests=, records=, bytes= a second; connections=, stored_bytes=. 0: no limit."),
]
Comment = Annotated[str | None, typer.Option(help="A note for people.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
COLUMNS = ["name", "grants", "quota", "keys", "disabled", "comment"]


def with_admin(ctx: typer.Context, act: Callable[[Admin], Awaitable[T]]) -> T:
    """Connect and do something with `client.admin`."""
    from ferryline.cli.connection import connected, run

    settings = of(ctx).settings

    async def work() -> T:
        async with connected(settings) as client:
            return await act(client.admin)

    return run(work())


def principal_row(principal: PrincipalInfo) -> dict[str, Any]:
    """A principal as every output form prints it."""
    from ferryline.cli.grants import show_grant, show_quota

    return {
        "name": principal.name,
        "grants": [show_grant(grant) for grant in principal.grants],
        "quota": show_quota(principal.quota) or None,
        "keys": len(principal.keys),
        "disabled": principal.disabled,
        "comment": principal.comment or None,
        "declared": principal.declared,
        "version": principal.version,
    }


def key_row(principal: str, key: Any) -> dict[str, Any]:
    """A key without its secret."""
    return {
        "principal": principal,
        "id": key.id,
        "created": moment(key.created_ms),
        "expires": moment(key.expires_ms) if key.expires_ms else "never",
    }


def moment(ms: int) -> str:
    """A time for people, UTC."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def show_key(ctx: typer.Context, principal: str, key: NewKey) -> None:
    """The only time that a key is shown: alone on stdout, so that it can be piped; what to do with it on stderr."""
    output = of(ctx).output
    output.done(key.key, principal=principal, id=key.id, key=key.key, expires_ms=key.expires_ms or None)
    until = f", good until {moment(key.expires_ms)}" if key.expires_ms else ""
    if output.for_people:
        stderr().print(
            f"Key {key.id} of {principal}{until}. It is shown this once: keep it where secrets are kept.\n"
            "Whoever shows it is this principal: FERRYLINE_TOKEN, --token, or in a header: Authorization: Bearer KEY",
            markup=False,
        )


@app.command()
def create(
    ctx: typer.Context,
    name: str,
    read: Read = None,
    write: Write = None,
    manage: Manage = None,
    quota: QuotaText = None,
    comment: Comment = None,
    key: Annotated[bool, typer.Option("--key", help="Make an API key, too, and print it.")] = False,
) -> None:
    """Create a principal that may do what the options say, and nothing else.

    A person who logs in by an issuer is named ISSUER:NAME and needs no key: created here, it gets grants of its own.

    Examples:

      ferryline principal create billing --read topic:orders.* --read group:billing --key

      ferryline principal create shop --write topic:orders.* --quota records=1000,bytes=1MB --key

      ferryline principal create google:ann@example.org --manage topic:*,group:* --read cluster
    """
    from ferryline.cli.grants import parse_grants, parse_quota

    grants = parse_grants(read, write, manage)
    limits = parse_quota(quota) if quota else None

    async def act(admin: Admin) -> tuple[PrincipalInfo, NewKey | None]:
        made = await admin.create_principal(name, grants, quota=limits, comment=comment or "")
        return made, await admin.create_key(name) if key else None

    made, new = with_admin(ctx, act)
    if new is not None:
        if of(ctx).output.for_people:
            stderr().print(f"{name} may {_said(made)}", markup=False)
        show_key(ctx, name, new)
        return
    of(ctx).output.done(f"{name} may {_said(made)}", **principal_row(made))


def _said(principal: PrincipalInfo) -> str:
    return ", ".join(principal_row(principal)["grants"]) or "do nothing yet: ferryline principal grant"


@app.command("list")
def list_principals(ctx: typer.Context) -> None:
    """All principals that are known by name. Who comes by an issuer's token alone is in the audit log only."""
    found = with_admin(ctx, lambda admin: admin.list_principals())
    empty = "no principals; ferryline principal create makes one"
    of(ctx).output.rows([principal_row(one) for one in found], columns=COLUMNS, empty=empty)


@app.command()
def show(ctx: typer.Context, name: str) -> None:
    """One principal, with its keys."""
    found = with_admin(ctx, lambda admin: admin.describe_principal(name))
    keys = [key_row(name, key) for key in found.keys]
    if not of(ctx).output.for_people:
        of(ctx).output.one({**principal_row(found), "key_list": keys})
        return
    of(ctx).output.one(principal_row(found))
    typer.echo()
    of(ctx).output.rows(keys, columns=["id", "created", "expires"], empty="no keys; ferryline token create makes one")


@app.command()
def grant(ctx: typer.Context, name: str, read: Read = None, write: Write = None, manage: Manage = None) -> None:
    """Allow more, from now on, also to those who are connected.

    Example: ferryline principal grant shop --read topic:prices
    """
    grants = _needed(read, write, manage)
    found = with_admin(ctx, lambda admin: admin.grant(name, *grants))
    of(ctx).output.done(f"{name} may {_said(found)}", **principal_row(found))


@app.command()
def revoke(
    ctx: typer.Context,
    name: str,
    read: Read = None,
    write: Write = None,
    manage: Manage = None,
    dry_run: DryRun = False,
) -> None:
    """Take back what was granted, on exactly the names and prefixes that were granted.

    Example: ferryline principal revoke shop --read topic:prices --dry-run
    """
    from msgspec.structs import replace

    from ferryline.access_admin import without_grants

    less = _needed(read, write, manage)

    async def act(admin: Admin) -> tuple[PrincipalInfo, PrincipalInfo]:
        before = await admin.describe_principal(name)
        if dry_run:
            return before, replace(before, grants=without_grants(before.grants, less))
        return before, await admin.revoke(name, *less)

    before, after = with_admin(ctx, act)
    if set(before.grants) == set(after.grants):
        raise UsageError(f"{name} was not granted that; it may {_said(before)}")
    would = "would be left with" if dry_run else "may"
    of(ctx).output.done(f"{name} {would} {_said(after)}", **principal_row(after), dry_run=dry_run)


def _needed(read: list[str] | None, write: list[str] | None, manage: list[str] | None) -> Any:
    from ferryline.cli.grants import parse_grants

    grants = parse_grants(read, write, manage)
    if not grants:
        raise UsageError("--read, --write or --manage is missing")
    return grants


@app.command()
def alter(ctx: typer.Context, name: str, quota: QuotaText = None, comment: Comment = None) -> None:
    """Change quota or comment. Of a quota, what is not named stays.

    Example: ferryline principal alter shop --quota records=2000,bytes=0
    """
    from ferryline.cli.grants import parse_quota

    if quota is None and comment is None:
        raise UsageError("--quota or --comment is missing")

    async def act(admin: Admin) -> PrincipalInfo:
        before = await admin.describe_principal(name)
        limits = parse_quota(quota, before.quota) if quota is not None else None
        return await admin.alter_principal(name, quota=limits, comment=comment, version=before.version)

    row = principal_row(with_admin(ctx, act))
    of(ctx).output.done(f"{name}: quota {row['quota'] or 'none'}, comment {row['comment'] or 'none'}", **row)


@app.command()
def disable(ctx: typer.Context, name: str) -> None:
    """Refuse a principal everywhere, within a moment; its sessions are ended, its keys and grants stay."""
    with_admin(ctx, lambda admin: admin.alter_principal(name, disabled=True))
    of(ctx).output.done(
        f"{name} is refused everywhere; ferryline principal enable lets it in", name=name, disabled=True
    )


@app.command()
def enable(ctx: typer.Context, name: str) -> None:
    """Let a disabled principal in again."""
    with_admin(ctx, lambda admin: admin.alter_principal(name, disabled=False))
    of(ctx).output.done(f"{name} is let in", name=name, disabled=False)


@app.command()
def delete(ctx: typer.Context, name: str, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Delete a principal with its keys and grants. What it made stays.

    Example: ferryline principal delete shop --dry-run
    """
    if dry_run:
        row = principal_row(with_admin(ctx, lambda admin: admin.describe_principal(name)))
        of(ctx).output.done(f"{name} and {row['keys']} keys would be deleted (dry run)", **row, dry_run=True)
        return
    if not yes:
        typer.confirm(f"Delete principal {name} and its keys?", abort=True)
    with_admin(ctx, lambda admin: admin.delete_principal(name))
    of(ctx).output.done(f"principal {name} deleted", deleted=name, dry_run=False)
