"""`ferryline.protocol.records` on either codec, side by side in one process."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any

import pytest

CODEC_NAMES = ("compiled", "python")


@cache
def records_on(name: str) -> Any:
    """A copy of the module that uses this codec. Skips the test when the compiled one was not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FERRYLINE_CODEC", name)
        for module in ("_codec", "records"):
            patch.delitem(sys.modules, f"ferryline.protocol.{module}", raising=False)
            patch.delattr(f"ferryline.protocol.{module}", raising=False)
        try:
            return importlib.import_module("ferryline.protocol.records")
        except ImportError as missing:
            pytest.skip(f"{missing}: python sdk/hatch_build.py")
