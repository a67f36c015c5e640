"""The nouns `exchange` and `binding`, and the programs in examples/, against a real cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ferryline.cli.processes import LocalCluster

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    made = LocalCluster(tmp_path_factory.mktemp("exchanges"), brokers=2)
    made.start()
    yield made
    made.kill_all()


@pytest.fixture(scope="module")
def run(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a program of Python against the cluster; the exit status must be the expected one."""
    home = tmp_path_factory.mktemp("home")

    def go(*args: str, status: int = 0) -> Done:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
        clean |= {"HOME": str(home), "FERRYLINE_HOME": str(home / "data"), "COLUMNS": "160", "NO_COLOR": "1"}
        clean |= {"FERRYLINE_URL": cluster.url, "FERRYLINE_CA": str(cluster.ca)}
        done = subprocess.run(
            [sys.executable, *args], capture_output=True, text=True, env=clean, timeout=90, check=False, cwd=ROOT
        )
        assert done.returncode == status, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return go


@pytest.fixture(scope="module")
def ferryline(run: Run) -> Run:
    return lambda *args, **options: run("-m", "ferryline.cli", *args, **options)


def as_json(done: Done) -> Any:
    return json.loads(done.stdout)


def test_an_exchange_lives_from_create_to_delete(ferryline: Run) -> None:
    ferryline("topic", "create", "eu", "-p", "1")
    ferryline("exchange", "create", "strays", "--type", "fanout")
    ferryline("exchange", "create", "shop", "--type", "topic", "--alternate", "strays")
    assert "EXCHANGE_EXISTS" in ferryline("exchange", "create", "shop", "--type", "topic", status=1).stderr
    ferryline("exchange", "create", "shop", "-t", "topic", "--alternate", "strays", "--if-not-exists")
    ferryline("exchange", "create", "shop", "-t", "direct", "--if-not-exists", status=1)
    ferryline("binding", "add", "shop", "--topic", "eu", "-r", "eu.#")
    ferryline("binding", "add", "shop", "--to-exchange", "strays", "-r", "#.copy")
    assert "UNROUTABLE" in ferryline("exchange", "test", "shop", "-r", "us", status=3).stderr
    assert as_json(ferryline("exchange", "test", "shop", "-r", "eu.order", "-o", "json")) == [{"topic": "eu"}]
    shown = as_json(ferryline("exchange", "show", "shop", "-o", "json"))
    assert (shown["type"], shown["alternate"], shown["bindings"]) == ("topic", "strays", 2)
    assert [b["routing_key"] for b in shown["binding_list"]] == ["eu.#", "#.copy"]
    assert "eu.#" in ferryline("exchange", "show", "shop").stdout
    listed = {row["name"]: row["bindings"] for row in as_json(ferryline("exchange", "list", "-o", "json"))}
    assert (listed["shop"], listed["strays"]) == (2, 0)
    rows = as_json(ferryline("binding", "list", "shop", "--topic", "eu", "-o", "json"))
    assert [(row["topic"], row["routing_key"]) for row in rows] == [("eu", "eu.#")]
    assert "UNKNOWN_EXCHANGE" in ferryline("binding", "list", "none", status=3).stderr
    ferryline("binding", "remove", "shop", "--topic", "eu", "-r", "eu.#")
    ferryline("binding", "remove", "shop", "--topic", "eu", "-r", "eu.#", status=3)
    ferryline("exchange", "delete", "strays", "--yes")
    assert as_json(ferryline("exchange", "show", "shop", "-o", "json"))["alternate"] is None
    assert as_json(ferryline("binding", "list", "shop", "-o", "json")) == []
    ferryline("exchange", "delete", "shop", "-y")
    assert "UNKNOWN_EXCHANGE" in ferryline("exchange", "show", "shop", status=3).stderr


