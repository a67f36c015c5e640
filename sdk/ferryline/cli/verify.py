"""`ferryline verify`: prove from the copies themselves that nothing is damaged, different or missing."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import FAILED, NOT_FOUND, UNAVAILABLE, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import Output, say, stderr, warn

if TYPE_CHECKING:
    from ferryline.cli.settings import Settings
    from ferryline.cli.verify_receipts import Account
    from ferryline.cli.verify_replicas import Auditor, Brokers, Checked, Finding
    from ferryline.client import Client
    from ferryline.proof.history import Op
    from ferryline.proof.receipts import Receipt
    from ferryline.protocol.metadata import PartitionMeta

AT_ONCE = 4  # partitions checked at the same time
REPAIR_S = 600.0
SHOWN_MAX = 50


def app(
    ctx: typer.Context,
    topics: Annotated[list[str] | None, typer.Argument(help="Only these topics.")] = None,
    receipts: Annotated[list[Path] | None, typer.Option(help="Receipts that a producer kept.")] = None,
    history: Annotated[list[Path] | None, typer.Option(help="Judge recorded histories; needs no cluster.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Fetch damaged copies again from the good ones.")] = False,
    trust: Annotated[int, typer.Option(help="The broker that is right where checksums cannot tell.", min=0)] = 0,
) -> None:
    """Read every copy of every partition on its broker's disk, check all checksums, and compare the copies.

    Traffic may go on. Exit status 1 for damage, a difference, or a receipt that is not honoured; 5 when a copy could
    not be checked.

    Examples:

      ferryline verify

      ferryline verify orders --repair

      ferryline verify --receipts receipts.jsonl
    """
    invocation = of(ctx)
    if history:
        _judge_histories(history, invocation.output)
        return
    from ferryline.cli.connection import run

    if receipts:
        account = run(_receipts(invocation.settings, receipts))
        _show_account(account, invocation.output)
        return
    run(_verify(invocation.settings, invocation.output, topics or [], repair, trust))


# -- replicas ----------------------------------------------------------------------------------------


async def _verify(settings: Settings, output: Output, topics: list[str], repair: bool, trust: int) -> None:
    from ferryline.cli.connection import connected
    from ferryline.cli.verify_replicas import Auditor, Brokers

    async with connected(settings) as client:
        parts = _chosen(client, topics)
        brokers = Brokers(client)
        with Meter(len(parts)) as meter:
            auditor = Auditor(brokers, progress=meter.bytes, trust=trust)
            checked = await _check_all(auditor, parts, meter.partition)
        _show(checked, output)
        bad = [one for one in checked if one.findings]
        if repair and bad:
            repaired = [await _repair(client, brokers, auditor, one) for one in bad]
            bad = [one for one in repaired if one.findings]
            _show_findings(repaired)
            warn(f"{len(repaired) - len(bad)} of {len(repaired)} partitions are whole again")
    _end([finding for one in bad for finding in one.findings])


def _chosen(client: Client, topics: list[str]) -> list[tuple[str, PartitionMeta]]:
    cluster = client.routing.cluster
    unknown = [name for name in topics if cluster.topic(name) is None]
    if unknown:
        raise Failed(f"topic {unknown[0]!r} does not exist", NOT_FOUND, code="UNKNOWN_TOPIC")
    names = {meta.id: meta.name for meta in cluster.topics.values() if not topics or meta.name in topics}
    parts = [(names[part.topic_id], part) for part in cluster.partitions.values() if part.topic_id in names]
    return sorted(parts, key=lambda item: (item[0], item[1].partition))


async def _check_all(
    auditor: Auditor, parts: list[tuple[str, PartitionMeta]], done: Callable[[], None]
) -> list[Checked]:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(topic: str, part: PartitionMeta) -> Checked:
        async with room:
            checked = await auditor.check(topic, part)
        done()
        return checked

    return list(await asyncio.gather(*(one(topic, part) for topic, part in parts)))


async def _repair(client: Client, brokers: Brokers, auditor: Auditor, checked: Checked) -> Checked:
    """Replace what is wrong in one partition and look again."""
    from ferryline.cli.verify_replicas import UNCHECKED, path_of
    from ferryline.protocol.errors import FerrylineError

    topic, key = checked.topic, checked.part.key
    for broker in sorted({finding.broker for finding in checked.findings if finding.kind != UNCHECKED}):
        part = client.routing.cluster.partitions[key]
        name = f"{topic}/{part.partition} on broker {broker}"
        good = [b for b in part.isr if b != broker and b in checked.copies and not checked.wrong(b)]
        if not good:
            warn(f"{name} is kept as it is: no other copy that is in sync was found good")
            continue
        reason = next(finding.reason for finding in checked.findings if finding.broker == broker)
        try:
            answer = await brokers.ask(broker, "POST", path_of(part) + "/repair", {"reason": reason[:400]})
        except FerrylineError as error:
            warn(f"{name} could not be set aside: {error}")
            continue
        warn(f"{name} was set aside" + (" after it had handed over" if answer["was_primary"] else "") + "; fetching")
        if not await _is_back(brokers, part, broker, lambda: client.routing.cluster.partitions[key]):
            warn(f"{name} is not back in sync after {REPAIR_S:g} s")
    return await auditor.check(topic, client.routing.cluster.partitions[key])


async def _is_back(brokers: Brokers, part: PartitionMeta, broker: int, now: Callable[[], PartitionMeta]) -> bool:
    """Wait until the copy was fetched again and is counted on."""
    from ferryline.cli.verify_replicas import path_of
    from ferryline.protocol.errors import FerrylineError

    end = time.monotonic() + REPAIR_S
    while time.monotonic() < end:
        # That it was out of sync may be over before anybody looked; the record is a later one all the same.
        if now().version > part.version and broker in now().isr:
            try:
                status = await brokers.ask(broker, "GET", path_of(part))
            except FerrylineError:
                status = {"stopped": "no answer", "repairing": True}
            if not status["stopped"] and not status["repairing"]:
                return True
        await asyncio.sleep(0.05)
    return False


class Meter:
    """A running count on a terminal."""

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self._done = self._bytes = 0
        self._status: Any = None

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            self._status = stderr().status("")
            self._status.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._status is not None:
            self._status.stop()

    def bytes(self, count: int) -> None:
        self._bytes += count
        self._update()

    def partition(self) -> None:
        self._done += 1
        self._update()

    def _update(self) -> None:
        if self._status is not None:
            self._status.update(f"{self._done} of {self._partitions} partitions, {self._bytes / 1e6:,.0f} MB read")


def _show(checked: list[Checked], output: Output) -> None:
    if not output.for_people:
        output.rows({**one.row(), "findings": [_as_dict(finding) for finding in one.findings]} for one in checked)
        return
    output.rows([one.row() for one in checked], empty="no partitions")
    _show_findings(checked)
    total = sum(one.bytes for one in checked)
    wrong = sum(any(finding.kind != "not checked" for finding in one.findings) for one in checked)
    say(f"{len(checked)} partitions, {total / 1e6:,.1f} MB read, {wrong} partitions with something wrong")


def _show_findings(checked: list[Checked]) -> None:
    sentences = [finding.sentence() for one in checked for finding in one.findings]
    for sentence in sentences[:SHOWN_MAX]:
        warn(sentence)
    if len(sentences) > SHOWN_MAX:
        warn(f"and {len(sentences) - SHOWN_MAX} more")


def _as_dict(finding: Finding) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(finding)


def _end(findings: list[Finding]) -> None:
    bad = [finding for finding in findings if finding.kind != "not checked"]
    if bad:
        raise Failed(
            f"{len(bad)} copies are damaged or differ", FAILED, remedy="ferryline verify --repair replaces them."
        )
    if findings:
        raise Failed(f"{len(findings)} copies could not be checked", UNAVAILABLE, remedy="ferryline doctor")


# -- receipts and histories --------------------------------------------------------------------------


async def _receipts(settings: Settings, files: list[Path]) -> Account:
    from ferryline.cli.connection import connected
    from ferryline.cli.verify_receipts import ReceiptAuditor
    from ferryline.cli.verify_replicas import Brokers

    async with connected(settings) as client:
        auditor = ReceiptAuditor(Brokers(client), client.routing.cluster)
        return await auditor.check(_read_receipts(files))


def _read_receipts(files: list[Path]) -> Iterator[Receipt]:
    from ferryline.proof.receipts import ReceiptError, parse

    for path in files:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break  # the producer was killed while it wrote
                try:
                    yield parse(line)
                except ReceiptError as error:
                    raise Failed(f"{path}:{number}: no receipt: {error}", FAILED) from None


def _show_account(account: Account, output: Output) -> None:
    output.one({**account.row(), "missing_examples": account.told} if not output.for_people else account.row())
    for sentence in account.told + account.unchecked:
        warn(sentence)
    if not account.good:
        raise Failed(f"{account.missing} receipts are not honoured", FAILED)
    if account.unchecked:
        raise Failed(f"{len(account.unchecked)} copies could not be asked", UNAVAILABLE)


def _judge_histories(files: list[Path], output: Output) -> None:
    from ferryline.proof.checker import check
    from ferryline.proof.history import HistoryError, read_history

    def operations() -> Iterator[Op]:
        for path in files:
            with path.open("rb") as lines:
                yield from read_history(lines, str(path))

    try:
        verdict = check(operations)
    except HistoryError as error:
        raise Failed(str(error), FAILED) from None
    if output.for_people:
        for line in verdict.explain():
            say(line)
    else:
        output.one(verdict.as_dict())
    if not verdict.good:
        raise Failed(f"{sum(verdict.errors.values())} promises were broken", FAILED)
