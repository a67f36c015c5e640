"""The cluster in containers, as `make up AUTH=1` starts it: one story, because each cluster takes seconds to start.

The images are those of this tree: `make test-containers` builds them first. The long version is
`python -m tests.integration.compose_campaign`.
"""

from __future__ import annotations

import pytest

from tests.integration.compose_campaign import NEWER, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]


async def test_a_cluster_is_killed_scaled_and_upgraded_and_no_client_sees_an_error() -> None:
    """1. from zero to TLS and access control  2. a container is killed  3. three brokers become five  4. all containers
    are replaced by a newer image, one by one  5. all go down and come up with records, offsets, principals.
    """
    story = await run(rate=200.0, calm_s=2.0, restart=False)
    assert story.wrong == []
    assert story.facts["client_errors"] == {}
    assert story.facts["acknowledged"] > 1_000
    assert story.facts["replicas_of_new_brokers"] > 0
    assert set(story.facts["upgraded_to"]) == {NEWER}
