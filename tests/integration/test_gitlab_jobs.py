"""Jobs of the pipeline, as a runner would run them: build, deploy, roll back, stop. All: `gitlab_jobs` as a program."""

from __future__ import annotations

import os

import pytest

from tests.integration.gitlab_jobs import run

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(1800)]


def test_wheels_and_images_are_built_deployed_rolled_back_and_stopped() -> None:
    assert os.geteuid() == 0
    account = run(source="push", changes={}, only={"wheels", "images", "deploy", "rollback", "stop"})
    told = {job["job"]: job["status"] for job in account["jobs"]}
    assert told == dict.fromkeys(("wheels", "images", "deploy", "rollback", "stop"), "passed"), account["jobs"]
