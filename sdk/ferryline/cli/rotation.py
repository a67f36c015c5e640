"""What `ferryline certs rotate` and `rotate-ca` do: ask every node, one after the other, and look whether it helped."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from ferryline.backup.calls import BackupCalls
from ferryline.cli.failures import UNAVAILABLE, Failed
from ferryline.cli.verify_replicas import Brokers
from ferryline.protocol.errors import FerrylineError

if TYPE_CHECKING:
    from ferryline.client import Client

TRUST, ISSUE, FINISH = STEPS = ("trust", "issue", "finish")
PATIENCE_S = 30.0
_PATH = "/v1/certificates"
Shown = dict[str, Any]


class Rotation:
    """One cluster's nodes. Nothing is done while one is down: a broker would not come back without its share, and of a
    coordinator nobody can say whether it is down or out of reach."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._calls = BackupCalls(client, PATIENCE_S)
        self._brokers = Brokers(client)

    async def renew(self) -> list[Shown]:
        """New certificates for the coordinator and every broker, of the CA that signs now."""
        rows = [_row("coordinator", await self._coordinator("POST", f"{_PATH}/renew", {}))]
        return rows + await self._renew_brokers(await self._all())

    async def change_ca(self, step: str) -> tuple[list[Shown], str]:
        """One step of changing the CA on every node; rows, and what clients have to trust from now on (PEM). Raises
        Failed when a node is not ready for it: then nothing was changed."""
        brokers = await self._all()
        others = await self._all_coordinators()
        now = await self._coordinator("GET", _PATH)
        if step != TRUST:
            for url, shown in others.items():
                _check_node(f"coordinator {url}", step, now, shown)
            await self._check_ready(step, now, brokers)
        changed = await self._coordinator("POST", f"{_PATH}/rotate", {"step": step})
        rows = [_row("coordinator", changed)]
        rows += [_row(f"coordinator {url}", await self._follows(url, changed)) for url in others]
        return [*rows, *await self._renew_brokers(brokers)], changed["ca"]

    # -- inside -------------------------------------------------------------------------------------

    async def _coordinator(self, method: str, path: str, body: Any = None) -> Shown:
        shown: Shown = await self._calls.coordinator(method, path, body)
        return shown

    async def _all_coordinators(self) -> dict[str, Shown]:
        """What each shows, where there are several: standbys, too, which answer nothing else. Raises Failed."""
        urls = self._client.routing.cluster.coordinators
        return {url: await self._look(url) for url in sorted(urls)} if len(urls) > 1 else {}

    async def _look(self, url: str) -> Shown:
        try:
            shown: Shown | None = (await self._calls.coordinator_at(url, "/healthz")).get("certificates")
        except FerrylineError as error:
            remedy = "Start it first; one that is gone for good is forgotten after ten minutes."
            raise Failed(f"coordinator {url} cannot be asked: {error}", UNAVAILABLE, remedy=remedy) from None
        if shown is None:
            raise Failed(f"coordinator {url} is of an older release, which would not see the change", UNAVAILABLE)
        return shown

    async def _follows(self, url: str, changed: Shown) -> Shown:
        """What a coordinator shows once it has seen the step. Raises Failed."""
        end = time.monotonic() + PATIENCE_S
        wanted, signer = _fingerprints(changed), changed["authorities"][0]["subject"]
        while True:
            shown = await self._look(url)
            if _fingerprints(shown) == wanted and shown["node"]["issuer"] == signer:
                return shown
            if time.monotonic() > end:
                raise Failed(f"coordinator {url} has not seen the change yet", UNAVAILABLE, remedy="Try again.")
            await asyncio.sleep(0.2)

    async def _all(self) -> list[int]:
        known = self._client.routing.cluster.brokers
        if down := sorted(broker.id for broker in known.values() if broker.fenced):
            raise Failed(
                f"broker {', '.join(map(str, down))}: down",
                UNAVAILABLE,
                remedy="Start it first, or forget it if it will not come back: ferryline broker forget ID.",
            )
        return sorted(known)

    async def _renew_brokers(self, brokers: list[int]) -> list[Shown]:
        return [_row(f"broker {broker}", await self._renew_broker(broker)) for broker in brokers]

    async def _renew_broker(self, broker: int) -> Shown:
        return await self._calls.patiently(lambda: self._brokers.ask(broker, "POST", f"{_PATH}/renew", {}))

    async def _check_ready(self, step: str, now: Shown, brokers: list[int]) -> None:
        """Before `issue` every broker trusts the new CA; before `finish` every one has a certificate of it."""
        for broker in brokers:
            try:
                shown = await self._brokers.ask(broker, "GET", _PATH)
            except FerrylineError as error:
                raise Failed(f"broker {broker} cannot be asked: {error}", UNAVAILABLE, remedy=error.remedy) from None
            _check_node(f"broker {broker}", step, now, shown)


def _fingerprints(shown: Shown) -> set[str]:
    return {cert["sha256"] for cert in shown["authorities"]}


def _check_node(name: str, step: str, now: Shown, shown: Shown) -> None:
    """Raises Failed unless a node is ready for the step. ``now``: what the active coordinator shows."""
    remedy = "ferryline certs rotate"
    if step == ISSUE and not _fingerprints(now) <= _fingerprints(shown):
        raise Failed(f"{name} does not trust the new CA yet", UNAVAILABLE, remedy=remedy)
    issuer = shown["node"]["issuer"]
    if step == FINISH and issuer != now["authorities"][0]["subject"]:
        raise Failed(f"{name} still shows a certificate of {issuer}", UNAVAILABLE, remedy=remedy)


def _row(name: str, shown: Shown) -> Shown:
    node = shown["node"] or {}
    return {
        "node": name,
        "issuer": node.get("issuer"),
        "not_after": node.get("not_after"),
        "sha256": node.get("sha256"),
        "trusts": [cert["subject"] for cert in shown["authorities"]],
    }
