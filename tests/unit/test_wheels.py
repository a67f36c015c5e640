"""Wheels of our distributions: the same bytes from the same sources, wherever and whenever they are built."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT = shutil.ignore_patterns("*.so", "__pycache__", "build", "dist", "*.egg-info")
EPOCH = "1700000000"


def digests(sources: Path, work: Path, touched: float) -> dict[str, str]:
    """SHA-256 of each wheel, built from a copy of the sources in a folder of its own."""
    shutil.copytree(sources, work)
    for path in work.rglob("*"):
        os.utime(path, (touched, touched))
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "wheel",
        "--no-index",
        "--no-deps",
    ]
    command += ["--no-build-isolation", "--wheel-dir", str(work / "dist"), "./sdk", "./services/common"]
    subprocess.run(command, cwd=work, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH}, check=True)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (work / "dist").glob("*.whl")}


@pytest.mark.slow
def test_a_wheel_is_the_same_wherever_and_whenever_it_is_built(tmp_path: Path) -> None:
    for source in ("sdk", "services/common"):
        shutil.copytree(ROOT / source, tmp_path / "sources" / source, ignore=BUILT)
    here = digests(tmp_path / "sources", tmp_path / "here", 1_700_000_000.0)
    there = digests(tmp_path / "sources", tmp_path / "there" / "deeper", 1_750_000_000.0)
    assert len(here) == 2
    assert here == there
