"""``python -m tests.simulation.compiled --ledger ...``: the same simulation, as machine code; for campaigns.

Copies the sources to ``build/simulation/``, has mypyc compile there what it can (the rest stays as it is, module by
module), runs some seeds in both trees, and refuses to go on unless every line of every trace is the same. Then it runs
``python -m tests.simulation`` with its arguments in the compiled tree. The sources themselves are left alone, and
assertions stay on. A tree is built once; when a source changes, it is built and compared again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

from tests.simulation.apart import set_apart

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("sdk", "services/common", "services/coordinator", "services/broker", ".")
SOURCES = ("sdk/ferryline", "services/common/ferryline_service", "services/coordinator/ferryline_coordinator",
           "services/broker/ferryline_broker", "tests/simulation")  # fmt: skip
COMPILED = ("sdk/ferryline/core/", "sdk/ferryline/protocol/", "services/coordinator/ferryline_coordinator/core/",
            "services/broker/ferryline_broker/core/", "tests/simulation/")  # fmt: skip
# What a campaign does not run, or what runs once per seed and hands its objects to pickle.
INTERPRETED = ("__init__.py", "__main__.py", "/_codec.py", "/_codec_python.py", "/runner.py", "/real_disk.py")
INTERPRETED += ("/compiled.py", "/apart.py")
ATTEMPTS = 8  # builds until nothing is left that mypyc objects to
CHECKED_SEEDS = 120

SETTINGS = """[mypy]
mypy_path = .:sdk:services/common:services/coordinator:services/broker
explicit_package_bases = True
"""
BUILD = """
import sys
from mypyc.build import mypycify
from setuptools import setup
modules = mypycify(["--config-file=mypy.ini", *sys.argv[1:]], opt_level="1", debug_level="0", group_name="simulation")
setup(name="simulation", ext_modules=modules, packages=[], script_args=["-q", "build_ext", "--build-lib", "lib"])
"""
IMPORTED = """
import sys
import tests.simulation.runner
print(*(module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)), sep="\\n")
"""
TRACES = """
import sys, hashlib, time, msgspec
from tests.simulation.runner import calm_collector, run_seed
from tests.simulation.settings import ALL, config_of
calm_collector()
for seed in range(1, int(sys.argv[1]) + 1):
    lines = hashlib.sha256()
    outcome = run_seed(config_of(list(ALL), seed), seed, trace=lambda line: lines.update(line.encode()))
    outcome.story = ""  # it tells lines of code, too
    print(outcome.config, seed, lines.hexdigest(), hashlib.sha256(msgspec.json.encode(outcome)).hexdigest())
began = time.process_time()
for seed in range(1, 61):
    run_seed(ALL[seed % len(ALL)], seed)
print(f"{60 / (time.process_time() - began):.1f} seeds per CPU second", file=sys.stderr)
"""
ERROR = re.compile(r"^(\S+\.py):(\d+): (?:error|\w+Error): .*?(\[[a-z-]+\])?$")  # without a code: mypyc's own


def main() -> int:
    """Build if needed, compare, run. Exit status 2 if the compiled simulation does anything else."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.compiled", description=__doc__)
    parser.add_argument("--only-build", action="store_true", help="build, compare, and run nothing")
    parser.add_argument("--leave-out", action="append", default=[], metavar="PATH", help="do not compile this module")
    parser.add_argument("--python", default=sys.executable, help="runs it: another CPython of this version, if faster")
    options, arguments = parser.parse_known_args()
    files = sorted(path for source in SOURCES for path in (ROOT / source).rglob("*.py*") if path.suffix != ".pyc")
    digest = hashlib.sha256(repr((sys.version, options.python, sorted(options.leave_out))).encode())
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    tree = ROOT / "build/simulation" / digest.hexdigest()[:12]
    if not (tree / "compared").exists():
        shutil.rmtree(tree, ignore_errors=True)
        for path in files:
            (tree / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tree / path.relative_to(ROOT))
        compile_in(tree, options.leave_out)
        if not compare(tree, options.python):
            return 2
        (tree / "compared").touch()
    if options.only_build:
        print(tree)
        return 0
    os.chdir(ROOT)  # where git and the ledger are
    os.execve(options.python, [options.python, "-m", "tests.simulation", *arguments], environment(tree))


def environment(tree: Path) -> dict[str, str]:
    """Of a process that runs the sources, or what was built of them, under ``tree``."""
    paths = os.pathsep.join([*(str(tree / path) for path in PATHS), sysconfig.get_path("purelib")])
    return os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"}


