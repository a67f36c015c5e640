"""Health check of a container: exit status 0 when the service on this port answers /readyz with 200."""

import ssl
import sys
import urllib.error
import urllib.request

# Inside its own container, over loopback: who answers is not in question, only whether it is ready.
context = ssl._create_unverified_context()
try:
    with urllib.request.urlopen(f"https://127.0.0.1:{sys.argv[1]}/readyz", timeout=3, context=context) as answer:
        sys.exit(answer.status != 200)
except (OSError, urllib.error.URLError) as error:
    sys.exit(f"not ready: {error}")
