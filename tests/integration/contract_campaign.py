"""Schemathesis against what a real cluster serves at /openapi.json: ``python -m tests.integration.contract_campaign``.

A coordinator and three brokers as processes, without access and with it. Valid and invalid requests to every operation
of the coordinator and of a broker; of each answer it is checked that it is no mistake of ours (5xx), that its status,
media type, headers and schema are in the document, that invalid data and other methods are refused, and with access on
that nothing answers without a token. One line for each run goes to benchmarks/results/contract.json.

Left out: the check that valid data is accepted, because a schema cannot say everything that a request must fit
(partitions that there are, offsets in range, records that are leased); and those that follow resources over requests.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from ferryline.cli.processes import LocalCluster
from tests.integration.contract_hooks import EXCHANGES, GROUPS, PRINCIPALS, TOPICS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/contract.json"
LEFT_OUT = ("positive_data_acceptance", "object_level_authorization", "use_after_free", "ensure_resource_availability")
BROKERS, PARTITIONS, TOPICS_KEPT = 3, 3, 30
JANITOR_S = 1.0
ACCESS = "open_metrics = false\n"
# Refusals of invalid data beyond those that Schemathesis takes for one: too large, or asked of another broker.
SETTINGS = """[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 408, 409, 412, 413, 415, 421, 429]
"""


@dataclass
class Run:
    """What one run of Schemathesis against one service came to."""

    service: str
    access: bool
    seed: int
    cases: int = 0
    operations: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    errors: int = 0
    seconds: float = 0.0
    text: str = ""
    answers: dict[str, int] = field(default_factory=dict)  # by class of status
    never_done: list[str] = field(default_factory=list)  # operations that were always refused


class Curl:
    """REST of the cluster, blocking."""

    def __init__(self, cluster: LocalCluster, token: str) -> None:
        self._context = ssl.create_default_context(cafile=str(cluster.ca))
        self._token = token
        self.url = cluster.url

    def __call__(self, method: str, url: str, body: Any = None) -> Any:
        """The answer as JSON, or None if it is refused."""
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        try:
            asked = Request(url, data=data, headers=headers, method=method)
            with urlopen(asked, context=self._context, timeout=15) as response:
                return json.loads(response.read())
        except OSError:
            return None


@contextmanager
def running(root: Path, *, access: bool) -> Iterator[tuple[LocalCluster, Curl, str]]:
    """A cluster, a way to ask it, and the token of whoever may do everything."""
    args: list[str] = []
    key = root / "admin.key"
    if access:
        file = root / "access.toml"
        root.mkdir(parents=True, exist_ok=True)
        file.write_text(ACCESS)
        args = ["--access", str(file), "--bootstrap-admin", str(key)]
    cluster = LocalCluster(root, brokers=BROKERS, coordinator_args=args)
    try:
        cluster.start()
        token = key.read_text().strip() if access else ""
        curl = Curl(cluster, token)
        os.environ["CONTRACT_TOPIC_IDS"] = " ".join(prepare(cluster, curl))
        yield cluster, curl, token
    finally:
        cluster.kill_all()


def prepare(cluster: LocalCluster, curl: Curl) -> list[str]:
    """Topics with records, groups, queues and exchanges, so that requests meet something. Returns ids of topics."""
    broker = cluster.urls[1]
    ids: list[str] = []
    for name in TOPICS:
        config = {"replication": BROKERS, "partitions": PARTITIONS}
        made = curl("POST", f"{curl.url}/v1/topics", {"name": name, "config": config})
        ids.append((made or curl("GET", f"{curl.url}/v1/topics/{name}"))["id"])
    for name in EXCHANGES:
        curl("POST", f"{curl.url}/v1/exchanges", {"name": name, "type": "topic"})
        curl("POST", f"{curl.url}/v1/exchanges/{name}/bindings", {"topic": TOPICS[0], "routing_key": "#"})
    end = time.monotonic() + 30
    records = [{"value": str(number), "partition": number % PARTITIONS} for number in range(60)]
    while curl("POST", f"{broker}/v1/topics/{TOPICS[0]}/records", {"records": records}) is None:
        assert time.monotonic() < end, "the topics do not get ready"
        time.sleep(0.2)
    curl("POST", f"{broker}/v1/topics/{TOPICS[1]}/records", {"records": records})
    offsets = [{"topic": TOPICS[0], "partition": number, "offset": 1} for number in range(PARTITIONS)]
    for name in PRINCIPALS:  # while access is on
        curl("POST", f"{curl.url}/v1/principals", {"name": name})
    for group in GROUPS:
        curl("PUT", f"{broker}/v1/groups/{group}/offsets", {"offsets": offsets})
        for url in cluster.urls[1:]:
            for topic in TOPICS:
                curl("POST", f"{url}/v1/queues/{topic}/{group}/receive", {"records": 2, "wait_ms": 100})
    member = {"member": "m", "topics": [TOPICS[0]], "session_ms": 3_600_000}
    curl("POST", f"{curl.url}/v1/groups/{GROUPS[0]}/heartbeat", member)
    return ids


class Janitor(threading.Thread):
    """Keeps the cluster usable: brokers take part, and topics do not pile up."""

    def __init__(self, curl: Curl) -> None:
        super().__init__(daemon=True)
        self._curl = curl
        self._ended = threading.Event()

    def run(self) -> None:
        curl = self._curl
        while not self._ended.wait(JANITOR_S):
            for broker in (curl("GET", f"{curl.url}/v1/brokers") or {"brokers": []})["brokers"]:
                if broker["draining"]:
                    curl("POST", f"{curl.url}/v1/brokers/{broker['id']}/undrain")
            topics = (curl("GET", f"{curl.url}/v1/topics") or {"topics": []})["topics"]
            made = [topic["name"] for topic in topics if topic["name"] not in TOPICS]
            for name in made[TOPICS_KEPT:]:
                curl("DELETE", f"{curl.url}/v1/topics/{name}")

    def end(self) -> None:
        self._ended.set()
        self.join()


def run(cluster: LocalCluster, url: str, token: str, *, service: str, seed: int, examples: int, phases: str) -> Run:
    """One run of Schemathesis."""
    report, answers = cluster.root / f"{service}-{seed}.json", cluster.root / f"{service}-{seed}-answers.json"
    settings = cluster.root / "schemathesis.toml"
    settings.write_text(SETTINGS)
    checks = ["--exclude-checks", ",".join(LEFT_OUT)]
    if token:
        # A header that is always sent cannot be left out by the check of required ones; `ignored_auth` looks at it.
        checks = ["--exclude-checks", ",".join([*LEFT_OUT, "missing_required_header"])]
        checks += ["--header", f"Authorization: Bearer {token}"]
    made = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(settings),
            "run", f"{url}/openapi.json",
            "--tls-verify", str(cluster.ca), "--checks", "all", *checks, "--seed", str(seed),
            "--max-examples", str(examples), "--phases", phases, "--continue-on-failure", "--no-shrink",
            "--generation-database", "none", "--request-timeout", "30", "--no-color",
            "--report", "json", "--report-json-path", str(report),
        ],
        cwd=cluster.root,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.integration.contract_hooks",
            "CONTRACT_ANSWERS": str(answers),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    told = json.loads(report.read_text()) if report.exists() else {}
    cases = told.get("test_cases", {})
    counts: dict[str, int] = json.loads(answers.read_text()) if answers.exists() else {}
    done = {name.rpartition(" ")[0] for name in counts if name.rpartition(" ")[2].startswith(("2", "3"))}
    by_class: Counter[str] = Counter()
    for name, count in counts.items():
        by_class[f"{name.rpartition(' ')[2][0]}xx"] += count
    return Run(
        service,
        bool(token),
        seed,
        cases.get("generated", 0),
        told.get("operations", {}).get("tested", 0),
        told.get("failures", []),
        cases.get("errored", 0) + len(told.get("errors", [])) + (not told),
        round(told.get("running_time", 0.0), 1),
        made.stdout + made.stderr,
        dict(sorted(by_class.items())),
        sorted({name.rpartition(" ")[0] for name in counts} - done),
    )


def campaign(root: Path, cases: int, seed: int) -> list[Run]:
    """Runs with other seeds, on clusters without and with access in turns, until there were so many cases."""
    runs: list[Run] = []
    while sum(one.cases for one in runs) < cases:
        access = len(runs) % 4 >= 2
        with running(root / f"cluster-{seed}", access=access) as (cluster, curl, token):
            janitor = Janitor(curl)
            janitor.start()
            try:
                for service, url in (("coordinator", cluster.url), ("broker", cluster.urls[1])):
                    one = run(cluster, url, token, service=service, seed=seed, examples=40, phases="coverage,fuzzing")
                    runs.append(one)
                    print(
                        f"{service:12} access={access!s:5} {one.cases:6} cases {one.answers} {one.failures}", flush=True
                    )
                    if one.failures or one.errors:
                        print(one.text, flush=True)
                    alive = all(known.running for known in cluster.services.values())
                    assert alive, "a service has ended"
            finally:
                janitor.end()
        seed += 1
    return runs


def main() -> int:
    """0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="contract-") as folder:
        runs = campaign(Path(folder), asked.cases, asked.seed)
    row = {
        "cases": sum(one.cases for one in runs),
        "failures": sum(len(one.failures) for one in runs),
        "errors": sum(one.errors for one in runs),
        "seconds": round(sum(one.seconds for one in runs), 1),
        "checks_left_out": list(LEFT_OUT),
        "runs": [{key: value for key, value in vars(one).items() if key != "text"} for one in runs],
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*known, row], indent=1) + "\n")
    print(f"{row['cases']} cases, {row['failures']} failures, {row['errors']} errors")
    return 1 if row["failures"] or row["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
