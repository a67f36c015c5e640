"""Dashboards, rules and the page of metrics: made from the code, complete, and of the same names."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.integration.prometheus import DASHBOARDS, SHIPPED, filled_in, panels, rules, scaled

ROOT = Path(__file__).resolve().parents[2]
_NAME = re.compile(r"\b(?:ferryline|rabbitmq|process)[a-z0-9_:]*[a-z0-9]\b")
_OF_PROMETHEUS = {"up", "ALERTS"}


def script(name: str) -> ModuleType:
    """A program of scripts/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_in(expression: str) -> set[str]:
    """Metrics that an expression asks for; those of histograms without what belongs to their parts."""
    bare = re.sub(r'"[^"]*"', "", expression)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in _NAME.findall(bare)}


def known() -> set[str]:
    """Everything that is served or recorded."""
    table = script("metric_table")
    served = {name for found in table.services().values() for name in found} | set(table.workers())
    return served | {rule["record"] for kind, rule in rules() if kind == "record"}


# -- made from the code -----------------------------------------------------------------------------


def test_the_page_of_metrics_is_what_the_code_says() -> None:
    assert script("metric_table").render() == (ROOT / "docs/metrics.md").read_text(encoding="utf-8"), "run `make docs`"


def test_the_dashboards_are_what_their_program_makes() -> None:
    made = script("dashboards").files()
    assert {path.name for path in DASHBOARDS.glob("*.json")} == {path.name for path in made}
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make docs`"


# -- complete ---------------------------------------------------------------------------------------


def test_every_panel_has_a_description_a_unit_and_a_legend_for_each_query() -> None:
    titles = set()
    for path in DASHBOARDS.glob("*.json"):
        dashboard = json.loads(path.read_text())
        titles.add(dashboard["title"])
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(ids) == len(set(ids))
        for panel in dashboard["panels"]:
            where = f"{path.name}, {panel['title']}"
            assert panel["description"].endswith("."), where
            assert panel["fieldConfig"]["defaults"]["unit"], where
            assert panel["targets"], where
            assert all(target["legendFormat"] for target in panel["targets"]), where
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24, where
        variables = {variable["name"] for variable in dashboard["templating"]["list"]}
        used = set(re.findall(r"\$([a-z]+)\b", " ".join(t["expr"] for p in dashboard["panels"] for t in p["targets"])))
        assert used <= variables, path.name
    assert len(titles) == 5


def test_panels_and_rules_ask_only_for_what_is_served_or_recorded() -> None:
    names = known()
    asked = {name: where for *where, expression in panels() for name in names_in(expression)}
    asked |= {name: [rule.get("alert") or rule["record"]] for _, rule in rules() for name in names_in(rule["expr"])}
    assert {name: where for name, where in asked.items() if name not in names | _OF_PROMETHEUS} == {}
    assert len(asked) > 50, "the expressions were not understood"


def test_every_alert_says_what_to_do_and_is_tested() -> None:
    tested = [
        case
        for test in yaml.safe_load((SHIPPED / "alerts.test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    pages = {}
    for kind, rule in rules():
        if kind != "alert":
            continue
        assert {"summary", "description", "action", "runbook"} == set(rule["annotations"]), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        pages.setdefault(page, {})[anchor] = rule["alert"]
        cases = [case for case in tested if case["alertname"] == rule["alert"]]
        assert any(case.get("exp_alerts") for case in cases), f"{rule['alert']}: no test that it fires"
    for page, anchors in pages.items():
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
        there = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert {anchor: alert for anchor, alert in anchors.items() if anchor not in there} == {}


def test_only_durations_are_scaled() -> None:
    text = "expr: rate(x[5m]) + predict_linear(y[1h], 4 * 3600) > 14 * 86400 # 15 minutes\nfor: 30s\n"
    assert scaled(text, 60) == (
        "expr: rate(x[5000ms]) + predict_linear(y[60000ms], 4 * 3600) > 14 * 86400 # 15 minutes\nfor: 1000ms\n"
    )


# -- by Prometheus' own tools -----------------------------------------------------------------------


def promtool(*args: str, cwd: Path = SHIPPED) -> str:
    done = subprocess.run(["promtool", *args], cwd=cwd, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.prometheus
def test_each_rule_fires_when_it_should_and_not_when_it_should_not() -> None:
    promtool("check", "rules", "recording.rules.yml", "alerts.rules.yml")
    promtool("test", "rules", "recording.test.yml", "alerts.test.yml")


@pytest.mark.prometheus
def test_the_configuration_is_one_that_prometheus_takes(tmp_path: Path) -> None:
    config = (SHIPPED / "prometheus.yml").read_text()
    for name in ("ca.crt", "token"):
        (tmp_path / name).write_text("")
    config = config.replace("/etc/prometheus/public/ca.crt", str(tmp_path / "ca.crt"))
    config = config.replace("/etc/prometheus/token/token", str(tmp_path / "token"))
    assert "/etc/prometheus" not in config
    (tmp_path / "prometheus.yml").write_text(config)
    for path in SHIPPED.glob("*.rules.yml"):
        (tmp_path / path.name).write_text(path.read_text())
    promtool("check", "config", "prometheus.yml", cwd=tmp_path)


@pytest.mark.prometheus
def test_every_query_of_every_dashboard_is_one_that_prometheus_understands(tmp_path: Path) -> None:
    made = [
        {"record": f"panel:number_{number}", "expr": filled_in(expression)}
        for number, (_, _, expression) in enumerate(panels())
    ]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    assert f"{len(made)} rules found" in promtool("check", "rules", "panels.yml", cwd=tmp_path)
