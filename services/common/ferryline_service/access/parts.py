"""Everything about access that a service has, put together: gate, issuers' tokens, quotas, audit log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from ferryline.protocol.access import AccessPolicy
from ferryline.protocol.errors import FerrylineError
from ferryline_service.access.audit_log import DONE, AuditLog
from ferryline_service.access.audit_rest import AuditRest
from ferryline_service.access.audited import Auditor
from ferryline_service.access.caller import Caller
from ferryline_service.access.gate import Gate
from ferryline_service.access.quotas import Quotas
from ferryline_service.access.shared_quotas import QuotaCounts, SharedQuotas
from ferryline_service.access.verifier import Verifier
from ferryline_service.access.whoami import WhoamiRest
from ferryline_service.metrics import ServiceMetrics
from ferryline_service.session import SessionEndpoint

OPERATOR = Caller("operator", service=True)  # whoever may write files on the machine itself


class Access:
    """Made with the service; `begin` once its cluster is known and its loop runs; `close` at its end.

    ``claim_key``: authenticates what services share in Redis. ``unknown``: what clients are told while the policy is
    not known.
    """

    def __init__(
        self,
        metrics: ServiceMetrics,
        *,
        claim_key: Callable[[], bytes],
        unknown: Callable[[], FerrylineError] | None = None,
    ) -> None:
        self.quotas = Quotas()
        self.verifier = Verifier(claim_key)
        self.gate = Gate(metrics.service, verifier=self.verifier, quotas=self.quotas, unknown=unknown)
        self._metrics = metrics
        self._auditor: Auditor | None = None
        self._shared: SharedQuotas | None = None
        QuotaCounts(self.quotas, metrics)

    def begin(self, cluster_id: str, audit: Path | None) -> None:
        """``audit``: folder of the audit log; None keeps none."""
        self.gate.cluster_id = cluster_id
        if audit is not None:
            log = AuditLog(audit)
            self._auditor = Auditor(log, self.gate)
            self._metrics.audit = lambda: (log.written, log.lost)
        self._shared = SharedQuotas(self.quotas, cluster_id)
        self._shared.start()

    def take(self, policy: AccessPolicy | None, *, registered: bool = False) -> None:
        """Decide by this policy from now on; None: everybody may do everything."""
        self.gate.take(policy or AccessPolicy(), registered=registered)

    def noted(self, action: str, resource: str, name: str, **details: Any) -> None:
        """Tell the audit log of a change that nobody asked for over the network."""
        if self._auditor is not None:
            self._auditor.log.note(OPERATOR, "", action, resource, name, DONE, **details)

    def middlewares(self) -> list[Any]:
        """Behind the error middleware, in this order: the audit log hears what the gate refuses."""
        auditing = [self._auditor.middleware()] if self._auditor is not None else []
        return [*auditing, self.gate.middleware()]

    def routes(self) -> list[web.RouteDef]:
        audit = AuditRest(self._auditor.log).routes() if self._auditor is not None else []
        return [*WhoamiRest(self.gate).routes(), *audit]

    def watch(self, endpoint: SessionEndpoint) -> None:
        """The endpoint asks our gate from now on, and tells the audit log what frames changed and were refused."""
        endpoint.gate = self.gate
        if self._auditor is not None:
            endpoint.on_refused = self._auditor.refused_frame
            endpoint.on_changed = self._auditor.changed_frame

    async def close(self) -> None:
        if self._shared is not None:
            await self._shared.close()
        await self.gate.close()
        if self._auditor is not None:
            self._auditor.log.close()
