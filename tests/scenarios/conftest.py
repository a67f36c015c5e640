"""``pytest tests/scenarios --rewrite`` writes what is printed now into the files: read the difference then."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", default=False, help="write the output of scenarios anew")
