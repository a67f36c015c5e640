"""Which cluster the command line talks to: config file < environment < flags.

The file is TOML, ``~/.config/ferryline/config.toml`` unless FERRYLINE_CONFIG or ``--config`` names another::

    current = "staging"                 # context used when neither --context nor FERRYLINE_CONTEXT is given

    [contexts.staging]
    url = ["https://mq1.example:8443", "https://mq2.example:9443"]
    ca = "~/staging-ca.crt"
    token = "..."
    timeout = 30.0                      # seconds for one command's requests
    output = "table"

Without any of it, commands talk to the local cluster of `ferryline up`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_PORT = 8443
OUTPUTS = ("table", "json", "yaml", "ndjson")
_KEYS = ("url", "ca", "token", "timeout", "output")


class UsageError(Exception):
    """The user asked for something that cannot be right; exit status 2."""


def config_path(flag: Path | None = None) -> Path:
    """The config file in force, whether or not it exists."""
    if flag is not None:
        return flag.expanduser()
    if named := os.environ.get("FERRYLINE_CONFIG"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "ferryline" / "config.toml"


def local_data_dir() -> Path:
    """Where `ferryline up` keeps the local cluster."""
    return Path(os.environ.get("FERRYLINE_HOME") or "~/.ferryline").expanduser() / "local"


def local_ca() -> Path:
    return local_data_dir() / "coordinator" / "data" / "tls" / "ca.crt"


@dataclass(frozen=True)
class Settings:
    """Effective settings of one invocation. ``sources`` says where each value came from."""

    url: tuple[str, ...] = (f"https://127.0.0.1:{DEFAULT_PORT}",)
    ca: Path | None = None
    token: str = ""
    timeout: float = 30.0
    output: str = "table"
    context: str = ""
    verbose: bool = False
    file: Path = field(default_factory=config_path)
    sources: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        """For --print-config: every value with its source; the token only as present or absent."""
        values = {
            "url": list(self.url),
            "ca": str(self.ca) if self.ca else "(system trust store)",
            "token": "(set)" if self.token else _logged_in(self.url),
            "timeout": self.timeout,
            "output": self.output,
            "context": self.context or "(none)",
        }
        return {name: {"value": value, "from": self.sources.get(name, "default")} for name, value in values.items()}


def _logged_in(urls: tuple[str, ...]) -> str:
    """Whose token `ferryline login` keeps for the cluster, in place of one that is set."""
    from ferryline.login.credentials import Credentials
    from ferryline.protocol.errors import BadCredentials

    try:
        found = Credentials().find(urls)
    except (BadCredentials, RuntimeError):
        return "(none)"
    return f"(login of {found[1].who or 'somebody'})" if found is not None else "(none)"


def read_file(path: Path) -> dict[str, Any]:
    """The config file as it stands; {} when there is none. Raises UsageError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None


def load(flags: Mapping[str, Any], *, context: str | None = None, file: Path | None = None) -> Settings:
    """Merge file, environment and flags. Flags that are None were not given."""
    path = config_path(file)
    content = read_file(path)
    contexts = content.get("contexts", {})
    chosen, origin = _choose_context(content, context)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if chosen:
        if not isinstance(contexts, dict) or chosen not in contexts:
            known = ", ".join(sorted(contexts)) or "none"
            raise UsageError(f"context {chosen!r} ({origin}) is not in {path}; known: {known}")
        for name, value in contexts[chosen].items():
            if name not in _KEYS:
                raise UsageError(f"{path}: contexts.{chosen}.{name}: unknown setting; known: {', '.join(_KEYS)}")
            values[name], sources[name] = value, f"context {chosen}"
        sources["context"] = origin
    for name in _KEYS:
        if (value := os.environ.get(f"FERRYLINE_{name.upper()}")) is not None:
            values[name], sources[name] = value, f"FERRYLINE_{name.upper()}"
    for name, value in flags.items():
        if value is not None and name in _KEYS:
            values[name], sources[name] = value, f"--{name}"
    if "url" not in values and "ca" not in values and local_ca().exists():
        values["ca"], sources["ca"] = str(local_ca()), "the local cluster"
    return _settings(values, sources, chosen, path, bool(flags.get("verbose")))


def _choose_context(content: Mapping[str, Any], flag: str | None) -> tuple[str, str]:
    if flag is not None:
        return flag, "--context"
    if named := os.environ.get("FERRYLINE_CONTEXT"):
        return named, "FERRYLINE_CONTEXT"
    # A URL in the environment means another cluster than the file's current one: mixing the two would send a token
    # of one cluster to another.
    if os.environ.get("FERRYLINE_URL"):
        return "", ""
    return str(content.get("current", "")), "current in the config file"


def _settings(
    values: Mapping[str, Any], sources: Mapping[str, str], context: str, path: Path, verbose: bool
) -> Settings:
    made: dict[str, Any] = {"context": context, "file": path, "sources": dict(sources), "verbose": verbose}
    if "url" in values:
        made["url"] = _urls(values["url"], sources["url"])
    if values.get("ca"):
        made["ca"] = Path(str(values["ca"])).expanduser()
    if "token" in values:
        made["token"] = str(values["token"])
    if "timeout" in values:
        try:
            made["timeout"] = float(values["timeout"])
        except (TypeError, ValueError):
            raise UsageError(f"timeout ({sources['timeout']}): {values['timeout']!r} is not a number") from None
        if not 0 < made["timeout"] <= 600:
            raise UsageError(f"timeout ({sources['timeout']}): {made['timeout']} is outside 0..600 seconds")
    if "output" in values:
        if values["output"] not in OUTPUTS:
            raise UsageError(f"output ({sources['output']}): {values['output']!r} is not one of {', '.join(OUTPUTS)}")
        made["output"] = values["output"]
    return Settings(**made)


def _urls(value: Any, source: str) -> tuple[str, ...]:
    parts = value if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
    found = [str(part).rstrip("/") for item in parts for part in str(item).replace(",", " ").split()]
    if not found:
        raise UsageError(f"url ({source}): empty")
    for url in found:
        if not url.startswith(("https://", "http://")):
            raise UsageError(f"url ({source}): {url!r} does not start with https://")
    return tuple(found)


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write a config file whole, readable by its owner only (it may hold tokens)."""
    lines: list[str] = []
    if content.get("current"):
        lines += [f"current = {_toml(content['current'])}", ""]
    for name, values in sorted(content.get("contexts", {}).items()):
        lines.append(f"[contexts.{_toml(name)}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines.append("")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write("\n".join(lines))
    temporary.replace(path)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in text) + '"'
