"""Sources for mypyc: classes that it cannot compile go into a module of their own, which stays interpreted.

These are the messages and records of msgspec (a metaclass makes them) and errors that are built-in types. A moved class
takes along what it needs of its module; line numbers of what stays are kept. Used by `compiled.py` only.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOTS = {"Struct", "Enum", "IntEnum", "AssertionError", "ValueError", "RuntimeError", "OSError", "KeyError"}


def set_apart(tree: Path, names: list[str], paths: tuple[str, ...]) -> list[str]:
    """Split the modules ``names`` under ``tree``; returns those in which something is left to compile."""
    parsed = {path: ast.parse(path.read_text()) for path in sorted(tree.rglob("*.py"))}
    moving = set(ROOTS)
    classes = [node for module in parsed.values() for node in module.body if isinstance(node, ast.ClassDef)]
    moving |= {node.name for node in classes if _bases(node) - {"Protocol", "Generic"} and _slots(node)}
    while more := {node.name for node in classes if node.name not in moving and _moves(node, moving)}:
        moving |= more
    left = []
    for name in names:
        path = tree / name
        if any(isinstance(node, ast.ClassDef) and _moves(node, moving) for node in parsed[path].body):
            prefix = max((p for p in paths if p == "." or name.startswith(p + "/")), key=len)
            module = (name if prefix == "." else name[len(prefix) + 1 :]).removesuffix(".py").replace("/", ".")
            if not _split(path, parsed[path], moving, f"{module}_apart"):
                continue
        left.append(name)
    return left


def _bases(node: ast.ClassDef) -> set[str]:
    return {base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases}


def _moves(node: ast.ClassDef, moving: set[str]) -> bool:
    return bool(_bases(node) & moving) or node.name in moving


def _slots(node: ast.ClassDef) -> bool:
    return any("__slots__" in _defined(line) for line in node.body)


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}


def _used(node: ast.stmt) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _split(path: Path, module: ast.Module, moving: set[str], apart: str) -> bool:
    """False, and nothing is written, if no function and no class would stay."""
    moved = {node for node in module.body if isinstance(node, ast.ClassDef) and _moves(node, moving)}
    needed: set[str] = set()
    while True:
        needed = {name for node in moved for name in _used(node)}
        more = {node for node in module.body if node not in moved and _defined(node) & needed}
        if not more:
            break
        moved |= more
    if not any(isinstance(node, ast.ClassDef | ast.FunctionDef) for node in module.body if node not in moved):
        return False
    lines = path.read_text().splitlines()
    header, segments, first = [], [], True
    for node in module.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if bound & needed or (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
                header += lines[node.lineno - 1 : node.end_lineno]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in _used(node):
            header += ["from typing import TYPE_CHECKING", *lines[node.lineno - 1 : node.end_lineno]]
        elif node in moved:
            decorators = getattr(node, "decorator_list", [])
            begin, end = min([node.lineno, *(d.lineno for d in decorators)]) - 1, node.end_lineno or node.lineno
            segments += [*lines[begin:end], "", ""]
            lines[begin:end] = [""] * (end - begin)
            if first:
                names = sorted(name for other in moved for name in _defined(other))
                lines[begin] = f"from {apart} import {', '.join(names)}"
                first = False
    path.with_name(f"{path.stem}_apart.py").write_text("\n".join([*header, "", "", *segments]))
    path.write_text("\n".join(lines) + "\n")
    return True
