"""What `ferryline up --auth` adds to a local cluster: an access file, the key of `admin`, a context that holds it, and
a principal of its own for FalconQ's gateway."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferryline.cli.failures import FAILED, Failed
from ferryline.cli.output import warn
from ferryline.cli.settings import config_path, read_file, write_file

if TYPE_CHECKING:
    from ferryline.admin import Admin

ADMIN, GATEWAY = "admin", "falconq"
CONTEXT = "local"
KEY_WAIT_S = 10.0
_ACCESS_FILE = """\
# Who may use this cluster, and for what. Nothing is allowed that is not granted here or by `ferryline principal`.
# Read again a moment after it was saved; a file that makes no sense is told in the coordinator's log, and the last one
# that did stays in force. All that can stand here: docs/access.md and docs/access.example.toml.

# Principals that are made at run time (ferryline principal create NAME --write topic:orders --key) need no entry here.
# Those that are declared here are changed here.
#
# [[principals]]
# name = "google:ann@example.org"
# comment = "an operator"
# grants = [
#     {resource = "topic", pattern = "orders.*", actions = ["read", "write"]},
#     {resource = "group", pattern = "*", actions = ["read"]},
#     {resource = "cluster", actions = ["read"]},
# ]
# quota = {records = 1000, bytes = 10000000}    # a second; requests, connections, stored_bytes, too

# People who log in elsewhere (ferryline login): the issuer whose tokens are believed, and for which audience.
#
# [[issuers]]
# name = "google"                               # principals are google:NAME
# issuer = "https://accounts.google.com"
# audience = "YOUR-CLIENT-ID.apps.googleusercontent.com"
# client_id = "YOUR-CLIENT-ID.apps.googleusercontent.com"
# name_claim = "email"

# Grants by what such a token says, here: everybody of one organisation.
#
# [[rules]]
# issuer = "google"
# claim = "hd"
# value = "example.org"
# grants = [{resource = "topic", pattern = "*", actions = ["read"]}]

# open_metrics = true                           # /metrics without a token
# redis_url = "redis://127.0.0.1:6379/0"        # quotas that hold over all brokers together
"""


@dataclass(frozen=True)
class LocalAuth:
    """Where a local cluster keeps what access needs, below its root."""

    root: Path

    @property
    def access_file(self) -> Path:
        return self.root / "access.toml"

    @property
    def key_file(self) -> Path:
        return self.root / "admin-key"

    @property
    def gateway_config(self) -> Path:
        return self.root / GATEWAY / "config.toml"

    def prepare(self) -> list[str]:
        """Write the access file unless there is one. Returns what the coordinators are told."""
        if not self.access_file.exists():
            descriptor = os.open(self.access_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(_ACCESS_FILE)
        return ["--access", str(self.access_file), "--bootstrap-admin", str(self.key_file)]

    def warn_if_left_out(self) -> None:
        """`ferryline up` without --auth where access was on before: say what that means."""
        if self.access_file.exists():
            warn(
                f"access control is OFF this time: whoever reaches these ports may do everything, although\n"
                f"{self.access_file} is there. Principals and keys stay; ferryline up --auth asks for them again."
            )

    def key(self, known: str) -> str:
        """The key of `admin`; ``known``, where its file was taken away on purpose. Raises Failed without either."""
        end = time.monotonic() + (0.0 if known else KEY_WAIT_S)  # another coordinator may be the one that makes it
        while True:
            if self.key_file.exists():
                return self.key_file.read_text().strip()
            if time.monotonic() >= end:
                break
            time.sleep(0.05)
        if known:
            return known
        raise Failed(
            f"{self.key_file}: not there, and no context holds a token for this cluster",
            FAILED,
            code="BAD_CREDENTIALS",
            remedy="Put the key of a principal that may manage the cluster into that file, or into a context: "
            "ferryline context add local --url URL --ca FILE --token KEY. None left? Declare a principal with a key "
            f"in {self.access_file} (ferryline-coordinator key makes one).",
        )


@dataclass(frozen=True)
class SavedContext:
    """The context in which the key of `admin` lies. ``current``: commands use it without being told."""

    name: str
    file: Path
    current: bool


def known_token(name: str, file: Path | None, ca: Path) -> str:
    """The token of context ``name``, if that is one of this cluster."""
    values = read_file(config_path(file)).get("contexts", {}).get(name, {})
    return str(values.get("token", "")) if values.get("ca") == str(ca) else ""


def save_context(name: str, file: Path | None, url: str, ca: Path, token: str) -> SavedContext:
    """Save how to reach this cluster under ``name``, and use that unless another context is in use.

    Raises Failed if the name belongs to another cluster: its token would be lost.
    """
    path = config_path(file)
    content = read_file(path)
    contexts: dict[str, Any] = content.setdefault("contexts", {})
    present = contexts.get(name, {})
    if present.get("token") and present.get("ca") != str(ca):
        raise Failed(
            f"context {name!r} in {path} is another cluster's, with its token",
            FAILED,
            code="CONFLICT",
            remedy="Choose another name for this one: ferryline up --auth --context NAME.",
        )
    contexts[name] = {**present, "url": url.split(","), "ca": str(ca), "token": token}
    content["current"] = content.get("current") or name
    write_file(path, content)
    return SavedContext(name, path, content["current"] == name)


async def admit_gateway(admin: Admin, auth: LocalAuth, url: str, ca: Path) -> None:
    """A principal and a key for FalconQ's gateway, and a config file with them that only its owner can read."""
    from ferryline.protocol.access import GROUP, MANAGE, TOPIC, Grant
    from ferryline.protocol.errors import UnknownPrincipal

    try:
        principal = await admin.describe_principal(GATEWAY)
    except UnknownPrincipal:
        grants = [Grant(TOPIC, "*", (MANAGE,)), Grant(GROUP, "*", (MANAGE,))]
        principal = await admin.create_principal(GATEWAY, grants, comment="FalconQ's HTTP on this machine")
    path = auth.gateway_config
    token = read_file(path).get("contexts", {}).get(CONTEXT, {}).get("token", "")
    if not any(token.startswith(f"fl_{key.id}_") for key in principal.keys):
        token = (await admin.create_key(GATEWAY)).key
    values = {"url": url.split(","), "ca": str(ca), "token": token}
    write_file(path, {"current": CONTEXT, "contexts": {CONTEXT: values}})
