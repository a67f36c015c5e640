"""Builds the compiled codec (`codec/*.c`) into the package; hatchling calls this for wheels and editable installs.

Optional: without a C compiler, without Python's headers or with FERRYLINE_BUILD_CODEC=0 the distribution is built
without it, with one line that says so, and works with the codec in Python. FERRYLINE_BUILD_CODEC=1 makes a failure an
error.

`python sdk/hatch_build.py` builds it in place (`--sanitize`: with the address and undefined-behaviour sanitizers, into
the folder given with ``--into``).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand where hatchling is not installed
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "codec"
PACKAGE = ROOT / "ferryline" / "protocol"
NAME = "_codec_compiled"
FLAGS = ("-O3", "-fPIC", "-std=c11", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-Wextra")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1")


class NotBuilt(Exception):
    """There is no compiler here, or it failed; the message says what it said."""


def build(into: Path = PACKAGE, flags: tuple[str, ...] = ()) -> Path:
    """Compile the extension into the folder ``into`` and return its path. Raises NotBuilt."""
    if sys.implementation.name != "cpython" or sys.platform == "win32":
        raise NotBuilt(f"there is no compiled codec for {sys.implementation.name} on {sys.platform}")
    target = into / (NAME + str(sysconfig.get_config_var("EXT_SUFFIX")))
    compiler = shlex.split(os.environ.get("CC") or str(sysconfig.get_config_var("CC") or "cc"))
    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    includes = sorted({sysconfig.get_path("include"), sysconfig.get_path("platinclude")})
    with tempfile.TemporaryDirectory(dir=into) as folder:  # renamed when whole: a process may have the old one open
        made = Path(folder) / target.name
        command = [*compiler, *FLAGS, *flags, *(f"-I{path}" for path in includes), *link]
        # Relative to here: the compiler writes the names into the file, which is to be the same wherever it was built.
        command += [str(path.relative_to(ROOT)) for path in sorted(SOURCES.glob("*.c"))] + ["-o", str(made)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError as error:
            raise NotBuilt(f"{compiler[0]}: {error.strerror}") from None
        if done.returncode:
            raise NotBuilt(f"{compiler[0]} ended with status {done.returncode}: {done.stderr.strip()[:1000]}")
        if done.stderr.strip():
            print(done.stderr.strip(), file=sys.stderr)
        made.replace(target)
    return target


class CodecHook(BuildHookInterface):  # type: ignore[misc, valid-type]
    """Makes a wheel with the extension specific to its platform, and one without it pure."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wish = os.environ.get("FERRYLINE_BUILD_CODEC", "auto")
        if self.target_name != "wheel" or wish == "0":
            return
        try:
            target = build()
        except NotBuilt as error:
            if wish == "1":
                raise
            self.app.display_warning(f"ferryline: built without the compiled codec, which only costs speed: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(target)] = str(target.relative_to(ROOT))
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--into", type=Path, default=PACKAGE)
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args()
    try:
        print(build(options.into.resolve(), SANITIZERS if options.sanitize else ()))
    except NotBuilt as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())


def get_build_hook() -> type[Any]:
    """What hatchling looks for where a module has more than one candidate."""
    return CodecHook
