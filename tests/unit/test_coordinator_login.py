"""What a coordinator tells whoever wants to log in, and what it keeps to itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from ferryline.protocol.access import AccessPolicy, IssuerMeta
from ferryline.protocol.errors import NotReady
from ferryline_coordinator.rest_login import LoginRest
from ferryline_service.access.gate import Gate

ISSUERS = (
    IssuerMeta("google", "https://accounts.google.com", "id", client_id="id", scopes=("openid",), client_secret="s"),
    IssuerMeta("machines", "https://issuer.internal", "mq"),  # nobody logs in there
)


async def told(policy: AccessPolicy | None) -> Any:
    gate = Gate("coordinator")
    if policy is not None:
        gate.take(policy)
    answer = await LoginRest(gate).issuers(make_mocked_request("GET", "/v1/login"))
    assert isinstance(answer.body, bytes)
    return json.loads(answer.body)


async def test_issuers_with_a_client_are_told_with_what_a_login_needs() -> None:
    (google,) = (await told(AccessPolicy(1, True, issuers=ISSUERS, redis_url="redis://:secret@r/0")))["issuers"]
    assert google == {
        "name": "google",
        "issuer": "https://accounts.google.com",
        "audience": "id",
        "client_id": "id",
        "client_secret": "s",
        "scopes": ["openid"],
    }


async def test_nothing_is_told_while_access_is_off() -> None:
    assert await told(AccessPolicy(1, False, issuers=ISSUERS)) == {"issuers": []}


async def test_a_coordinator_without_a_policy_leaves_the_answer_to_another_one() -> None:
    with pytest.raises(NotReady):
        await told(None)
