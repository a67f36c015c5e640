"""A few hundred requests of Schemathesis against both services, with access on; the campaign makes 20,000."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.contract_campaign import run, running

pytestmark = pytest.mark.process


def test_what_is_answered_is_what_is_documented_and_nothing_answers_without_a_token(tmp_path: Path) -> None:
    with running(tmp_path / "cluster", access=True) as (cluster, _, token):
        for service, url in (("coordinator", cluster.url), ("broker", cluster.urls[1])):
            found = run(cluster, url, token, service=service, seed=11, examples=3, phases="fuzzing")
            assert not found.failures, found.text
            assert not found.errors, found.text
            assert found.cases > 100, found.text
