"""What is in the images of this tree, which `make test-containers` builds first: the codec, and no compiler."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from tests.integration.compose_campaign import IMAGES, TAG

pytestmark = [pytest.mark.docker]

SERVICES = ("broker", "coordinator")
_TELL = """
import importlib.util, json, shutil
from ferryline.protocol import _codec
from ferryline.protocol.records import decode_batch, encode_batch
built = importlib.util.find_spec("ferryline.protocol._codec_compiled") is not None
rows = [(record.key, record.value) for record in decode_batch(bytes(encode_batch([(b"k", b"v", [])])))]
print(json.dumps([built, _codec.NAME, rows == [(b"k", b"v")], shutil.which("gcc")]))
"""


def told(service: str, **environment: str) -> list[Any]:
    """Whether the image of a service has the compiled codec; which one runs; whether it works; the compiler in it."""
    given = [part for name, value in environment.items() for part in ("--env", f"{name}={value}")]
    run = ["docker", "run", "--rm", "--network", "none", *given, "--entrypoint", "python3"]
    done = subprocess.run(
        [*run, f"{IMAGES}ferryline-{service}:{TAG}", "-c", _TELL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_runs_the_codec_that_was_compiled_for_it(service: str) -> None:
    found = told(service)
    if not found[0] and os.environ.get("FERRYLINE_IMAGE_CODEC", "auto") != "1":
        assert found == [False, "python", True, None]
        pytest.skip("no compiler could be installed while the images were built: they run the codec in Python")
    assert found == [True, "compiled", True, None]


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_runs_without_the_compiled_codec_too(service: str) -> None:
    assert told(service, FERRYLINE_CODEC="python")[1:] == ["python", True, None]
