"""Make the token that reads /metrics, once: `ferryline-metrics-token https://coordinator:8443`.

With access control (there is an admin key), principal `prometheus` may read the cluster and nothing else; its key
goes to /token/token, in a volume that only Prometheus sees, and is kept as long as it works. Without, a word goes there
that nobody looks at: Prometheus wants a file.
"""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request

ADMIN_KEY_FILE, TOKEN_FILE, CA_FILE = "/access/admin.key", "/token/token", "/public/ca.crt"
NAME = "prometheus"
UNAUTHORIZED, CONFLICT = 401, 409


def ask(method: str, url: str, token: str, body: object = None) -> dict:
    """The answer of the coordinator. Raises HTTPError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method)
    request.add_header("Authorization", f"Bearer {token}")
    request.add_header("Content-Type", "application/json")
    context = ssl.create_default_context(cafile=CA_FILE)
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        return json.load(answer)


def read(path: str) -> str:
    """The word in a file; empty when there is none."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def works(base: str, token: str) -> bool:
    """Whether the cluster still takes it."""
    try:
        ask("GET", f"{base}/v1/whoami", token)
    except urllib.error.HTTPError as error:
        if error.code != UNAUTHORIZED:
            raise
        return False
    return True


def make(base: str, admin: str) -> str:
    """A new key of the principal, which is made unless it is there."""
    grants = [{"resource": "cluster", "pattern": "*", "actions": ["read"]}]
    try:
        ask("POST", f"{base}/v1/principals", admin, {"name": NAME, "grants": grants, "comment": "reads /metrics"})
    except urllib.error.HTTPError as error:
        if error.code != CONFLICT:
            raise
    return str(ask("POST", f"{base}/v1/principals/{NAME}/keys", admin, {})["key"])


def main(base: str) -> None:
    """Leave a token that works in the file."""
    admin, token = read(ADMIN_KEY_FILE), read(TOKEN_FILE)
    if not admin:
        token = "access-is-off"
    elif not token or not works(base, token):
        token = make(base, admin)
    with open(TOKEN_FILE, "w", encoding="ascii") as file:
        file.write(token)
    os.chmod(TOKEN_FILE, 0o444)  # Prometheus is nobody in its container; the volume is nobody else's


main(sys.argv[1].rstrip("/"))
