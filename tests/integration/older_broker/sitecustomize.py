"""Programs of the release before, as far as others can tell: a broker announces feature level 1, and a coordinator
founds its cluster there."""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NODE, COORDINATOR = "ferryline_broker.core.node", "ferryline_coordinator.core.coordinator"


class Older(MetaPathFinder):
    """Changes what two modules say of themselves, once they are loaded."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in (NODE, COORDINATOR):
            return None
        spec = PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if name == NODE:
                module.Register = functools.partial(module.Register, feature_level=1)  # type: ignore[attr-defined]
            else:
                module.FEATURE_LEVEL = 1  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Older())
