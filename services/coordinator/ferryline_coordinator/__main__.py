"""``python -m ferryline_coordinator --data-dir D [--port P ...]``, ``... certs show --data-dir D``, ``... secret``,
``... key``."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import signal
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import pydantic

from ferryline_coordinator.access_file import AccessFileError, read_access
from ferryline_coordinator.app import Coordinator
from ferryline_coordinator.authority import describe
from ferryline_coordinator.config import CoordinatorConfig, as_toml, load_config
from ferryline_coordinator.etcd_certs import make_etcd_certificates
from ferryline_coordinator.store.interface import StoreUnusable
from ferryline_service.access.keys import ID_BYTES, SECRET_BYTES, make_key
from ferryline_service.files import write_durably
from ferryline_service.logs import get_logger, setup_logs
from ferryline_service.programs import run

_log = get_logger()


def parser() -> argparse.ArgumentParser:
    """One flag for each setting; lists may be repeated."""
    made = argparse.ArgumentParser(prog="ferryline-coordinator", description="The coordinator of a Ferryline cluster.")
    made.add_argument("--config", type=Path, help="TOML file with settings")
    made.add_argument("--print-config", action="store_true", help="print the effective settings and exit")
    for name, field in CoordinatorConfig.model_fields.items():
        flag, annotation = f"--{name.replace('_', '-')}", field.annotation
        if annotation is bool:
            made.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=field.description)
        elif typing.get_origin(annotation) is list:
            made.add_argument(flag, action="append", default=None, help=field.description)
        else:
            made.add_argument(flag, default=None, help=field.description, metavar=_metavar(annotation))
    return made


def _metavar(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    return {int: "N", Path: "PATH", str: "TEXT"}.get(annotation, "VALUE")


def main() -> None:
    """Exit status: 0 stopped as asked, 1 failed, 2 wrong usage."""
    if sys.argv[1:2] == ["certs"]:
        sys.exit(certs(sys.argv[2:]))
    if sys.argv[1:2] == ["secret"]:
        sys.exit(secret(sys.argv[2:]))
    if sys.argv[1:2] == ["key"]:
        sys.exit(key(sys.argv[2:]))
    flags = vars(parser().parse_args())
    file, show = flags.pop("config"), flags.pop("print_config")
    try:
        config = load_config({name: value for name, value in flags.items() if value is not None}, file)
    except pydantic.ValidationError as error:
        for wrong in error.errors(include_url=False, include_context=False):
            where = ".".join(str(part) for part in wrong["loc"]) or "settings"
            sys.stderr.write(f"ferryline-coordinator: {where}: {wrong['msg']}\n")
        sys.exit(2)
    except (OSError, tomllib.TOMLDecodeError) as error:
        sys.stderr.write(f"ferryline-coordinator: {file}: {error}\n")
        sys.exit(2)
    try:
        if config.access is not None:
            read_access(config.access)
    except AccessFileError as error:
        sys.stderr.write(f"ferryline-coordinator: access: {error}\n")
        sys.exit(2)
    if show:
        sys.stdout.write(as_toml(config.shown()))
        return
    setup_logs("coordinator", level=config.log_level, form=config.log_form)
    sys.exit(run(lambda stop: serve(config, stop)))


async def serve(config: CoordinatorConfig, stop: asyncio.Event) -> int:
    """Serve until asked to stop, or until the store fails."""
    coordinator = Coordinator(config)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, coordinator.reload_access)
    try:
        await coordinator.start()
        failure = await coordinator.wait(stop)
    except (StoreUnusable, OSError) as error:
        _log.critical("cannot serve", error=str(error))
        failure = error
    await coordinator.stop()
    if failure is not None:
        _log.critical("ending", reason=str(failure)[:2000])
    return 1 if failure is not None else 0


def certs(arguments: list[str]) -> int:
    """``certs show``: those of a data directory. ``certs etcd``: new ones for an etcd of this cluster's own."""
    made = argparse.ArgumentParser(prog="ferryline-coordinator certs")
    made.add_argument("action", choices=["show", "etcd"])
    made.add_argument("--data-dir", type=Path, required=True, help="etcd: where they are put, unless they are there")
    made.add_argument("--host", action="append", default=[], help="etcd: names and addresses of its members")
    made.add_argument("--json", action="store_true")
    asked = made.parse_args(arguments)
    if asked.action == "etcd":
        make_etcd_certificates(asked.data_dir, asked.host or ["localhost", "127.0.0.1", "::1"])
        return 0
    found = describe(asked.data_dir)
    if asked.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        for certificate in found:
            sys.stdout.write("".join(f"{name:12} {value}\n" for name, value in certificate.items()) + "\n")
    return 0 if found else 1


def key(arguments: list[str]) -> int:
    """``key``: a new API key, and what the access file says of it. Nothing keeps the key but whoever reads this."""
    made = argparse.ArgumentParser(prog="ferryline-coordinator key")
    made.add_argument("--json", action="store_true")
    text, key_id, digest = make_key(secrets.token_bytes(ID_BYTES + SECRET_BYTES))
    found = {"key": text, "id": key_id, "sha256": digest.hex()}
    if made.parse_args(arguments).json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.write(f'{text}\nkeys = [{{ id = "{key_id}", sha256 = "{digest.hex()}" }}]\n')
    return 0


def secret(arguments: list[str]) -> int:
    """``secret --out FILE``: a new cluster secret, for the owner of the file only. An existing file is left alone."""
    made = argparse.ArgumentParser(prog="ferryline-coordinator secret")
    made.add_argument("--out", type=Path, required=True)
    out: Path = made.parse_args(arguments).out
    if out.exists():
        sys.stderr.write(f"ferryline-coordinator: {out} exists already; it is left as it is\n")
        return 0
    out.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(out, secrets.token_hex(32).encode(), mode=0o600)
    return 0


if __name__ == "__main__":
    main()
