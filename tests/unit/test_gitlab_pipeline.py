"""The pipeline file: GitLab's schema, and what each kind of pipeline runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.gitlab_pipeline import NotUnderstood, Pipeline, expanded, holds, read

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / ".gitlab-ci.yml"
BRANCH = {"CI_PIPELINE_SOURCE": "push", "CI_COMMIT_BRANCH": "main", "CI_DEFAULT_BRANCH": "main"}
SERVER = {"CI_REGISTRY": "registry.example", "DEPLOY_HOST": "ssh://me@host.example"}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return read(FILE.read_text(encoding="utf-8"))


def names(pipeline: Pipeline, variables: dict[str, str], when: str) -> set[str]:
    return {job.name for job in pipeline.jobs if job.when(variables) == when}


def schema_says(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.gitlab-ci", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_file_is_what_gitlabs_schema_allows(tmp_path: Path) -> None:
    done = schema_says(FILE)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "broken.yml"
    broken.write_text(FILE.read_text(encoding="utf-8").replace("  stage: lint", "  stage: {not: a name}"))
    assert schema_says(broken).returncode != 0


def test_a_branch_is_checked_and_built_and_a_person_deploys(pipeline: Pipeline) -> None:
    by_itself = names(pipeline, BRANCH | SERVER, "on_success")
    assert by_itself == {
        *("check", "unit", "processes", "simulation", "mutants"),
        *("wheels", "images", "containers"),
    }
    assert names(pipeline, BRANCH | SERVER, "manual") == {"deploy", "rollback", "stop"}


def test_without_a_registry_nothing_is_pushed_or_deployed(pipeline: Pipeline) -> None:
    assert not names(pipeline, BRANCH, "on_success") & {"images", "containers"}
    assert not names(pipeline, BRANCH | {"DEPLOY_HOST": "ssh://me@host.example"}, "manual")


def test_another_branch_deploys_nothing(pipeline: Pipeline) -> None:
    assert not names(pipeline, BRANCH | SERVER | {"CI_COMMIT_BRANCH": "feature"}, "manual")


def test_a_schedule_runs_what_takes_long_and_nothing_else(pipeline: Pipeline) -> None:
    scheduled = BRANCH | SERVER | {"CI_PIPELINE_SOURCE": "schedule"}
    assert names(pipeline, scheduled, "on_success") == {"long-simulation", "chaos", "all-mutants"}
    assert not names(pipeline, scheduled, "manual")


def test_jobs_come_after_what_they_need_and_wait_for_nothing_else(pipeline: Pipeline) -> None:
    seen: set[str] = set()
    for job in pipeline.jobs:
        assert "needs" in job.raw, f"{job.name} waits for whole stages"
        assert seen.issuperset(job.needs), job.name
        seen.add(job.name)


def test_what_can_break_a_running_cluster_is_not_interrupted_repeated_or_done_twice_at_once(pipeline: Pipeline) -> None:
    for job in pipeline.jobs:
        if job.stage == "deploy":
            raw = job.raw
            assert (raw["interruptible"], raw["retry"], raw["resource_group"]) == (False, 0, "production"), job.name
            assert raw["environment"]["name"] == "production"


def test_every_make_target_and_script_that_the_file_names_exists(pipeline: Pipeline) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for job in pipeline.jobs:
        for line in (*job.before_script, *job.script):
            words = line.split()
            if words[0] == "make":
                assert f"\n{words[1]}:" in makefile, line
            elif words[0].startswith("scripts/"):
                assert (ROOT / words[0]).exists(), line


@pytest.mark.parametrize(
    ("condition", "outcome"),
    [
        ("$A", True),
        ("$EMPTY", False),
        ("$NONE", False),
        ('$A == "1"', True),
        ('$A != "1"', False),
        ("$A == $B", False),
        ('$A && $B == "2"', True),
        ('$A && $B == "3"', False),
    ],
)
def test_conditions_are_read_as_gitlab_does(condition: str, outcome: bool) -> None:
    assert holds(condition, {"A": "1", "B": "2", "EMPTY": ""}) is outcome


def test_what_the_reader_does_not_know_is_refused() -> None:
    with pytest.raises(NotUnderstood):
        holds("$A || $B", {})
    with pytest.raises(NotUnderstood, match="ghost"):
        read("stages: [a]\njob: {stage: a, extends: .ghost, script: x}")
    with pytest.raises(NotUnderstood, match="wait for"):
        read("stages: [a]\njob: {stage: a, needs: [ghost], script: x}")


def test_lists_are_replaced_and_mappings_merged() -> None:
    text = """
    stages: [a]
    .base: {stage: a, variables: {X: "1", Y: "2"}, before_script: [one, two]}
    job: {extends: .base, variables: {Y: "3"}, before_script: [], script: go}
    """
    (job,) = read(text).jobs
    assert job.variables == {"X": "1", "Y": "3"}
    assert (job.before_script, job.script) == ((), ("go",))
    assert expanded({"P": "$X/${Q}$NONE"}, {"X": "a", "Q": "b"})["P"] == "a/b"
