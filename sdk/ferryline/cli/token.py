"""`ferryline token`: API keys of principals, made, listed, changed and revoked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import NOT_FOUND, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import warn
from ferryline.cli.principal import DryRun, Yes, key_row, show_key, with_admin
from ferryline.cli.settings import UsageError, config_path, read_file, write_file

if TYPE_CHECKING:
    from ferryline.access_admin import KeyInfo, NewKey, PrincipalInfo
    from ferryline.admin import Admin
    from ferryline.cli.settings import Settings

Expires = Annotated[str | None, typer.Option(help="After so long it is refused: 12h, 90d. [default: never]")]

app = typer.Typer(
    no_args_is_help=True,
    help="""API keys. A key is shown when it is made and never again; the cluster keeps only its hash.

  ferryline token create billing --expires 90d\n
  ferryline token list billing\n
  ferryline token rotate billing --expires 90d     a new key; the old ones stay until they are revoked\n
  ferryline token revoke billing 3f9a1c0de4b7a210  refused everywhere within a moment

A program shows its key in FERRYLINE_TOKEN, a person in a context (ferryline context add NAME --token ...), curl in
the header Authorization: Bearer KEY. Needs manage on the cluster.""",
)


def _seconds(expires: str | None) -> float | None:
    from ferryline.cli.offsets import parse_duration_ms

    if expires is None:
        return None
    ms = parse_duration_ms(expires)
    if ms < 1000:
        raise UsageError(f"--expires {expires}: at least a second")
    return ms / 1000


@app.command()
def create(ctx: typer.Context, name: str, expires: Expires = None) -> None:
    """Make an API key for a principal and print it: this once, alone on stdout.

    Examples:

      ferryline token create billing --expires 90d

      FERRYLINE_TOKEN=$(ferryline token create billing) ferryline consume orders --group billing
    """
    seconds = _seconds(expires)
    show_key(ctx, name, with_admin(ctx, lambda admin: admin.create_key(name, expires=seconds)))


@app.command("list")
def list_keys(ctx: typer.Context, name: str) -> None:
    """The keys of a principal: which there are, not what they are."""
    found = with_admin(ctx, lambda admin: admin.describe_principal(name))
    empty = f"{name} has no keys; ferryline token create {name} makes one"
    of(ctx).output.rows([key_row(name, key) for key in found.keys], columns=["id", "created", "expires"], empty=empty)


@app.command()
def revoke(ctx: typer.Context, name: str, key_id: str, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Refuse a key everywhere, within a moment. Sessions that were opened with it are ended.

    KEY_ID is what `ferryline token list` shows, or the key itself, if that is what has leaked.

    Example: ferryline token revoke billing 3f9a1c0de4b7a210
    """
    wanted = key_id.split("_")[1] if key_id.startswith("fl_") and key_id.count("_") >= 2 else key_id

    async def act(admin: Admin) -> PrincipalInfo:
        found = await admin.describe_principal(name)
        if not dry_run and any(key.id == wanted for key in found.keys):
            await admin.delete_key(name, wanted)
        return found

    if not (yes or dry_run):
        typer.confirm(f"Revoke key {wanted} of {name}?", abort=True)
    keys = with_admin(ctx, act).keys
    if not any(key.id == wanted for key in keys):
        known = ", ".join(key.id for key in keys) or "none"
        raise Failed(f"{name} has no key {wanted}", NOT_FOUND, code="NOT_FOUND", remedy=f"It has: {known}.")
    sentence = f"key {wanted} of {name} " + ("would be revoked (dry run)" if dry_run else "is refused from now on")
    of(ctx).output.done(sentence, principal=name, revoked=wanted, dry_run=dry_run)


@app.command()
def rotate(
    ctx: typer.Context,
    name: str,
    expires: Expires = None,
    revoke_old: Annotated[bool, typer.Option("--revoke-old", help="Revoke all its other keys at once.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Put the new key into the context in use.")] = False,
) -> None:
    """Make a new key, to replace the old ones without a gap: both work until the old ones are revoked.

    Hand the new key out, wait until nobody shows the old one, then: ferryline token revoke. With --save the command
    line itself goes on with the new key.

    Examples:

      ferryline token rotate billing --expires 90d

      ferryline token rotate admin --save --revoke-old
    """
    seconds = _seconds(expires)
    settings = of(ctx).settings
    if save and not settings.context:
        raise UsageError("--save: no context is in use; ferryline context add NAME makes one")

    async def act(admin: Admin) -> tuple[NewKey, list[KeyInfo]]:
        old = list((await admin.describe_principal(name)).keys)
        new = await admin.create_key(name, expires=seconds)
        if save:
            _save(settings, new.key)  # before anything is revoked: the key in use may be among the old ones
        for key in old if revoke_old else ():
            await admin.delete_key(name, key.id)
        return new, old

    new, old = with_admin(ctx, act)
    show_key(ctx, name, new)
    if save:
        warn(f"It is in use from now on, in context {settings.context} of {settings.file}.")
    if revoke_old and old:
        warn(f"Revoked: {', '.join(key.id for key in old)}.")
    elif old:
        warn(f"When nobody shows the old ones any more: ferryline token revoke {name} {old[0].id}" + _more(old))


def _more(old: list[Any]) -> str:
    return f" (and {', '.join(key.id for key in old[1:])})" if len(old) > 1 else ""


def _save(settings: Settings, key: str) -> None:
    path = config_path(settings.file)
    content = read_file(path)
    content["contexts"][settings.context]["token"] = key
    write_file(path, content)
