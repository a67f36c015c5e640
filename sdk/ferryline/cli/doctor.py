"""`ferryline doctor`: says what is wrong, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import FAILED, UNAVAILABLE, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import Output, say, stdout

if TYPE_CHECKING:
    from ferryline.cli.diagnosis import Finding
    from ferryline.cli.settings import Settings
    from ferryline.client import Client

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}
NAMED_MAX = 5
LETTERS_S = 5.0


def app(
    ctx: typer.Context,
    all_findings: Annotated[bool, typer.Option("--all/--problems", help="Also show what is in order.")] = True,
    data_dir: Annotated[Path | None, typer.Option(help="Of a cluster on this machine, if it is another one.")] = None,
) -> None:
    """Look at everything between this command and the records, and say what is wrong and what to do.

    Settings, names, ports, TLS, certificates, clocks, tokens, each service's health, releases, brokers and their disks,
    partitions, groups, queues and dead letters, keys on this machine. Exit status 0 when all is well (warnings
    included), 5 when no server can be used, 1 for other problems.

    Examples:

      ferryline doctor

      ferryline doctor --url https://mq1:8443 --ca ca.crt --output json
    """
    from ferryline.cli import diagnosis

    invocation = of(ctx)
    found, answering = examine(invocation.settings, data_dir)
    _show(found, invocation.output, all_findings)
    problems = sum(finding.level == diagnosis.FAIL for finding in found)
    if not answering:
        raise Failed("no server can be used", UNAVAILABLE)
    if problems:
        raise Failed(f"{problems} problem{'s' if problems > 1 else ''}", FAILED)


def examine(settings: Settings, data_dir: Path | None = None) -> tuple[list[Finding], list[str]]:
    """Everything that there is to say, and which of the given servers answered."""
    from ferryline.cli import diagnosis
    from ferryline.cli.diagnosis_access import check_keys
    from ferryline.cli.settings import local_data_dir

    found = diagnosis.check_settings(settings)
    answering = []
    for url in settings.url:
        findings, answers = diagnosis.check_server(url, settings.ca)
        found += findings
        if answers:
            answering.append(url)
        else:
            found += diagnosis.check_port_owner(url)
    if answering:
        found += _served(settings, answering[0])
    elif settings.context:
        remedy = "If the cluster has moved or was made anew, it is stale: ferryline context set, or context delete."
        found.append(diagnosis.Finding(diagnosis.FAIL, "context", f"nothing of {settings.context!r} answers", remedy))
    root = data_dir or local_data_dir()
    return [*found, *diagnosis.check_disk(root), *check_keys(root)], answering


def _served(settings: Settings, url: str) -> list[Finding]:
    """What the cluster says to this client, if it lets it in."""
    from ferryline.cli.connection import run
    from ferryline.cli.diagnosis import FAIL
    from ferryline.cli.diagnosis_access import check_token

    found = check_token(url, settings.ca, settings.token)
    if any(finding.level == FAIL for finding in found):
        return found
    return found + run(_cluster(settings))


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
            letters = await _with_letters(client)
    except FerrylineError as error:
        return [Finding(FAIL, "cluster", str(error), error.remedy)]
    found = [Finding(OK, "cluster", f"{metadata.cluster_id}: {len(brokers)} brokers, {len(topics)} topics")]
    found += diagnosis.check_versions([level], FEATURE_LEVEL)
    reached = []
    for broker in brokers:
        state = _state(broker)
        if state:
            found.append(Finding(WARN, f"broker {broker.id}", f"{broker.external} is {state[0]}", state[1]))
        if broker.fenced:
            continue
        findings, answers = await asyncio.to_thread(diagnosis.check_server, broker.external, settings.ca)
        if broker.external not in settings.url:
            found += [one for one in findings if one.level != OK]
        if answers:
            reached.append(broker)
            found.append(Finding(OK, f"broker {broker.id}", f"{broker.external} can be reached"))
        else:
            remedy = "Clients are sent there: --advertise-external must be an address that they can reach."
            what = f"it advertises {broker.external}, where it cannot be reached from here"
            found.append(Finding(FAIL, f"broker {broker.id}", what, remedy))
    found += _partitions(parts, {topic.id: topic.name for topic in topics.values()})
    found += await asyncio.to_thread(_releases, settings)
    return found + await asyncio.to_thread(_measured, settings, reached, list(metadata.coordinators), letters)


async def _with_letters(client: Client) -> set[str]:
    """Topics of dead letters that hold some; a topic that was only made holds records of the brokers' own."""
    import asyncio

    from ferryline.protocol.dead_letters import SUFFIX
    from ferryline.protocol.errors import FerrylineError

    found = set()
    for topic in client.routing.cluster.topics.values():
        if not topic.name.endswith(SUFFIX):
            continue
        letters = client.dead_letters(topic.name).browse(timeout=LETTERS_S)
        try:
            async with asyncio.timeout(LETTERS_S):
                async for _ in letters:
                    found.add(topic.name)
                    break
        except (FerrylineError, TimeoutError):
            continue  # it cannot be read: that is told of its partitions
        finally:
            await letters.aclose()
    return found


