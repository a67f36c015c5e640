"""`ferryline doctor`: says what is wrong, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import FAILED, UNAVAILABLE, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import Output, say, stdout

if TYPE_CHECKING:
    from ferryline.cli.diagnosis import Finding
    from ferryline.cli.settings import Settings

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}
NAMED_MAX = 5


def app(
    ctx: typer.Context,
    all_findings: Annotated[bool, typer.Option("--all", help="Also show what is in order.")] = True,
) -> None:
    """Look at everything between this command and the records, and say what is wrong and what to do.

    Settings, names, ports, TLS, certificates, clocks, each service's health, brokers, partitions, disks. Exit status 0
    when all is well (warnings included), 5 when no server can be used, 1 for other problems.

    Examples:

      ferryline doctor

      ferryline doctor --url https://mq1:8443 --ca ca.crt --output json
    """
    from ferryline.cli import diagnosis

    invocation = of(ctx)
    settings = invocation.settings
    found = diagnosis.check_settings(settings)
    answering = 0
    for url in settings.url:
        findings, answers = diagnosis.check_server(url, settings.ca)
        found += findings
        answering += answers
        if not answers:
            found += diagnosis.check_port_owner(url)
    if answering:
        from ferryline.cli.connection import run

        found += run(_cluster(settings))
    from ferryline.cli.settings import local_data_dir

    found += diagnosis.check_disk(local_data_dir())
    _show(found, invocation.output, all_findings)
    problems = sum(finding.level == diagnosis.FAIL for finding in found)
    if not answering:
        raise Failed("no server can be used", UNAVAILABLE)
    if problems:
        raise Failed(f"{problems} problem{'s' if problems > 1 else ''}", FAILED)


def _show(found: list[Finding], output: Output, everything: bool) -> None:
    shown = [finding for finding in found if everything or finding.level != "ok"]
    if not output.for_people:
        output.rows(finding.row() for finding in shown)
        return
    from rich.text import Text

    console = stdout()
    for finding in shown:
        mark, style = MARKS[finding.level]
        console.print(Text(f"{mark} ", style=style) + Text(f"{finding.what}: ", style="bold") + Text(finding.detail))
        if finding.remedy:
            console.print(Text(f"    → {finding.remedy}", style="dim"))
    if all(finding.level == "ok" for finding in found):
        say("all is well")


async def _cluster(settings: Settings) -> list[Finding]:
    """What the cluster says about itself, and whether its brokers can be reached from here."""
    import asyncio

    from ferryline.cli import diagnosis
    from ferryline.cli.connection import connected
    from ferryline.cli.diagnosis import FAIL, OK, WARN, Finding
    from ferryline.protocol.errors import FerrylineError
    from ferryline.protocol.messages import FEATURE_LEVEL

    try:
        async with connected(settings) as client:
            metadata = client.routing.cluster
            brokers, topics = list(metadata.brokers.values()), dict(metadata.topics)
            parts = list(metadata.partitions.values())
            level = metadata.feature_level
    except FerrylineError as error:
        return [Finding(FAIL, "cluster", str(error), error.remedy)]
    found = [Finding(OK, "cluster", f"{metadata.cluster_id}: {len(brokers)} brokers, {len(topics)} topics")]
    found += diagnosis.check_versions([level], FEATURE_LEVEL)
    for broker in brokers:
        state = _state(broker)
        if state:
            found.append(Finding(WARN, f"broker {broker.id}", f"{broker.external} is {state[0]}", state[1]))
        if broker.external not in settings.url and not broker.fenced:
            findings, answers = await asyncio.to_thread(diagnosis.check_server, broker.external, settings.ca)
            found += [one for one in findings if one.level != OK]
            if answers:
                found.append(Finding(OK, f"broker {broker.id}", f"{broker.external} can be reached"))
    return found + _partitions(parts, {topic.id: topic.name for topic in topics.values()})


def _state(broker: Any) -> tuple[str, str] | None:
    if broker.draining:
        return "draining", f"It gets its primaries back after: ferryline broker undrain {broker.id}"
    if broker.fenced:
        return "fenced: it is down, or silent for over 3 s", "Start it, or look into its log and at its network."
    if broker.stopping:
        return "stopping", "Nothing to do, unless it should not."
    return None


def _partitions(parts: list[Any], names: dict[str, str]) -> list[Finding]:
    from ferryline.cli.cluster import MOVING, OFFLINE, READ_ONLY, UNDER_REPLICATED, state_of
    from ferryline.cli.diagnosis import FAIL, OK, WARN, Finding

    by_state: dict[str, list[str]] = {}
    for part in parts:
        by_state.setdefault(state_of(part), []).append(f"{names.get(part.topic_id, part.topic_id)}/{part.partition}")
    found: list[Finding] = []
    for state, level, fact, remedy in (
        (OFFLINE, FAIL, "without a primary", "They wait for a broker that has every acknowledged record: start those."),
        (READ_ONLY, FAIL, "below min_isr, refusing records", "Start the missing brokers, or: ferryline topic alter."),
        (UNDER_REPLICATED, WARN, "under-replicated", "Copies return by themselves, or are replaced after 30 s."),
        (MOVING, OK, "moving to other brokers", ""),
    ):
        if some := sorted(by_state.get(state, [])):
            more = f" and {len(some) - NAMED_MAX} more" if len(some) > NAMED_MAX else ""
            found.append(Finding(level, "partitions", f"{fact}: {', '.join(some[:NAMED_MAX])}{more}", remedy))
    return found or [Finding(OK, "partitions", f"all {len(parts)} have a primary and all their copies")]
