"""What `ferryline certs rotate` and `rotate-ca` do: ask every node, one after the other, and look whether it helped."""

from __future__ import annotations

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
    """One cluster's nodes. Nothing is done to brokers that are down: they would not come back without their share."""

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
        now = await self._coordinator("GET", _PATH)
        if step != TRUST:
            await self._check_ready(step, now, brokers)
        changed = await self._coordinator("POST", f"{_PATH}/rotate", {"step": step})
        rows = [_row("coordinator", changed), *await self._renew_brokers(brokers)]
        return rows, changed["ca"]

    # -- inside -------------------------------------------------------------------------------------

    async def _coordinator(self, method: str, path: str, body: Any = None) -> Shown:
        shown: Shown = await self._calls.coordinator(method, path, body)
        return shown

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
        wanted = {cert["sha256"] for cert in now["authorities"]}
        signer = now["authorities"][0]["subject"]
        for broker in brokers:
            try:
                shown = await self._brokers.ask(broker, "GET", _PATH)
            except FerrylineError as error:
                raise Failed(f"broker {broker} cannot be asked: {error}", UNAVAILABLE, remedy=error.remedy) from None
            if step == ISSUE and not wanted <= {cert["sha256"] for cert in shown["authorities"]}:
                raise Failed(
                    f"broker {broker} does not trust the new CA yet", UNAVAILABLE, remedy="ferryline certs rotate"
                )
            if step == FINISH and shown["node"]["issuer"] != signer:
                raise Failed(
                    f"broker {broker} still shows a certificate of {shown['node']['issuer']}",
                    UNAVAILABLE,
                    remedy="ferryline certs rotate",
                )


def _row(name: str, shown: Shown) -> Shown:
    node = shown["node"] or {}
    return {
        "node": name,
        "issuer": node.get("issuer"),
        "not_after": node.get("not_after"),
        "sha256": node.get("sha256"),
        "trusts": [cert["subject"] for cert in shown["authorities"]],
    }
