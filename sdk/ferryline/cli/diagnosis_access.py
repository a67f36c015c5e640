"""What `ferryline doctor` says about tokens, and about who may read the keys on this machine."""

from __future__ import annotations

import http.client
import json
import stat
import time
from pathlib import Path
from typing import Any

from ferryline.cli.diagnosis import FAIL, OK, WARN, Finding, get

TOKEN_ENDS_S = 600.0  # programs renew theirs before that; one that is given by hand is worth a word
KEY_ENDS_S = 7 * 86_400.0
SECRETS = ("*.key", "cluster-secret", "join-tokens/*", "bootstrap-*", "*token*")
NAMED_MAX = 5


def check_token(url: str, ca: Path | None, token: str) -> list[Finding]:
    """For whom the cluster takes this client."""
    try:
        status, _, body = get(url, "/v1/whoami", ca, token)
        told: dict[str, Any] = json.loads(body)
    except (OSError, http.client.HTTPException, ValueError):
        return []  # a service that does not answer is told elsewhere
    if status in (401, 403):
        if not token:
            remedy = "ferryline login, or give one: --token or FERRYLINE_TOKEN. An operator makes one: ferryline token."
            return [Finding(FAIL, "token", "the cluster wants one, and none is given", remedy)]
        remedy = "It has ended, was revoked, or is of another cluster: ferryline login, or ask for another one."
        return [Finding(FAIL, "token", f"it is refused: {told.get('detail', status)}", remedy)]
    if status != 200:
        return []
    if not told.get("access"):
        return [Finding(OK, "access", "off: everybody may do everything (docs/access.md)")]
    found = _ends(told)
    if not _may_read_cluster(told["grants"]):
        remedy = "An operator may grant it: resource cluster, actions read. Brokers and groups are not looked at now."
        found.append(Finding(WARN, "access", f"{told['principal']} may not read the cluster", remedy))
    return found or [Finding(OK, "access", f"on; this is {told['principal']}")]


def _ends(told: dict[str, Any]) -> list[Finding]:
    if not told["expires_ms"]:
        return []
    left_s = told["expires_ms"] / 1000 - time.time()
    if left_s > (KEY_ENDS_S if told["by"] == "key" else TOKEN_ENDS_S):
        return []
    when = f"{left_s / 86_400:.1f} days" if left_s > 86_400 else f"{left_s / 60:.0f} minutes"
    remedy = "A new key: ferryline token create. A login: ferryline login."
    return [Finding(WARN, "token", f"the {told['by']} of {told['principal']} ends in {when}", remedy)]


def _may_read_cluster(grants: list[dict[str, Any]]) -> bool:
    return any(grant["resource"] == "cluster" and {"read", "manage"} & set(grant["actions"]) for grant in grants)


def check_keys(root: Path) -> list[Finding]:
    """Keys and secrets of a local cluster that others on this machine could read."""
    open_ones = []
    for pattern in SECRETS:
        for path in root.rglob(pattern):
            try:
                mode = path.lstat().st_mode
            except OSError:
                continue  # gone meanwhile: a token that was used
            if stat.S_ISREG(mode) and mode & 0o077:
                open_ones.append(str(path))
    if not open_ones:
        return []
    more = f" and {len(open_ones) - NAMED_MAX} more" if len(open_ones) > NAMED_MAX else ""
    shown = ", ".join(sorted(set(open_ones))[:NAMED_MAX])
    remedy = f"chmod 600 {sorted(open_ones)[0]}; if others have used this machine, change them (ferryline certs)."
    return [Finding(FAIL, "keys", f"can be read by others: {shown}{more}", remedy)]
