"""The REST surface of rolling upgrades: who runs what, and the word that all of them run the new release.

``GET  /v1/upgrade``          {feature_level, possible, behind, coordinator, brokers}
``POST /v1/upgrade/finish``   raise the feature level: from then on older brokers and coordinators are refused
"""

from __future__ import annotations

from aiohttp import web

from ferryline.protocol.messages import FEATURE_LEVEL, PROTOCOL_MAX, PROTOCOL_MIN
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core import upgrade
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.rest import durable_state


class UpgradeRest:
    """Handlers of the routes above."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/upgrade", self.look), web.post("/v1/upgrade/finish", self.finish)]

    async def look(self, _: web.Request) -> web.Response:
        state = await durable_state(self._driver)
        records = [state.brokers[broker_id] for broker_id in sorted(state.brokers)]
        return web.json_response(
            {
                "feature_level": state.cluster.feature_level,
                "possible": upgrade.possible(records),
                "behind": upgrade.behind(records),
                "coordinator": {"feature_level": FEATURE_LEVEL, "versions": [PROTOCOL_MIN, PROTOCOL_MAX]},
                "brokers": [
                    {
                        "id": record.meta.id,
                        "running": not record.meta.fenced,
                        "feature_level": record.feature_level,
                        "versions": list(record.versions),
                    }
                    for record in records
                ],
            }
        )

    async def finish(self, request: web.Request) -> web.Response:
        await self._driver.ask(ev.LevelRaised)
        return await self.look(request)