def _releases(settings: Settings) -> list[Finding]:
    """Whether all nodes run the same release, and the cluster uses it."""
    import http.client
    import json

    from ferryline.cli.diagnosis import WARN, Finding, get

    for url in settings.url:
        try:
            status, _, body = get(url, "/v1/upgrade", settings.ca, settings.token)
            told = json.loads(body)
        except (OSError, http.client.HTTPException, ValueError):
            continue
        if status != 200:
            continue  # a broker, or nobody who may ask
        if told["behind"]:
            brokers = ", ".join(map(str, told["behind"]))
            remedy = "Upgrade them, too, one after the other: docs/operations.md, Upgrade."
            return [Finding(WARN, "release", f"brokers {brokers} run an older one than the coordinator", remedy)]
        if told["possible"] > told["feature_level"]:
            remedy = "When nobody is to go back any more: ferryline cluster upgrade --finish"
            level = f"level {told['feature_level']}, and could run at {told['possible']}"
            return [Finding(WARN, "release", f"the cluster runs at feature {level}", remedy)]
    return []


def _measured(settings: Settings, brokers: list[Any], coordinators: list[str], letters: set[str]) -> list[Finding]:
    """What the services measure themselves."""
    from ferryline.cli import diagnosis_metrics as metrics

    found: list[Finding] = []
    everything: list[metrics.Sample] = []
    members: dict[str, float] = {}
    for broker in brokers:
        samples, status = metrics.scrape(broker.external, settings.ca, settings.token)
        if status == 200:
            everything += samples
            found += metrics.check_broker(f"broker {broker.id}", samples)
    active = False
    for url in dict.fromkeys([*coordinators, *settings.url]):
        samples, _ = metrics.scrape(url, settings.ca, settings.token)
        if metrics.one(samples, "ferryline_coordinator_active"):
            active, members = True, metrics.total(samples, "ferryline_group_members", "group")
    return found + (metrics.check_traffic(everything, members, letters) if active else [])


def _state(broker: Any) -> tuple[str, str] | None:
    if broker.draining:
        return "draining", f"It gets its primaries back after: ferryline broker undrain {broker.id}"
    if broker.fenced:
        return "fenced: it is down, or silent for over 3 s", "Start it, or look into its log and at its network."
    if broker.stopping:
        return "stopping", "Nothing to do, unless it should not."
    return None


def _partitions(parts: list[Any], names: dict[str, str]) -> list[Finding]:
    from ferryline.cli.cluster import MOVING, OFFLINE, READ_ONLY, RESTORED, UNDER_REPLICATED, state_of
    from ferryline.cli.diagnosis import FAIL, OK, WARN, Finding

    by_state: dict[str, list[str]] = {}
    for part in parts:
        by_state.setdefault(state_of(part), []).append(f"{names.get(part.topic_id, part.topic_id)}/{part.partition}")
    found: list[Finding] = []
    for state, level, fact, remedy in (
        (OFFLINE, FAIL, "without a primary", "They wait for a broker that has every acknowledged record: start those."),
        (RESTORED, FAIL, "being restored from a backup", "Run ferryline restore again: it goes on where it was."),
        (READ_ONLY, FAIL, "below min_isr, refusing records", "Start the missing brokers, or: ferryline topic alter."),
        (UNDER_REPLICATED, WARN, "under-replicated", "Copies return by themselves, or are replaced after 30 s."),
        (MOVING, OK, "moving to other brokers", ""),
    ):
        if some := sorted(by_state.get(state, [])):
            more = f" and {len(some) - NAMED_MAX} more" if len(some) > NAMED_MAX else ""
            found.append(Finding(level, "partitions", f"{fact}: {', '.join(some[:NAMED_MAX])}{more}", remedy))
    return found or [Finding(OK, "partitions", f"all {len(parts)} have a primary and all their copies")]