def test_headers_are_bound_and_tested_by_name_and_value(ferryline: Run) -> None:
    ferryline("topic", "create", "pdfs", "-p", "1")
    ferryline("exchange", "create", "docs", "-t", "headers")
    ferryline("binding", "add", "docs", "--topic", "pdfs", "-H", "format=pdf", "-H", "urgent", "--match", "any")
    assert "pdfs" in ferryline("exchange", "test", "docs", "-H", "format=pdf").stdout
    assert "pdfs" in ferryline("exchange", "test", "docs", "-H", "urgent=whatever").stdout
    ferryline("exchange", "test", "docs", "-H", "format=zip", status=3)
    row = as_json(ferryline("binding", "list", "docs", "-o", "json"))[0]
    assert (row["headers"], row["match"]) == ({"format": "pdf", "urgent": None}, "any")
    ferryline("binding", "remove", "docs", "--topic", "pdfs", "-H", "urgent", "-H", "format=pdf", "--match", "any")


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (("exchange", "create", "x", "-t", "odd"), 2, "direct, topic, fanout, headers"),
        (("exchange", "create", "x"), 2, "--type"),
        (("exchange", "create", "a/b", "-t", "topic"), 2, "INVALID_NAME"),
        (("exchange", "delete", "none", "-y"), 3, "UNKNOWN_EXCHANGE"),
        (("exchange", "test", "none"), 3, "UNKNOWN_EXCHANGE"),
        (("binding", "add", "none", "--topic", "t"), 3, "UNKNOWN_EXCHANGE"),
        (("binding", "add", "none"), 2, "topic, exchange"),
        (("binding", "add", "none", "--topic", "t", "-H", "=x"), 2, "name=value"),
        (("binding", "add", "none", "--topic", "t", "-H", "a=1", "-H", "a=2"), 2, "stands twice"),
        (("binding", "add", "none", "--topic", "t", "--match", "some"), 2, "neither 'all' nor 'any'"),
    ],
)
def test_what_is_wrong_ends_with_its_status(ferryline: Run, args: tuple[str, ...], status: int, says: str) -> None:
    assert says in ferryline(*args, status=status).stderr


def test_definitions_go_out_and_in_again(ferryline: Run, tmp_path: Path) -> None:
    ferryline("topic", "create", "kept", "-p", "2")
    ferryline("exchange", "create", "known", "--type", "direct")
    file = tmp_path / "cluster.json"
    assert "topics" in ferryline("definitions", "export", str(file)).stdout
    document = json.loads(file.read_text())
    assert json.loads(ferryline("definitions", "export").stdout) == document
    ferryline("exchange", "delete", "known", "--yes")
    plan = as_json(ferryline("definitions", "import", str(file), "--dry-run", "-o", "json"))
    assert [row["name"] for row in plan if row["action"] == "create"] == ["known"]
    ferryline("definitions", "import", str(file))
    ferryline("exchange", "show", "known")
    document["topics"] = [{"name": "kept", "config": {"partitions": 1}}]
    file.write_text(json.dumps(document))
    assert "1 of" in ferryline("definitions", "import", str(file), status=1).stderr
    file.write_text("{")
    ferryline("definitions", "import", str(file), status=2)
    file.write_text('{"topics": [{"name": "a b"}]}')
    assert "INVALID_NAME" in ferryline("definitions", "import", str(file), status=2).stderr


EXAMPLES: dict[str, list[str]] = {
    "work_queue": [
        "job 1: done",
        "job 2: done",
        "job 3: done at attempt 2",
        "job 4: done",
        "job 5: done",
        "job 6: done",
    ],
    "publish_subscribe": [
        "screen: the disk is filling up",
        "screen: the disk is full",
        "file: the disk is filling up",
        "file: the disk is full",
    ],
    "routing": [
        "pager: error: the disk is full",
        "archive: info: started",
        "archive: warning: the disk is filling up",
        "archive: error: the disk is full",
    ],
    "topics": [
        "quick.orange.rabbit -> oranges, rabbits",
        "lazy.orange.elephant -> oranges, rabbits",
        "quick.orange.fox -> oranges",
        "lazy.brown.fox -> rabbits",
        "quick.brown.fox -> nobody",
        "oranges: quick orange rabbit",
        "oranges: lazy orange elephant",
        "oranges: quick orange fox",
        "rabbits: quick orange rabbit",
        "rabbits: lazy orange elephant",
        "rabbits: lazy brown fox",
    ],
    "headers": [
        "invoice -> pdf-invoices, pdf-or-photo",
        "photo -> pdf-or-photo",
        "scan -> marked-urgent, pdf-or-photo",
    ],
    "exchange_to_exchange": [
        "refused: exchange everything leads back to events: events -> everything -> events",
        "eu.shop.order -> audit, europe, orders",
        "eu.shop.login -> audit, europe",
        "us.login -> audit",
    ],
    "request_reply": ["fibonacci(1) = 1", "fibonacci(10) = 55", "fibonacci(30) = 832040"],
    "unroutable": ["counted: 1", "refused: UNROUTABLE", "known -> known", "unknown -> strays"],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_does_what_it_says_a_second_time_too(run: Run, name: str) -> None:
    for _ in range(2):
        assert run(f"examples/{name}.py").stdout.splitlines() == EXAMPLES[name]
