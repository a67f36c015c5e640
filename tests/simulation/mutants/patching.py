"""Change the product's code at run time: text inside its functions is replaced, and the result put in their place.

Text that is no longer there is an error, not a pass.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from types import FunctionType, ModuleType
from typing import Any

from tests.simulation.mutants.model import Mutant

PACKAGES = ("ferryline_broker.", "ferryline_coordinator.", "ferryline.", "tests.simulation.")


class PatchFailed(Exception):
    """The text that a mutant replaces is not there (any more): the mutant must be rewritten."""


def _modules() -> list[ModuleType]:
    return [module for name, module in sorted(sys.modules.items()) if name.startswith(PACKAGES) and module is not None]


def find(target: str) -> tuple[Any, str, FunctionType, Any]:
    """``Class.method`` or ``function`` -> (owner, name, function, how it is wrapped); with ``module:`` before it if the
    name alone could mean two."""
    place, _, target = target.rpartition(":")
    owner_name, _, name = target.rpartition(".")
    owners: list[Any] = []
    for module in _modules():
        if not module.__name__.endswith(place):
            continue
        if owner_name:
            owner = vars(module).get(owner_name)
            if inspect.isclass(owner) and owner.__module__ == module.__name__:
                owners.append(owner)
        elif isinstance(vars(module).get(name), FunctionType) and vars(module)[name].__module__ == module.__name__:
            owners.append(module)
    if len(owners) != 1:
        raise PatchFailed(f"{target}: found {len(owners)} times")
    owner = owners[0]
    for base in getattr(owner, "__mro__", (owner,)):
        if name in vars(base):
            owner = base
            break
    else:
        raise PatchFailed(f"{target}: no such function")
    found = vars(owner)[name]
    if isinstance(found, property):
        return owner, name, found.fget, property  # type: ignore[return-value]
    if isinstance(found, classmethod | staticmethod):
        return owner, name, found.__func__, type(found)  # type: ignore[return-value]
    return owner, name, found, None


def patch(target: str, old: str, new: str) -> None:
    """Replace ``old`` by ``new``, exactly once, in the source of one function, and put the result in place."""
    owner, name, function, wrapped = find(target)
    source = textwrap.dedent(_source(function))
    if source.count(old) != 1:
        raise PatchFailed(f"{target}: the text to replace occurs {source.count(old)} times: {old!r}")
    lines = source.replace(old, new)
    code = compile("from __future__ import annotations\n" + lines, f"<mutant of {target}>", "exec")
    module = sys.modules[function.__module__]
    names: dict[str, Any] = {}
    exec(code, vars(module), names)
    changed = names[name]
    made = (
        changed if wrapped is None or isinstance(changed, property | classmethod | staticmethod) else wrapped(changed)
    )
    plain = changed.fget if isinstance(changed, property) else getattr(changed, "__func__", changed)
    plain.__mutant_source__ = lines
    setattr(owner, name, made)
    if isinstance(owner, ModuleType):  # whoever imported the function by name must get the changed one
        for other in _modules():
            for key, value in list(vars(other).items()):
                if value is function:
                    setattr(other, key, changed)


def _source(function: Any) -> str:
    return getattr(function, "__mutant_source__", None) or inspect.getsource(function)


def apply(mutant: Mutant) -> None:
    for target, old, new in mutant.edits:
        patch(target, old, new)
