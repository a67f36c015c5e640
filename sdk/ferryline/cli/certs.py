"""`ferryline certs`: which certificates are in use, until when, and how they are changed under way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import FAILED, NOT_FOUND, Failed
from ferryline.cli.invocation import of

if TYPE_CHECKING:
    from ferryline.cli.settings import Settings

app = typer.Typer(
    no_args_is_help=True, help="Show certificates and when they expire; change them while everything runs."
)


def _all(settings: Settings) -> list[dict[str, Any]]:
    """The CA and what each server shows, as rows; a server that does not answer is a row with its error."""
    from ferryline.cli import tlsinfo

    moment = tlsinfo.now()
    rows: list[dict[str, Any]] = []
    authorities = []
    if settings.ca is not None:
        try:
            authorities = tlsinfo.read_file(settings.ca)
        except (OSError, ValueError) as error:
            raise Failed(f"{settings.ca}: {error}", NOT_FOUND, remedy="--ca names the cluster's ca.crt.") from None
    rows += [_row(str(settings.ca), cert, moment, trusted=True) for cert in authorities]
    for url in settings.url:
        try:
            cert = tlsinfo.of_server(url, min(settings.timeout, tlsinfo.TIMEOUT_S))
        except OSError as error:
            rows.append({"where": url, "subject": None, "error": str(error)})
            continue
        trusted = any(tlsinfo.signed_by(cert, authority) for authority in authorities) if authorities else None
        rows.append(_row(url, cert, moment, trusted=trusted))
    return rows


def _row(where: str, cert: Any, moment: Any, trusted: bool | None) -> dict[str, Any]:
    return {
        "where": where,
        "subject": cert.subject,
        "issuer": cert.issuer,
        "names": list(cert.names),
        "not_before": cert.not_before.isoformat(),
        "not_after": cert.not_after.isoformat(),
        "days_left": round(cert.days_left(moment), 1),
        "signed_by_ca": trusted,
        "sha256": cert.fingerprint,
        "error": None,
    }


@app.command()
def show(ctx: typer.Context) -> None:
    """The CA that is trusted here, and the certificate that each server shows.

    Example: ferryline certs show --url https://mq1:8443,https://mq2:9443 --ca ca.crt
    """
    rows = _all(of(ctx).settings)
    of(ctx).output.rows(rows, columns=["where", "subject", "issuer", "not_after", "days_left", "signed_by_ca", "names"])


@app.command()
def expiry(
    ctx: typer.Context,
    days: Annotated[float, typer.Option(help="Fail when one has fewer days left.", min=0)] = 14,
) -> None:
    """Fail (exit status 1) when a certificate expires soon or a server cannot be asked: for cron and monitoring."""
    rows = _all(of(ctx).settings)
    of(ctx).output.rows(rows, columns=["where", "subject", "not_after", "days_left", "error"])
    short = [row["where"] for row in rows if row["error"] is None and row["days_left"] < days]
    if short:
        raise Failed(f"less than {days:g} days left: {', '.join(short)}", FAILED, code="CERTIFICATE_EXPIRES")
    if silent := [row["where"] for row in rows if row["error"] is not None]:
        raise Failed(f"no certificate from {', '.join(silent)}", FAILED, code="CONNECTION_FAILED")


@app.command()
def rotate(ctx: typer.Context) -> None:
    """New certificates for the coordinator and every broker, without a restart. Open connections go on.

    Brokers also renew theirs by themselves, 60 days before they end.
    """
    from ferryline.cli.connection import connected, run
    from ferryline.cli.rotation import Rotation

    invocation = of(ctx)

    async def act() -> list[dict[str, Any]]:
        async with connected(invocation.settings) as client:
            return await Rotation(client).renew()

    invocation.output.rows(run(act()), columns=["node", "issuer", "not_after"])


@app.command("rotate-ca")
def rotate_ca(
    ctx: typer.Context,
    step: Annotated[str, typer.Argument(help="trust, issue or finish: in this order.")],
    out: Annotated[Path | None, typer.Option(help="Write what clients have to trust to this file.")] = None,
) -> None:
    """Change the cluster's CA in three steps, without a restart; each may be repeated.

    trust: a new CA is made, and every node trusts both. Give the new ca.crt to every client now; the SDK reads the
    file again by itself. issue: every node gets a certificate of the new CA. finish: the old CA is trusted no more.

    Example: ferryline certs rotate-ca trust --out ca.crt
    """
    from ferryline.cli.connection import connected, run
    from ferryline.cli.failures import USAGE
    from ferryline.cli.output import warn
    from ferryline.cli.rotation import STEPS, TRUST, Rotation

    if step not in STEPS:
        raise Failed(f"{step}: {', '.join(STEPS)}", USAGE, code="INVALID_ARGUMENT")
    invocation = of(ctx)

    async def act() -> tuple[list[dict[str, Any]], str]:
        async with connected(invocation.settings) as client:
            return await Rotation(client).change_ca(step)

    rows, pem = run(act())
    if out is not None:
        temporary = out.with_name(f"{out.name}.tmp")
        temporary.write_text(pem)
        temporary.replace(out)
    invocation.output.rows(rows, columns=["node", "issuer", "trusts"])
    if step == TRUST:
        warn("now give the new ca.crt to every client, then: ferryline certs rotate-ca issue")
