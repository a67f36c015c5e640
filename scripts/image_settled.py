"""Exit status 0 once every partition has a primary and all its copies: `ferryline-settled BROKERS [SECONDS]`.

Run inside the container of the coordinator (``docker exec``), between two steps of a rolling restart: whoever takes the
next broker away while copies are missing takes the last ones. BROKERS: how many must be running.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

ADMIN_KEY_FILE = "/access/admin.key"
POLL_S = 0.2


def ask(path: str) -> dict:
    """What the coordinator of this container answers."""
    request = urllib.request.Request(f"https://localhost:{os.environ.get('FERRYLINE_COORDINATOR_PORT', '8443')}{path}")
    if os.path.exists(ADMIN_KEY_FILE):
        with open(ADMIN_KEY_FILE, encoding="ascii") as file:
            request.add_header("Authorization", f"Bearer {file.read().strip()}")
    context = ssl.create_default_context(cafile="/data/tls/ca.crt")
    with urllib.request.urlopen(request, timeout=5, context=context) as answer:
        return json.load(answer)


def missing(brokers: int) -> str:
    """What is still to be waited for; empty when nothing is."""
    running = sum(broker["state"] == "running" for broker in ask("/v1/brokers")["brokers"])
    if running < brokers:
        return f"{running} of {brokers} brokers are running"
    if not ask("/v1/cluster")["healthy"]:
        return "some partition has no primary or lacks a copy"
    return ""


def main(brokers: int, seconds: float) -> str:
    """Wait at most this long; returns what was missing last."""
    end = time.monotonic() + seconds
    while True:
        try:
            wrong = missing(brokers)
        except (OSError, urllib.error.URLError) as error:
            wrong = f"the coordinator does not answer: {error}"
        if not wrong or time.monotonic() > end:
            return wrong
        time.sleep(POLL_S)


sys.exit(main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 120.0) or 0)
