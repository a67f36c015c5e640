"""testssl.sh against a coordinator and a broker of a real cluster: ``python -m tests.integration.testssl_campaign``.

Needs Debian's testssl.sh. Exits 1 when there is a finding of medium severity or above that is not in `EXPECTED`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ferryline.cli.driver import ProcessCluster
from ferryline.cli.tlsinfo import address

BAD = ("MEDIUM", "HIGH", "CRITICAL", "FATAL")
# What a scanner for public web sites expects and a private cluster cannot have, with the reason.
EXPECTED = {"DNS_CAArecord": "the names of a private cluster are not in the public DNS"}


def scan(url: str, ca: Path, folder: Path) -> list[dict[str, str]]:
    """All findings about one address."""
    host, port = address(url)
    out = folder / f"{port}.json"
    command = ["testssl", "--quiet", "--color", "0", "--warnings", "off", "--add-ca", str(ca), "--jsonfile", str(out)]
    done = subprocess.run([*command, f"{host}:{port}"], capture_output=True, text=True, check=False, timeout=1200)
    if not out.exists():
        raise SystemExit(f"testssl: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    found: list[dict[str, str]] = json.loads(out.read_text())
    return found


async def campaign(root: Path) -> dict[str, Any]:
    cluster = ProcessCluster(root / "cluster", brokers=1)
    await cluster.start()
    try:
        told = {}
        for name, url in zip(["coordinator", *cluster.brokers], cluster.urls, strict=True):
            told[name] = await asyncio.to_thread(scan, url, cluster.ca, root)
    finally:
        await cluster.stop()
    result: dict[str, Any] = {"bad": [], "expected": [], "counts": {}}
    for name, findings in told.items():
        counts = result["counts"].setdefault(name, {})
        for finding in findings:
            counts[finding["severity"]] = counts.get(finding["severity"], 0) + 1
            if finding["severity"] in BAD:
                shown = {key: finding[key] for key in ("id", "severity", "finding")}
                known = next((reason for prefix, reason in EXPECTED.items() if finding["id"].startswith(prefix)), "")
                result["expected" if known else "bad"].append(
                    {"service": name, **shown, **({"why": known} if known else {})}
                )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result here, too")
    args = parser.parse_args()
    if shutil.which("testssl") is None:
        raise SystemExit("testssl: not installed (Debian: testssl.sh)")
    with tempfile.TemporaryDirectory(prefix="ferryline-testssl-") as root:
        result = asyncio.run(campaign(Path(root)))
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
