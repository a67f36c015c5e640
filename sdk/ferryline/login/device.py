"""The device flow (RFC 8628): for a terminal on a machine without a browser. The person types a code elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ferryline.login.flow import DEVICE_GRANT, Client, Login, for_audience, login_of, said
from ferryline.login.issuer import Issuer
from ferryline.protocol.errors import BadCredentials, ConnectionFailed, DeadlineExceeded, InvalidArgument

POLL_S = 5.0  # unless the issuer says otherwise
SLOWER_S = 5.0  # added whenever the issuer asks for it
Show = Callable[[str, str, str], None]


async def log_in(client: Client, issuer: Issuer, show: Show, *, timeout: float) -> Login:
    """Log in elsewhere. ``show`` gets the address, the code to type there, and an address that holds the code ("" if
    there is none). Raises InvalidArgument if the issuer has no such flow, BadCredentials, DeadlineExceeded."""
    at = await issuer.discover()
    if not at.device or not at.token:
        raise InvalidArgument("issuer: has no device flow; leave --device out", field="device")
    fields = {"client_id": client.client_id, "scope": " ".join(client.scopes), **for_audience(client)}
    if client.client_secret:
        fields["client_secret"] = client.client_secret
    status, answer = await issuer.post(at.device, fields)
    if status != 200 or not isinstance(answer, dict):
        raise BadCredentials(f"the issuer refused: {said(answer if isinstance(answer, dict) else {})}")
    try:
        device_code = str(answer["device_code"])
        show(
            str(answer["verification_uri"]), str(answer["user_code"]), str(answer.get("verification_uri_complete", ""))
        )
        life_s = min(timeout, float(answer["expires_in"]))
        pause_s = max(0.1, float(answer.get("interval", POLL_S)))
    except (KeyError, TypeError, ValueError):
        raise BadCredentials("the issuer's answer is not that of a device flow", reason="answer") from None
    end = time.monotonic() + life_s
    while time.monotonic() < end:
        await asyncio.sleep(pause_s)
        try:
            found = await issuer.tokens(at.token, client, grant_type=DEVICE_GRANT, device_code=device_code)
        except ConnectionFailed:
            continue  # the person may still be typing
        except BadCredentials as error:
            if error.details.get("error") == "slow_down":
                pause_s += SLOWER_S
            elif error.details.get("error") != "authorization_pending":
                raise
            continue
        return login_of(found, client, time.time())
    raise DeadlineExceeded(f"nobody typed the code within {life_s:g} s")