def compile_in(tree: Path, leave_out: list[str]) -> None:
    """Put compiled modules beside those sources in ``tree`` that mypyc can compile."""
    (tree / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-c", IMPORTED]
    found = subprocess.run(command, cwd=tree, env=environment(tree), check=True, capture_output=True, text=True)
    names = [Path(line).relative_to(tree).as_posix() for line in found.stdout.split() if line.startswith(f"{tree}/")]
    names = [name for name in names if name.startswith(COMPILED) and not name.endswith((*INTERPRETED, *leave_out))]
    names = set_apart(tree, sorted(names), PATHS)
    for _ in range(ATTEMPTS):
        command = [sys.executable, "-c", BUILD, *names]
        built = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
        if built.returncode == 0:
            spread(tree, names)
            culprit = broken(tree, names)
            if not culprit:
                break
            names.remove(culprit)
            continue
        told = built.stdout + built.stderr
        matches = [match for line in told.splitlines() if (match := ERROR.match(line))]
        errors = sorted({(match[1], match[2], bool(match[3])) for match in matches})
        assert errors, told[-4000:]
        refused = {name for name, line, code in errors if not (code and ignore(tree / name, int(line)))}
        for name in sorted(refused & set(names)):
            print(f"{name} stays interpreted", *(line for line in told.splitlines() if name in line), sep="\n  ")
        assert refused <= set(names), told[-4000:]
        names = [name for name in names if name not in refused]
    else:
        raise AssertionError(f"mypyc still objects after {ATTEMPTS} attempts:\n{told[-4000:]}")
    print(f"{len(names)} modules compiled")


def spread(tree: Path, names: list[str]) -> None:
    """Each compiled module goes beside its source: there it is found first."""
    folders = {}
    for name in names:
        path = next(path for path in PATHS if path == "." or name.startswith(f"{path}/"))
        folders[Path(name).parent.relative_to(path)] = (tree / name).parent
    for module in (tree / "lib").rglob("*.so"):
        folder = module.parent.relative_to(tree / "lib")
        if folder == Path() or module.name.split(".")[0] in {Path(name).stem for name in names}:
            shutil.copy(module, tree if folder == Path() else folders[folder])


def broken(tree: Path, names: list[str]) -> str:
    """The compiled module that cannot even be imported, and nothing compiled is left then; empty if all can."""
    command = [sys.executable, "-c", IMPORTED]
    ran = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
    if ran.returncode == 0:
        return ""
    frames = re.findall(r'File "(\S+)", line', ran.stderr)
    culprits = [frame for frame in frames if frame in names]
    assert culprits, ran.stderr[-4000:]
    print(f"{culprits[-1]} stays interpreted\n  {ran.stderr.splitlines()[-1]}")
    for module in tree.rglob("*.so"):
        module.unlink()
    return culprits[-1]


def ignore(path: Path, number: int) -> bool:
    """Have the type checker overlook a line. False if it was told so before."""
    lines = path.read_text().splitlines(keepends=True)
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.start[0] == number]
    column = next((token.start[1] for token in tokens if token.type == tokenize.COMMENT), len(lines[number - 1]) - 1)
    code = lines[number - 1][:column].rstrip()
    if "# type: ignore\n" in lines[number - 1]:
        return False
    lines[number - 1] = f"{code}  # type: ignore\n"
    path.write_text("".join(lines))
    return True


def compare(tree: Path, python: str) -> bool:
    """Whether the compiled tree and the sources run the same seeds in the same way, line by line."""
    told = []
    for where, runs in ((ROOT, sys.executable), (tree, python)):
        command = [runs, "-c", TRACES, str(CHECKED_SEEDS)]
        ran = subprocess.run(command, cwd=where, env=environment(where), capture_output=True, text=True)
        print("compiled:" if where == tree else "interpreted:", ran.stderr.strip()[-2000:], flush=True)
        told.append(ran.stdout.splitlines())
    different = [one for one, other in zip(*told, strict=False) if one != other]
    if different or len(told[0]) != CHECKED_SEEDS or len(told[1]) != CHECKED_SEEDS:
        print(f"{len(different)} seeds ran in another way when compiled, first: {different[:1]}")
        return False
    print(f"{CHECKED_SEEDS} seeds have the same traces")
    return True


if __name__ == "__main__":
    sys.exit(main())
